"""Where each rank is, or was when it failed, and whether it only lost another rank.

Runs in the parent. failures.py, hangs.py, the hang board and `load_run` call it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ddp_lessons.diagnosis import source_code
from ddp_lessons.results import RankResult
from ddp_lessons.text import agree, exit_name, listed, ranks_text
from ddp_lessons.wire import losses, stacks
from ddp_lessons.wire.ops import JOIN, JOINING, MAKES_GROUP
from ddp_lessons.wire.owners import Owner, is_of_check, owner_of
from ddp_lessons.wire.records import (
    NOT_OF_A_THREAD,
    ErrorRecord,
    Frame,
    Kind,
    Lane,
    Span,
    Timeout,
    split_site,
)
from ddp_lessons.wire.stacks import Position

# The time that ran out, in milliseconds.
_TIMEOUT = re.compile(r"(?:Timed out waiting |monitoredBarrier in |Timeout\(ms\)=)(\d+)")
# Under TORCH_DISTRIBUTED_DEBUG=DETAIL: the ranks' calls differ in nothing but their number.
_COUNTS = re.compile(r"differ in the following aspects:\s*Sequence number: ?\d+ ?vs ?\d+\s*$")

# The verb at the start of a line, for one rank and for several.
_PLURAL = {
    "waits in": "wait in",
    "is": "are",
    "lost its partner in": "lost their partner in",
    "has not finished on its GPU:": "have not finished on their GPUs:",
}


def position(rank: RankResult) -> Position:
    """Where the rank was when it was stopped or raised, and the call it waited in.

    If it waited for asynchronous work, that is the call that issued the work. Of a rank that NCCL
    ended as it lost another one, it is the last call that it never finished.
    """
    if rank.status == "died" and rank.exitcode is not None and lost_partner(rank):
        last = next((s for s in reversed(rank.spans) if s.op and s.t1_ns is None), None)
        return Position(frame_of(last.site), last.op) if last else Position(None, None)
    there = stacks.position(frames_of(rank))
    if there.call != stacks.WAIT:
        return there
    waits = [s.op for s in rank.spans if s.kind == Kind.WAIT and (s.failed or s.t1_ns is None)]
    return there._replace(call=(waits or [None])[-1] or stacks.WAIT)


def frames_of(rank: RankResult) -> Sequence[Frame]:
    """Where the rank was: its stack, or where it raised; of a lost partner, where it lost it."""
    if rank.error is None:
        return rank.stack
    return (_first_loss(rank) or rank.error).frames


def waits(rank: RankResult) -> bool:
    """True if a rank waits in a call of torch.distributed, or did until that failed."""
    if rank.status == "stopped":
        return position(rank).call is not None and rank.activity != "busy"
    return lost_partner(rank)


def lines(ranks: Sequence[RankResult]) -> list[str]:
    """What each rank did and where; ranks that did the same share a line."""
    texts: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        texts.setdefault(_doing(rank), []).append(rank.rank)
    for rank in ranks:
        if (call := _on_gpu(rank)) is not None:
            texts.setdefault(call, []).append(rank.rank)
        for where in _in_other_threads(rank):
            texts.setdefault(("waits in", where), []).append(rank.rank)
        if (error := handled(rank)) is not None:
            key = (
                "called it while handling",
                f"{error.summary}{line(next(iter(error.frames), None))}",
            )
            texts.setdefault(key, []).append(rank.rank)
    told = [
        f"{ranks_text(those)} {agree(those, verb, _PLURAL.get(verb, verb))} {rest}"
        for (verb, rest), those in texts.items()
    ]
    unseen = sorted({what for rank in ranks for what in rank.unseen})
    told += [text for _, text, _ in dead_threads(ranks)]
    return [*told, f"not recorded: {listed(unseen)}"] if unseen else told


def _in_other_threads(rank: RankResult) -> list[str]:
    """The calls in which a rank's threads wait, except the one whose stack is known."""
    if rank.status != "stopped" or not rank.threads:
        return []
    here, lanes = _site(rank), (Lane.MAIN, *rank.threads)
    waits = [s for s in rank.spans if s.t1_ns is None and s.op and s.lane in lanes]
    return [
        f"{span.op}{_thread(rank, span)}{line(frame_of(span.site))}"
        for span in waits
        if span.site != here and span.kind != Kind.ISSUE
    ]


