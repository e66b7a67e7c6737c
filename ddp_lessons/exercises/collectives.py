"""The checks of lessons 03 and 03b: a mean, predicted tensors; passing on and adding in a ring."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ddp_lessons import RankResult, Run, Span, span
from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.exercises.numeric_answers import near, numbers
from ddp_lessons.text import count
from ddp_lessons.wire.ops import COLLECTIVES, RECVS, SENDS

Numbers = list[float]
MEANS: tuple[tuple[str, Sequence[Sequence[float]]], ...] = (
    ("2 ranks with integers", [[1, 2, 7], [2, 2, 2]]),
    ("3 ranks", [[0.5, 1.0], [2.0, 4.0], [0.0, 1.0]]),
    ("1 rank", [[3, 4]]),
)

LATE = 0.1  # seconds


@in_group
def _mean_of(
    rank: int, mean_over_ranks: Callable[[torch.Tensor], Any], rows: Sequence[Sequence[float]]
) -> tuple[Any, bool]:
    x = torch.tensor(rows[rank])
    before = x.clone()
    time.sleep(LATE if rank == 1 else 0)  # whoever does not wait for the sum has none
    mean = numbers(mean_over_ranks(x))
    return mean, torch.equal(x, before)


@exercise(
    "Which collective gives the sums to all ranks, and what makes a mean of a sum?",
    "`all_reduce` works in place, and integers have no fractions. Give it a copy that has.",
    "`total = x.clone().float()`, all_reduce it, and divide by `dist.get_world_size()`.",
)
def check_mean_over_ranks(mean_over_ranks: Callable[[torch.Tensor], Any]) -> str:
    """Check that `mean_over_ranks(x)` is the elementwise mean over ranks and keeps x unchanged."""
    for what, rows in MEANS:
        run = run_ranks(_mean_of, (mean_over_ranks, rows), nprocs=len(rows))
        _judge_mean(what, rows, run.values)
    return "right for integers, for fractions and for a single rank, and `x` stayed as it was."


def _judge_mean(what: str, rows: Sequence[Sequence[float]], values: list[tuple[Any, bool]]) -> None:
    sums = [sum(column) for column in zip(*rows, strict=True)]
    means = [number / len(rows) for number in sums]
    for rank, (mean, unchanged) in enumerate(values):
        x = f"{what}, x is {rows[rank]} on rank {rank}"
        is_row = isinstance(mean, list) and len(mean) == len(means)
        row = [n for n in mean if isinstance(n, int | float)] if is_row else []
        if len(row) < len(means) or not all(
            near(a, b, 1e-4) for a, b in zip(row, means, strict=True)
        ):
            mistakes = {
                "Every rank must return the mean; is `return` under an `if`?": rank > 0
                and mean is None,
                "Rank 0 has the mean, and this rank has the sum. Every rank must divide: is that "
                "under an `if`?": rank > 0 and row == sums,
                "Rank 0 has the mean, and the others do not. `reduce` gives the sums to `dst` "
                "only; `all_reduce` gives them to all.": rank > 0,  # rank 0's is right
                "Return a tensor with as many numbers as x. (`dist.all_reduce` returns None: the "
                "sums are in the tensor that it was given.)": len(row) < len(means),
                "That is the sum. all_reduce adds up; to get a mean, divide by the world size.": (
                    row == sums
                ),
                "That is what this rank had itself, divided: nothing of the others had come. Is "
                "there a collective, and with `async_op=True` a `wait()` before the sum is read?": (
                    row == [number / len(rows) for number in rows[rank]]
                ),
                "That is what this rank had itself. Only a collective brings in the others.": (
                    row == list(rows[rank])
                ),
                "Divide by the number of ranks, `dist.get_world_size()`, which is not 2 in every "
                "job.": len(rows) != 2 and row == [number / 2 for number in sums],
                "Integers cannot hold the mean: `x.float()` before the collective, `/` after "
                "it.": all(float(number).is_integer() for number in row),
                "Add up over all ranks first, then divide by the number of ranks (not of "
                "elements).": True,
            }
            judge(f"{x}: you returned {mean!r}, not {means}.", mistakes)
        if not unchanged:
            raise Wrong(
                f"{x}: the result is right, but x was changed.",
                "`all_reduce` puts the sums into the tensor that it is given. Give it a copy, "
                "`x.clone()`. (`x.float()` is a copy only if x had another type; of floats it "
                "returns x itself.)",
            )


@in_group
def _after_each(rank: int, jobs: Mapping[str, Sequence[Numbers]]) -> dict[str, Numbers | None]:
    """What this rank has after each real collective."""
    return {op: _after(rank, op, before) for op, before in jobs.items()}


def _after(rank: int, op: str, before: Sequence[Numbers]) -> Numbers | None:
    world_size, is_root = dist.get_world_size(), rank == 0
    x = torch.tensor(before[rank])
    pieces = list(x.chunk(world_size))
    room = [torch.empty_like(x) for _ in range(world_size)]
    piece = torch.empty_like(pieces[0])
    arguments = {
        "broadcast": (x, 0),
        "all_reduce": (x,),
        "reduce": (x, 0),
        "all_gather": (room, x),
        "gather": (x, room if is_root else None, 0),
        "scatter": (piece, pieces if is_root else None, 0),
        "reduce_scatter": (piece, pieces),
    }
    getattr(dist, op)(*arguments[op])
    if op in ("reduce", "gather") and not is_root:
        return None
    result = torch.cat(room) if "gather" in op else piece if "scatter" in op else x
    row: Numbers = result.tolist()
    return row


@exercise(
    "Write down who has what in the pictures above, and take rank 0 where the picture has another.",
    "With `n = len(before)` and `sums = [sum(c) for c in zip(*before)]`, each op is one line; rank "
    "r's piece is `row[r * k : (r + 1) * k]` with `k = len(row) // n`.",
)
def check_predict(predict: Callable[..., Any]) -> str:
    """Check `predict(op, before)` against real ranks' tensors after each collective."""
    drawn = random.Random(3)
    because = f"It takes a name, one of {', '.join(OPS)}, and a list of lists of numbers."
    for ranks, length in ((2, 4), (3, 3)):
        jobs = {
            op: [[drawn.randrange(100) for _ in range(length)] for _ in range(ranks)] for op in OPS
        }
        values = run_ranks(_after_each, (jobs,), nprocs=ranks).values
        for op, before in jobs.items():
            given = [list(row) for row in before]
            predicted = call(predict, op, given, because=because)
            _judge_prediction(op, before, [value[op] for value in values], predicted)
    return "right for all seven collectives on 2 and on 3 ranks."


