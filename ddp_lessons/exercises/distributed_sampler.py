"""The checks of lesson 05: batch size, sampler, accuracy, the epoch bug, steps of an epoch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, product
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ddp_lessons import Run
from ddp_lessons.exercises.framework import (
    Watched,
    Wrong,
    call,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import near, number, numbers, plain
from ddp_lessons.text import count

Shards = list[list[int]]  # by rank
Train = Callable[["DistributedSampler[int]", "DataLoader[int]", int, int], Any]

SHARDED = {3: (10, 12, 2, 1), 4: (12, 10), 1: (7,)}  # ranks: samples
EVALUATED = ((10, 3, (0, 2)), (1, 2, ()), (6, 1, (5,)), (5, 4, (4,)))  # and wrong samples
TRAINED = ((12, 3, 0, 3), (10, 2, 2, 4))  # samples, ranks, first and last epoch
SHARED_BATCHES = ((64, 4), (66, 3), (4, 4), (8, 1))  # global batch, ranks
IMPOSSIBLE_BATCHES = ((66, 4), (3, 4), (0, 2))
STEPPED = ((10, 4, 2), (11, 3, 2), (10, 4, 16), (2, 3, 4), (12, 1, 5))  # samples, ranks, batch


class _Indices(Dataset[int]):  # type: ignore[misc]
    """A dataset whose sample i is i, also where there is none."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __getitem__(self, index: int) -> int:
        return int(index)

    def __len__(self) -> int:
        return self.total


def _loaded(
    rank: int, sampler: Callable[..., Any], jobs: Sequence[tuple[int, bool]]
) -> list[tuple[Any, ...]]:
    """Of each job: the sampler's length, its samples in two epochs, whether torch's does it."""
    torchs_own = Watched(DistributedSampler)
    done = []
    for total, drop_last in jobs:
        made = sampler(total, rank, _world_size(), drop_last)
        loader = DataLoader(_Indices(total), batch_size=2, sampler=made)
        first, second = ([int(index) for batch in loader for index in batch] for _ in range(2))
        done.append((len(made), first, second, torchs_own.was_made))
    return done


def _world_size() -> int:
    """The number of ranks, without a process group."""
    return int(os.environ["WORLD_SIZE"])


@exercise(
    "Which places of the padded order are this rank's? `range(rank, size, world_size)` walks over "
    "them.",
    "Without `drop_last` the size is `total` rounded up to a multiple of `world_size`, with it "
    "rounded down. What stands at place `i` is sample `i % total`.",
)
def check_sampler(sampler: Callable[[int, int, int, bool], Iterable[int]]) -> str:
    """Check `sampler(total, rank, world_size, drop_last)` against DistributedSampler's samples."""
    for ranks, totals in SHARDED.items():
        jobs = [(total, drop_last) for drop_last in (False, True) for total in totals]
        run = run_ranks(_loaded, (sampler, jobs), nprocs=ranks)
        for (total, drop_last), done in zip(jobs, zip(*run.values, strict=True), strict=True):
            what = f"{_on(total, ranks)}, drop_last={drop_last}"
            _judge_sampler(what, total, drop_last, *map(list, zip(*done, strict=True)))
    return "the samples of DistributedSampler, also with 10 samples on 3 ranks and with 2 on 3."


def _judge_sampler(
    what: str,
    total: int,
    drop_last: bool,
    lengths: list[int],
    shards: Shards,
    again: Shards,
    of_torch: list[bool],
) -> None:
    seen = f"{what}: the ranks got {shards}"
    _judge_shards(f"{seen}.", shards, total, drop_last)
    if again != shards:
        raise Wrong(
            f"{seen}, and in the second epoch {again}.",
            "Each epoch asks for the samples anew: `__iter__` must begin again each time.",
        )
    if any(of_torch):
        raise Wrong(
            f"{seen}, dealt out by torch's own DistributedSampler.",
            "Write it by hand: a few lines are all there is to it.",
        )
    if lengths != [len(shard) for shard in shards]:
        raise Wrong(
            f"{seen}, but len() says {lengths}.",
            "`__len__` is the number of samples of this rank: the DataLoader counts its steps by "
            "it.",
        )