def _thread(rank: RankResult, span: Span | None) -> str:
    """` in thread 'saver'`; "" for the main thread."""
    name = None if span is None else rank.threads.get(span.lane)
    return "" if name is None else f" in thread {name!r}"


def _site(rank: RankResult) -> str | None:
    frame = position(rank).frame
    return None if frame is None else f"{frame.filename}:{frame.lineno}"


def dead_threads(ranks: Sequence[RankResult]) -> list[tuple[tuple[int, ...], str, Frame | None]]:
    """The threads that an exception ended: the ranks on which they died alike, how, and where."""
    alike: dict[tuple[str, str, Frame | None], list[int]] = {}
    for rank in ranks:
        for name, error in rank.dead_threads:
            frame = stacks.position(error.frames).frame
            alike.setdefault((name, f"{error.summary}{line(frame)}", frame), []).append(rank.rank)
    return [
        (tuple(on), f"thread {name!r} of {ranks_text(on)} died of {how}", frame)
        for (name, how, frame), on in alike.items()
    ]


def handled(rank: RankResult) -> ErrorRecord | None:
    """The exception that a rank was handling in an `except` block when it made its last call."""
    if rank.status == "raised":
        before = root_error(rank.error).previous if rank.error is not None else None
        return None if before is None or _is_loss(before) else before
    if rank.handling is None:
        return None
    began = rank.handling.t0_ns
    later = any(
        span.t0_ns > began and span.lane not in NOT_OF_A_THREAD
        for span in rank.spans
        if span.op and span.kind != Kind.WAIT
    )
    return None if later else rank.handling.error


def _on_gpu(rank: RankResult) -> tuple[str, str] | None:
    """The first call that a rank's GPU has not finished, though it returned on the CPU."""
    for span in rank.spans:
        if span.lane == Lane.CUDA and span.t1_ns is None:
            return "has not finished on its GPU:", f"{span.op}{line(frame_of(span.site))}"
    return None


def frame_of(site: str | None) -> Frame | None:
    """The line of a site; None for a line of an exercise's check, which is not the learner's."""
    if site is None or is_of_check(split_site(site)[0]):
        return None
    return stacks.frame_at(*split_site(site))


def line_of(site: str | None) -> str:
    """`Cell In[3], line 4`."""
    if (frame := frame_of(site)) is not None:
        return stacks.line_name(frame)
    return "an unknown line" if site is None else "a line of the check"


def line(frame: Frame | None) -> str:
    """`: Cell In[3], line 4:  dist.barrier()`; without its text, `: <stdin>, line 4, in work`."""
    if frame is None:
        return ""
    told = f":  {frame.source}" if frame.source else f", in {frame.function}"
    return f": {stacks.line_name(frame)}{told if frame.source or frame.function else ''}"


def _after(rank: RankResult) -> str:
    """`, after all_reduce at train.py, line 7`: the last recorded call."""
    calls = [span for span in rank.spans if span.op and span.site]
    if not calls:
        return ""
    return f", after {calls[-1].op} at {line_of(calls[-1].site)}"


def _doing(rank: RankResult) -> tuple[str, str]:
    """A verb, and the rest of the line."""
    frame, call = position(rank)
    match rank.status:
        case "died" if rank.exitcode is None and call is not None:
            return "ended in", f"{call}{line(frame)}"
        case "died" if rank.exitcode is None:
            return "ended", f"outside torch.distributed{_after(rank)}"
        case "died":
            where = f" in {call}{line(frame)}" if call is not None else ""
            return "died:", f"{exit_name(rank.exitcode)}{where}"
        case "raised" if gave_up(rank):
            return "gave up waiting in", f"{call}{line(frame)}"
        case "raised" if lost_partner(rank):
            return "lost its partner in", f"{call}{line(frame)}"
        case "raised" if rank.error is not None:
            own = own_error(rank.error)
            return "raised", f"{own.summary}{line(stacks.position(own.frames).frame)}"
        case "stopped" if rank.kept_by is not None:
            return "returned,", f"but {rank.kept_by} goes on{line(frame)}"
        case "stopped" if call is None and frame is None and rank.exitcode is None:
            return "is", f"outside torch.distributed{_after(rank)}"
        case "stopped" if call is None and frame is None:
            return "did not answer:", "suspended, busy in C code, or given no processor"
        case "stopped" if rank.activity == "suspended" or call is None:
            return "is", f"{rank.activity or 'idle'}{line(frame)}"
        case "stopped":
            there = [s for s in rank.spans if s.op and s.site == _site(rank)]
            last = max(there, key=lambda span: span.t0_ns, default=None)  # may have failed since
            return "waits in", f"{call}{_thread(rank, last)}{line(frame)}"
    verb, _, rest = rank.outcome().partition(" ")
    return verb, rest


