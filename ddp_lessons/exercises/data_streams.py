"""The checks of lesson 17: shard a stream, end together, resume a loader in the middle."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ddp_lessons import Run, WorkerFailed
from ddp_lessons.diagnosis import rank_state
from ddp_lessons.exercises.framework import (
    Wrong,
    call,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import number, number_or_text, numbers, plain
from ddp_lessons.text import count, listed, ranks_text

Batches = list[list[int]]
Own = list[list[int]]  # a rank's items, by worker

# ranks: (items of each shard, workers); one run for each number of ranks
Job = tuple[tuple[int, ...], int]
SHARED: dict[int, tuple[Job, ...]] = {
    2: (((5, 5, 4), 2), ((3, 3, 3, 3), 2), ((3, 3), 0), ((7,), 0), ((3,), 2)),
    3: (((7, 7), 2),),
    1: (((2, 2, 2), 2),),
}
# (items of each rank), `every`
ENDED: tuple[tuple[tuple[int, ...], int], ...] = (
    ((9, 2), 4),
    ((0, 4), 4),
    ((1, 6, 3), 3),
    ((5,), 2),
)
# (a rank's items by worker, for two ranks), batch size, batches taken
RESUMED: tuple[tuple[tuple[Own, Own], int, int], ...] = (
    (([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]], [[20, 21, 22, 23], [30, 31, 32]]), 2, 3),
    (([[0, 1, 2, 3, 4, 5], [10]], [[20], [30, 31, 32, 33, 34, 35]]), 2, 3),
    (([[0, 1, 2]], [[], [30, 31, 32]]), 1, 1),
    (([[0, 1, 2], [10]], [[20]]), 2, 0),
    (([[0, 1]], [[20]]), 1, 9),
)


class _Shard:
    """A shard that notes when it is read."""

    def __init__(self, number: int, items: range, opened: set[int]) -> None:
        self._number, self._items, self._opened = number, items, opened

    def __iter__(self) -> Iterator[int]:
        self._opened.add(self._number)
        return iter(self._items)

    def __repr__(self) -> str:
        return f"shard {self._number}"


def _ranges(sizes: Sequence[int]) -> list[range]:
    ends = [0, *accumulate(sizes)]
    return [range(*pair) for pair in pairwise(ends)]


class _Shared(IterableDataset[Any]):  # type: ignore[misc]
    """What the learner's function takes of the shards of each job, by the job's number.

    Last comes how many items and shards it took.
    """

    def __init__(
        self, mine: Callable[..., Any], jobs: Mapping[int, Sequence[int]], rank: int
    ) -> None:
        self.mine, self.jobs, self.rank = mine, jobs, rank

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        for job, sizes in self.jobs.items():
            opened: set[int] = set()
            taken = 0
            shards = [_Shard(n, items, opened) for n, items in enumerate(_ranges(sizes))]
            found = self.mine(shards, self.rank, dist.get_world_size())
            for item in found if isinstance(found, Iterable) else [repr(found)]:
                taken += 1
                told = item if isinstance(item, str | int) else plain(number_or_text(item))
                yield job, "item", told
            yield job, "end", (taken, len(opened))


@in_group
def _shared(
    rank: int, mine: Callable[..., Any], jobs: Sequence[Job]
) -> list[tuple[list[Any], list[tuple[int, int]]]]:
    """Of each job, the items of this rank's loader; of each taker, how many items and shards."""
    found: list[tuple[list[Any], list[tuple[int, int]]]] = [([], []) for _ in jobs]
    for workers in sorted({workers for _, workers in jobs}):  # to start a loader takes longest
        how = "fork" if workers else None
        alike = {job: sizes for job, (sizes, n) in enumerate(jobs) if n == workers}
        data = _Shared(mine, alike, rank)
        loader: Any = DataLoader(data, None, num_workers=workers, multiprocessing_context=how)
        for job, kind, value in loader:
            items, ends = found[job]
            if kind == "item":
                items.append(plain(value))
            else:
                ends.append((*plain(value),))
    return found


