"""The checks of lesson 05, and its arithmetic compared with torch's."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from typing import Any

import cloudpickle
import nbformat
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from ddp_lessons.exercises.distributed_sampler import (
    check_accuracy,
    check_per_rank_batch,
    check_sampler,
    check_steps,
    check_train,
)
from tests.support import answers
from tests.support.checkout import ROOT

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NOTEBOOKS = ROOT / "notebooks"
TOTALS, RANKS, EPOCHS = (1, 2, 3, 7, 10, 12, 25), (1, 2, 3, 4, 8), (0, 1, 5)


def defined_in(notebook: str, name: str) -> Any:
    """A function or class as a cell of a notebook defines it."""
    cells = nbformat.read(NOTEBOOKS / notebook, as_version=4).cells
    pattern = rf"^(def|class) {name}\b"
    source = next(cell.source for cell in cells if re.search(pattern, cell.source, re.M))
    names: dict[str, Any] = {"torch": torch, "dist": dist}
    exec(source, names)
    return names[name]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_lesson_s_arithmetic_is_that_of_torch(ranks: int) -> None:
    shard = defined_in("05_distributed_sampler.ipynb", "shard")
    strided = defined_in("solutions/05_distributed_sampler.ipynb", "StridedSampler")
    for total in TOTALS:
        for rank in range(ranks):
            for epoch in EPOCHS:
                sampler = DistributedSampler(range(total), ranks, rank, seed=3)
                sampler.set_epoch(epoch)
                assert shard(total, rank, ranks, epoch, seed=3) == list(sampler)
            for drop_last in (False, True):
                sampler = DistributedSampler(
                    range(total), ranks, rank, shuffle=False, drop_last=drop_last
                )
                mine = strided(total, rank, ranks, drop_last)
                assert (list(mine), len(mine)) == (list(sampler), len(sampler))


class Samples:
    """A sampler whose samples come from a function."""

    choose: Any = None

    def __init__(self, total: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.mine = type(self).choose(total, rank, world_size, drop_last)

    def __iter__(self) -> Any:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


def sampler_of(choose: Any) -> Any:
    return type("Sampler", (Samples,), {"choose": staticmethod(choose)})


def size(total: int, ranks: int, drop_last: bool) -> int:
    return total // ranks * ranks if drop_last else -(-total // ranks) * ranks


def right(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    return [i % total for i in range(rank, size(total, ranks, drop_last), ranks)]


def blocks(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    each = size(total, ranks, drop_last) // ranks
    return [i % total for i in range(rank * each, (rank + 1) * each)]


def last_repeated(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    return [min(i, total - 1) for i in range(rank, size(total, ranks, drop_last), ranks)]


class WrongLength(Samples):
    choose = staticmethod(right)

    def __len__(self) -> int:
        return 12


def counted(rank: int, samples: list[int], is_right: Any) -> torch.Tensor:
    return torch.tensor([sum(map(is_right, samples)), len(samples)], dtype=torch.double)


def accuracy(is_right: Any, total: int, *, way: str = "right") -> Any:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    samples = list(range(rank, total, ranks))
    if way == "padded":
        samples = list(DistributedSampler(range(total), shuffle=False))
    if way == "all":
        samples = list(range(total))
    if way == "blocks":
        each = -(-total // ranks)
        samples = list(range(total))[rank * each : (rank + 1) * each]
    if way == "rank 0 alone":
        samples = list(range(total)) if rank == 0 else []
    if way == "dropped":
        samples = samples[: total // ranks]
    count = counted(rank, samples, is_right)
    if way == "local":
        return (count[0] / count[1]).item() if count[1] else 0.0
    if way == "means":
        mean = count[0] / count[1].clamp(min=1)
        dist.all_reduce(mean)
        return mean.item() / ranks
    if way == "rank 0":
        dist.reduce(count, dst=0)
        return (count[0] / count[1]).item() if rank == 0 else None
    dist.all_reduce(count)
    return count[0].item() if way == "undivided" else (count[0] / count[1]).item()


def accuracy_by(way: str) -> Any:
    return lambda is_right, total: accuracy(is_right, total, way=way)


def train(sampler: Any, loader: Any, first: int, last: int, epoch_of: Any = None) -> Any:
    seen = []
    for epoch in range(first, last):
        if epoch_of is not None:
            sampler.set_epoch(epoch_of(epoch, first, sampler.rank))
        seen.append([i for batch in loader for i in batch.tolist()])
    return seen


def train_with(epoch_of: Any) -> Any:
    return lambda sampler, loader, first, last: train(sampler, loader, first, last, epoch_of)


def train_too_late(sampler: Any, loader: Any, first: int, last: int) -> Any:
    seen: list[list[int]] = []
    for epoch in range(first, last):
        seen.append([])
        for batch in loader:
            sampler.set_epoch(epoch)
            seen[-1] += batch.tolist()
    return seen


def per_rank_batch(batch: int, ranks: int) -> int:
    if batch % ranks or batch < ranks:
        raise ValueError("not possible")
    return batch // ranks


def steps(
    total: int, ranks: int, batch: int, sampler_drops: bool, loader_drops: bool, *, way: str = ""
) -> Any:
    if way == "at once":
        number = total / (ranks * batch)
        return math.floor(number) if loader_drops else math.ceil(number)
    if way == "switches swapped":
        sampler_drops, loader_drops = loader_drops, sampler_drops
    mine = total if way == "all samples" else size(total, ranks, sampler_drops) // ranks
    if way == "never up":
        mine = total // ranks
    if way == "float":
        return mine / batch
    return mine // batch if loader_drops else -(-mine // batch)


def steps_by(way: str) -> Any:
    return lambda *args: steps(*args, way=way)


def steps_of_loader(
    total: int, ranks: int, batch: int, sampler_drops: bool, loader_drops: bool
) -> int:
    sampler = DistributedSampler(range(total), ranks, 0, drop_last=sampler_drops)
    return len(DataLoader(range(total), batch, sampler=sampler, drop_last=loader_drops))


class OneShot(Samples):
    """Its second epoch is empty."""

    choose = staticmethod(right)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.left = iter(self.mine)

    def __iter__(self) -> Any:
        return self.left


class Wrapped(Samples):
    """Lets torch's own sampler do the work."""

    def __init__(self, total: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.mine = DistributedSampler(
            range(total), world_size, rank, shuffle=False, drop_last=drop_last
        )


class Generated:
    """A generator instead of a list, by slices of an order that is repeated."""

    def __init__(self, total: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.number = size(total, world_size, drop_last) // world_size
        self.order = list(range(total)) * (world_size + 1)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Any:
        yield from self.order[self.rank :: self.world_size][: self.number]

    def __len__(self) -> int:
        return self.number


def padded_once(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    order = list(range(total))
    if drop_last:
        order = order[: total // ranks * ranks]
    else:
        order += order[: -total % ranks]
    return order[rank::ranks]


def sampler_with_slices(total: int, rank: int, world_size: int, drop_last: bool) -> Any:
    """A function that returns a list."""
    order = np.resize(np.arange(total), size(total, world_size, drop_last))
    return order.reshape(-1, world_size)[..., rank].tolist()


class OfTensors(Samples):
    choose = staticmethod(right)

    def __iter__(self) -> Any:
        return iter(torch.tensor(self.mine, dtype=torch.int64))


class ByCycling(Sampler[int]):  # type: ignore[misc]
    def __init__(self, total: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.total, self.places = total, range(rank, size(total, world_size, drop_last), world_size)

    def __iter__(self) -> Any:
        return itertools.islice(
            itertools.cycle(range(self.total)),
            self.places.start,
            self.places.stop,
            self.places.step,
        )

    def __len__(self) -> int:
        return len(self.places)


def without_wrapping(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    return list(range(rank, size(total, ranks, drop_last), ranks))


def from_one(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    return [1 + i for i in right(total, rank, ranks, drop_last)]


def shuffled(total: int, rank: int, ranks: int, drop_last: bool) -> list[int]:
    return [total - 1 - i for i in right(total, rank, ranks, drop_last)]


class NoLength:
    def __init__(self, total: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.mine = right(total, rank, world_size, drop_last)

    def __iter__(self) -> Any:
        return iter(self.mine)


def of_objects(is_right: Any, total: int) -> float:
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, list(map(is_right, range(dist.get_rank(), total, len(shards)))))
    return float(np.mean([*itertools.chain(*shards)]))


def of_a_vector(is_right: Any, total: int) -> Any:
    """Each rank fills its places in a vector of zeros."""
    vector = torch.zeros(total, 1)
    for i in range(total - 1 - dist.get_rank(), -1, -dist.get_world_size()):
        vector[i] = is_right(torch.tensor(i))
    dist.all_reduce(vector)
    return vector[..., 0].mean()


class Accuracy:
    def __call__(self, is_right: Any, total: int) -> Any:
        return np.array([accuracy(is_right, total)])


def two_messages(is_right: Any, total: int) -> Any:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = total * rank // ranks, total * (rank + 1) // ranks
    hits, asked = torch.zeros(1), torch.tensor([float(mine[1] - mine[0])])
    hits += sum(filter(None, map(is_right, range(*mine))))
    for count in hits, asked:
        dist.reduce(count, dst=0)
        dist.broadcast(count, src=0)
    return hits / asked


def skipped_without_samples(is_right: Any, total: int) -> Any:
    return accuracy(is_right, total) if dist.get_rank() < total else 0.0


def divided_too_soon(is_right: Any, total: int) -> Any:
    mine = [is_right(i) for i in range(dist.get_rank(), total, dist.get_world_size())]
    mean = torch.tensor(sum(mine) / len(mine) * len(mine) / total)
    dist.all_reduce(mean)
    return mean


def only_10(is_right: Any, total: int) -> Any:
    return accuracy(is_right, total) * total / 10


def shown(*given: Any) -> None:
    print(accuracy(*given))


def train_by_attribute(sampler: Any, loader: Any, first: int, last: int) -> Any:
    for sampler.epoch in range(first, last):
        yield torch.cat(list(loader))


def train_of_batches(sampler: Any, loader: Any, first: int, last: int) -> Any:
    seen = []
    for epoch in range(first, last):
        loader.sampler.set_epoch(epoch)
        seen.append([batch[..., :] for batch in loader])
    return tuple(seen)


def train_without_loader(sampler: Any, loader: Any, first: int, last: int) -> Any:
    return np.array([sampler.set_epoch(e) or list(sampler) for e in range(first, last)])


def train_once(sampler: Any, loader: Any, first: int, last: int) -> Any:
    sampler.set_epoch(first)
    return [[i for batch in loader for i in batch.tolist()]]


def train_flat(*given: Any) -> list[int]:
    return [*itertools.chain(*train_with(lambda epoch, first, rank: epoch)(*given))]


def train_on_rank_0(*given: Any) -> Any:
    return train_with(lambda epoch, first, rank: epoch if rank == 0 else 0)(*given)


def train_sorted(*given: Any) -> Any:
    return map(sorted, train_with(lambda epoch, first, rank: epoch)(*given))


def asserted(batch: int, ranks: int) -> int:
    assert batch % ranks == 0 < batch
    return batch // ranks


class Batch:
    def __call__(self, batch: int, ranks: int) -> int:
        return per_rank_batch(batch, ranks)


class NotShareable(ValueError):
    pass


def counted_up(batch: int, ranks: int) -> int:
    for each in range(1, batch + 1):
        if each * ranks == batch:
            return each
    raise NotShareable


RIGHT: list[tuple[Any, Any]] = [
    (check_sampler, sampler_of(right)),
    (check_sampler, Generated),
    (check_sampler, sampler_with_slices),
    (check_sampler, OfTensors),
    (check_sampler, ByCycling),
    (check_sampler, functools.partial(sampler_of(right))),
    (check_accuracy, accuracy_by("blocks")),
    (check_accuracy, accuracy),
    (check_accuracy, of_objects),
    (check_accuracy, of_a_vector),
    (check_accuracy, Accuracy()),
    (check_accuracy, two_messages),
    (check_train, train_with(lambda epoch, first, rank: epoch)),
    (check_train, train_by_attribute),
    (check_train, train_of_batches),
    (check_train, train_without_loader),
    (check_train, lambda *given: dict(enumerate(train_of_batches(*given))).values()),
    (check_train, functools.partial(train, epoch_of=lambda epoch, first, rank: epoch)),
    (check_per_rank_batch, per_rank_batch),
    (check_per_rank_batch, Batch()),
    (check_per_rank_batch, counted_up),
    (check_per_rank_batch, lambda batch, ranks: range(ranks, batch + 1, ranks).index(batch) + 1),
    (check_per_rank_batch, functools.partial(lambda f, *given: f(*given), per_rank_batch)),
    (check_per_rank_batch, lambda batch, n: [*range(n, batch + n, n)].index(batch or None) + 1),
    (check_steps, steps),
    (check_steps, steps_of_loader),
    (check_steps, lambda *args: np.int64(steps(*args))),
    (check_steps, lambda *args: torch.tensor([steps(*args)])[..., 0]),
    (check_steps, functools.partial(answers.decorated(steps))),
    (check_steps, answers.Called(steps)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_sampler, sampler_of(blocks), "block of neighbours.*dealt|block of neighbours.*deals"),
    (
        check_sampler,
        sampler_of(lambda total, rank, ranks, drop_last: list(range(rank, total, ranks))),
        "10 samples on 3 ranks.*Rank 0 has 4 samples and rank 1 only 3.*Pad by wrapping round",
    ),
    (check_sampler, sampler_of(lambda t, r, w, d: right(t, r, w, False)), "drop_last=True.*should"),
    (check_sampler, sampler_of(lambda t, r, w, d: right(t, r, w, True)), "drop_last=False.*up"),
    (check_sampler, sampler_of(last_repeated), "padding begins again with the first"),
    (check_sampler, sampler_of(lambda t, r, w, d: right(t, 0, w, d)), "same samples"),
    (check_sampler, WrongLength, r"len\(\) says \[12, 12"),
    (check_sampler, OneShot, r"second epoch \[\[\], .*begin again each time"),
    (check_sampler, Wrapped, "torch's own DistributedSampler.*by hand"),
    (check_sampler, sampler_of(padded_once), "1 sample on 3 ranks.*has 1 sample and.*only 0"),
    (check_sampler, lambda *args: 5 // 0, "failed on real ranks.*ZeroDivisionError"),
    (check_sampler, sampler_of(without_wrapping), "10 samples on 3.*no sample 10.*wraps round"),
    (check_sampler, sampler_of(from_one), "no sample 10: they count from 0 to 9"),
    (check_sampler, sampler_of(shuffled), "DistributedSampler gives"),
    (check_sampler, sampler_of(lambda t, r, w, d: list(range(t))), "same samples"),
    (check_sampler, NoLength, r"failed on real ranks.*no len\(\)"),
    (check_accuracy, skipped_without_samples, "1 sample on 2 ranks.*takes part with zeros"),
    (check_accuracy, divided_too_soon, "1 sample on 2 ranks.*divided by zero.*some rank has none"),
    (check_accuracy, only_10, "1 sample on 2 ranks.*the ranks returned 0.1, 0.1"),
    (check_accuracy, shown, "returned None, None, None.*`return` missing"),
    (check_accuracy, lambda *given: 100 * accuracy(*given), "returned 80, 80, 80.*not per cent"),
    (check_accuracy, lambda is_right, total: 0.8, r"asked for \[\[\], .*Sample 0 was never asked"),
    (check_accuracy, lambda is_right: 1.0, "failed on real ranks.*TypeError"),
    (check_accuracy, accuracy_by("padded"), "10 samples on 3 ranks.*Sample 0 was counted twice"),
    (check_accuracy, accuracy_by("all"), "Every rank did all the work"),
    (check_accuracy, accuracy_by("rank 0 alone"), "One rank did all the work"),
    (check_accuracy, accuracy_by("dropped"), "Sample 9 was never asked for"),
    (check_accuracy, accuracy_by("means"), "returned 0.806, 0.806, 0.806.*mean of the ranks'"),
    (check_accuracy, accuracy_by("local"), "own accuracies"),
    (check_accuracy, accuracy_by("rank 0"), "Rank 0 is right, but every rank"),
    (check_accuracy, accuracy_by("undivided"), "returned 8, 8, 8.*then divide"),
    (check_train, train, "All epochs are the same"),
    (check_train, train_with(lambda epoch, first, rank: 5), "All epochs are the same"),
    (
        check_train,
        train_too_late,
        r"rank 0 saw \[\[8, 9, 2, 1\], .*inside that loop comes too late",
    ),
    (check_train, train_with(lambda epoch, first, rank: epoch - first), "began again with the shu"),
    (check_train, train_with(lambda epoch, first, rank: epoch + rank), "did not see every sample"),
    (check_train, train_with(lambda epoch, first, rank: epoch + 7), r"after `sampler\.set_epoch"),
    (check_train, train_once, "one list of samples for each of the 3"),
    (check_train, lambda *given: dict(enumerate(train_of_batches(*given))), "not in a dict"),
    (check_train, train_flat, "one list of samples for each of the 3"),
    (check_train, lambda *given: print(train(*given)), "rank 0 saw None.*one list"),
    (check_train, train_on_rank_0, "did not see every sample"),
    (check_train, train_sorted, "Epoch e must have the order"),
    (check_train, train_with(lambda epoch, first, rank: epoch + 1), "Epoch e must have the order"),
    (check_train, lambda sampler: [], "failed on real ranks.*TypeError"),
    (check_train, lambda *args: [[1, 2]], "one list of samples for each of the 3"),
    (
        check_per_rank_batch,
        lambda batch, ranks: batch // ranks,
        "66 on 4.*returned 16.*without an error",
    ),
    (check_per_rank_batch, lambda batch, ranks: batch / ranks, "returned 16.0.*whole numbers only"),
    (
        check_per_rank_batch,
        lambda batch, ranks: batch,
        "took 256 samples, not 64.*takes the global",
    ),
    (
        check_per_rank_batch,
        lambda batch, ranks: max(1, batch // ranks),
        "returned 16.*without an error",
    ),
    (check_per_rank_batch, lambda batch, ranks: 2, "took 8 samples, not 64.*together must be"),
    (check_per_rank_batch, lambda batch: 1, "raised TypeError"),
    (check_per_rank_batch, lambda batch, ranks: batch * ranks, "returned 256.*more than all ranks"),
    (check_per_rank_batch, lambda batch, ranks: print(batch // ranks), "None.*`return` missing"),
    (check_per_rank_batch, divmod, r"returned \(16, 0\).*takes an `int`"),
    (
        check_per_rank_batch,
        lambda batch, ranks: -(-batch // ranks),
        "returned 17.*without an error",
    ),
    (check_per_rank_batch, lambda batch, ranks: batch // ranks - 1, "took 60 samples, not 64"),
    (check_per_rank_batch, lambda batch, ranks: batch // 4, "took 48 samples, not 66"),
    (check_per_rank_batch, asserted, "66 on 4|raised AssertionError.*Raise a ValueError"),
    (check_per_rank_batch, lambda batch, ranks: 1 / 0, "raised ZeroDivisionError.*as here"),
    (check_per_rank_batch, lambda batch, ranks: 0, "returned 0.*at least one sample"),
    (
        check_per_rank_batch,
        lambda batch, ranks: batch // ranks if batch % ranks == 0 else None,
        "returned None.*say so with a ValueError",
    ),
    (
        check_per_rank_batch,
        lambda batch, ranks: 1 // int(batch % ranks == 0 < batch) * batch // ranks,
        "raised ZeroDivisionError.*Raise a ValueError",
    ),
    (check_steps, steps_by("at once"), "one after the other"),
    (check_steps, steps_by("all samples"), "one process that has all samples"),
    (check_steps, steps_by("float"), "you returned 1.5.*whole"),
    (check_steps, steps_by("never up"), "The sampler's `drop_last` decides"),
    (check_steps, steps_by("switches swapped"), "True in the loader.*The sampler's"),
    (check_steps, lambda *args: "2", "you returned '2'.*whole"),
    (check_steps, answers.prints(steps), "you returned None.*whole"),
    (check_steps, lambda *args: [steps(*args)], "you returned .[0-9]+..*whole"),
    (check_steps, lambda *args: steps(*args) + 1, "The sampler's `drop_last` decides"),
    (check_steps, lambda *args: args[0] // args[3], "raised ZeroDivisionError"),
    (check_steps, lambda total: total, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


def test_a_class_with_a_hole_is_not_attempted() -> None:
    class Unfinished:
        def __iter__(self) -> Any: ...

    assert check_sampler(Unfinished).passed is None
