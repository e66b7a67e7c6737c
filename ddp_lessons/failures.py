"""Why a run failed in which a rank raised, died or could not send its value. Runs in the parent.

The earliest failure is the cause; ranks that only lost their partner are collateral and get one
line. If all failures are such losses, hangs.py tells who was missing.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_lessons import advice, evidence, hangs, silences, stacks
from ddp_lessons.losses import lost_partner
from ddp_lessons.messages import FORKSERVER
from ddp_lessons.verdict import Kind, Verdict
from ddp_lessons.wording import agree, exit_name, ranks_text

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, Run

LAST_LINES = 5  # of a dead rank's output, shown as evidence
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "MemoryError", "out of memory")
_CPP_FRAME = re.compile(r"frame #\d+: ")  # of C++, below what it says
_KERNEL_GAVE_UP = re.compile(r"^\S+\.cuh?:\d+: .*Assertion")  # once a thread of the GPU
_GPU_FAILED = re.compile(r"CUDA error: ")


def explain(run: Run) -> Verdict | None:
    """The verdict on a run in which ranks failed; None if none did."""
    failures = [rank for rank in run.ranks if rank.status in evidence.FAILED]
    if not failures:
        return None
    own = [rank for rank in failures if not lost_partner(rank)]
    if own and all(_got_another_size(rank) for rank in own):
        return hangs.explain_sizes(run, [rank.rank for rank in own])
    if not own:
        return hangs.explain(run)
    cause = _cause(own)
    if cause.status == "died" and cause.exitcode is None:
        return silences.explain(run, cause)
    match cause.status:
        case "raised":
            return _raised(run, cause)
        case "unsendable":
            return _unsendable(run, cause)
        case _:
            return _died(run, cause) if cause.error is None else _lost(run, cause)


def _got_another_size(rank: RankResult) -> bool:
    """Gloo ended the process because data of another size came than its call expects."""
    return rank.status == "died" and any("op.preamble.length" in line for line in rank.lines)


def _cause(failures: Sequence[RankResult]) -> RankResult:
    """The failure that came first; of ranks that failed alike, the lowest."""
    first = min(failures, key=lambda rank: rank.ended_ns)
    return min((rank for rank in failures if _alike(rank, first)), key=lambda rank: rank.rank)


def _alike(one: RankResult, other: RankResult) -> bool:
    if one.error is None or other.error is None:
        return one is other
    return (one.error.type_name, stacks.position(one.error.frames)) == (
        other.error.type_name,
        stacks.position(other.error.frames),
    )


def _raised(run: Run, cause: RankResult) -> Verdict:
    assert cause.error is not None
    same = [
        rank.rank
        for rank in run.ranks
        if rank.status == "raised" and _alike(rank, cause) and not lost_partner(rank)
    ]
    who = f"{ranks_text(same)} of {run.world_size}" if run.world_size > 1 else "the rank"
    return Verdict(
        "raised",
        tuple(same),
        f"{who} raised {cause.error.summary}",
        (stacks.render(cause.error), *_of_the_kernel(cause), *evidence.others(run, same)),
        _advice(run, cause),
        stacks.position(cause.error.frames).frame,
    )


def _of_the_kernel(cause: RankResult) -> list[str]:
    """What a kernel of the GPU wrote when it gave up: it says more than CUDA's error."""
    if cause.error is None or not _GPU_FAILED.search(cause.error.text):
        return []
    said = next(filter(_KERNEL_GAVE_UP.search, cause.lines), None)
    return ["", "What the GPU said:", f"    {said}"] if said else []


def _advice(run: Run, cause: RankResult) -> str:
    assert cause.error is not None
    if cause.error.type_name == "TypeError" and not cause.error.frames:
        return f"launch() calls {run.name}(rank, *args): does it take these arguments?"
    if any(text in cause.error.text for text in _NO_MEMORY):
        return "Memory ran out: use smaller tensors or batches, or fewer ranks."
    return next((what for text, what in advice.BACKENDS.items() if text in cause.error.text), "")


