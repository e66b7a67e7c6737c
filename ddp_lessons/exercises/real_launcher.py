"""The checks of real_2: the processes that a machine starts, and scores of unequally many clips."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
from ddp_lessons.exercises.numeric_answers import plain
from ddp_lessons.text import count

GIVEN = "It gets three whole numbers, and all that it needs follows from them."
SHAPES = ((1, 2), (2, 3))  # (num_proc, num_shards)


@exercise(
    "Which number says whether there is anybody to join: the processes of this machine, or those "
    "of the whole job?",
    "The job has `num_proc * num_shards` ranks. shard_id machines stand before this one, each with "
    "num_proc ranks.",
    "`None` if `num_proc * num_shards` is 1; else, for each local_rank of `range(num_proc)`, the "
    "pair `(shard_id * num_proc + local_rank, num_proc * num_shards)`.",
)
def check_to_start(to_start: Callable[[int, int, int], Any]) -> str:
    """Check `to_start(num_proc, shard_id, num_shards)` by RANK and WORLD_SIZE of real ranks."""

    def compare(_: int) -> tuple[int, int, Any]:
        names = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")
        num_proc, shard_id, world_size = (int(os.environ[name]) for name in names)
        hidden = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        answer = to_start(num_proc, shard_id, world_size // num_proc)
        return shard_id, int(hidden["LOCAL_RANK"]), _pairs(answer)

    alone = call(to_start, 1, 0, 1, because=GIVEN)
    if alone is not None:
        raise Wrong(
            f"one device on one machine: to_start(1, 0, 1) gave {alone!r}, not None.",
            "A job of one rank has nobody to join: `func` is called where you are.",
        )
    one_machine = _pairs(call(to_start, 2, 0, 1, because=GIVEN))
    _judge_starts(2, 1, [(0, local_rank, one_machine) for local_rank in range(2)])
    for num_proc, num_shards in SHAPES:
        run = run_ranks(compare, nprocs=num_proc, nnodes=num_shards)
        _judge_starts(num_proc, num_shards, run.values)
    return "right on 1 machine with 1 or 2 devices, 3 machines with 2 each, and 2 with 1 each."


def _pairs(answer: Any) -> Any:
    """An answer with plain numbers; a list of pairs as a list of tuples."""
    answer = plain(answer)
    if not isinstance(answer, list | tuple):
        return answer
    return [tuple(map(plain, one)) if isinstance(one, list | tuple) else one for one in answer]


def _judge_starts(num_proc: int, num_shards: int, values: list[tuple[int, int, Any]]) -> None:
    world_size = num_proc * num_shards
    for rank, (shard_id, local_rank, answer) in enumerate(values):
        given = f"to_start({num_proc}, {shard_id}, {num_shards}) gave {answer!r}"
        first = rank - local_rank
        right = [(first + n, world_size) for n in range(num_proc)]
        if answer == right and all(type(n) is int for pair in answer for n in pair):
            continue
        where = f"{count(num_shards, 'machine')} with {count(num_proc, 'device')}: {given}"
        listed = isinstance(answer, list) and all(
            isinstance(pair, tuple) and [*map(type, pair)] == [int, int] for pair in answer
        )
        pairs = answer if listed else []
        ranks, worlds = [pair[0] for pair in pairs], {pair[1] for pair in pairs}
        judge(where, _start_mistakes(answer, listed, ranks, worlds, first, num_proc, num_shards))


def _start_mistakes(
    answer: Any,
    listed: bool,
    ranks: Sequence[int],
    worlds: set[int],
    first: int,
    num_proc: int,
    num_shards: int,
) -> dict[str, object]:
    world_size, right = num_proc * num_shards, list(range(first, first + num_proc))
    return {
        ".\nThe condition must ask for the ranks of the job, not of this machine: a plain call on "
        "each of two machines trains two models apart, and no error says so.": (
            answer is None and num_proc == 1
        ),
        ".\nIs `return` missing? The job has more than one rank, so processes must be "
        "started.": answer is None,
        ".\nReturn a list with a pair of whole numbers, (rank, world_size), for each process of "
        "this machine.": not listed,
        f", {count(len(ranks), 'pair')}.\nEach machine starts its own processes only: num_proc of "
        "them.": len(ranks) != num_proc,
        ".\nEach pair has the rank first, then the world size.": (
            list(worlds) != [world_size] and set(ranks) == {world_size}
        ),
        f"; the job has {world_size} ranks.\nThe world size counts the processes of all machines, "
        "num_proc * num_shards: a group waits until so many have come.": worlds != {world_size},
        f"; rank {first} of the job has local rank 0 here.\nRanks are counted from 0.": (
            first == 0 and [rank - 1 for rank in ranks] == right
        ),
        f"; this machine's ranks are {right}.\nThe local rank begins again at 0 on every machine. "
        "Two processes with one rank cannot join: count the ranks of the machines before this "
        "one.": ranks == list(range(num_proc)),
        f"; this machine's ranks are {right}.\nThe order is that of the local ranks.": sorted(ranks)
        == right,
        f"; this machine's ranks are {right}.\nshard_id machines with num_proc ranks each come "
        "before this one.": True,
    }


CLASSES = 2
Parts = tuple[tuple[int, ...], ...]  # the ids that every rank has
UNEQUAL: dict[str, Parts] = {
    "three ranks with 3, 2 and 2 clips": ((0, 3, 6), (1, 4), (5, 2)),
    "three ranks, one of them without a clip": ((2, 1), (), (0,)),
    "three ranks, two of which have clip 0": ((0, 3), (1, 0), (2,)),
}
EQUAL: dict[str, Parts] = {"two ranks with 2 clips each": ((0, 2), (1, 3))}
ALONE = (2, 0, 1)


@exercise(
    "`all_gather` needs tensors of one shape. Which call sends anything? And what tells you where "
    "a row belongs?",
    "`dist.all_gather_object(parts, (ids, scores))`, or counts first and rows padded to the "
    "largest count, which are cut off again. Then put each row where its id says.",
    "Gather the pairs (in a group: `parts = [None] * dist.get_world_size()`; else `parts = [(ids, "
    "scores)]`), then `torch.cat` the ids and the scores, make `rows = dict(zip(ids.tolist(), "
    "scores))`, and stack `rows[i] for i in sorted(rows)`.",
)
def check_gather_scores(gather_scores: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `gather_scores(ids, scores)` with unequal counts, none, twins, and without a group."""

    @in_group
    def gather(rank: int, cases: Sequence[Parts]) -> list[Any]:
        return [_as_lists(gather_scores(*_part(ids_of[rank]))) for ids_of in cases]

    for nprocs, cases in ((2, EQUAL), (3, UNEQUAL)):
        counts = (
            "different counts, also 0, on 3 ranks" if nprocs == 3 else "2 clips on each of 2 ranks"
        )
        run = run_ranks(gather, (list(cases.values()),), nprocs, check=False)
        if run.error is not None:
            because = (
                "`all_gather` needs tensors of one shape on all ranks, and all ranks must make the "
                "same calls. Send objects, or pad to the largest count."
                if stuck(run) or not errors(run)
                else "Read the error first. Each rank gets (n,) ids and (n, classes) scores, and n "
                "may be 0."
            )
            raise Wrong(f"{counts}: {run.error}", because)
        for number, (where, ids_of) in enumerate(cases.items()):
            for rank, values in enumerate(run.values):
                _judge_scores(f"{where}: rank {rank} ", values[number], ids_of)
    alone = call(
        gather_scores,
        *_part(ALONE),
        because="Without a process group no collective can be called: ask `dist.is_initialized()`.",
    )
    _judge_scores("without a group, it ", _as_lists(alone), (ALONE,))
    return "all clips, each once and by id, with unequal counts, on 2 and 3 ranks and in no group."