@exercise(
    "How many takers are there on all ranks together, and which of them is this one? "
    "`get_worker_info()` is None where the loader has no workers: then the rank itself takes.",
    "Number the takers `worker * world_size + rank`. Do they divide `len(shards)`? Then "
    "`shards[number::takers]` are this one's; otherwise it takes items of all shards.",
    "`islice(chain.from_iterable(shards), number, None, takers)` gives a taker its items.",
)
def check_shard(mine: Callable[..., Any]) -> str:
    """Check `mine(shards, rank, world_size)` in real loaders of real ranks."""
    for ranks, jobs in SHARED.items():
        run = run_ranks(_shared, (mine, jobs), nprocs=ranks, check=False)
        _explain_none(run)
        run.raise_for_failure()
        for job, got in zip(jobs, zip(*run.values, strict=True), strict=True):
            _judge_shared(*job, *map(list, zip(*got, strict=True)))
    return "every item once, no shard is read in vain, and takers differ by one item at most."


def _explain_none(run: Run) -> None:
    for error in errors(run):
        if "'NoneType' object has no attribute" in error.summary:
            raise Wrong(
                f"with num_workers=0 it raised {error.summary}",
                "Without workers the loader reads in the rank itself, where `get_worker_info()` is "
                "None: one taker a rank.",
            )


def _judge_shared(
    sizes: Sequence[int],
    workers: int,
    lists: list[list[Any]],
    ends: list[list[tuple[int, int]]],
) -> None:
    takers = len(lists) * max(1, workers)
    total, lengths = sum(sizes), list(map(len, lists))
    taken, opened = zip(*chain(*ends), strict=True)
    seen = (
        f"{_shards(sizes)} on {count(len(lists), 'rank')} with {count(workers, 'worker')} each: "
        f"{_told_lists(lists)}."
    )
    every = Counter(map(str, chain(*lists)))
    never = [item for item in range(total) if not every[str(item)]]
    twice = [item for item in range(total) if every[str(item)] > 1]
    beyond = [item for item in chain(*lists) if item not in range(total)]
    own = [Counter(map(str, items)) for items in lists]
    in_rank = all(min(of_rank.values(), default=2) > 1 for of_rank in own)
    same = len(lists) > 1 and all(of_rank == own[0] for of_rank in own)
    fits = len(sizes) % takers == 0
    most, least = lengths.index(max(lengths)), lengths.index(min(lengths))
    mistakes = {
        "Return or yield the items of this taker. Is `return` or `yield` missing?": "None"
        in beyond,
        f"{str(beyond[0])[:60] if beyond else ''} is no item: give what stands in the shards, and "
        "nothing with it.": beyond,
        "Nobody shares: every worker of every rank gives all items. Both the rank and the worker "
        "must choose.": twice and not never and same and in_rank,
        "The workers of a rank give the same items. Each runs your function on its own; "
        "`get_worker_info()` tells it which one it is.": twice and in_rank and not same,
        "The ranks give the same items: the worker chose, the rank did not.": twice and same,
        f"Item {twice[0] if twice else ''} comes more than once. Each taker needs a number of its "
        "own among all of them: worker 0 of one rank and worker 0 of the next are "
        "different takers.": twice,
        f"Item {never[0] if never else ''} never comes. Every item has exactly one taker: count "
        "takers from 0, and leave nothing over.": never,
        f" Rank {most} gets {lengths[most]} and rank {least} {lengths[least]}.\n{takers} takers do "
        f"not divide {count(len(sizes), 'shard')}, so whole shards cannot be fair: deal out "
        "items.": lengths[most] - lengths[least] > 1 and max(opened) < len(sizes),
        f" Rank {most} gets {lengths[most]} and rank {least} {lengths[least]}.\nEach item comes "
        "once, but a rank with more items takes steps alone. Number the takers so that neighbours "
        "in number are on different ranks.": lengths[most] - lengths[least] > 1,
        f" One taker gets {count(max(taken), 'item')} and another {min(taken)}.\n{takers} takers "
        f"do not divide {count(len(sizes), 'shard')}: compare with all takers, not with the ranks "
        "alone, and deal out items.": max(taken) - min(taken) > 1,
        f" A taker read {max(opened)} of {len(sizes)} shards.\n{takers} takers divide "
        f"{len(sizes)} shards: each can have {len(sizes) // takers} whole, and needs to read no "
        "other.": fits and max(opened) > len(sizes) // takers,
    }
    judge(seen, mistakes)