OPS = {
    "broadcast": "All ranks, `src` too, have what `src` had.",
    "all_reduce": "All ranks have the sums, number by number.",
    "reduce": "Only `dst` has the sums. What is in the others' tensors does not count: None.",
    "all_gather": "All ranks have all tensors one after the other, in the order of ranks.",
    "gather": "Only `dst` has all tensors one after the other; the others have nothing: None.",
    "scatter": "Rank r has piece r of what `src` had, and nothing of its own.",
    "reduce_scatter": "Rank r has the sums of piece r only.",
}


def _judge_prediction(op: str, before: Any, after: list[Any], predicted: Any) -> None:
    what = f"{op} of {before}"
    is_listed = isinstance(predicted, Iterable) and not isinstance(predicted, str | Mapping)
    rows = [numbers(row) for row in predicted] if is_listed else []
    if len(rows) != len(after):
        raise Wrong(
            f"{what}: you returned {rows or predicted!r}.",
            f"Return one list for each of the {len(after)} ranks. Is this op missing?",
        )
    for rank, (have, said) in enumerate(zip(after, rows, strict=True)):
        if have != said:
            raise Wrong(f"{what}: rank {rank} has {have}; you said {said!r}.", OPS[op])


ANSWER = "answer"  # the span around the learner's function
GATHERS = ((2, 2), (4, 3), (3, 1), (1, 2))  # (ranks, length of a piece)
BLANK = -1.0


