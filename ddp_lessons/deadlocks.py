"""Why ranks wait though their calls have not parted and none is away: mostly for each other.

Runs in the parent, for hangs.py.
"""

from __future__ import annotations

from ddp_lessons import advice
from ddp_lessons.calls import Call
from ddp_lessons.partings import frame_of
from ddp_lessons.signatures import SENDS
from ddp_lessons.standstill import DDP_CALLS, JOIN, Standstill
from ddp_lessons.verdict import Kind, Verdict
from ddp_lessons.whereabouts import position
from ddp_lessons.wording import agree, count, listed, ranks_text


def explain(still: Standstill) -> Verdict:
    """The verdict on a standstill for which no rank that is elsewhere can be blamed."""
    lines = still.evidence()
    frame = still.frame()
    calls = {position(rank).call for rank in still.waiting}
    everyone = tuple(rank.rank for rank in still.waiting)
    if calls == {JOIN}:
        title = f"{still.who_waits()} for ranks that never came"
        place = advice.PLACE.format(ranks=count(still.run.world_size, "rank"))
        return Verdict("never joined", everyone, title, lines, place, frame)
    title = f"all ranks wait for each other: {still.who_waits()}"
    if late := _late(still):
        op = still.standing[late[0]].op
        them = agree(late, "it", "them")
        title = f"{ranks_text(late)} came to {op} when others had given up waiting for {them}"
        return Verdict("gave up waiting", late, title, lines, advice.LATE, frame)
    unmatched = [c for c in still.standing.values() if c.pairwise and still.calls.missing(c)]
    groups = {c.group for c in still.standing.values() if not c.pairwise and c.group}
    if unmatched and len(unmatched) == len(still.standing):
        return _all_pairwise(title, unmatched, lines)
    if unmatched:
        return _unmatched(unmatched[0], lines)
    if len(groups) > 1:
        return Verdict(
            "groups in different order",
            _in_the_smallest_group(still) or everyone,
            f"{title}, in groups that they take in different order",
            lines,
            advice.GROUPS,
            frame,
        )
    if len(calls) > 1:
        return _different(still, lines)
    if _across_machines(still):
        title = f"{title}, and nothing comes through from one machine to the other"
        return Verdict("cut off", everyone, title, lines, advice.NETWORK, frame)
    if still.run.hung_after is None:
        return Verdict("gave up waiting", everyone, still.who_waits(), lines, advice.MISSING, frame)
    return Verdict("waiting for each other", everyone, title, lines, advice.SAME_CALL, frame)


def _across_machines(still: Standstill) -> bool:
    """A call never ended though all have come to it, and they are on several machines."""
    hosts = {rank.host for rank in still.waiting}
    calls = still.standing.values()
    return len(hosts) > 1 and any(not still.calls.missing(call) for call in calls)


def _different(still: Standstill, lines: tuple[str, ...]) -> Verdict:
    """Some wait in a call of DDP's own, which is not recorded, others elsewhere."""
    by_call: dict[str | None, list[int]] = {}
    for rank in still.waiting:
        by_call.setdefault(position(rank).call, []).append(rank.rank)
    few, *_, many = sorted(by_call.values(), key=len)
    sides = [
        f"{ranks_text(ranks)} {agree(ranks, 'waits', 'wait')} in {call}"
        for call, ranks in by_call.items()
    ]
    return Verdict(
        "different collectives",
        tuple(few if len(few) < len(many) else sorted(few + many)),
        f"the ranks wait for each other in different calls: {listed(sides)}",
        lines,
        advice.DDP if DDP_CALLS & by_call.keys() else advice.ORDER,
        position(still.run.ranks[few[0]]).frame,
    )


def _in_the_smallest_group(still: Standstill) -> tuple[int, ...]:
    """The ranks that wait in a group where fewer wait than in the others; () if none."""
    by_group: dict[str | None, list[int]] = {}
    for rank, call in still.standing.items():
        by_group.setdefault(call.group, []).append(rank)
    few, *_, many = sorted(by_group.values(), key=len)
    return tuple(few) if len(few) < len(many) else ()


def _late(still: Standstill) -> tuple[int, ...]:
    """The ranks that came to a call only after others had failed there."""
    standing = still.standing.values()
    if still.run.hung_after is not None or len({(c.group, c.seq) for c in standing}) != 1:
        return ()
    ended = (rank.ended_ns for rank in still.waiting if rank.status == "raised")
    first = min(ended, default=None)
    return tuple(c.rank for c in standing if first is not None and c.t0_ns > first)


def _all_pairwise(title: str, calls: list[Call], lines: tuple[str, ...]) -> Verdict:
    ranks = tuple(sorted(call.rank for call in calls))
    kind: Kind = "unmatched recv"
    against = advice.RECEIVES_FIRST
    if all(call.op in SENDS for call in calls):
        kind, against = "unmatched send", advice.SENDS_FIRST
    return Verdict(kind, ranks, title, lines, against, frame_of(calls[0].site))


def _unmatched(call: Call, lines: tuple[str, ...]) -> Verdict:
    sends = call.op in SENDS
    other = "any rank" if call.peer is None else f"rank {call.peer}"
    title = (
        f"rank {call.rank} waits in {call.op} {'to' if sends else 'from'} {other}, which does "
        f"not {'receive' if sends else 'send'}: it waits, too"
    )
    kind: Kind = "unmatched send" if sends else "unmatched recv"
    return Verdict(kind, (call.rank,), title, lines, advice.PAIRS, frame_of(call.site))