def _shards(sizes: Sequence[int]) -> str:
    if len({*sizes}) > 1:
        return f"shards of {listed(map(str, sizes))} items"
    return f"{count(len(sizes), 'shard')} of {count(sizes[0], 'item')}"


def _told_lists(lists: Sequence[Sequence[Any]]) -> str:
    return "; ".join(f"rank {rank} got {_short(items)}" for rank, items in enumerate(lists))


def _short(items: Sequence[Any]) -> str:
    told = ", ".join(str(item)[:20] for item in items[:14])
    return f"[{told}{', ...' if len(items) > 14 else ''}]"


class _Counted:
    """A stream that counts what was taken of it."""

    def __init__(self, items: Iterable[int]) -> None:
        self._items, self.taken = iter(items), 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        item = next(self._items)
        self.taken += 1
        return item


@in_group
def _ended(
    rank: int, together: Callable[..., Any], counts: Sequence[int], every: int
) -> tuple[list[Any], int]:
    """What the learner's generator gave in each step, and how much it took before the first."""
    stream = _Counted(range(100 * rank, 100 * rank + counts[rank]))
    given: list[Any] = []
    first = 0
    found = together(stream, every)
    if not isinstance(found, Iterable):
        return [repr(found)], 0
    for pair in found:
        first = first or stream.taken
        dist.all_reduce(torch.ones(1))  # what backward does in each step
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        given.append([plain(pair[0]), number(pair[1])] if is_pair else repr(pair))
        if len(given) > max(counts) + 3:
            break
    return given, first


@exercise(
    "Take up to `every` items off the stream. How many has the rank that got the most? So many "
    "steps all ranks take before they ask again.",
    "`all_reduce` that number with `dist.ReduceOp.MAX`, also on a rank that got none. If it is "
    "less than `every`, all streams have ended.",
    "`items = list(islice(stream, every))`. Ask; then for each n below the answer yield "
    "`(items[n], True)` if there is such an item, else `(None, False)`.",
)
def check_together(together: Callable[..., Any]) -> str:
    """Check `together(stream, every)`: equally many steps, no item lost, few questions."""
    for counts, every in ENDED:
        run = run_ranks(_ended, (together, counts, every), nprocs=len(counts), check=False)
        what = f"{_streams(counts)}, every={every}: "
        if not run.ok:
            _explain_hang(what, counts, run)
        run.raise_for_failure()
        _judge_ended(what, counts, every, run.values)
        _judge_questions(what, counts, every, run)
    return f"all ranks end together, and no item is lost: {_streams(ENDED[0][0])} and 3 more."


def _streams(counts: Sequence[int]) -> str:
    if len(counts) == 1:
        return f"a stream of {count(counts[0], 'item')} on 1 rank"
    return f"streams of {listed(map(str, counts))} items on {count(len(counts), 'rank')}"


def _judge_questions(what: str, counts: Sequence[int], every: int, run: Run) -> None:
    steps = max(counts)
    asked = sum(row.rank == 0 for row in run.waits()) - steps
    enough = steps // every + 1
    if asked > 2 * enough:  # some ways to ask are two calls
        raise Wrong(
            f"{what}rank 0 asked {asked} times in {steps} steps.",
            f"{count(enough, 'question')} will do: look at up to `every` items at once, and ask "
            "how many steps all of these need.",
        )


def _steps(lengths: Sequence[int]) -> str:
    return f"{listed(map(str, lengths))} steps"