@in_group
def _gathered(
    rank: int, ring_all_gather: Callable[[list[torch.Tensor]], object], length: int
) -> list[Numbers]:
    """The list after the learner's all_gather."""
    pieces = [torch.full((length,), BLANK) for _ in range(dist.get_world_size())]
    pieces[rank] = torch.tensor(_piece(rank, length))
    with span(ANSWER):
        ring_all_gather(pieces)
    dist.barrier()  # whoever does too little waits here: the others' wait is seen as a hang
    return [piece.tolist() for piece in pieces]


def _piece(rank: int, length: int) -> Numbers:
    return [10.0 * rank + place for place in range(length)]


@exercise(
    "Your own piece first. What can you send in the next step that your neighbour does not have?",
    "What has just come. In step s, rank r sends piece r - s to the next rank and gets piece "
    "r - s - 1 from the previous one, all modulo the world size.",
    "n - 1 times: `isend` of `pieces[(rank - s) % n]` to `(rank + 1) % n`, `recv` into "
    "`pieces[(rank - s - 1) % n]` from `(rank - 1) % n`, then `wait()`.",
)
def check_ring_all_gather(ring_all_gather: Callable[[list[torch.Tensor]], object]) -> str:
    """Check `ring_all_gather(pieces)`: all pieces everywhere, messages to neighbours, few bytes."""
    for ranks, length in GATHERS:
        run = run_ranks(_gathered, (ring_all_gather, length), nprocs=ranks, check=False)
        if stuck(run):
            _explain_hang(run)
        run.raise_for_failure()
        _judge_gathered(run, ranks, length)
    return "all pieces on 1 to 4 ranks, with neighbours only, and each passed on once."


def _judge_gathered(run: Run, ranks: int, length: int) -> None:
    what = f"{count(ranks, 'rank')}, {count(ranks, 'piece')} of {length}: "
    sends = _sends_by_hand(run, what)
    right, blank = [_piece(rank, length) for rank in range(ranks)], [BLANK] * length
    for rank, have in enumerate(run.values):
        mistakes = {
            "The list must have one piece for each rank; fill the tensors in it.": (
                len(have) != ranks
            ),
            "The list is as it was. Fill the tensors in it; what is returned does not count.": (
                have == [piece if r == rank else blank for r, piece in enumerate(right)]
            ),
            "Its own piece must stay, in its place.": have[rank : rank + 1] != [right[rank]],
            "One step brings the piece of the previous rank. There are n - 1 steps, and what came "
            "in one is passed on in the next.": blank in have,
            "`pieces[r]` is for rank r's. What comes in step s set out from rank - s - 1.": True,
        }
        if have != right:
            judge(f"{what}rank {rank} has {have}, not {right}.", mistakes)
    _judge_neighbours(sends, what, ranks)
    most = (ranks - 1) * length * 4
    sent = max(sum(s.nbytes or 0 for s in sends if s.rank == rank) for rank in range(ranks))
    if sent > most:
        raise Wrong(
            f"{what}the pieces are right, but a rank sent {sent} bytes; {most} are enough.",
            "Send one piece in a step, the one that came last, and not all that you have.",
        )


RINGS = ((2, 4), (4, 10), (3, 2), (1, 5))  # (ranks, length)


@in_group
def _ring(
    rank: int, ring_all_reduce: Callable[[torch.Tensor], object], length: int
) -> tuple[Numbers, Numbers]:
    """The results of the learner's all_reduce and of `dist.all_reduce`."""
    x = torch.arange(length, dtype=torch.float32) + 100.0**rank
    same = x.clone()
    dist.all_reduce(same)
    with span(ANSWER):
        ring_all_reduce(x)
    return x.tolist(), same.tolist()