def _judge_shards(seen: str, shards: Shards, total: int, drop_last: bool) -> None:
    ranks, sizes = len(shards), [len(shard) for shard in shards]
    expected = [
        list(DistributedSampler(range(total), ranks, rank, shuffle=False, drop_last=drop_last))
        for rank in range(ranks)
    ]
    if shards == expected:
        return
    never = sorted(set().union(*expected).difference(*shards))
    are_twins = len(set(map(tuple, shards))) < ranks <= total
    unpadded = all(a[:-1] == b[:-1] for a, b in zip(shards, expected, strict=True))
    is_padded = not drop_last and total % ranks and unpadded
    beyond = sorted(set().union(*shards).difference(range(total)))
    mistakes = {
        f"There is no sample {beyond[0] if beyond else ''}: they count from 0 to {total - 1}. The "
        "padding wraps round, to the first samples.": beyond,
        f"Rank {sizes.index(max(sizes))} has {count(max(sizes), 'sample')} and rank "
        f"{sizes.index(min(sizes))} only {min(sizes)}. Ranks with more take more steps, and wait "
        "in their last one for the others, which have none left. Pad by wrapping round, or "
        "drop.": len(set(sizes)) > 1,
        "Two ranks have the same samples: they would do the same work twice.": are_twins,
        "Each rank has a block of neighbours. DistributedSampler deals samples out like cards: "
        "rank r gets every world_size-th one, beginning with r.": _are_blocks(shards),
        f"Each rank should have {len(expected[0])} samples. With drop_last the number of samples "
        "is rounded down to a multiple of "
        "world_size, else up; never more than that.": sizes[0] != len(expected[0]),
        f"Sample {never[0] if never else ''} was never seen.": never,
        "The padding begins again with the first samples: 0, 1 and so on.": is_padded,
        f"DistributedSampler gives {expected}.": True,
    }
    judge(seen, mistakes)


def _are_blocks(shards: Shards) -> bool:
    return len(shards) > 1 and all(
        len(shard) > 1 and shard == list(range(shard[0], shard[0] + len(shard)))
        for shard in shards[:-1]
    )


@in_group
def _evaluated(
    _: int, accuracy: Callable[..., Any], total: int, wrong: tuple[int, ...]
) -> tuple[Any, list[int]]:
    asked: list[int] = []

    def is_right(index: int) -> bool:
        asked.append(int(index))
        return int(index) not in wrong

    answer = numbers(accuracy(is_right, total))
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer, asked


@exercise(
    "`range(rank, total, world_size)` gives every sample to one rank, without padding.",
    "Let two numbers travel in one `all_reduce`: how many are right, and how many were asked for. "
    "Divide afterwards. A rank without samples gives zeros.",
)
def check_accuracy(accuracy: Callable[..., Any]) -> str:
    """Check `accuracy(is_right, total)`: each sample asked once, the exact value on all ranks."""
    for total, ranks, wrong in EVALUATED:
        run = run_ranks(_evaluated, (accuracy, total, wrong), nprocs=ranks, check=False)
        what = f"{_on(total, ranks)}, {total - len(wrong)} of them right"
        _judge_end(what, run, total)
        results, shards = map(list, zip(*run.values, strict=True))
        _judge_asked(f"{what}: the ranks asked for {shards}.", total, shards)
        _judge_accuracy(what, results, shards, total, wrong)
    return "exact on every rank, for 10 samples on 3 ranks, 5 on 4, 1 on 2 and 6 on 1."


def _judge_end(what: str, run: Run, total: int) -> None:
    """Raise what a rank raised; `Wrong` where it may be that it had no samples."""
    idle = total < run.world_size
    if idle and stuck(run):
        raise Wrong(
            f"{what}: {run.explain().splitlines()[0]}",
            "A rank without samples must call what the others call: it takes part with zeros.",
        )
    if idle and any(error.type_name == "ZeroDivisionError" for error in errors(run)):
        raise Wrong(
            f"{what}: a rank divided by zero.",
            "There are fewer samples than ranks, so some rank has none. Add up over the ranks "
            "first and divide afterwards.",
        )
    run.raise_for_failure()


def _judge_asked(seen: str, total: int, shards: Shards) -> None:
    everything = list(range(total))
    counts = Counter(index for shard in shards for index in shard)
    twice = [index for index in sorted(counts) if counts[index] > 1]
    never = [index for index in everything if not counts[index]]
    are_all = len(shards) > 1 and all(sorted(shard) == everything for shard in shards)
    mistakes = {
        "Every rank did all the work. Each needs only its own part.": are_all,
        "One rank did all the work, and the others had nothing to do. Let each do a part.": (
            len(shards) > 1 and total >= len(shards) and sum(map(bool, shards)) == 1
        ),
        f"Sample {min(twice, default='')} was counted twice. A padded sampler is for training, "
        "where ranks need equally many steps; in evaluation each sample may count once.": twice,
        f"Sample {min(never, default='')} was never asked for: it is missing in the accuracy.": (
            never
        ),
    }
    judge(seen, mistakes)