def lost_partner(rank: RankResult) -> bool:
    """True for a secondary failure: another rank was gone, or did not come."""
    if rank.status == "died":
        return rank.exitcode == -6 and losses.is_loss("\n".join(rank.shown_lines[-20:]))
    return rank.error is not None and _is_loss(rank.error)


def _is_loss(error: ErrorRecord) -> bool:
    """Whether what an exception began with, or all parts of that group, report a lost rank."""
    first = root_error(error)
    return _lost(first) or (bool(first.parts) and all(map(_is_loss, first.parts)))


def root_error(error: ErrorRecord) -> ErrorRecord:
    """What a chain of exceptions began with: the oldest that was not dealt with.

    A call may lose its partner while an exception is on its way, in a `finally`: then that
    exception counts. One that an `except` deals with, by making the call, does not.
    """
    while error.previous is not None and not (_lost(error) and _deals_with(error, error.previous)):
        error = error.previous
    return error


def own_error(error: ErrorRecord) -> ErrorRecord:
    """The exception to tell of a rank that failed by itself: the last before it lost others."""
    chain, first = [error], root_error(error)
    while error is not first and error.previous is not None:
        chain.append(error := error.previous)
    own = list(itertools.takewhile(lambda one: not _lost(one), reversed(chain)))
    reasons = [one for one in own if one.type_name != "SystemExit"]  # sys.exit() in an `except`
    return (reasons or own)[-1] if own else chain[0]


def _deals_with(error: ErrorRecord, previous: ErrorRecord) -> bool:
    """Whether an exception comes from an `except` block that dealt with the previous one."""
    if not previous.frames:
        return False
    caught = previous.frames[0]  # the line of the `try`
    if owner_of(caught.filename) is Owner.LIBRARY:
        return True
    return any(
        source_code.handles(caught.filename, caught.lineno, frame.lineno)
        for frame in error.frames
        if (frame.filename, frame.function) == (caught.filename, caught.function)
    )


def gave_up(rank: RankResult) -> bool:
    """True for a rank whose call timed out, with no exception of its own on its way by then."""
    first = _first_loss(rank)
    return first is not None and losses.timed_out(first.text)


def was_kept(rank: RankResult) -> bool:
    """True if an exception was on its way when the rank's last call lost others."""
    error = rank.error
    return error is not None and _lost(error) and root_error(error) is not error


def _first_loss(rank: RankResult) -> ErrorRecord | None:
    """How a rank first learnt that another was gone or late; None if it failed by itself."""
    first = None if rank.error is None else root_error(rank.error)
    return first if first is not None and _lost(first) else None


def own_timeout(rank: RankResult) -> Timeout | None:
    """The timeout that ran out on a rank which gave up; `call` is "" if it is unknown who got it.

    It was passed to the call itself, or to the one that made the call's group.
    """
    first = _first_loss(rank)
    if first is None or not losses.timed_out(first.text):
        return None
    here = _site(rank)
    passed = [own for own in rank.timeouts if own.site == here]
    if here is not None and passed:
        return passed[-1]
    if (told := _TIMEOUT.search(first.text)) is None:
        return None
    seconds = int(told[1]) / 1000
    group = next((span.group for span in reversed(rank.spans) if span.failed and span.group), "")
    makers = MAKES_GROUP if "ranks " in group else JOINING if not group else (JOIN,)
    given = [
        own
        for own in rank.timeouts
        if own.seconds == seconds and own.call in (*makers, "set_timeout")
    ]
    return given[0] if len(given) == 1 else Timeout(seconds, "", None)


def _lost(error: ErrorRecord) -> bool:
    # Only in torch.distributed: a database may lose its connection, too.
    return losses.is_loss(error.text) and stacks.position(error.frames).call is not None


def is_counted_apart(rank: RankResult) -> bool:
    """Whether torch's check found nothing but its own number of a call unlike on another rank."""
    return rank.error is not None and _COUNTS.search(rank.error.text) is not None