def _explain_hang(what: str, counts: Sequence[int], run: Run) -> None:
    waiting = [rank.rank for rank in run.ranks if rank_state.waits(rank)]
    late = ranks_text(waiting) if waiting else ""
    first = run.explain().splitlines()[0]
    raised = [error for error in errors(run) if error.type_name != "RuntimeError"]
    unequal = len(set(counts)) > 1
    mistakes = {
        f"{late} waited for the others until the timeout.\nA rank without an item must do in "
        "each step what the others do: ask, and yield something, until nobody has an item "
        "left.": waiting and unequal,
        f"{first}\nAll ranks must make the same calls in the same order, in each step.": stuck(run)
        or (isinstance(run.error, WorkerFailed) and not raised),
    }
    judge(what, mistakes)


def _judge_ended(what: str, counts: Sequence[int], every: int, values: list[Any]) -> None:
    given, first = map(list, zip(*values, strict=True))
    for step in chain(*given):
        if isinstance(step, str):
            raise Wrong(
                f"{what}it gave {step[:60]}.",
                "In each step yield two things: an item, and whether it is a real one.",
            )
    lengths = [len(steps) for steps in given]
    real = [[item for item, is_real in steps if is_real] for steps in given]
    own = [list(range(100 * rank, 100 * rank + n)) for rank, n in enumerate(counts)]
    twice = [r for r, items in enumerate(real) if len(items) > len(set(map(str, items)))]
    lost = [r for r, items in enumerate(real) if not {*map(str, own[r])} <= {*map(str, items)}]
    empty = [r for r, items in enumerate(real) if None in items]
    eager = [r for r, n in enumerate(first) if n > every + 1]  # one may be looked at ahead
    rank = (twice or lost or empty or eager or [0])[0]
    mistakes = {
        f"after {max(lengths)} steps it still goes on.\nWhen no rank has an item left, all must "
        "stop.": max(lengths) > max(counts) + 2,
        f"rank {rank} says that None is a real item.\nA step without an item has False as its "
        "second part, so that the loop can leave it out of the loss.": empty,
        f"rank {rank} gave the items {_short(real[rank])} as real ones.\nAn item that comes again "
        "only to fill a step is not real: its second part is False.": twice,
        f"the ranks took {_steps(lengths)}.\nStop when the last rank has ended, not when "
        "the first has: its items are lost.": lost and lengths[0] == min(counts) < max(counts),
        f"rank {rank} had the items {_short(own[rank])} and gave {_short(real[rank])} as real "
        "ones.\nEach item of the stream is given once, as a real one.": lost,
        f"the ranks took {_steps(lengths)}.\nAll must take as many steps as the rank "
        "with the most items has items.": {*lengths} != {max(counts)},
        f"rank {rank} gave {_short(real[rank])} as real ones, of the items {_short(own[rank])}.\n"
        "Give the items in their order, and nothing else as real.": real != own,
        f"rank {rank} took {first[rank]} items before its first step.\nA stream may be longer than "
        "the memory, or never end: take no more than `every` items at a time.": eager,
    }
    judge(what, mistakes)


class _Given(IterableDataset[int]):  # type: ignore[misc]
    """Each worker gives its own list."""

    def __init__(self, own: Own) -> None:
        self.own = own

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(self.own[info.id])


def _loaded(rank: int, jobs: Sequence[tuple[Sequence[Own], int]]) -> list[Batches]:
    """The batches that a rank's loader gives, for each job."""
    return [
        [
            plain(batch)
            for batch in DataLoader(
                _Given(own[rank]), size, num_workers=len(own[rank]), multiprocessing_context="fork"
            )
        ]
        for own, size in jobs
    ]


@functools.cache
def _uninterrupted() -> list[list[Batches]]:
    """`[rank][case]`: the batches of a loader that nobody interrupts."""
    jobs = [(own, size) for own, size, _ in RESUMED]
    found: list[list[Batches]] = run_ranks(_loaded, (jobs,)).values
    return found


