"""Matches spans of different ranks to collectives and splits each into waiting and transfer.

Runs in the parent; metrics.py and the plots build on it. No rank leaves an all_reduce before the
last one has come, so the time until then is waiting and the rest is transfer. Spans that never
ended and ranks that never came do not raise.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ddp_lessons.analysis.last_run import kept
from ddp_lessons.wire.ops import (
    BY_TREE,
    DIRECT,
    FROM_ROOT,
    JOIN,
    OWN_WORLD,
    RECVS,
    SENDS,
    SENDS_ALIKE,
    TO_ROOT,
)
from ddp_lessons.wire.records import Kind, Span

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

ALL_TO_ALL, LATE_ROOT, EARLY_ROOT = "all to all", "late root", "early root"
LATE_SENDER, LATE_RECEIVER = "late sender", "late receiver"


class Share(NamedTuple):
    """One rank's part in one collective, send or recv.

    Attributes
    ----------
    bucket : int or None
        The index of the gradient bucket, for DDP's own collectives.
    wait_ns : int
        How long the rank waited for the ranks that its pattern names.
    transfer_ns : int
        How long it stayed in the call after that.
    last_rank : int or None
        The last to come of these ranks; None if one never came.
    pattern : str
        "all to all" (all wait for the last), "late root" (all wait for the root, also those that
        give it something and are in the call until it comes), "early root" (the root waits for the
        last of the others, or any rank for one by which the root's data come or go on), "late
        sender" (a recv waits for its send) or "late receiver" (a send waits for its recv).
    open : bool
        True if the call never ended; `t1_ns` is then the rank's end.
    peer : int or None
        The other rank of a send or recv; the root of a broadcast, reduce, gather or scatter.
    tag : int or None
        The tag of a send or recv.
    """

    rank: int
    op: str
    group: str
    seq: int
    step: int | None
    nbytes: int | None
    bucket: int | None
    t0_ns: int
    t1_ns: int
    wait_ns: int
    transfer_ns: int
    last_rank: int | None
    pattern: str
    open: bool = False
    peer: int | None = None
    tag: int | None = None


class Arrival(NamedTuple):
    """When the ranks came to one collective.

    `lateness_ns`, by global rank, counts from the first arrival; None for a rank that took no part.
    `last_rank` is None if a rank of the group never came.
    """

    op: str
    group: str
    seq: int
    step: int | None
    last_rank: int | None
    lateness_ns: tuple[int | None, ...]


@kept
def waits(run: RunRecord) -> Sequence[Share]:
    """Every rank's part in every collective, send and recv, split into waiting and transfer.

    The patterns are Scalasca's wait states (Geimer et al., 2010). Sorted by last arrival and rank.
    """
    shares = [(m.last_ns, share) for m in meetings(run) for share in _shares(m)]
    return tuple(share for _, share in sorted(shares, key=lambda pair: (pair[0], pair[1].rank)))


def arrivals(run: RunRecord) -> list[Arrival]:
    """The lateness of each rank at each collective, sorted by last arrival.

    Sends and recvs are left out.
    """
    collectives = [m for m in meetings(run) if m.pattern != LATE_SENDER]
    return [_arrival(run, m) for m in sorted(collectives, key=lambda m: m.last_ns)]


def ended(spans: Iterable[Span], end_ns: int) -> Iterator[tuple[Span, int]]:
    """The spans with their ends; `end_ns` for those that never ended."""
    for span in spans:
        t1_ns = end_ns if span.t1_ns is None else span.t1_ns
        yield span, max(span.t0_ns, t1_ns)


def key_of(span: Span) -> tuple[object, ...]:
    """The key that the spans of one collective, or of a send and its recv, share."""
    if span.op in SENDS:
        return span.group, "send", span.seq, span.rank, span.peer, span.tag
    if span.op in RECVS:
        return span.group, "send", span.seq, span.peer, span.rank, span.tag
    return span.group, SENDS_ALIKE.get(span.op or "", span.op), span.seq


class Collective(NamedTuple):
    """One collective, or a send and its recv: the ranks that came and those they wait for."""

    pattern: str
    parts: dict[int, tuple[Span, int]]  # the spans and their ends, by rank
    ranks: tuple[int, ...]  # all that take part
    awaited: tuple[int | None, ...]  # the ranks for which the others wait
    last_ns: int  # when the last rank came

    @property
    def complete(self) -> bool:
        """True if all awaited ranks came."""
        return all(rank in self.parts for rank in self.awaited)

    def waits(self, rank: int) -> bool:
        """Whether `rank` waits for others."""
        return self.pattern in (ALL_TO_ALL, LATE_SENDER) or rank not in self.awaited


Members = Callable[[str], tuple[int, ...]]  # the ranks of a group, by its name


def meetings(run: RunRecord) -> Iterator[Collective]:
    """All collectives, and sends with their recvs, except those that dropped spans may hide.

    A call has no group if its name was not kept: then nobody knows which ranks take part.
    """
    parts: dict[tuple[object, ...], dict[int, tuple[Span, int]]] = {}
    for rank in run.ranks:
        for span, t1_ns in ended(rank.spans, rank.ended_ns):
            if span.kind == Kind.COMM and span.seq is not None and span.group is not None:
                parts.setdefault(key_of(span), {}).setdefault(span.rank, (span, t1_ns))
    groups = members([s for rank in run.ranks for s in rank.spans], run.world_size)
    lossy = set(run.lossy)
    for by_rank in parts.values():
        meeting = _meeting(by_rank, groups)
        # A rank that dropped spans may have come: then nothing is known.
        if lossy.isdisjoint(meeting.awaited) or lossy.isdisjoint({*meeting.awaited} - {*by_rank}):
            yield meeting


def _meeting(parts: dict[int, tuple[Span, int]], members_of: Members) -> Collective:
    span, _ = next(iter(parts.values()))
    last_ns = max(part.t0_ns for part, _ in parts.values())
    if span.op in SENDS or span.op in RECVS:
        pair = (span.rank, -1 if span.peer is None else span.peer)
        return Collective(LATE_SENDER, parts, pair, pair, last_ns)
    ranks = members_of(span.group or "")
    if span.op in FROM_ROOT:
        return Collective(LATE_ROOT, parts, ranks, (span.peer,), last_ns)
    if span.op in TO_ROOT:
        others = tuple(rank for rank in ranks if rank != span.peer)
        return Collective(EARLY_ROOT, parts, ranks, others, last_ns)
    return Collective(ALL_TO_ALL, parts, ranks, ranks, last_ns)


def members(spans: Sequence[Span], world_size: int) -> Members:
    """A function from a group's name to its ranks, made from the spans of all ranks."""
    joined = Counter(s.rank for s in spans if s.op == JOIN and s.group is None)

    @functools.cache
    def of(group: str) -> tuple[int, ...]:
        if OWN_WORLD in group:
            return tuple({s.rank for s in spans if s.group == group})
        listed = _listed(group)
        if listed or not joined:
            return listed or tuple(range(world_size))
        _, _, number = group.partition(" #")  # "world #2" has the ranks that joined twice
        times = int(number) if number.isdecimal() else 1
        active = {s.rank for s in spans if s.group == group}
        return tuple(sorted(active.union(r for r, count in joined.items() if count >= times)))

    return of


def _listed(group: str) -> tuple[int, ...]:
    """The ranks in a group's name: 0, 4, 5, 6 in "rows: ranks 0 4-6 #2"; none in "world"."""
    found = re.search(r"(?:^|: )ranks (\d[\d -]*?)(?: #\d+)?$", group)
    ranges = [part.partition("-") for part in found[1].split()] if found else []
    return tuple(rank for a, _, b in ranges for rank in range(int(a), int(b or a) + 1))


def _shares(meeting: Collective) -> Iterator[Share]:
    begun = {rank: span.t0_ns for rank, (span, _) in meeting.parts.items()}
    complete = meeting.complete
    awaited = [rank for rank in meeting.awaited if rank in begun] if complete else []
    last = max(awaited, key=begun.__getitem__, default=None)
    came_ns = max((begun[rank] for rank in awaited), default=0)
    for rank, (span, t1_ns) in meeting.parts.items():
        until_ns, waits_for, pattern = span.t0_ns, last, meeting.pattern
        if meeting.waits(rank):
            until_ns = min(t1_ns, max(came_ns, span.t0_ns)) if complete else t1_ns
        if complete and (later := _came_later(meeting, rank, until_ns)) is not None:
            until_ns, waits_for = begun[later], later
            pattern = LATE_ROOT if later == span.peer else EARLY_ROOT
        yield Share(
            rank,
            span.op or span.name,
            span.group or "",
            -1 if span.seq is None else span.seq,
            span.step,
            span.nbytes,
            span.bucket,
            span.t0_ns,
            t1_ns,
            until_ns - span.t0_ns,
            t1_ns - until_ns,
            waits_for,
            LATE_RECEIVER if span.op in SENDS else pattern,
            span.t1_ns is None,
            span.peer,
            span.tag,
        )


def _came_later(meeting: Collective, rank: int, since_ns: int) -> int | None:
    """The last rank that `rank` needs and that came after `since_ns`, while it was in the call."""
    if meeting.last_ns <= since_ns:
        return None
    span, t1_ns = meeting.parts[rank]
    partners = needed(span.op or "", rank, span.peer, meeting.ranks)
    came = {r: meeting.parts[r][0].t0_ns for r in partners if r in meeting.parts}
    later = {r: t0_ns for r, t0_ns in came.items() if since_ns < t0_ns <= t1_ns}
    return max(later, key=later.__getitem__, default=None)


def needed(op: str, rank: int, root: int | None, ranks: Sequence[int]) -> set[int]:
    """The other ranks of the group `ranks` that a collective needs to return on `rank` in gloo."""
    others = set(ranks) - {rank}
    if root is None or root not in ranks or rank not in ranks:
        return others
    if op in DIRECT:
        return others if rank == root else {root}
    if op in BY_TREE:
        return _on_the_way(ranks.index(rank), ranks.index(root), ranks)
    return others


def exchanges(op: str, rank: int, root: int, ranks: Sequence[int]) -> dict[int, int]:
    """To which ranks of a group gloo sends data in a collective with a root (1), from which (-1).

    Only what the root decides: {} for a reduce, in which all ranks exchange data first.
    """
    if root not in ranks or rank not in ranks or op not in (*DIRECT, *BY_TREE, "gather_object"):
        return {}
    if op in BY_TREE:
        first, size = ranks.index(root), len(ranks)
        number = (ranks.index(rank) - first) % size
        ways = dict.fromkeys(_after(number, size), 1) | ({_before(number): -1} if number else {})
        return {ranks[(n + first) % size]: way for n, way in ways.items()}
    way = 1 if op in FROM_ROOT else -1  # of the root
    return dict.fromkeys(set(ranks) - {rank}, way) if rank == root else {root: -way}


def _on_the_way(place: int, root: int, ranks: Sequence[int]) -> set[int]:
    """The ranks by which a broadcast comes from the root, and those to which a rank passes it.

    Counted from the root, number n receives from n without its highest bit (gloo/broadcast.cc).
    """
    size = len(ranks)
    number = (place - root) % size
    found = {*_after(number, size)}
    while number:
        number = _before(number)
        found.add(number)
    return {ranks[(n + root) % size] for n in found}


def _before(number: int) -> int:
    """From which rank a broadcast comes to a rank, both counted from the root."""
    return number ^ 1 << (number.bit_length() - 1)


def _after(number: int, size: int) -> list[int]:
    """To which ranks a rank passes a broadcast, all counted from the root."""
    bits = range(number.bit_length(), size.bit_length())
    return [number | 1 << bit for bit in bits if number | 1 << bit < size]


def _arrival(run: RunRecord, meeting: Collective) -> Arrival:
    begun = {rank: span.t0_ns for rank, (span, _) in meeting.parts.items()}
    first_ns = min(begun.values())
    span, _ = next(iter(meeting.parts.values()))
    lateness = (begun[r] - first_ns if r in begun else None for r in range(run.world_size))
    return Arrival(
        span.op or span.name,
        span.group or "",
        -1 if span.seq is None else span.seq,
        span.step,
        max(begun, key=begun.__getitem__) if begun.keys() >= {*meeting.ranks} else None,
        tuple(lateness),
    )
