"""Explains runs in which a rank raised, died or could not send its value. Runs in the parent.

The earliest failure is the cause; ranks that only lost their partner are collateral and get one
line. If all failures are such losses, hangs.py finds the missing rank.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence

from ddp_lessons.diagnosis import advice, hangs, rank_state
from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.diagnosis.rank_state import frame_of, line, lost_partner, own_error
from ddp_lessons.diagnosis.verdict import Kind, Verdict
from ddp_lessons.results import RankResult, RunRecord
from ddp_lessons.text import agree, at_head, exit_name, ranks_text
from ddp_lessons.wire import stacks
from ddp_lessons.wire.records import FORKSERVER, NOT_LOADED, ErrorRecord, Frame

FAILED = ("raised", "died", "unsendable")
LAST_LINES = 5  # of a dead rank's output, as evidence
_TOO_MANY_FILES = f"OSError: [Errno {errno.EMFILE}]"
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "MemoryError", "out of memory")
_CPP_FRAME = re.compile(r"frame #\d+: ")  # of a C++ stack below an error message
_KERNEL_GAVE_UP = re.compile(r"^\S+\.cuh?:\d+: .*Assertion")  # once for each GPU thread
_GPU_FAILED = re.compile(r"CUDA error: ")
# For ranks of a script whose recording ends without an exit status.
_RANK_VANISHED = (
    "Its record just stops: it was killed (when memory ran out, say), it called os._exit, or its "
    "machine is gone. torchrun's log tells which."
)
_NODE_VANISHED = "Its agent (torchrun) was killed and its ranks with it, or the machine is gone."
_ALL_VANISHED = "The agent (torchrun) was killed and its ranks with it, or the machine stopped."


def explain(run: RunRecord) -> Verdict | None:
    """The verdict on a run in which ranks failed; None if no rank did."""
    failures = [rank for rank in run.ranks if rank.status in FAILED]
    if not failures:
        return None
    own = [rank for rank in failures if not lost_partner(rank)]
    if own and all(_got_another_size(run, rank) for rank in own):
        return hangs.explain_sizes(run, [rank.rank for rank in own])
    if not own:
        return hangs.explain(run)
    cause = _cause(run, own)
    if cause.status == "died" and cause.exitcode is None:
        return _vanished(run, cause)
    match cause.status:
        case "raised" if verdict := hangs.explain_message(run, cause.rank):
            return verdict
        case "raised" if _compared(cause) and (verdict := hangs.explain_mismatch(run)):
            return verdict
        case "raised":
            return _raised(run, cause)
        case "unsendable":
            return _unsendable(run, cause)
        case _:
            return _died(run, cause) if cause.error is None else _lost(run, cause)


def _compared(rank: RankResult) -> bool:
    """Whether a rank raised as DDP compared models: what it got may be of another call."""
    text = "" if rank.error is None else own_error(rank.error).text
    return "DDP expects same model" in text or "appears not to match" in text


def _got_another_size(run: RunRecord, rank: RankResult) -> bool:
    """Gloo aborted the process: it received data of another size than its call expects.

    Of a script only the calls are recorded, not what it printed.
    """
    if rank.status != "died":
        return False
    return any("op.preamble.length" in line for line in rank.lines) or (
        rank.exitcode is None and hangs.got_too_much(run, rank.rank)
    )


def _cause(run: RunRecord, failures: Sequence[RankResult]) -> RankResult:
    """The earliest failure; of ranks that failed alike, the lowest rank's."""
    first = min(failures, key=lambda rank: _failed_ns(run, rank.rank))
    return min((rank for rank in failures if _alike(rank, first)), key=lambda rank: rank.rank)


def _alike(one: RankResult, other: RankResult) -> bool:
    if one.error is None or other.error is None:
        return one is other
    errors = own_error(one.error), own_error(other.error)
    first, second = ((error.type_name, stacks.position(error.frames)) for error in errors)
    return first == second


def _raised(run: RunRecord, cause: RankResult) -> Verdict:
    assert cause.error is not None
    error = own_error(cause.error)
    same = [
        rank.rank
        for rank in run.ranks
        if rank.status == "raised" and _alike(rank, cause) and not lost_partner(rank)
    ]
    who = f"{ranks_text(same)} of {run.world_size}" if run.world_size > 1 else "the rank"
    told = {own_error(e).summary for rank in same if (e := run.ranks[rank].error) is not None}
    alone = f" ({ranks_text([cause.rank])})" if len(told) > 1 else ""
    return Verdict(
        "raised",
        tuple(same),
        f"{who} raised {error.summary}{alone}",
        (
            stacks.render(cause.error),
            *_before_the_call(run, cause),
            *_variables(cause),
            *_of_the_kernel(cause),
            *other_ranks(run, same),
        ),
        _advice(run, error),
        stacks.position(error.frames).frame,
    )


def _before_the_call(run: RunRecord, cause: RankResult) -> list[str]:
    """A note if unpickling the function or its arguments failed: that may run any code."""
    if cause.started_ns is not None:
        return []
    return ["", f"This was before {run.name} was called, while it or its arguments were loaded."]