@exercise(
    "Cut each worker's list into its batches first. The loader takes one from each worker in turn, "
    "and passes over a worker that has none left.",
    "A new loader begins with its worker 0. So the lists must be turned: first the one whose turn "
    "it is.",
    "Play the loader: take `taken` batches off the lists, one after the other, and note who is "
    "next. Then `rest[turn:] + rest[:turn]`.",
)
def check_resume(rest: Callable[..., Any]) -> str:
    """Check `rest(own, size, taken)`: a new loader goes on as the old one would have."""
    because = "It takes a list of items for each worker, the batch size and the batches taken."
    answers: list[list[Own]] = []
    for own, size, taken in RESUMED:
        found = [call(rest, of_rank, size, taken, because=because) for of_rank in own]
        answers.append([_lists(*job, size, taken) for job in zip(own, found, strict=True)])
    jobs = [(own, size) for own, (_, size, _) in zip(answers, RESUMED, strict=True)]
    resumed = run_ranks(_loaded, (jobs,)).values
    for case, (own, size, taken) in enumerate(RESUMED):
        for rank, of_rank in enumerate(own):
            whole = _uninterrupted()[rank][case]
            _judge_resumed(of_rank, size, taken, whole, answers[case][rank], resumed[rank][case])
    return f"{len(RESUMED)} loaders on two ranks went on, batch by batch, as without a stop."


def _lists(own: Own, found: Any, size: int, taken: int) -> Own:
    """The answer as a list of whole numbers for each worker."""
    seen = f"{_told_case(own, size, taken)}you returned {str(found)[:80]}."
    found = plain(found)
    is_listed = isinstance(found, Iterable) and not isinstance(found, str | Mapping)
    lists = [plain(part) for part in found] if is_listed else []
    if not is_listed or not all(
        isinstance(part, Iterable) and not isinstance(part, str | Mapping) for part in lists
    ):
        raise Wrong(seen, "Return a list of items for each worker of the new loader.")
    if len(lists) != len(own):
        raise Wrong(
            seen,
            f"The new loader has {count(len(own), 'worker')}, too: return a list for each, which "
            "may be empty.",
        )
    parts = [list(part) for part in lists]
    if any(not isinstance(item, int) for part in parts for item in map(number, part)):
        nested = all(isinstance(item, list | tuple) for part in parts for item in part)
        raise Wrong(
            seen,
            "Return items, not batches: the new loader makes batches itself."
            if nested
            else "Return the items themselves, in a list for each worker.",
        )
    return [[int(number(item)) for item in part] for part in parts]


def _told_case(own: Own, size: int, taken: int) -> str:
    return f"workers with {own}, batches of {size}, {taken} taken: "


def _judge_resumed(
    own: Own, size: int, taken: int, whole: Batches, answer: Own, resumed: Batches
) -> None:
    right = whole[taken:]
    if resumed == right:
        return
    done, got = {*numbers(whole[:taken])}, numbers(resumed)
    again = sorted(done.intersection(got))
    lost = sorted({*numbers(right)} - {*got})
    strange = sorted({*got} - {*numbers(whole)})
    seen = (
        f"{_told_case(own, size, taken)}the old loader gave {whole[:taken]} and would have gone on "
        f"with {_told(right)}; the new one gave {_told(resumed)}."
    )
    mistakes = {
        f"{strange[0] if strange else ''} was in no list.": strange,
        "It begins anew: every item that was trained on comes again.": taken and answer == own,
        f"Items {_short(again)} come twice. Take away what each worker has given, in whole "
        "batches. A worker that has nothing left is passed over, and the others give more.": again
        and not lost,
        f"Items {_short(lost)} are lost. A worker that has nothing left is passed over, a short "
        "batch at its end is a whole turn, and each worker has given its own number of "
        "batches.": lost and not again,
        f"Items {_short(lost)} are lost, and {_short(again)} come twice. Each worker has given its "
        "own number of batches: play the loader's turns.": lost and again,
        "No item is lost or comes twice, but the order differs. The new loader begins with its "
        "worker 0: give that one the list of the worker whose turn it is.": sorted(got)
        == sorted(numbers(right)),
        "The new loader must give the batches that the old one had left.": True,
    }
    judge(seen, mistakes)


def _told(batches: Batches) -> str:
    return str(batches) if batches else "nothing"
