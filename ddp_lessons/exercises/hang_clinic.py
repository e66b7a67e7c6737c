"""The checks of lesson 10: find the odd rank, stop together, use groups in one order."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddp_lessons import losses
from ddp_lessons.calls import Calls
from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.joining import GROUP_CALLS
from ddp_lessons.results import Run
from ddp_lessons.wording import count, listed, ranks_text

# Exercise 1: which rank differs first

Made = tuple[str, str | None, int]  # the function, the tensor and the line of a call
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
    # One rank's own branch of an `if`, and nothing wrong.
    _patient(None, "4:all_reduce:1 8:broadcast:1", "4:all_reduce:1 6:broadcast:1", ranks=3, rank=0),
    _patient((CALL, 0), "5:all_reduce:1 8:all_reduce:1",
             "5:all_reduce:1 7:barrier:0 8:all_reduce:1", ranks=4, rank=0),
    _patient((MISSING, 3), "5:all_reduce:1 " * 4, "5:all_reduce:1 " * 2, ranks=4, rank=3),
    # It shows later, and in the end two ranks stand in the same line.
    _patient((CALL, 1), STEP * 3 + "9:all_reduce:1", STEP * 2 + "9:all_reduce:1", ranks=3, rank=1),
    _patient((TENSOR, 2), "5:all_reduce:2 5:all_reduce:2", "5:all_reduce:2 5:all_reduce:1",
             ranks=3, rank=2),
    # A rank with lines of its own that then leaves.
    _patient((MISSING, 0), "4:all_reduce:1 8:broadcast:1 9:all_reduce:1",
             "4:all_reduce:1 6:broadcast:1", ranks=3, rank=0),
    _patient((CALL, 2), "5:all_reduce:1 6:broadcast:1 7:all_reduce:1 8:barrier:0",
             "5:all_reduce:1 7:all_reduce:1 8:barrier:0", ranks=4, rank=2),
)  # fmt: skip


def _parts(script: str) -> list[tuple[int, str, int]]:
    tokens = (token.split(":") for token in script.split())
    return [(int(line), op, int(size)) for line, op, size in tokens]


def _perform(rank: int, scripts: Sequence[str]) -> None:
    dist.init_process_group("gloo")
    for _, op, size in _parts(scripts[rank]):
        match op:
            case "barrier":
                dist.barrier()
            case "broadcast":
                dist.broadcast(torch.ones(size), src=0)
            case _:
                dist.all_reduce(torch.ones(size))
    time.sleep(0.2)  # so that the others have left the last common call, too
    dist.destroy_process_group()


@functools.cache
def records() -> tuple[tuple[tuple[Made, ...], ...], ...]:
    """For each patient, for each rank the calls that it really made. Takes some seconds once."""
    return tuple(
        _recorded(run_quietly(_perform, (patient.scripts,), nprocs=len(patient.scripts)), patient)
        for patient in PATIENTS
    )


def _recorded(run: Run, patient: Patient) -> tuple[tuple[Made, ...], ...]:
    calls = Calls([rank.spans for rank in run.ranks]).of_rank
    return tuple(
        tuple(
            (made.op, made.tensor, line)
            for made, (line, _, _) in zip(
                (c for c in of_rank if c.op not in GROUP_CALLS), _parts(script), strict=False
            )
        )
        for of_rank, script in zip(calls, patient.scripts, strict=True)
    )


@exercise(
    "Walk from call to call: `for n in range(max(map(len, calls)))`. What does each rank do there? "
    "`None` for a rank that has no n-th call is handy.",
    "At the first n at which the ranks do not all do the same, one of them is alone: look for the "
    "one whose function and tensor no other rank has. `collections.Counter` counts.",
)
def check_diagnose(diagnose: Callable[..., Any]) -> str:
    """Check `diagnose(calls)` on what real ranks called, in runs that hang, fail or go well."""
    for patient, record in zip(PATIENTS, records(), strict=True):
        calls = [list(of_rank) for of_rank in record]
        answer = call(diagnose, calls, because="It takes one list of calls for each rank.")
        _judge_finding(record, patient.finding, answer)
    wrong = sum(patient.finding is not None for patient in PATIENTS)
    return f"right for {count(wrong, 'run')} that hung or failed, and for one that went well."


def _judge_finding(record: Sequence[Sequence[Made]], finding: Finding | None, answer: Any) -> None:
    if isinstance(answer, list):
        answer = tuple(answer)
    if answer == finding:
        return
    where, seen = _first_difference(record)
    seen = f"{seen} You returned {answer!r}."
    if finding is None:
        raise Wrong(
            seen,
            "Nothing is wrong there. Lines do not matter: a call at one line meets a call at "
            "another, as in the branches of an `if`. Compare functions and tensors.",
        )
    if answer is None:
        raise Wrong(seen, "The ranks differ. Look at every call, also where a rank has none.")
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise Wrong(seen, f"Return None, or two things: what is wrong, and the rank: {finding!r}.")
    kind, rank = answer
    if rank != finding[1]:
        raise Wrong(seen, _why_not_that_rank(record, finding, rank, where))
    raise Wrong(
        seen,
        f"The rank is right. Say {MISSING!r} if it has no such call, {CALL!r} if the function is "
        f"another one, and {TENSOR!r} if only the tensor is. Here it is {finding[0]!r}; you said "
        f"{kind!r}.",
    )


def _why_not_that_rank(
    record: Sequence[Sequence[Made]], finding: Finding, rank: Any, where: int
) -> str:
    if not (isinstance(rank, int) and 0 <= rank < len(record)):
        return "That is no rank: the calls of rank r are `calls[r]`."
    if finding[0] == MISSING:
        return (
            f"Rank {rank} came to that call. It may have got an error there, but it is the rank "
            "that did not come that has the bug."
        )
    if _look(record[rank], where) == _most(record, where):
        return (
            f"In its call {where + 1}, rank {rank} does what most do. Where the ranks stand in the "
            "end is not the point: the first call at which they differ is."
        )
    return "At the first call at which the ranks differ, one of them is alone with what it does."


def _look(calls: Sequence[Made], n: int) -> tuple[str, str | None] | None:
    return calls[n][:2] if n < len(calls) else None


def _most(record: Sequence[Sequence[Made]], n: int) -> object:
    looks = [_look(calls, n) for calls in record]
    return max(looks, key=looks.count)


def _first_difference(record: Sequence[Sequence[Made]]) -> tuple[int, str]:
    """The first call at which ranks differ, the last one if none does; and what they do there."""
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


# Exercise 2: stop together

BOUND = 0.3
GRADIENT = 17  # elements
OF_EPOCH, OF_END = ("all_reduce", f"float32 ({GRADIENT},)"), ("barrier", None)
LOSSES: tuple[tuple[tuple[float, ...], ...], ...] = (
    ((0.5, 0.2, 0.1, 0.1), (0.5, 0.5, 0.4, 0.2)),
    ((0.9, 0.6, 0.4, 0.2), (0.5, 0.2, 0.1, 0.1)),
    ((0.5, 0.4, 0.2, 0.1), (0.9, 0.8, 0.7, 0.6), (0.2, 0.1, 0.1, 0.1)),
    ((0.5, 0.2, 0.1),) * 4,
    ((0.2, 0.1), (0.1, 0.1)),
    ((0.9, 0.8, 0.7), (0.9, 0.9, 0.9)),
    ((0.5, 0.2, 0.1),),
)


def _trains(
    rank: int, train: Callable[..., Any], of_ranks: Sequence[Sequence[float]]
) -> tuple[list[int], Any]:
    dist.init_process_group("gloo")
    trained: list[int] = []

    def epoch(n: int) -> None:
        print(f"epoch {n}")
        trained.append(n)
        dist.all_reduce(torch.ones(GRADIENT))

    answer = train(list(of_ranks[rank]), BOUND, epoch)
    dist.barrier()
    dist.destroy_process_group()
    return trained, answer


@exercise(
    "The ranks must hold a vote in every epoch, also those with nothing to say: put the answer, 0 "
    "or 1, into a tensor and let a collective carry it.",
    "`dist.broadcast(flag, src=0)` makes rank 0's answer that of all; `all_reduce` with MAX stops "
    "as soon as one rank wants to, with MIN when all want to. Then all look at `flag`.",
)
def check_train(train: Callable[..., Any]) -> str:
    """Check `train(losses, bound, epoch)`: all ranks stop after the same epoch, and in time."""
    for of_ranks in LOSSES:
        run = run_quietly(_trains, (train, of_ranks), nprocs=len(of_ranks))
        told = _told_losses(of_ranks)
        if not run.ok:
            _judge_stopping(told, run)
        run.raise_for_failure()
        _judge_epochs(told, of_ranks, run)
    return f"all ranks stop after the same epoch, for {count(len(LOSSES), 'set')} of losses."


def _told_losses(of_ranks: Sequence[Sequence[float]]) -> str:
    of_each = "; ".join(f"rank {r}: {', '.join(map(str, own))}" for r, own in enumerate(of_ranks))
    return f"losses of {of_each}"


def _judge_stopping(told: str, run: Run) -> None:
    if any(rank.status == "raised" and not losses.lost_partner(rank) for rank in run.ranks):
        return  # the learner's own error says it best
    begun = [sum(line.startswith("epoch ") for line in rank.shown_lines) for rank in run.ranks]
    seen = f"{told}: they got no further. Epochs begun: {', '.join(map(str, begun))}."
    if not _asked(run):
        raise Wrong(
            seen,
            "Each rank decided by a loss of its own. The one that stops leaves the others alone in "
            "the next epoch: it takes part in no call any more.",
        )
    raise Wrong(
        seen,
        "The ranks made different calls. They must hold their vote in every epoch, on every rank, "
        "whatever its own loss says: a call inside `if loss < bound` is met by nobody.",
    )


def _asked(run: Run) -> bool:
    """Whether any rank made a collective of its own, beyond those of the check."""
    for rank in run.ranks:
        made = [(s.op, s.tensor) for s in rank.spans if s.seq is not None]
        if {*made} - {OF_EPOCH, OF_END} or made.count(OF_END) > 1:
            return True
    return False


def _judge_epochs(told: str, of_ranks: Sequence[Sequence[float]], run: Run) -> None:
    numbers = [trained for trained, _ in run.values]
    done = len(numbers[0])
    wants = [next((n + 1 for n, x in enumerate(own) if x < BOUND), len(own)) for own in of_ranks]
    if numbers[0] != list(range(done)):
        raise Wrong(
            f"{told}: rank 0 called epoch with {numbers[0]}.", "Call `epoch(n)` once for each n."
        )
    if done > max(wants):
        raise Wrong(
            f"{told}: trained {count(done, 'epoch')}, with a bound of {BOUND}.",
            f"After {count(max(wants), 'epoch')} all ranks were below the bound, so they must stop "
            "there. Look at the loss after each epoch.",
        )
    if done < min(wants):
        raise Wrong(
            f"{told}: trained {count(done, 'epoch')}, with a bound of {BOUND}.",
            "No rank was below the bound yet. Train first, then look at that epoch's loss.",
        )
    for rank, (_, answer) in enumerate(run.values):
        if isinstance(answer, bool) or answer != done:
            raise Wrong(
                f"{told}: rank {rank} trained {count(done, 'epoch')} and returned {answer!r}.",
                "Return the number of epochs that were trained.",
            )


# Exercise 3: one order for all

GRIDS = ((2, 2), (1, 2), (2, 1), (1, 1))  # rows and columns


def _adds_up(
    rank: int, add_up: Callable[..., Any], shape: tuple[int, int], late: int
) -> tuple[float, ...] | str:
    dist.init_process_group("gloo")
    height, width = shape
    grid = torch.arange(height * width).view(shape).tolist()
    rows = [dist.new_group(ranks) for ranks in grid]
    columns = [dist.new_group(ranks) for ranks in map(list, zip(*grid, strict=True))]
    time.sleep(0.1 if rank == late else 0)
    found = add_up(torch.tensor(10.0**rank), rows[rank // width], columns[rank % width])
    dist.destroy_process_group()
    try:
        return tuple(float(x) for x in found)
    except (TypeError, ValueError, RuntimeError):
        return repr(found)


@exercise(
    "All ranks take their row first, say. Then whoever is waited for is on the way.",
    "`all_reduce` writes its sum into the tensor that it gets: add up a copy, `x.clone()`.",
)
def check_add_up(add_up: Callable[..., Any]) -> str:
    """Check `add_up(x, row, column)` on real ranks in a grid, with one of them late."""
    for shape in GRIDS:
        world_size = shape[0] * shape[1]
        for late in {0, world_size - 1}:
            run = run_quietly(_adds_up, (add_up, shape, late), nprocs=world_size)
            if run.verdict is not None:
                _judge_meeting(shape, run)
            run.raise_for_failure()
            for rank, answer in enumerate(run.values):
                _judge_sums(shape, rank, answer)
    return "right on a grid of 2 rows and 2 columns, on one row, on one column and on one rank."


def _judge_meeting(shape: tuple[int, int], run: Run) -> None:
    assert run.verdict is not None
    if run.verdict.kind in ("raised", "unsendable"):
        return
    seen = f"{_told_grid(shape)}: {run.verdict.title}."
    if run.verdict.kind == "groups in different order":
        raise Wrong(
            seen,
            "Each rank waits in a group for one that waits in the other group. No rank may choose "
            "its own order.",
        )
    raise Wrong(seen, "Each rank of a group must make the same calls in that group, once each.")


def _judge_sums(shape: tuple[int, int], rank: int, answer: Any) -> None:
    height, width = shape
    own_row, own_column = divmod(rank, width)
    row = sum(10.0 ** (own_row * width + c) for c in range(width))
    column = sum(10.0 ** (r * width + own_column) for r in range(height))
    if answer == (row, column):
        return
    seen = f"{_told_grid(shape)}, x is 1, 10, 100, ...: rank {rank} got {answer}"
    seen = f"{seen}, not ({row:g}, {column:g})."
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Wrong(seen, "Return two numbers: the sum over the row and that over the column.")
    if answer == (column, row):
        raise Wrong(seen, "Return the sum over the row first, then that over the column.")
    total = sum(10.0**r for r in range(height * width))
    if answer == (10.0**rank, 10.0**rank):
        raise Wrong(seen, "That is `x` itself. Add it up over the group: `group=row`.")
    if total in answer:
        raise Wrong(
            seen,
            "One of them has come to the sum over all ranks. `all_reduce` writes into its tensor, "
            "so the second call added up what the first one had left there; or `group=` is "
            "missing.",
        )
    raise Wrong(seen, "Add up `x` over each group once, and each time a copy of `x`.")


def _told_grid(shape: tuple[int, int]) -> str:
    height, width = shape
    grid = f"{count(height, 'row')} and {count(width, 'column')}"
    return f"ranks in {grid}"
