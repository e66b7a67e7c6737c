"""The checks of real_4: one stream with real epochs, and a fixed length that is fair."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from ddp_lessons.exercises.framework import Wrong, exercise, in_group, judge, run_ranks
from ddp_lessons.exercises.numeric_answers import numbers, plain
from ddp_lessons.text import count

Merge = Callable[[int, int, int, int, int, int], Any]
FixedLength = Callable[[int, int, int, int, int], Any]
Job = tuple[int, int, int, int]  # samples, batch, first and last epoch
Streams = list[list[list[int]]]  # the batches of each rank

STREAMS: dict[tuple[int, int], tuple[Job, ...]] = {  # by ranks of a machine, and machines
    (3, 1): ((11, 2, 0, 3), (12, 3, 2, 4), (2, 1, 0, 2)),
    (2, 2): ((20, 2, 1, 4),),
    (1, 1): ((7, 3, 0, 3),),
}
WITHOUT_STEP: dict[tuple[int, int], Job] = {(3, 1): (11, 5, 0, 2), (2, 2): (20, 16, 0, 2)}


@in_group
def _merged(rank: int, merge: Merge, jobs: Sequence[Job]) -> list[Any]:
    return [_batches(merge, total, rank, *of_epochs) for total, *of_epochs in jobs]


def _batches(merge: Merge, total: int, rank: int, *of_epochs: int) -> Any:
    """The batches as lists, or the text of something else; an exception as a tuple."""
    try:
        answer = plain(merge(total, rank, dist.get_world_size(), *of_epochs))
        if not isinstance(answer, Iterable) or isinstance(answer, str | Mapping):
            return repr(answer)
        batches = [numbers(batch) for batch in answer]
    except Exception as error:
        return type(error).__name__, str(error)
    return batches if all(map(_is_list, batches)) else repr(batches)


def _is_list(batch: object) -> bool:
    return isinstance(batch, list) and all(isinstance(sample, int) for sample in batch)


@exercise(
    "Which object knows the order of an epoch, and which call tells it the epoch? Cut each epoch's "
    "order into batches before you go on to the next.",
    "`DistributedSampler(range(total), world_size, rank)`, then for each epoch `set_epoch(epoch)` "
    "and `list(sampler)`. `len(order) // batch` batches are full.",
    "For each epoch of `range(first, last)`, `batches += [order[i : i + batch] for i in range(0, "
    "len(order) - batch + 1, batch)]`. If `len(sampler) < batch`, raise a ValueError.",
)
def check_merge(merge: Merge) -> str:
    """Check `merge(total, rank, world_size, batch, first, last)` against DistributedSampler."""
    for (nprocs, nnodes), jobs in STREAMS.items():
        without = [WITHOUT_STEP[nprocs, nnodes]] if (nprocs, nnodes) in WITHOUT_STEP else []
        run = run_ranks(_merged, (merge, [*jobs, *without]), nprocs, nnodes)
        answers = list(zip(*run.values, strict=True))
        for job, answer in zip(jobs, answers, strict=False):
            _judge_stream(job, answer)
        for job in without:
            _judge_without_step(job, answers[-1])
    return "one stream, each epoch with its own order, on 1 and 3 ranks and on 2 machines with 2."


def _named(job: Job, ranks: int) -> str:
    total, batch, first, last = job
    samples, on = count(total, "sample"), count(ranks, "rank")
    return f"{samples} on {on}, batches of {batch}, epochs {first} to {last - 1}"


def _judge_stream(job: Job, answers: Sequence[Any]) -> None:
    where = _named(job, len(answers))
    for rank, answer in enumerate(answers):
        if isinstance(answer, list):
            continue
        raised = isinstance(answer, tuple)
        seen = f"rank {rank} {'raised ' + ': '.join(answer) if raised else 'returned ' + answer}"
        mistakes = {
            "Each epoch has at least one full batch here. How many samples has a *rank*, padding "
            "included?": raised and answer[0] == "ValueError",
            "It gets six whole numbers, and has to do with any of them.": raised,
            "Is `return` missing?": answer == "None",
            "Return a list of batches, and each batch is a list of whole numbers.": True,
        }
        judge(f"{where}: {seen}.", mistakes)
    streams = list(answers)
    if streams != _streams(job, len(streams)):
        _judge_wrong_stream(where, job, streams)


def _streams(
    job: Job,
    ranks: int,
    *,
    begin: int | None = None,
    by_epoch: int = 1,
    by_rank: int = 0,
    late: bool = False,
    crosses: bool = False,
    short: bool = False,
    **of_sampler: bool,
) -> Streams:
    """The right batches of each rank, or those of a typical mistake.

    The sampler is told the epochs from `begin` on, `by_epoch` more each time, and `by_rank` more on
    each rank; `late`, after it gave the epoch's order.
    """
    total, batch, first, last = job
    streams = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(total), ranks, rank, **of_sampler)
        orders = [list(sampler)] if late else []
        for epoch in range(first, last - late):
            number = (first if begin is None else begin) + by_epoch * (epoch - first)
            sampler.set_epoch(number + by_rank * rank)
            orders.append(list(sampler))
        orders = [list(chain(*orders))] if crosses else orders
        streams.append([cut for order in orders for cut in _cut(order, batch, short)])
    return streams


def _cut(order: list[int], batch: int, short: bool) -> list[list[int]]:
    cuts = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [cut for cut in cuts if short or len(cut) == batch]


def _judge_wrong_stream(where: str, job: Job, streams: Streams) -> None:
    total, batch, first, last = job
    ranks = len(streams)

    def like(**mistake: Any) -> bool:
        return streams == _streams(job, ranks, **mistake)

    lengths = [len(cut) for stream in streams for cut in stream]
    counts = [len(stream) for stream in streams]
    right = len(_streams(job, ranks)[0])
    of_epoch = right // (last - first)
    again = _seen_again(streams, of_epoch)
    more = streams == _streams((total, batch, first, last + 1), ranks)
    mistakes = {
        "All epochs have the same order. The sampler does not count epochs: tell it the number of "
        "each one.": like(begin=0, by_epoch=0) or like(by_epoch=0),
        "Each epoch has the shuffle of the one before: `set_epoch` comes too late, as the order is "
        "made when you loop over the sampler.": like(late=True),
        "The epochs are counted from 0: a run that goes on with epoch "
        f"{first} begins with `first`.": like(begin=0),
        "A batch has samples of two epochs: cut each epoch's order by itself, and drop what does "
        "not fill a batch.": like(crosses=True) or like(crosses=True, short=True),
        "A batch that is not full must be dropped, in each epoch.": like(short=True),
        "Each rank shuffles by a number of its own, so that their parts do not fit together: all "
        "ranks set the same epoch.": like(by_rank=1),
        "The samples are not shuffled. DistributedSampler shuffles by seed and epoch.": like(
            shuffle=False
        ),
        "The sampler has to pad: with its `drop_last` a rank may be short of the one sample that "
        "fills a batch.": like(drop_last=True),
        f"These are {_batches_text(counts[0])} of {lengths[:1]} samples. The batch is "
        "that of one rank: do not divide it by world_size again.": (
            lengths[:1] == [max(1, batch // ranks)] and batch // ranks != batch
        ),
        "Ranks have different numbers of batches: those with more would wait in their last one. "
        "Pad, as DistributedSampler does.": len(set(counts)) > 1,
        "A batch that is not full must be dropped, in each epoch; all others have `batch` "
        "samples.": set(lengths) != {batch},
        f"Epoch {last} is one too many: `last` is the first epoch that does not run.": more,
        f"Sample {again} comes twice in one epoch: this is one long shuffle of all epochs, not an "
        "order for each of them.": again is not None,
        f"Rank 0 has {_batches_text(counts[0])}; {count(last - first, 'epoch')} with "
        f"{of_epoch} each make {right}.": counts[0] != right,
        f"DistributedSampler's order is different: rank 0 has {_streams(job, ranks)[0]}.": True,
    }
    judge(f"{where}: rank 0 has {streams[0]}.", mistakes)


def _batches_text(number: int) -> str:
    return f"{number} batch{'es' * (number != 1)}"


def _seen_again(streams: Streams, of_epoch: int) -> int | None:
    """A sample that one rank has twice within an epoch."""
    for stream in streams:
        for start in range(0, len(stream), of_epoch):
            seen = Counter(chain(*stream[start : start + of_epoch]))
            if again := [sample for sample, times in seen.items() if times > 1]:
                return min(again)
    return None


def _judge_without_step(job: Job, answers: Sequence[Any]) -> None:
    for rank, answer in enumerate(answers):
        if isinstance(answer, tuple) and answer[0] == "ValueError":
            continue
        raised = isinstance(answer, tuple)
        did = f"raised {answer[0]}" if raised else f"returned {answer}"
        mistakes = {
            "Raise a ValueError: the value is what is wrong.": raised,
            "No rank can fill a batch. A loop over nothing is no error in Python: raise a "
            "ValueError. (Ask how many samples a *rank* has.)": True,
        }
        judge(f"{_named(job, len(answers))}: rank {rank} {did}.", mistakes)


LENGTHS: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {  # by ranks of a machine, machines
    (2, 1): ((10, 8), (10, 12), (12, 4)),
    (2, 2): ((12, 12), (3, 8)),
    (1, 1): ((7, 5),),
}
EPOCHS = 8
RESUMED = 6  # the epoch that is asked for first
Epochs = list[list[Any]]  # [rank][epoch]


@in_group
def _fixed(rank: int, fixed_length: FixedLength, jobs: Sequence[tuple[int, int]]) -> list[Any]:
    done = []
    for total, length in jobs:
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        np.random.seed(100 + rank)
        before = _generators()
        epochs = [
            numbers(fixed_length(total, length, rank, dist.get_world_size(), epoch))
            for epoch in (RESUMED, *range(EPOCHS))
        ]
        epochs = [epoch if _is_list(epoch) else repr(epoch) for epoch in epochs]
        touched = [name for name, state in _generators().items() if before[name] != state]
        done.append((epochs[0], epochs[1:], touched))
    return done


def _generators() -> dict[str, bytes]:
    """The states of the global generators."""
    states = {
        "torch": torch.get_rng_state().numpy(),
        "Python": random.getstate(),
        "NumPy": np.random.get_state(),
    }
    return {name: pickle.dumps(state) for name, state in states.items()}


@exercise(
    "Think of one endless stream: a shuffled pass over all images, then another one, and so on. "
    "Which stretch of it belongs to epoch e?",
    "Epoch e has the places `e * length` to `(e + 1) * length - 1` of the stream. Place p is in "
    "pass `p // total`. Who can work out that pass's order without having seen the passes before?",
    "For each place in `range(epoch * length + rank, (epoch + 1) * length, world_size)`: `number, "
    "index = divmod(place, total)`, then `torch.randperm(total, generator=torch.Generator()"
    ".manual_seed(number))[index].item()`.",
)
def check_fixed_length(fixed_length: FixedLength) -> str:
    """Check `fixed_length(total, length, rank, world_size, epoch)` over eight epochs."""
    for (nprocs, nnodes), jobs in LENGTHS.items():
        run = run_ranks(_fixed, (fixed_length, jobs), nprocs, nnodes)
        for (total, length), answers in zip(jobs, zip(*run.values, strict=True), strict=True):
            resumed, epochs, touched = map(list, zip(*answers, strict=True))
            on = count(nprocs * nnodes, "rank")
            where = f"{count(total, 'image')}, {length} places, {on}"
            _judge_lists(where, epochs, total, length)
            _judge_generators(where, touched)
            _judge_resumed(where, resumed, epochs)
            _judge_fair(where, epochs, total)
            _judge_passes(where, epochs, total, length)
    return (
        "fair after each of 8 epochs, shuffled, and the same after a resume, on 1, 2 and 4 ranks."
    )


def _judge_lists(where: str, epochs: Epochs, total: int, length: int) -> None:
    each = length // len(epochs)
    for rank, of_rank in enumerate(epochs):
        for epoch, samples in enumerate(of_rank):
            listed = isinstance(samples, list)
            strange = [n for n in samples if not 0 <= n < total] if listed else []
            mistakes = {
                "Is `return` missing?": samples == "None",
                "Return a list of whole numbers: the samples of this rank in this epoch.": (
                    not listed
                ),
                f"There is no image {strange[:1]}: they count from 0 to {total - 1}. A place is "
                "not yet an image.": strange,
                f"All ranks together have {length} places, so each has {each}. If all took "
                "`length`, the batch would be that many times as large.": (
                    len(epochs) > 1 and len(samples) == length
                ),
                f"Each rank has {each} of the {length} places, in every epoch.": (
                    len(samples) != each
                ),
            }
            judge(f"{where}: rank {rank} has {samples} in epoch {epoch}.", mistakes)


def _judge_generators(where: str, touched: list[list[str]]) -> None:
    for rank, names in enumerate(touched):
        if names:
            raise Wrong(
                f"{where}: {names[0]}'s global generator was in a different state afterwards on "
                f"rank {rank}.",
                "That generator belongs to augmentation and has a different seed on each rank. "
                "Drawn from, it gives each rank a different list; seeded alike, it makes all ranks "
                "augment alike. Take a generator of your own: "
                "`torch.Generator().manual_seed(...)`.",
            )


def _judge_fair(where: str, epochs: Epochs, total: int) -> None:
    counts: Counter[int] = Counter()
    for epoch, shards in enumerate(zip(*epochs, strict=True)):
        counts.update(chain(*shards))
        times = [counts[image] for image in range(total)]
        most, least = max(times), min(times)
        if most - least < 2:
            continue
        alike = len(shards) > 1 and len({tuple(sorted(shard)) for shard in shards}) == 1
        still = epoch > 0 and all(of_rank[0] == of_rank[epoch] for of_rank in epochs)
        mistakes = {
            "All ranks have the same images. Let each take its own places of one "
            "list: `rank`, `rank + world_size` and so on.": alike,
            "Each epoch begins again with the same images. It should go on where the epoch before "
            "it stopped.": still,
            "In epoch 0 the ranks go through one list of all images, from its beginning, and each "
            "place goes to one rank. Is it the same list on all ranks?": epoch == 0,
            "An epoch should go on where the one before it stopped, and a pass over the images "
            "should end before the next begins. A new shuffle in each epoch is fair only on "
            "average, and places that two epochs share count twice.": True,
        }
        ended = f"after {count(epoch + 1, 'epoch')}"
        seen = f"image {times.index(most)} was seen {count(most, 'time')}, image "
        judge(f"{where}: {ended} {seen}{times.index(least)} {count(least, 'time')}.", mistakes)


def _judge_resumed(where: str, resumed: list[Any], epochs: Epochs) -> None:
    for rank, samples in enumerate(resumed):
        if samples != epochs[rank][RESUMED]:
            raise Wrong(
                f"{where}: asked for epoch {RESUMED} first, rank {rank} got {samples}; after "
                f"epochs 0 to {RESUMED - 1} it got {epochs[rank][RESUMED]}.",
                "A resumed run has not gone through the epochs before. What an epoch has must "
                "follow from its number alone: keep nothing from call to call.",
            )


def _judge_passes(where: str, epochs: Epochs, total: int, length: int) -> None:
    """Compare whole passes, where each begins with an epoch."""
    if total % length:
        return
    each = total // length
    passes = [[of_rank[n : n + each] for of_rank in epochs] for n in range(0, EPOCHS - 1, each)]
    for number, (one, other) in enumerate(pairwise(passes)):
        if one == other:
            raise Wrong(
                f"{where}: passes {number} and {number + 1} have the same order; rank 0 has "
                f"{one[0]}.",
                "Fair, but not shuffled anew: the order of a pass has to depend on its number.",
            )