def _variables(cause: RankResult) -> list[str]:
    """The variables of the learner's innermost function, if they were noted."""
    frame = stacks.position(own_error(cause.error).frames).frame if cause.error else None
    noted = [one for one in cause.post_mortem if _in_same_function(one.frame, frame)]
    if not noted:
        return []
    lines = [f"    {name} = {value}" for name, value in noted[-1].variables]
    more = len(cause.post_mortem) > 1
    where = f" (run.ranks[{cause.rank}].frames has those of all functions)" if more else ""
    return ["", f"The variables of rank {cause.rank} there{where}:", *lines] if lines else []


def _in_same_function(frame: Frame, other: Frame | None) -> bool:
    return other is not None and (frame.filename, frame.function) == (
        other.filename,
        other.function,
    )


def _of_the_kernel(cause: RankResult) -> list[str]:
    """The failed assertion that a GPU kernel printed: it says more than CUDA's error."""
    if cause.error is None or not _GPU_FAILED.search(cause.error.text):
        return []
    said = next(filter(_KERNEL_GAVE_UP.search, cause.lines), None)
    return ["", "What the GPU said:", f"    {said}"] if said else []


def _advice(run: RunRecord, error: ErrorRecord) -> str:
    if error.type_name == "TypeError" and not error.frames:
        return f"launch() calls {run.name}(rank, *args): does it take these arguments?"
    if any(text in error.text for text in _NO_MEMORY):
        return "Memory ran out: use smaller tensors or batches, or fewer ranks."
    return next((what for text, what in advice.REMEDIES.items() if text in error.text), "")


def _unsendable(run: RunRecord, cause: RankResult) -> Verdict:
    assert cause.error is not None
    name, why = cause.error.type_name, cause.error.text
    loaded = name != NOT_LOADED
    what = f"of type {name}, which cannot be sent back" if loaded else "that cannot be loaded here"
    if why.startswith(_TOO_MANY_FILES):
        try_this = advice.MORE_FILES
    else:
        try_this = advice.LESS if why.startswith("MemoryError") else advice.PLAIN_DATA
        try_this += "" if loaded else f" {advice.INSTALL}"
    return Verdict(
        "unsendable",
        (cause.rank,),
        f"rank {cause.rank} of {run.world_size} returned a value {what}: {why}",
        advice=try_this,
    )


def _died(run: RunRecord, cause: RankResult) -> Verdict:
    what, why = _death(run, cause)
    lines = [why, *last_call(run, cause)]
    if last := _last_lines(cause):
        lines += ["", f"The last lines of rank {cause.rank}'s output:"]
        lines += [f"    {line}" for line in last]
    kind: Kind = "killed" if (cause.exitcode or 0) < 0 else "exited"
    return Verdict(
        kind,
        (cause.rank,),
        f"rank {cause.rank} of {run.world_size} {what}",
        (*lines, *other_ranks(run, [cause.rank])),
    )


def _lost(run: RunRecord, cause: RankResult) -> Verdict:
    """The forkserver or engine that started a rank ended before it reported the rank's end."""
    assert cause.error is not None
    same = [rank.rank for rank in run.ranks if rank.error == cause.error]
    what, _, why = cause.error.text.partition("\n")
    kind: Kind = "forkserver ended" if cause.error.type_name == FORKSERVER else "engine lost"
    return Verdict(
        kind,
        tuple(same),
        f"{ranks_text(same)} of {run.world_size} {agree(same, 'was', 'were')} lost: {what}",
        (why, *last_call(run, cause), *other_ranks(run, same)),
    )


def _death(run: RunRecord, rank: RankResult) -> tuple[str, str]:
    """How a rank died, and the likely reason."""
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
    """A rank's last lines without C++ stacks; if its GPU failed, the lines that say how."""
    lines = [line for line in rank.shown_lines if line.strip() and not _CPP_FRAME.match(line)]
    if rank.exitcode == -signal.SIGABRT:
        found = (next(filter(text.search, lines), None) for text in (_KERNEL_GAVE_UP, _GPU_FAILED))
        if of_gpu := [line for line in found if line is not None]:
            return of_gpu
    return lines[-LAST_LINES:]


def _reason(run: RunRecord, rank: RankResult, exitcode: int) -> str:
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
                "Most often the system does that when memory runs out: use fewer ranks or smaller "
                "tensors."
            )
        case "SIGKILL":
            return (
                "The system reports no out-of-memory kill during this run: another process, "
                "or the rank itself, sent that signal."
            )
        case "SIGABRT" if out:
            return "Memory ran out: use smaller tensors or batches, or fewer ranks."
        case "SIGABRT" if any(_GPU_FAILED.search(line) for line in last):
            who = "NCCL's watchdog" if "watchdog" in last[-1] else "C++ code"
            return f"{who} ended the process over an error of its GPU.\n{advice.ON_GPU}"
        case "SIGABRT":
            told = "; its last lines may say why" if last else ""
            return f"C or C++ code, or os.abort(), ended the process{told}."
        case "SIGSEGV" | "SIGBUS" | "SIGFPE" | "SIGILL":
            return "C or C++ code crashed; nothing in Python can catch that."
        case _ if exitcode < 0:
            return "The system, another process, or the rank itself sent that signal."
    return (
        f"It called os._exit({exitcode}), or a library called exit(), before the function returned."
    )