def _judge_accuracy(
    what: str, results: list[Any], shards: Shards, total: int, wrong: tuple[int, ...]
) -> None:
    exact = (total - len(wrong)) / total
    right = [near(result, exact, 1e-5) for result in results]
    if all(right):
        return
    local = [1 - len({*shard} & {*wrong}) / len(shard) if shard else 0.0 for shard in shards]
    pairs = zip(results, local, strict=True)
    are_local = len(results) > 1 and all(near(a, b, 1e-5) for a, b in pairs)
    mistakes = {
        "Rank 0 is right, but every rank should know: `all_reduce` tells all.": right[0],
        "These are the ranks' own accuracies. Put their counts together: `all_reduce`.": are_local,
        "This is the mean of the ranks' accuracies. They have different numbers of samples: send "
        "the counts round and divide the sums.": near(results[0], sum(local) / len(local), 1e-5),
        "Return a part of 1, not per cent.": near(results[0], 100 * exact, 1e-3),
        "Every rank returns the accuracy, a number. Is `return` missing?": results[0] is None,
        "Add up the right ones and the samples over all ranks, then divide.": True,
    }
    returned = ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v)[:40] for v in results)
    seen = f"{what}: the accuracy is {exact:.3g}, and the ranks returned {returned}."
    judge(seen, mistakes)


def _trained(rank: int, train: Train, total: int, first: int, last: int) -> Any:
    sampler = DistributedSampler(range(total), _world_size(), rank)
    loader = DataLoader(range(total), batch_size=2, sampler=sampler)
    seen = plain(train(sampler, loader, first, last))
    is_listed = isinstance(seen, Iterable) and not isinstance(seen, str | Mapping)
    return [numbers(epoch) for epoch in seen] if is_listed else seen


def _is_list(value: object) -> bool:
    return isinstance(value, list)


@exercise(
    "When does the loader ask the sampler for its order: when the loop over batches begins, or for "
    "each batch?",
    "Call `set_epoch(epoch)` before `for batch in loader`, once an epoch.",
)
def check_train(train: Train) -> str:
    """Check `train(sampler, loader, first, last)`: each epoch is shuffled by its number."""
    for total, ranks, first, last in TRAINED:
        run = run_ranks(_trained, (train, total, first, last), nprocs=ranks)
        what = f"epochs {first} to {last - 1} of {_on(total, ranks)}"
        _judge_trained(what, run.values, total, range(first, last))
    return "every epoch has its own shuffle, also when training goes on from epoch 2."


def _judge_trained(what: str, values: list[Any], total: int, epochs: range) -> None:
    ranks = len(values)
    samplers = [DistributedSampler(range(total), ranks, rank) for rank in range(ranks)]
    right = []
    for epoch in range(epochs.stop):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        right.append(list(map(list, samplers)))
    seen = f"{what}: rank 0 saw {values[0]}."
    are_listed = all(
        isinstance(value, list) and len(value) == len(epochs) and all(map(_is_list, value))
        for value in values
    )
    if not are_listed:
        is_dict = isinstance(values[0], Mapping)
        raise Wrong(
            seen,
            f"Return one list of samples for each of the {len(epochs)} epochs, in a list"
            f"{', not in a dict' if is_dict else ''}: `seen` of the function above.",
        )
    shards = [list(epoch) for epoch in zip(*values, strict=True)]
    if shards == right[epochs.start :]:
        return
    mistakes = {
        "All epochs are the same. The sampler does not count epochs: tell it the number of each "
        "one with `set_epoch`.": shards[1:] == shards[:-1],
        "Each epoch has the shuffle of the one before. The loader asks for the order when its loop "
        "begins; `set_epoch` inside that loop comes too late.": shards[1] == right[epochs.start],
        "Together the ranks did not see every sample in every epoch. All ranks must set the same "
        "epoch, so that they cut the same order into parts.": any(
            {*map(str, chain(*epoch))} != {*map(str, range(total))} for epoch in shards
        ),
        "Training that goes on from a checkpoint began again with the shuffle of epoch 0. Count "
        "epochs from `first`.": epochs.start and shards == right[: len(epochs)],
        "Epoch e must have the order after `sampler.set_epoch(e)`.": True,
    }
    judge(seen, mistakes)


def _first_batch(rank: int, batch_size: int, total: int) -> int:
    sampler = DistributedSampler(range(total), _world_size(), rank)
    return len(next(iter(DataLoader(range(total), batch_size, sampler=sampler))))


