"""The checks of lesson 10: find the odd rank, stop together, use groups in the same order."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddp_lessons import RankResult, Run
from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.diagnosis.rank_state import lost_partner
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
from ddp_lessons.exercises.numeric_answers import is_number, number, number_or_text
from ddp_lessons.text import count, listed, ranks_text
from ddp_lessons.wire.ops import GROUP_CALLS

Made = tuple[str, str | None, int]  # the function, the tensor and the line of a call
Record = Sequence[Sequence[Made]]  # by rank
Finding = tuple[str, int]  # what is wrong, and the rank

MISSING, CALL, TENSOR = "missing", "other call", "other tensor"


class Patient(NamedTuple):
    """A run: what each rank calls, as `line:function:elements` in order, and what is wrong."""

    scripts: tuple[str, ...]
    finding: Finding | None


def _patient(finding: Finding | None, most: str, odd: str, *, ranks: int, rank: int) -> Patient:
    return Patient(tuple(odd if r == rank else most for r in range(ranks)), finding)


STEP = "7:broadcast:1 8:all_reduce:1 "
PATIENTS: tuple[Patient, ...] = (
    # Nothing is wrong: one rank takes its own branch of an `if`.
    _patient(None, "4:all_reduce:1 8:broadcast:1", "4:all_reduce:1 6:broadcast:1", ranks=3, rank=0),
    _patient((CALL, 0), "5:all_reduce:1 8:all_reduce:1",
             "5:all_reduce:1 7:barrier:0 8:all_reduce:1", ranks=4, rank=0),
    _patient((MISSING, 3), "5:all_reduce:1 " * 4, "5:all_reduce:1 " * 2, ranks=4, rank=3),
    # The difference shows later, and at the end two ranks are at the same line.
    _patient((CALL, 1), STEP * 3 + "9:all_reduce:1", STEP * 2 + "9:all_reduce:1", ranks=3, rank=1),
    _patient((TENSOR, 2), "5:all_reduce:2 5:all_reduce:2", "5:all_reduce:2 5:all_reduce:1",
             ranks=3, rank=2),
    # A rank calls from its own lines and then leaves.
    _patient((MISSING, 0), "4:all_reduce:1 8:broadcast:1 9:all_reduce:1",
             "4:all_reduce:1 6:broadcast:1", ranks=3, rank=0),
    _patient((CALL, 2), "5:all_reduce:1 6:broadcast:1 7:all_reduce:1 8:barrier:0",
             "5:all_reduce:1 7:all_reduce:1 8:barrier:0", ranks=4, rank=2),
)  # fmt: skip


def _parts(script: str) -> list[tuple[int, str, int]]:
    tokens = (token.split(":") for token in script.split())
    return [(int(line), op, int(size)) for line, op, size in tokens]


@in_group
def _perform(rank: int, scripts: Sequence[str]) -> None:
    for _, op, size in _parts(scripts[rank]):
        match op:
            case "barrier":
                dist.barrier()
            case "broadcast":
                dist.broadcast(torch.ones(size), src=0)
            case _:
                dist.all_reduce(torch.ones(size))
    time.sleep(0.2)  # until the others have left the last common call


@functools.cache
def records() -> tuple[tuple[tuple[Made, ...], ...], ...]:
    """The calls that each rank of each patient really made. The first call takes some seconds."""
    return tuple(map(_recorded, PATIENTS))


def _recorded(patient: Patient) -> tuple[tuple[Made, ...], ...]:
    ranks = len(patient.scripts)
    run = run_ranks(_perform, (patient.scripts,), nprocs=ranks, check=False)
    calls = [[c for c in of_rank if c.op not in GROUP_CALLS] for of_rank in Calls.of(run).of_rank]
    lines = [[line for line, _, _ in _parts(script)] for script in patient.scripts]
    return tuple(
        tuple((made.op, made.tensor, line) for made, line in zip(*of_rank, strict=False))
        for of_rank in zip(calls, lines, strict=True)
    )


@exercise(
    "Walk from call to call: `for n in range(max(map(len, calls)))`. What does each rank do there? "
    "`None` for a rank that has no n-th call is handy.",
    "At the first n at which the ranks do not all do the same, one of them is alone: look for the "
    "one whose function and tensor no other rank has. `collections.Counter` counts.",
    "If that one is `None`, the answer is `missing`; if its function is not that of the others, "
    "`other call`; else `other tensor`. With it goes the rank, `here.index(odd)`.",
)
def check_diagnose(diagnose: Callable[..., Any]) -> str:
    """Check `diagnose(calls)` on the calls of real ranks, in runs that hang, fail or go well."""
    for patient, record in zip(PATIENTS, records(), strict=True):
        calls = [list(of_rank) for of_rank in record]
        answer = call(diagnose, calls, because="It takes one list of calls for each rank.")
        answer = tuple(map(number, answer)) if isinstance(answer, tuple | list) else answer
        _judge_finding(record, patient.finding, answer)
    wrong = sum(patient.finding is not None for patient in PATIENTS)
    return f"right for {count(wrong, 'run')} that hung or failed, and for one that went well."


def _judge_finding(record: Record, finding: Finding | None, answer: Any) -> None:
    is_pair = isinstance(answer, tuple) and len(answer) == 2
    kind, rank = answer if is_pair else (None, None)
    is_rank = is_number(rank) and rank in range(len(record))
    is_told = is_rank and isinstance(kind, str)
    if answer is finding or (is_told and (kind, rank) == finding):
        return
    where, differ = _first_difference(record)
    seen = f"{differ} You returned {answer!r}."
    if finding is None:
        if not is_pair:
            raise Wrong(seen, "All is well there. Return None then, and nothing else.")
        raise Wrong(
            seen,
            "Nothing is wrong there. Lines do not matter: a call at one line meets a call at "
            "another, as in the branches of an `if`. Compare functions and tensors.",
        )
    looks = [_look(calls, where) for calls in record]
    usual = [r for r, look in enumerate(looks) if look == max(looks, key=looks.count)]
    mistakes = {
        "The ranks differ. Look at every call, also where a rank has none, and return what you "
        "found.": answer is None,
        f"Return None, or two things: what is wrong, and the rank: {finding!r}.": not is_pair,
        f"First what is wrong, then the rank: {finding!r}.": isinstance(rank, str)
        and rank == finding[0],
        f"The rank is right. Say {MISSING!r} if it has no such call, {CALL!r} if the function is "
        f"a different one, and {TENSOR!r} if only the tensor is. Here it is {finding[0]!r}; you "
        f"said {kind!r}.": is_rank and rank == finding[1],
        "That is no rank: the calls of rank r are `calls[r]`.": not is_rank,
        f"Rank {rank} came to that call. It may have got an error there, but it is the rank that "
        "did not come that has the bug.": finding[0] == MISSING,
        f"In its call {where + 1}, rank {rank} does what most do. Where the ranks stand in the end "
        "is not the point: the first call at which they differ is.": is_rank and rank in usual,
        "At the first call at which the ranks differ, one of them is alone with what it "
        "does.": True,
    }
    judge(seen, mistakes)


def _look(calls: Sequence[Made], n: int) -> tuple[str, str | None] | None:
    return calls[n][:2] if n < len(calls) else None


def _first_difference(record: Record) -> tuple[int, str]:
    """The first call at which ranks differ, or else the last; and what they do there."""
    numbers = range(max(map(len, record)))
    differ = (n for n in numbers if len({_look(calls, n) for calls in record}) > 1)
    n = next(differ, numbers[-1])
    sides: dict[str, list[int]] = {}
    for rank, calls in enumerate(record):
        sides.setdefault(_told(calls, n), []).append(rank)
    text = listed(f"{ranks_text(ranks)} {what}" for what, ranks in sides.items())
    return n, f"on {count(len(record), 'rank')}, call {n + 1}: {text}."


def _told(calls: Sequence[Made], n: int) -> str:
    if n >= len(calls):
        return "did not come"
    op, tensor, line = calls[n]
    return f"in {op}{f' of {tensor}' if tensor else ''}, line {line}"


GRADIENT = 17  # elements
UNKNOWN = "is not known before"
RETURNED = "train returned"  # printed by a rank
OF_EPOCH, OF_END = ("all_reduce", f"float32 ({GRADIENT},)"), ("barrier", None)
Losses = Sequence[Sequence[float]]  # [rank][epoch]
LOSSES: tuple[tuple[float, Losses], ...] = (  # with the bound
    (0.3, ((0.5, 0.2, 0.1, 0.1), (0.5, 0.5, 0.4, 0.2))),
    (0.5, ((0.9, 0.6, 0.4, 0.2), (0.5, 0.2, 0.1, 0.1))),
    (0.3, ((0.5, 0.4, 0.2, 0.1), (0.9, 0.8, 0.7, 0.6), (0.2, 0.1, 0.1, 0.1))),
    (0.2, ((0.5, 0.2, 0.1),) * 4),
    (0.3, ((0.2, 0.1), (0.1, 0.1))),
    (0.6, ((0.9, 0.8, 0.7), (0.9, 0.9, 0.9))),
    (0.3, ((0.5, 0.2, 0.1),)),
)


class _Known(Sequence[float]):
    """A rank's losses, of which only those up to the epoch that comes next can be read."""

    def __init__(self, losses: Sequence[float], trained: Sequence[int]) -> None:
        self._losses = losses
        self._trained = trained

    def __len__(self) -> int:
        return len(self._losses)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number > len(self._trained):
            raise LookupError(f"losses[{number}] {UNKNOWN} epoch {number} was trained")
        return self._losses[number]