@exercise(
    "`x.tensor_split(world_size)` cuts into pieces that are views of x, also where the length is "
    "not divisible. In step s, rank r sends piece r - s to the next rank and gets piece r - s - 1.",
    "`isend` before `recv`, and `wait` after it. In the first n - 1 steps add what you got to your "
    "piece. Then pass on: in step s send piece r + 1 - s, and overwrite piece r - s.",
)
def check_ring_all_reduce(ring_all_reduce: Callable[[torch.Tensor], object]) -> str:
    """Check `ring_all_reduce(x)`: sums in place, messages to neighbours only, few bytes."""
    for ranks, length in RINGS:
        run = run_ranks(_ring, (ring_all_reduce, length), nprocs=ranks, check=False)
        if stuck(run):
            _explain_hang(run)
        run.raise_for_failure()
        _judge_ring(run, ranks, length)
    return "the sums on 1 to 4 ranks, with neighbours only, and less than twice the tensor sent."


def _explain_hang(run: Run) -> None:
    stuck = {s.op for s in run.spans() if s.t1_ns is None and s.op in (*SENDS, *RECVS)}
    mistakes = {
        "all wait in send.\n"
        "A `send` may wait until its `recv` has begun. If every rank sends first, nobody receives: "
        "start with `isend`, then `recv`, then `wait()`.": stuck == {"send"},
        f"sends and recvs do not match.\n{run.error}\n"
        "Each send needs its recv on the rank that it names, and each recv its send: as many, and "
        "in the same order. Do all ranks take all steps?": True,
    }
    judge(f"{run.world_size} ranks: ", mistakes)


def _judge_ring(run: Run, ranks: int, length: int) -> None:
    what = f"{count(ranks, 'rank')}, {length} numbers: "
    sends = _sends_by_hand(run, what)
    for rank, (have, expected) in enumerate(run.values):
        if have != expected:
            mistakes = {
                "x is as it was. Work on x itself or on views of it: what is returned, or done to "
                "a copy, does not count.": have == [n + 100.0**rank for n in range(length)],
                "That is the mean; all_reduce adds up and does not divide.": all(
                    near(a * ranks, b, 1e-2) for a, b in zip(have, expected, strict=True)
                ),
                "After the first round each piece is complete on one rank only; after the second "
                "everywhere. Work on views of x, so that x itself changes; check which piece goes "
                "to whom in each step.": True,
            }
            judge(
                f"{what}rank {rank} has {have}; after dist.all_reduce it has {expected}.", mistakes
            )
    _judge_neighbours(sends, what, ranks)
    most = 2 * (ranks - 1) * -(-length // ranks) * 4
    sent = max(sum(s.nbytes or 0 for s in sends if s.rank == rank) for rank in range(ranks))
    if sent > most:
        raise Wrong(
            f"{what}the sums are right, but a rank sent {sent} bytes; {most} are enough.",
            "Passing whole tensors round sends each n - 1 times. Send pieces: 2 (n - 1) of them, "
            "each an n-th of the tensor, however many ranks there are.",
        )


def _sends_by_hand(run: Run, what: str) -> list[Span]:
    """The sends of the learner's function, which may call no collective."""
    calls = [s for rank in run.ranks for s in _made_by_answer(rank)]
    used = {str(s.op) for s in calls if s.op in COLLECTIVES}
    if used:
        raise Wrong(f"{what}you called {', '.join(sorted(used))}.", "Build it by hand.")
    return [s for s in calls if s.op in SENDS and s.kind == "comm"]


def _judge_neighbours(sends: list[Span], what: str, ranks: int) -> None:
    for s in sends:
        if (int(s.peer or 0) - s.rank) % ranks not in (1, ranks - 1):
            raise Wrong(
                f"{what}rank {s.rank} sent to rank {s.peer}.",
                "In a ring each rank talks to the next and the previous one only: then all links "
                "work at once, and none carries everything.",
            )


def _made_by_answer(rank: RankResult) -> Iterator[Span]:
    """The spans that the rank recorded in the learner's function."""
    answer = next(s for s in rank.spans if s.name == ANSWER)
    return (s for s in rank.spans if answer.t0_ns <= s.t0_ns < (answer.t1_ns or 0))
