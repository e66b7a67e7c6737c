"""Why a run failed or hung: from stacks, exit codes and errors to one verdict with its evidence.

Runs in the parent, on a finished `Run`. The earliest failure is the cause; ranks that only lost
their partner are collateral and get one line. What the recorded collectives can tell on top of
this belongs here, too.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_lessons import stacks
from ddp_lessons.errors import CannotSend, LaunchError, WorkerDied, WorkerFailed, WorkersHung
from ddp_lessons.messages import Frame

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, Run

FORKSERVER_ENDED = (
    "The process that starts the ranks, multiprocessing's forkserver, was ended while they ran. "
    "The next launch starts a new one."
)
JOIN = "init_process_group"
LAST_LINES = 5  # of a dead rank's output, shown as evidence

# How gloo, the TCP store and NCCL say that another rank is gone (torch 2.13; gloo transport/tcp).
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed"
    r"|failed to recv, got 0 bytes|remote process has (?:terminated|exited)|NCCL.*remote error"
)


def count(number: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1 and 2`; runs of more than four are shortened to `ranks 0 to 7`."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 4 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]} to {numbers[-1]}"
    *most, last = map(str, numbers)
    return f"ranks {', '.join(most)} and {last}"


def all_ranks(world_size: int) -> str:
    """`All 4 ranks`, at the head of a sentence."""
    return "The rank" if world_size == 1 else f"All {world_size} ranks"


def exit_name(exitcode: int) -> str:
    """`SIGKILL` for -9, `exit code 7` for 7."""
    if exitcode < 0:
        try:
            return signal.Signals(-exitcode).name
        except ValueError:
            return f"signal {-exitcode}"
    return f"exit code {exitcode}"


def waiting_where(stack: Sequence[Frame]) -> str:
    """`, waiting in barrier, Cell In[3], line 4`; "" for an unknown stack."""
    frame, call = stacks.position(stack)
    if frame is None:
        return ""
    line = stacks.line_name(frame)
    return f", waiting in {call}, {line}" if call else f" at {line}"


def waits_for_others(stack: Sequence[Frame]) -> bool:
    """True if a rank with this stack is inside a call of torch.distributed."""
    return stacks.position(stack).call is not None


def verdict(run: Run) -> LaunchError | None:
    """The error of a run, or None if every rank returned."""
    if run.ok:
        return None
    if run.hung_after is not None:
        return _hung(run)
    failures = [r for r in run.ranks if r.status in ("raised", "died", "unsendable")]
    if not failures:
        return None  # interrupted: the ranks were only stopped
    cause = _cause(failures)
    match cause.status:
        case "raised":
            return _failed(run, cause)
        case "unsendable":
            return _unsendable(run, cause)
        case _:
            return _died(run, cause)


def lost_partner(rank: RankResult) -> bool:
    """True for a rank that failed only because another one was gone."""
    return rank.error is not None and _LOST_PEER.search(rank.error.text) is not None


def _cause(failures: Sequence[RankResult]) -> RankResult:
    """The failure that came first; of ranks that failed alike, the lowest."""
    own = [r for r in failures if not lost_partner(r)] or list(failures)
    first = min(own, key=lambda r: r.ended_ns)
    return min((r for r in own if _alike(r, first)), key=lambda r: r.rank)


def _alike(one: RankResult, other: RankResult) -> bool:
    if one.error is None or other.error is None:
        return one is other
    return (one.error.type_name, stacks.position(one.error.frames)) == (
        other.error.type_name,
        stacks.position(other.error.frames),
    )


def _failed(run: Run, cause: RankResult) -> LaunchError:
    assert cause.error is not None
    same = [r.rank for r in run.ranks if r.status == "raised" and _alike(r, cause)]
    who = f"{ranks_text(same)} of {run.world_size}" if run.world_size > 1 else "the rank"
    text = [f"{who} raised {cause.error.summary}", "", stacks.render(cause.error)]
    text += _others(run, same)
    if lost_partner(cause):
        text += _who_was_gone(run)
    if cause.error.type_name == "TypeError" and not cause.error.frames:
        text += ["", f"launch() calls {run.name}(rank, *args): does it take these arguments?"]
    return WorkerFailed("\n".join(text), run=run, rank=cause.rank)


def _died(run: Run, cause: RankResult) -> LaunchError:
    what, why = _death(cause)
    text = [f"rank {cause.rank} of {run.world_size} {what}", "", why]
    if cause.shown_lines:
        text += ["", f"The last lines of rank {cause.rank}'s output:"]
        text += [f"    {line}" for line in cause.shown_lines[-LAST_LINES:]]
    text += _others(run, [cause.rank])
    return WorkerDied("\n".join(text), run=run, rank=cause.rank)


def _death(rank: RankResult) -> tuple[str, str]:
    """What happened to a rank that died, and the likely reason."""
    name = exit_name(rank.exitcode)
    if rank.error is not None:
        return "was lost", rank.error.text
    if rank.started_ns is None:
        return (
            f"ended with {name} before its function was called",
            "See what the rank printed below; a shortage of memory is a common reason.",
        )
    match name:
        case "SIGKILL":
            why = (
                "Most often that is the system, out of memory: use fewer ranks or smaller tensors."
            )
        case "SIGABRT":
            why = "C++ code gave up; the reason is in the last lines of its output."
        case "SIGSEGV" | "SIGBUS" | "SIGFPE" | "SIGILL":
            why = "C or C++ code crashed; nothing in Python can catch that."
        case _ if rank.exitcode < 0:
            why = "Another process sent that signal."
        case _:
            why = (
                f"Its process left without returning: os._exit({rank.exitcode}), "
                "or a library that calls exit()."
            )
    verb = "was ended by" if rank.exitcode < 0 else "ended with"
    return f"{verb} {name}", why


def _unsendable(run: Run, cause: RankResult) -> LaunchError:
    assert cause.error is not None
    text = [
        f"rank {cause.rank} of {run.world_size} returned a value of type {cause.error.type_name}, "
        f"which cannot travel back to the notebook: {cause.error.text}",
        "Return plain data instead: numbers, strings, lists, tensors, state_dict().",
    ]
    return CannotSend("\n".join(text), run=run, rank=cause.rank)


def _hung(run: Run) -> LaunchError:
    assert run.hung_after is not None
    waiting = [r for r in run.ranks if r.status == "stopped" and waits_for_others(r.stack)]
    away = [r for r in run.ranks if r not in waiting]
    text = [_hang_title(run, waiting, away), ""]
    text += [f"rank {r.rank} {_whereabouts(r)}" for r in run.ranks]
    for rank in away:
        if rank.error is not None:
            text += ["", stacks.render(rank.error)]
    text += ["", _hang_advice(run, waiting, away)]
    return WorkersHung("\n".join(text), run=run, rank=away[0].rank if len(away) == 1 else None)


def _hang_title(run: Run, waiting: Sequence[RankResult], away: Sequence[RankResult]) -> str:
    calls = sorted({str(stacks.position(r.stack).call) for r in waiting})
    what = f"{_verb(waiting, 'waits', 'wait')} in {' and '.join(calls)}"
    if not waiting:
        return f"no rank made progress for {_seconds(run.hung_after)}"
    who = ranks_text([r.rank for r in waiting])
    if not away and calls == [JOIN]:
        return f"{who} {what} for ranks that never came"
    if not away:
        return f"all ranks wait for each other: {who} {what}"
    wheres = dict.fromkeys(_short_whereabouts(r) for r in away)
    groups = [[r for r in away if _short_whereabouts(r) == where] for where in wheres]
    gone = [f"{ranks_text([r.rank for r in g])} {_short_whereabouts(g[0], len(g))}" for g in groups]
    return f"{who} {what}, but {', '.join(gone)}"


def _verb(ranks: Sequence[RankResult], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _seconds(seconds: float | None) -> str:
    return f"{seconds:g} s"


def _short_whereabouts(rank: RankResult, number: int = 1) -> str:
    has = "has" if number == 1 else "have"
    match rank.status:
        case "returned":
            return f"{has} returned"
        case "raised":
            return f"raised {rank.error.type_name if rank.error else ''}"
        case "stopped":
            frame = stacks.position(rank.stack).frame
            is_ = "is" if number == 1 else "are"
            return f"{is_} busy at {stacks.line_name(frame)}" if frame else "did not answer"
        case _:
            return f"{has} died"


def _whereabouts(rank: RankResult) -> str:
    frame, call = stacks.position(rank.stack)
    if rank.status == "raised" and rank.error:
        frame = stacks.position(rank.error.frames).frame
        return f"raised {rank.error.summary}" + (f"  ({stacks.line_name(frame)})" if frame else "")
    if rank.status != "stopped":
        return rank.outcome()
    if frame is None:
        return "did not answer: stopped by SIGSTOP, or busy in C code"
    doing = f"waits in {call}" if call else "is busy"
    return f"{doing}: {stacks.line_name(frame)}:  {frame.source}"


def _hang_advice(run: Run, waiting: Sequence[RankResult], away: Sequence[RankResult]) -> str:
    limit = f"No rank made progress for {_seconds(run.hung_after)}. "
    if not waiting or any(r.status == "stopped" for r in away):
        return limit + (
            "If a rank is slow rather than stuck, let it print a line or use span() now and then, "
            "or raise launch(timeout=...)."
        )
    if away:
        return (
            "A collective returns only when every rank of its group has called it. Look for the "
            "`if`, the early `return` or the exception that keeps the missing rank from it."
        )
    positions = {stacks.position(r.stack) for r in waiting}
    if {position.call for position in positions} == {JOIN}:
        return (
            f"{count(run.world_size, 'rank')} were launched. Does world_size= or WORLD_SIZE say "
            "the same, does every rank have a number of its own, and do all name the same place?"
        )
    if {position.call for position in positions} == {"send"}:
        return (
            "A send may wait until its recv has begun, and here all of them send first. Start with "
            "isend and wait for it after the recv, or let some ranks receive first."
        )
    if len(positions) == 1:
        return (
            "All of them make the same call. Do their tensors have the same shape and dtype, and "
            "did all of them make the same calls before?"
        )
    return (
        "Every rank must call the same collectives in the same order. Compare the lines above: "
        "where do they differ?"
    )


def _others(run: Run, told: Sequence[int]) -> list[str]:
    """One line for each kind of collateral damage."""
    rest = [r for r in run.ranks if r.rank not in told]
    lost = [r for r in rest if lost_partner(r)]
    stopped = [r for r in rest if r.status == "stopped"]
    own = [r for r in rest if r.status in ("raised", "died", "unsendable") and r not in lost]
    lines = [f"rank {r.rank} failed later: {r.outcome()}" for r in own]
    for where in dict.fromkeys(_lost_where(r) for r in lost):
        there = [r for r in lost if _lost_where(r) == where]
        lines.append(
            f"{_capital(there)} lost {_verb(there, 'its', 'their')} partner by that{where}."
        )
    lines += [f"rank {r.rank} was {r.outcome()}" for r in stopped[:4]]
    if len(stopped) > 4:
        lines.append(f"... and {len(stopped) - 4} more ranks were stopped")
    return ["", *lines] if lines else []


def _lost_where(rank: RankResult) -> str:
    return waiting_where(rank.error.frames) if rank.error is not None else ""


def _capital(ranks: Sequence[RankResult]) -> str:
    text = ranks_text([r.rank for r in ranks])
    return text[0].upper() + text[1:]


def _who_was_gone(run: Run) -> list[str]:
    """For a lost connection with no failure before it: the ranks that had left."""
    first = min(r.ended_ns for r in run.ranks if lost_partner(r))
    left = [r for r in run.ranks if r.status == "returned" and r.ended_ns <= first]
    if not left:
        return []
    have, they = _verb(left, "had", "had"), _verb(left, "it", "they")
    return [
        "",
        f"{_capital(left)} {have} already returned: either {they} never made this call, or {they} "
        "made it with other tensors. A collective needs every rank of its group, and like shapes.",
    ]