def _vanished(run: RunRecord, first: RankResult) -> Verdict:
    """The verdict where ranks ended without an exit status; `first` is the earliest."""
    silent = [rank for rank in run.ranks if rank.status == "died" and rank.exitcode is None]
    ranks = tuple(rank.rank for rank in silent)
    if len(silent) == run.world_size:
        who = f"all {run.world_size} ranks" if run.world_size > 1 else "the rank"
        lines = (_ALL_VANISHED, "", *rank_state.lines(silent))
        return Verdict("killed", ranks, f"{who} ended without an exit status", lines)
    if (node := _gone_node(run, first)) is not None:
        return _node(run, node, first)
    title = f"rank {first.rank} of {run.world_size} ended without an exit status"
    lines = (_RANK_VANISHED, *last_call(run, first), *other_ranks(run, [first.rank]))
    return Verdict("killed", (first.rank,), title, lines)


def _gone_node(run: RunRecord, first: RankResult) -> list[RankResult] | None:
    """The ranks of the first one's machine, if exactly these ended without an exit status."""
    there = [rank for rank in run.ranks if rank.group_rank == first.group_rank]
    silent = [rank for rank in run.ranks if rank.status == "died"]
    return there if silent == there else None


def _node(run: RunRecord, there: list[RankResult], first: RankResult) -> Verdict:
    ranks = tuple(rank.rank for rank in there)
    others = {rank.host for rank in run.ranks if rank.group_rank != first.group_rank}
    host = f" ({first.host})" if first.host not in others else ""
    title = (
        f"node {first.group_rank}{host} is gone: {ranks_text(ranks)} of {run.world_size} ended "
        "without an exit status"
    )
    now = map(at_head, rank_state.lines(there))
    lines = (_NODE_VANISHED, "", *now, *other_ranks(run, ranks))
    return Verdict("killed", ranks, title, lines)


# Evidence beside the cause


def last_call(run: RunRecord, rank: RankResult) -> list[str]:
    """The last call of a dead rank: its span buffer stays readable."""
    calls = Calls.of(run)
    made = calls.of_rank[rank.rank]
    if not made:
        return []
    call = calls.standing(rank.rank) or made[-1]
    ends = {"done": "Its last call was", "failed": "Its last call, which failed, was"}
    what = ends.get(call.state, "It was in")
    return [f"{what} {call.name}{line(frame_of(call.site))}"]


def other_ranks(run: RunRecord, told: Sequence[int]) -> list[str]:
    """Secondary failures: one line for each kind."""
    rest = [r for r in run.ranks if r.rank not in told]
    lost = [r for r in rest if lost_partner(r)]
    stopped = [r for r in rest if r.status == "stopped"]
    own = [r for r in rest if r.status in FAILED and r not in lost]
    lines = [at_head(died) for _, died, _ in rank_state.dead_threads(run.ranks)]
    lines += [f"rank {r.rank} failed{_later(run, r, told)}: {r.outcome()}" for r in own]
    for where in dict.fromkeys(_lost_where(r) for r in lost):
        there = [r.rank for r in lost if _lost_where(r) == where]
        partner = agree(there, "its partner", "their partner")
        before = all(_had_given_up(run, rank, told) for rank in there)
        then = "had given up before" if before else f"then lost {partner}"
        lines.append(f"{at_head(ranks_text(there))} {then}{where}.")
    lines += [
        f"rank {r.rank} {'' if r.pid or r.kept_by else 'was '}{r.outcome()}" for r in stopped[:4]
    ]
    if len(stopped) > 4:
        more = [rank.rank for rank in stopped[4:]]
        lines.append(f"... and {len(more)} more {agree(more, 'rank was', 'ranks were')} stopped")
    return ["", *lines] if lines else []


def _had_given_up(run: RunRecord, rank: int, told: Sequence[int]) -> bool:
    ended = _failed_ns(run, rank)
    return rank_state.gave_up(run.ranks[rank]) and all(_failed_ns(run, o) > ended for o in told)


def _later(run: RunRecord, rank: RankResult, told: Sequence[int]) -> str:
    """` later`, where it is known that a rank failed after those that are told of."""
    known = all(run.ranks[other].exitcode is not None for other in (rank.rank, *told))
    failed = _failed_ns(run, rank.rank)
    return " later" if known and all(_failed_ns(run, o) < failed for o in told) else ""


def _failed_ns(run: RunRecord, rank: int) -> int:
    """When a rank failed, at the latest: before the call that kept its exception, if one did."""
    result = run.ranks[rank]
    if rank_state.was_kept(result):
        failed = [call.t0_ns for call in Calls.of(run).of_rank[rank] if call.state == "failed"]
        return max(failed, default=result.ended_ns)
    return result.ended_ns


def _lost_where(rank: RankResult) -> str:
    return stacks.waiting_where(rank_state.frames_of(rank)) if rank.error is not None else ""