@in_group
def _trains(
    rank: int, train: Callable[..., Any], bound: float, of_ranks: Losses
) -> tuple[list[int], Any]:
    trained: list[int] = []

    def epoch(n: int) -> None:
        print(f"epoch {n}")
        trained.append(n)
        dist.all_reduce(torch.ones(GRADIENT))

    answer = train(_Known(of_ranks[rank], trained), bound, epoch)
    print(RETURNED)
    dist.barrier()
    # bool is no count, though Python takes it for a number
    return trained, repr(answer) if isinstance(answer, bool) else number_or_text(answer)


@exercise(
    "The ranks must hold a vote in every epoch, also those with nothing to say: put the answer, 0 "
    "or 1, into a tensor and let a collective carry it.",
    "`dist.broadcast(flag, src=0)` makes rank 0's answer that of all; `all_reduce` with MAX stops "
    "as soon as one rank wants to, with MIN when all want to. Then all look at `flag`.",
)
def check_train(train: Callable[..., Any]) -> str:
    """Check `train(losses, bound, epoch)`: all ranks stop after the same, right epoch."""
    for bound, of_ranks in LOSSES:
        run = run_ranks(_trains, (train, bound, of_ranks), nprocs=len(of_ranks), check=False)
        each = (f"rank {r}: {', '.join(map(str, own))}" for r, own in enumerate(of_ranks))
        told = f"bound {bound}, losses of {'; '.join(each)}: "
        if not run.ok:
            _explain_stopping(told, run)
        run.raise_for_failure()
        _judge_epochs(told, bound, of_ranks, run)
    return f"all ranks stop after the same epoch, for {count(len(LOSSES), 'set')} of losses."