@exercise(
    "`divmod` gives the whole part and the remainder at once.",
    "Raise a ValueError if there is a remainder, or if nothing would be left for a rank.",
)
def check_per_rank_batch(per_rank_batch: Callable[[int, int], int]) -> str:
    """Check `per_rank_batch(global_batch, world_size)`, also with real ranks."""
    for batch, ranks in SHARED_BATCHES:
        because = (
            "It takes the global batch and the world size, and returns a number where that batch "
            "can be shared evenly, as here."
        )
        size = call(per_rank_batch, batch, ranks, because=because)
        _judge_batch(batch, ranks, size)
    for batch, ranks in IMPOSSIBLE_BATCHES:
        _judge_impossible(per_rank_batch, batch, ranks)
    return "right for 64, 66, 4 and 8, and 66 on 4 ranks, 3 on 4 and 0 on 2 are refused."


def _judge_batch(batch: int, ranks: int, size: Any) -> None:
    asked = f"a batch of {batch} on {count(ranks, 'rank')}"
    mistakes: dict[str, object] = {
        "A DataLoader takes whole numbers only, and `/` gives a float: use `//`.": (
            isinstance(size, float)
        ),
        "A DataLoader takes an `int`. Is `return` missing?": type(size) is not int,
        "That is no batch size: at least one sample.": type(size) is int and size < 1,
        "That is more than all ranks together should take.": type(size) is int and size > batch,
    }
    judge(f"{asked}: you returned {size!r}.", mistakes)
    run = run_ranks(_first_batch, (size, 4 * ranks * max(batch, size)), nprocs=ranks)
    together = sum(run.values)
    if together != batch:
        mistakes = {
            "Every rank takes the global batch. A DataLoader's batch size counts for one rank: all "
            "of them together take that many times the number of ranks.": size == batch,
            "The ranks' batches together must be the global batch.": True,
        }
        took = f"one step on {count(ranks, 'rank')} took {together} samples, not {batch}."
        judge(took, mistakes)


def _judge_impossible(per_rank_batch: Callable[[int, int], int], batch: int, ranks: int) -> None:
    asked = f"a batch of {batch} on {count(ranks, 'rank')}"
    try:
        size = per_rank_batch(batch, ranks)
    except ValueError:
        return
    except Exception as error:
        raise Wrong(
            f"{asked}: it raised {type(error).__name__}.",
            "Raise a ValueError: the value is what is wrong.",
        ) from error
    because = "No rank can take such a batch: say so with a ValueError."
    if type(size) is int and size > 0:
        because = f"{ranks} x {size} is {ranks * size}: samples are lost or added without an error."
    raise Wrong(f"{asked}: you returned {size!r}.", because)


def _stepped(rank: int, total: int, batch: int) -> dict[tuple[bool, ...], int]:
    """The steps of an epoch, by `drop_last` of the sampler and of the loader."""
    steps = {}
    for drops in product((False, True), repeat=2):
        sampler = DistributedSampler(range(total), _world_size(), rank, drop_last=drops[0])
        loader = DataLoader(range(total), batch, sampler=sampler, drop_last=drops[1])
        steps[drops] = sum(1 for _ in loader)
    return steps


@exercise(
    "Two roundings, one after the other: first the samples of one rank, then its batches.",
    "Each rounds down where its `drop_last` is set, else up: `n // d` and `-(-n // d)`.",
)
def check_steps(steps: Callable[[int, int, int, bool, bool], int]) -> str:
    """Check `steps(total, world_size, batch_size, sampler_drops, loader_drops)` by counting."""
    for total, ranks, batch in STEPPED:
        counted = run_ranks(_stepped, (total, batch), nprocs=ranks).values[0]
        for drops, right in counted.items():
            because = "It takes three whole numbers and two switches, and returns a whole number."
            found = number(call(steps, total, ranks, batch, *drops, because=because))
            _judge_steps(total, ranks, batch, drops, found, right)
    return "as many steps as real ranks take, also with 2 samples on 3 ranks."


def _judge_steps(
    total: int, ranks: int, batch: int, drops: tuple[bool, ...], found: Any, right: int
) -> None:
    if found == right and isinstance(found, int):
        return
    switches = "drop_last={} in the sampler and {} in the loader".format(*drops)
    alone, at_once = (
        total // size if drops[1] else -(-total // size) for size in (batch, ranks * batch)
    )
    mistakes = {
        "A number of steps is whole: `/` gives a float, `//` rounds down.": (
            not isinstance(found, int)
        ),
        "These are the steps of one process that has all samples. Each rank only has its own.": (
            found == alone
        ),
        "Sampler and loader round one after the other. One division by both numbers at once "
        "forgets that the sampler gives all ranks equally many.": found == at_once,
        "The sampler's `drop_last` decides how many samples a rank has, the loader's whether a "
        "short batch at the end is a step.": True,
    }
    seen = f"{_on(total, ranks)}, batches of {batch}, {switches}: {right}, you returned {found!r}."
    judge(seen, mistakes)


def _on(samples: int, ranks: int) -> str:
    return f"{count(samples, 'sample')} on {count(ranks, 'rank')}"