def _unsendable(run: Run, cause: RankResult) -> Verdict:
    assert cause.error is not None
    return Verdict(
        "unsendable",
        (cause.rank,),
        f"rank {cause.rank} of {run.world_size} returned a value of type {cause.error.type_name}, "
        f"which cannot travel back to the notebook: {cause.error.text}",
        advice="Return plain data instead: numbers, strings, lists, tensors, state_dict().",
    )


def _died(run: Run, cause: RankResult) -> Verdict:
    what, why = _death(run, cause)
    lines = [why, *evidence.last_call(run, cause)]
    if last := _last_lines(cause):
        lines += ["", f"The last lines of rank {cause.rank}'s output:"]
        lines += [f"    {line}" for line in last]
    kind: Kind = "killed" if (cause.exitcode or 0) < 0 else "exited"
    return Verdict(
        kind,
        (cause.rank,),
        f"rank {cause.rank} of {run.world_size} {what}",
        (*lines, *evidence.others(run, [cause.rank])),
    )


def _lost(run: Run, cause: RankResult) -> Verdict:
    """What started a rank was gone before it could tell how the rank ended."""
    assert cause.error is not None
    same = [rank.rank for rank in run.ranks if rank.error == cause.error]
    what, _, why = cause.error.text.partition("\n")
    kind: Kind = "forkserver ended" if cause.error.type_name == FORKSERVER else "engine lost"
    return Verdict(
        kind,
        tuple(same),
        f"{ranks_text(same)} of {run.world_size} {agree(same, 'was', 'were')} lost: {what}",
        (why, *evidence.last_call(run, cause), *evidence.others(run, same)),
    )


def _death(run: Run, rank: RankResult) -> tuple[str, str]:
    """What happened to a rank that died, and the likely reason."""
    exitcode = rank.exitcode or 0
    name = exit_name(exitcode)
    if rank.started_ns is None:
        return (
            f"ended with {name} before its function was called",
            "See what the rank printed below; a shortage of memory is a common reason.",
        )
    verb = "was ended by" if exitcode < 0 else "ended with"
    return f"{verb} {name}", _reason(run, rank, exitcode)


def _last_lines(rank: RankResult) -> list[str]:
    """What a rank wrote at last, without C++ stacks; if its GPU failed, the lines that say how."""
    lines = [line for line in rank.shown_lines if line.strip() and not _CPP_FRAME.match(line)]
    if rank.exitcode == -signal.SIGABRT:
        found = (next(filter(text.search, lines), None) for text in (_KERNEL_GAVE_UP, _GPU_FAILED))
        if of_gpu := [line for line in found if line is not None]:
            return of_gpu
    return lines[-LAST_LINES:]


def _reason(run: Run, rank: RankResult, exitcode: int) -> str:
    name = exit_name(exitcode)
    last = _last_lines(rank)
    out = any(text in line for line in last for text in _NO_MEMORY)
    match name:
        case "SIGKILL" if run.out_of_memory:
            return (
                "The system killed a process during this run because memory had run out: use "
                "fewer ranks or smaller tensors."
            )
        case "SIGKILL" if run.out_of_memory is None:
            return (
                "Most often that is the system, out of memory: use fewer ranks or smaller tensors."
            )
        case "SIGKILL":
            return (
                "The system reports no kill for want of memory during this run: another process, "
                "or the rank itself, sent that signal."
            )
        case "SIGABRT" if out:
            return "Memory ran out: use smaller tensors or batches, or fewer ranks."
        case "SIGABRT" if any(_GPU_FAILED.search(line) for line in last):
            who = "NCCL's watchdog" if "watchdog" in last[-1] else "C++ code"
            return f"{who} ended the process over an error of its GPU.\n{advice.ON_GPU}"
        case "SIGABRT":
            return "C++ code gave up; the reason is in the last lines of its output."
        case "SIGSEGV" | "SIGBUS" | "SIGFPE" | "SIGILL":
            return "C or C++ code crashed; nothing in Python can catch that."
        case _ if exitcode < 0:
            return "Another process sent that signal."
    return (
        f"Its process left without returning: os._exit({exitcode}), or a library that calls exit()."
    )