def _explain_stopping(told: str, run: Run) -> None:
    early = [error.summary for error in errors(run) if UNKNOWN in error.summary]
    if early:
        raise Wrong(
            f"{told}{early[0]}.",
            "A training run learns its losses one by one, so nobody can vote on those to come. "
            "Read `losses[n]` after `epoch(n)`, and no other.",
        )
    if any(rank.status == "raised" and not lost_partner(rank) for rank in run.ranks):
        return  # the error explains more
    begun = [sum(line.startswith("epoch ") for line in rank.shown_lines) for rank in run.ranks]
    mistakes = {
        "Each rank decided by a loss of its own. The one that stops leaves the others alone in the "
        "next epoch: it takes part in no call any more.": not any(map(_has_voted, run.ranks)),
        "The ranks made different calls. They must hold their vote in every epoch, on every rank, "
        "whatever its own loss says: the others make no call inside `if loss < bound`.": True,
    }
    seen = f"{told}they got no further. Epochs begun: {', '.join(map(str, begun))}."
    judge(seen, mistakes)


def _has_voted(rank: RankResult) -> bool:
    """Whether the learner's function called a collective, besides those of the check."""
    made = [(s.op, s.tensor) for s in rank.spans if s.seq is not None]
    of_check = RETURNED in rank.shown_lines
    return bool({*made} - {OF_EPOCH, OF_END}) or made.count(OF_END) > of_check


