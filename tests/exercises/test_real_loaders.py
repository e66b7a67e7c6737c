"""The checks of real_4: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ddp_lessons.exercises.real_loaders import check_fixed_length, check_merge
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Order = list[int]
Batches = list[list[int]]


def orders(
    total: int, rank: int, ranks: int, epochs: Any, **options: bool
) -> list[tuple[int, Order]]:
    """Each epoch and its order."""
    sampler = DistributedSampler(range(total), ranks, rank, **options)
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append((epoch, list(sampler)))
    return found


def cut(order: Order, batch: int) -> Batches:
    return [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]


def merging(total: int, rank: int, ranks: int, batch: int, epochs: Any, **options: bool) -> Batches:
    of_epochs = [cut(order, batch) for _, order in orders(total, rank, ranks, epochs, **options)]
    if not of_epochs[0]:
        raise ValueError("no step")
    return list(itertools.chain(*of_epochs))


def right(total: int, rank: int, ranks: int, batch: int, first: int, last: int) -> Batches:
    return merging(total, rank, ranks, batch, range(first, last))


def by_batch_sampler(total: int, rank: int, ranks: int, batch: int, first: int, last: int) -> Any:
    sampler = DistributedSampler(range(total))  # from the group
    batches = BatchSampler(sampler, batch, drop_last=True)
    if not len(batches):
        raise ValueError
    for epoch in range(first, last):
        sampler.set_epoch(epoch)
        yield from batches


def by_loader(total: int, rank: int, ranks: int, batch: int, first: int, last: int) -> Any:
    sampler = DistributedSampler(range(total), ranks, rank)
    loader = DataLoader(range(total), batch, sampler=sampler, drop_last=True)
    if len(loader) == 0:
        raise ValueError("too few")
    stream: tuple[Tensor, ...] = ()
    for epoch in range(first, last):
        loader.sampler.set_epoch(epoch)
        stream += tuple(loader)
    return stream


def by_hand(total: int, rank: int, ranks: int, batch: int, first: int, last: int) -> Any:
    each = -(-total // ranks)
    steps = each // batch
    if steps < 1:
        raise ValueError(f"{each} < {batch}")
    stream = torch.empty(0, batch, dtype=torch.int64)
    for epoch in range(first, last):
        order = torch.randperm(total, generator=torch.Generator().manual_seed(epoch))
        mine = order[torch.arange(rank, each * ranks, ranks) % total]
        stream = torch.cat([stream, mine[: steps * batch].view(steps, batch)])
    return stream


class Stream:
    """Something to loop over, as a batch sampler is."""

    def __init__(self, *numbers: int) -> None:
        self.batches = right(*numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def raises(kind: type[Exception]) -> Any:
    def merge(*numbers: int) -> Batches:
        try:
            return right(*numbers)
        except ValueError as error:
            raise kind from error

    return merge


def without_check(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    return [c for _, order in orders(t, r, w, range(first, last)) for c in cut(order, b)]


def crossing(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    every = [order for _, order in orders(t, r, w, range(first, last))]
    return cut(list(itertools.chain(*every)), b)


def short_kept(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    every = [order for _, order in orders(t, r, w, range(first, last))]
    return [order[i : i + b] for order in every for i in range(0, len(order), b)]


def one_shuffle(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    epochs = last - first
    sampler = DistributedSampler(range(t * epochs), w, r)
    each = -(-t // w) // b
    return cut([i % t for i in sampler], b)[: each * epochs]


def unpadded(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    stream = []
    for epoch in range(first, last):
        order = torch.randperm(t, generator=torch.Generator().manual_seed(epoch)).tolist()
        stream += cut(order[r::w], b)
    return stream


def checks_all(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    if t // b == 0:
        raise ValueError("too few")
    return without_check(t, r, w, b, first, last)


def too_strict(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    if t // w < b:
        raise ValueError("too few")
    return right(t, r, w, b, first, last)


def told_late(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    sampler, stream = DistributedSampler(range(t), w, r), []
    for epoch in range(first, last):
        stream += cut(list(sampler), b)
        sampler.set_epoch(epoch)
    return stream


def told_once(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    return cut(orders(t, r, w, [first])[0][1], b) * (last - first)


def blocks(t: int, r: int, w: int, b: int, first: int, last: int) -> Batches:
    stream, each = [], -(-t // w)
    for epoch in range(first, last):
        order = torch.randperm(t, generator=torch.Generator().manual_seed(epoch)).tolist()
        stream += cut((order + order[: each * w - t])[r * each : (r + 1) * each], b)
    return stream


@functools.cache
def one_pass(total: int, number: int) -> Order:
    order: Order = torch.randperm(total, generator=torch.Generator().manual_seed(number)).tolist()
    return order


def fair(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    places = range(epoch * length + rank, (epoch + 1) * length, ranks)
    return [one_pass(total, place // total)[place % total] for place in places]


def in_blocks(total: int, length: int, rank: int, ranks: int, epoch: int) -> Tensor:
    each = length // ranks
    begin = epoch * length + rank * each
    places = torch.arange(begin, begin + each)
    passes = torch.tensor(
        [one_pass(total, n) for n in range(begin // total, places[-1] // total + 1)]
    )
    return passes.flatten()[places - begin // total * total]


def by_islice(total: int, length: int, rank: int, ranks: int, epoch: int) -> Iterator[int]:
    stream = itertools.chain.from_iterable(one_pass(total, n) for n in itertools.count())
    return itertools.islice(stream, epoch * length + rank, (epoch + 1) * length, ranks)


def by_numpy(total: int, length: int, rank: int, ranks: int, epoch: int) -> Any:
    passes = (epoch + 1) * length // total + 1
    stream = np.concatenate([np.random.default_rng(n).permutation(total) for n in range(passes)])
    return stream[epoch * length : (epoch + 1) * length][rank::ranks]


def by_random(total: int, length: int, rank: int, ranks: int, epoch: int) -> tuple[int, ...]:
    stream: Order = []
    while len(stream) < (epoch + 1) * length:
        order = list(range(total))
        random.Random(len(stream)).shuffle(order)
        stream += order
    return tuple(stream[epoch * length + rank : (epoch + 1) * length : ranks])


def by_rank_0(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    parts = [fair(total, length, of, ranks, epoch) for of in range(ranks)] if rank == 0 else None
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, parts, src=0)
    return list(mine[0])


def forked(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    stream: Order = []
    with torch.random.fork_rng():
        for number in range((epoch + 1) * length // total + 1):
            torch.manual_seed(number)
            stream += torch.randperm(total).tolist()
    return stream[epoch * length + rank : (epoch + 1) * length : ranks]


def new_each_epoch(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    order = one_pass(total, epoch)
    return [order[place % total] for place in range(rank, length, ranks)]


def always_first(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return [one_pass(total, 0)[place % total] for place in range(rank, length, ranks)]


def unshuffled(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return [p % total for p in range(epoch * length + rank, (epoch + 1) * length, ranks)]


def own_seed(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    places = range(epoch * length + rank, (epoch + 1) * length, ranks)
    return [one_pass(total, 99 * rank + place // total)[place % total] for place in places]


def drawing(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return torch.randperm(total).repeat(9)[rank:length:ranks].tolist()  # type: ignore[no-any-return]


def seeding(seed: Callable[[int], object], draw: Callable[[int], Any]) -> Any:
    def fixed_length(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
        stream: Order = []
        for number in range((epoch + 1) * length // total + 1):
            seed(number)
            stream += [int(n) for n in draw(total)]
        return stream[epoch * length + rank : (epoch + 1) * length : ranks]

    return fixed_length


class Remembers:
    """Goes on where its last call stopped."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, int], int] = {}

    def __call__(self, total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
        turn = self.at.get((total, length), 0)
        self.at[total, length] = turn + 1
        return fair(total, length, rank, ranks, turn)


def whole_length(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return fair(total, length * ranks, rank, ranks, epoch)


def all_alike(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return fair(total, length, 0, ranks, epoch)


def counts_samples(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return [one_pass(total, epoch)[p] for p in range(rank, min(total, length), ranks)]


def places_only(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    return list(range(epoch * length + rank, (epoch + 1) * length, ranks))


def by_rank_length(total: int, length: int, rank: int, ranks: int, epoch: int) -> Order:
    """Goes on by a rank's part of the length."""
    begin = epoch * (length // ranks)
    places = range(begin + rank, begin + length, ranks)
    return [one_pass(total, place // total)[place % total] for place in places]


def epochs_of(change: Callable[[int, int, int], Any]) -> Any:
    """A right merge, of other epochs: `change(first, last, rank)` names them."""
    return lambda t, r, w, b, first, last: merging(t, r, w, b, change(first, last, r))


RIGHT: list[tuple[Any, Any]] = [
    (check_merge, right),
    (check_merge, answers.mixed(by_batch_sampler, by_hand)),
    (check_merge, answers.mixed(by_hand, by_loader)),
    (check_merge, answers.mixed(answers.decorated(right), Stream)),
    (check_fixed_length, answers.Called(fair)),
    (check_fixed_length, answers.mixed(fair, by_numpy, by_islice)),
    (check_fixed_length, answers.mixed(fair, in_blocks, by_random)),
    (check_fixed_length, answers.mixed(fair, by_rank_0, forked)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_merge, epochs_of(lambda f, t, r: [0] * (t - f)), "All epochs have the same order"),
    (check_merge, told_once, "All epochs have the same order.*tell it"),
    (check_merge, epochs_of(lambda f, t, r: range(t - f)), "2 to 3: .*begins with `first`"),
    (
        check_merge,
        epochs_of(lambda f, t, r: range(f, t + 1)),
        "Epoch 3 is one too many: `last`",
    ),
    (check_merge, epochs_of(lambda f, t, r: range(f + r, t + r)), "number of its own"),
    (check_merge, told_late, "shuffle of the one before: `set_epoch` comes too late"),
    (check_merge, crossing, "samples of two epochs"),
    (check_merge, short_kept, "12 samples on 3 ranks, batches of 3.*not full must be dropped"),
    (check_merge, one_shuffle, "comes twice in one epoch: this is one long shuffle"),
    (check_merge, unpadded, "different numbers of batches|not.*DistributedSampler's order"),
    (check_merge, without_check, "11 samples.*batches of 5.*returned \\[\\].*A loop over nothing"),
    (check_merge, checks_all, "batches of 5.*how many samples a .rank. has"),
    (check_merge, raises(RuntimeError), "raised RuntimeError.*Raise a ValueError"),
    (check_merge, too_strict, "2 samples on 3 ranks.*raised ValueError.*padding included"),
    (
        check_merge,
        lambda t, r, w, b, f, to: merging(t, r, w, b, range(f, to), shuffle=False),
        "are not shuffled",
    ),
    (
        check_merge,
        lambda t, r, w, b, f, to: without_check(t, r, w, max(1, b // w), f, to),
        "batches of \\[1\\] samples.*do not divide it",
    ),
    (
        check_merge,
        lambda t, r, w, b, f, to: [
            c for _, order in orders(t, r, w, range(f, to), drop_last=True) for c in cut(order, b)
        ],
        "has to pad: with its `drop_last`",
    ),
    (check_merge, blocks, "order is different: rank 0 has"),
    (check_merge, lambda *n: list(itertools.chain(*right(*n))), "Return a list of batches"),
    (check_merge, answers.prints(right), "returned None.*`return` missing"),
    (check_merge, lambda t, r, w: [], "raised TypeError.*six whole numbers"),
    (check_fixed_length, new_each_epoch, "fair only on average"),
    (check_fixed_length, always_first, "begins again with the same images"),
    (check_fixed_length, unshuffled, "12 images, 4 places.*the same order.*shuffled anew"),
    (check_fixed_length, own_seed, "one list of all images.*the same list on all ranks"),
    (check_fixed_length, drawing, "torch's global generator.*rank 0.*of your own"),
    (check_fixed_length, seeding(torch.manual_seed, torch.randperm), "torch's global gen"),
    (check_fixed_length, seeding(np.random.seed, np.random.permutation), "NumPy's global gen"),
    (
        check_fixed_length,
        seeding(random.seed, lambda total: random.sample(range(total), total)),
        "Python's global generator",
    ),
    (check_fixed_length, Remembers(), "asked for epoch 6 first.*from its number alone"),
    (check_fixed_length, whole_length, "each has 4. If all took `length`"),
    (check_fixed_length, all_alike, "All ranks have the same images"),
    (check_fixed_length, counts_samples, "fair only on average|Each rank has 6 of the 12 places"),
    (check_fixed_length, places_only, "There is no image \\[10\\].*A place is not yet"),
    (check_fixed_length, by_rank_length, "places that two epochs share count twice"),
    (check_fixed_length, answers.prints(fair), "has None.*`return` missing"),
    (check_fixed_length, lambda *n: str(fair(*n)), "Return a list of whole numbers"),
    (check_fixed_length, lambda *n: fair(*n)[:-1], "Each rank has 4 of the 8 places"),
    (check_fixed_length, lambda total, length: 1, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