def _score(clip: int) -> list[float]:
    return [clip + 0.25, -1.0 - clip]


def _part(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([_score(clip) for clip in ids]).reshape(len(ids), CLASSES)
    return torch.tensor(ids, dtype=torch.int64), scores


def _as_lists(answer: Any) -> Any:
    return answer.tolist() if isinstance(answer, Tensor) else repr(answer)


def _judge_scores(where: str, value: Any, ids_of: Sequence[Sequence[int]]) -> None:
    given = [clip for ids in ids_of for clip in ids]
    right = [_score(clip) for clip in sorted(set(given))]
    if value == right:
        return
    rows = value if isinstance(value, list) and all(isinstance(r, list) for r in value) else []
    own = [[_score(clip) for clip in ids] for ids in ids_of]
    missing = [clip for clip in sorted(set(given)) if _score(clip) not in rows]
    foreign = [row for row in rows if row not in right]
    mistakes = {
        f"returned {value}.\nReturn a tensor on every rank, not on one only, and do not print "
        "it.": not isinstance(value, list),
        f"returned a tensor {value}.\nThe shape must be (clips, classes): one row for each "
        "clip.": not rows,
        "returned its own scores only.\nThe scores of the other ranks must be gathered, too.": len(
            ids_of
        )
        > 1
        and bool(missing)
        and sorted(rows) in [sorted(o) for o in own],
        f"has the row {foreign[:1]}, which is no clip's.\nA clip that two ranks have counts once: "
        "do not add up what came twice.": bool(foreign) and len(given) > len(set(given)),
        f"has the row {foreign[:1]}, which is no clip's.\nRows that pad the shorter parts must "
        "be cut off again: gather the counts, too.": bool(foreign),
        f"has no scores of clip {missing[:1]}.\nNo clip may be lost: parts differ in length, so "
        "none may be cut to the shortest.": bool(missing),
        f"has {len(rows)} rows for {len(right)} clips.\nA clip that a sampler gave to two ranks "
        "counts once.": len(rows) > len(right),
        "has the clips in a different order.\nRow i belongs to clip i. The parts come in the order "
        "of the ranks, and a rank may have its clips in any order: sort by id.": True,
    }
    judge(where, mistakes)