def _judge_epochs(told: str, bound: float, of_ranks: Losses, run: Run) -> None:
    numbers = run.values[0][0]
    done = len(numbers)
    out_of_order = [
        rank for rank, (own, _) in enumerate(run.values) if own != list(range(len(own)))
    ]
    odd = out_of_order[0] if out_of_order else 0
    wants = [next((n + 1 for n, x in enumerate(own) if x < bound), len(own)) for own in of_ranks]
    trained = f"trained {count(done, 'epoch')}.\n"
    mistakes = {
        f"rank {odd} called epoch with {run.values[odd][0]}.\n"
        "Call `epoch(n)` once for each n, from 0 on.": out_of_order,
        f"{trained}After {count(max(wants), 'epoch')} all ranks were below the bound, so they must "
        "stop there. Look at the loss after each epoch.": done > max(wants),
        f"{trained}No rank was below the bound yet. Train first, then look at that epoch's "
        "loss.": done < min(wants),
    }
    judge(told, mistakes)
    for rank, (_, answer) in enumerate(run.values):
        if answer != done:
            raise Wrong(
                f"{told}rank {rank} trained {count(done, 'epoch')} and returned {answer}.",
                "Return the number of epochs that were trained.",
            )


Shape = tuple[int, int]
AddUp = Callable[[torch.Tensor, dist.ProcessGroup, dist.ProcessGroup], Any]
GRIDS: tuple[Shape, ...] = ((2, 2), (1, 2), (2, 1), (1, 1))  # rows and columns


@in_group
def _adds_up(
    rank: int, add_up: AddUp, shape: Shape, unit: int, late: int
) -> tuple[float, ...] | str:
    height, width = shape
    grid = torch.arange(height * width).view(shape).tolist()
    rows = [dist.new_group(ranks) for ranks in grid]
    columns = [dist.new_group(ranks) for ranks in map(list, zip(*grid, strict=True))]
    dist.barrier()  # no rank leaves while another one still makes a group
    time.sleep(0.1 if rank == late else 0)
    found = add_up(torch.tensor(unit * 10.0**rank), rows[rank // width], columns[rank % width])
    try:
        return tuple(float(x) for x in found)
    except (TypeError, ValueError, RuntimeError):
        return repr(found)


@exercise(
    "All ranks take their row first, say. Then the rank that the others wait for is on its way.",
    "`all_reduce` writes its sum into the tensor that it gets: add up a copy, `x.clone()`.",
    "`across, down = x.clone(), x.clone()`; on every rank `all_reduce(across, group=row)`, then "
    "`all_reduce(down, group=column)`.",
)
def check_add_up(add_up: AddUp) -> str:
    """Check `add_up(x, row, column)` on real ranks in a grid, one of them late."""
    for shape in GRIDS:
        height, width = shape
        size = height * width
        for unit, late in enumerate(sorted({0, size - 1}), 1):  # not always the same x
            x = listed([*(f"{unit * 10**rank}" for rank in range(size))])
            grid = f"ranks in {count(height, 'row')} and {count(width, 'column')}, x is {x}"
            run = run_ranks(_adds_up, (add_up, shape, unit, late), nprocs=size, check=False)
            if run.verdict is not None and stuck(run):
                mistakes = {
                    "Each rank waits in a group for one that waits in the other group. No rank may "
                    "choose its own order.": run.verdict.kind == "groups in different order",
                    "Each rank of a group must make the same calls in that group, once each.": True,
                }
                judge(f"{grid}: {run.verdict.title}.", mistakes)
            run.raise_for_failure()
            for rank, answer in enumerate(run.values):
                _judge_sums(grid, shape, unit, rank, answer)
    return "right on a grid of 2 rows and 2 columns, on one row, on one column and on one rank."


def _judge_sums(grid: str, shape: Shape, unit: int, rank: int, answer: Any) -> None:
    height, width = shape
    own_row, own_column = divmod(rank, width)
    row = unit * sum(10.0 ** (own_row * width + c) for c in range(width))
    column = unit * sum(10.0 ** (r * width + own_column) for r in range(height))
    if answer == (row, column):
        return
    total = unit * sum(10.0**r for r in range(height * width))
    is_pair = isinstance(answer, tuple) and len(answer) == 2
    mistakes = {
        "Return two numbers: the sum over the row and that over the column.": not is_pair,
        "Return the sum over the row first, then that over the column.": answer == (column, row),
        "That is `x` itself. Add it up over the group: `group=row`.": answer
        == (unit * 10.0**rank,) * 2,
        "One of them has come to the sum over all ranks. `all_reduce` writes into its tensor, so "
        "the second call added up what the first one had left there; or "
        "`group=` is missing.": is_pair and total in answer,
        "Add up `x` over each group once, and each time a copy of `x`.": True,
    }
    seen = f"{grid}: rank {rank} got {answer}, not ({row:g}, {column:g})."
    judge(seen, mistakes)
