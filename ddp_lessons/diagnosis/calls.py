"""`Calls`: each rank's calls in order, matched across ranks. Runs in the parent.

Within a group, the n-th collective of one rank matches the n-th of every other. The watchdog asks
`Calls` whether any rank can still proceed, hangs.py asks where it went wrong, and the hang board
draws it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

from ddp_lessons.analysis.wait_states import exchanges, members, needed
from ddp_lessons.wire.ops import (
    DDP,
    GROUP_CALLS,
    JOIN,
    JOINING,
    LEAVE,
    LIKE,
    RECVS,
    SENDS,
    SENDS_ALIKE,
    WAIT_FOR_BUCKETS,
)
from ddp_lessons.wire.records import IN_FLIGHT, NOT_OF_A_THREAD, Kind, Span

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

State = Literal["done", "open", "failed"]
Pair = tuple[str | None, int, int, int | None]  # group, sender, receiver and tag


class Call(NamedTuple):
    """One rank's call of torch.distributed.

    Attributes
    ----------
    group, seq : str or None, int or None
        The group and the call's number in it; None for calls that make groups.
    peer : int or None
        The other rank of a send or recv; the root of a broadcast, reduce, gather or scatter.
    site : str or None
        The line of the learner's code, see `wire.records.split_site`.
    state : str
        "done", "open" (it never returned) or "failed" (it raised).
    """

    rank: int
    op: str
    group: str | None
    seq: int | None
    peer: int | None
    nbytes: int | None
    tensor: str | None
    site: str | None
    state: State
    t0_ns: int
    waits: bool = False  # a wait for asynchronous work issued earlier
    tag: int | None = None  # of a send or recv
    owner: str = ""  # who made the call, if it is not the learner's code: "DDP"
    thread: str | None = None  # its name, if it is not the main one

    @property
    def name(self) -> str:
        """The function; `DDP's broadcast` for a call that DDP made."""
        return f"{self.owner}'s {self.op}" if self.owner else self.op

    @property
    def kind(self) -> tuple[str, int | None, str]:
        """What must be the same on all ranks: what it sends, its root, and who calls."""
        return SENDS_ALIKE.get(self.op, self.op), self.peer, self.owner

    @property
    def pairwise(self) -> bool:
        """True for a send or a recv."""
        return self.op in SENDS or self.op in RECVS

    @property
    def side(self) -> str:
        """Of a send or a recv: which of the two it is."""
        return "send" if self.op in SENDS else "recv"

    @property
    def pair(self) -> Pair | None:
        """The group, sender, receiver and tag of a message; None if they are not known yet."""
        if self.peer is None or not self.pairwise:
            return None
        ends = (self.rank, self.peer) if self.side == "send" else (self.peer, self.rank)
        return (self.group, *ends, self.tag)

    @property
    def look(self) -> tuple[int | None, str] | None:
        """Bytes and dtype, where they must be the same on all ranks; else None."""
        if self.op not in LIKE or self.tensor is None:
            return None
        return self.nbytes, self.dtype

    @property
    def dtype(self) -> str:
        """The dtype of the call's tensor; "" if it is unknown."""
        return (self.tensor or "").partition(" (")[0]


class Calls:
    """The calls of all ranks, from each rank's spans; for a `Run` use `Calls.of(run)`.

    `lossy` are the ranks whose later spans were dropped; `threads` has for each rank the names of
    its threads by lane.
    """

    _of_runs: ClassVar[WeakKeyDictionary[RunRecord, Calls]] = WeakKeyDictionary()

    @classmethod
    def of(cls, run: RunRecord) -> Calls:
        """The calls of a run, cached."""
        found = cls._of_runs.get(run)
        if found is None:
            names = [rank.threads for rank in run.ranks]
            found = cls._of_runs[run] = cls([rank.spans for rank in run.ranks], run.lossy, names)
        return found

    def __init__(
        self,
        spans: Sequence[Sequence[Span]],
        lossy: Iterable[int] = (),
        threads: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.lossy = set(lossy)
        self.world_size = len(spans)
        self.members = members([s for rank in spans for s in rank], self.world_size)
        names = threads or [{}] * len(spans)
        self.of_rank = [list(_calls(*rank)) for rank in zip(spans, names, strict=True)]
        self.met: dict[str, dict[int, dict[int, Call]]] = {}  # group, number, rank
        self.messages: dict[Pair, dict[int, dict[str, Call]]] = {}  # pair, number, "send" or "recv"
        self._made: Counter[tuple[str, int]] = Counter()  # groups made, by function and rank
        for call in (call for rank in self.of_rank for call in rank):
            self._sort_in(call)
        self._awaited_buckets = [list(self._awaited(rank)) for rank in spans]

    def _sort_in(self, call: Call) -> None:
        if call.op in GROUP_CALLS:
            self._made[call.op, call.rank] += call.group is None
        elif call.state == "failed" and call.seq is None:
            return  # torch refused it: no other rank met it
        elif call.pairwise:
            if call.pair is not None and call.seq is not None and not call.waits:
                numbers = self.messages.setdefault(call.pair, {})
                numbers.setdefault(call.seq, {})[call.side] = call
        elif call.group is not None and call.seq is not None:
            there = self.met.setdefault(call.group, {}).setdefault(call.seq, {})
            before = there.get(call.rank)
            waits = before if call.waits else None
            there[call.rank] = waits._replace(state=call.state) if waits else call

    def open(self, rank: int) -> list[Call]:
        """The calls that a rank is in, one on each of its threads.

        A backward that only waits for its buckets adds one bucket's call: one that can never
        complete, if there is any.
        """
        found = [call for call in self.of_rank[rank] if call.state == "open"]
        buckets = self._awaited_buckets[rank]
        stuck = [call for call in buckets if self.missing(call)]
        return found + (stuck or buckets)[:1]

    def standing(self, rank: int) -> Call | None:
        """The call that a rank is in, its main thread's if that is, or its last if that raised."""
        if still := self.open(rank):
            return _of_main_thread(still) or still[0]
        mine = self.of_rank[rank]
        return mine[-1] if mine and mine[-1].state == "failed" else None

    def last_met(self, rank: int) -> Call | None:
        """The last collective that a rank called."""
        mine = (there[rank] for met in self.met.values() for there in met.values() if rank in there)
        return max(mine, key=lambda call: call.t0_ns, default=None)

    def _awaited(self, spans: Sequence[Span]) -> Iterator[Call]:
        """The collectives in flight while a rank's backward waits for its buckets."""
        if not any(s.t1_ns is None and s.name == WAIT_FOR_BUCKETS for s in spans):
            return
        for span in spans:
            in_flight = span.t1_ns is None and span.lane in IN_FLIGHT
            if in_flight and span.group is not None and span.seq is not None:
                call = self.met.get(span.group, {}).get(span.seq, {}).get(span.rank)
                if call is not None:
                    yield call._replace(state="open", waits=True)

    def missing(self, call: Call) -> set[int]:
        """The ranks that a call needs to return and that have not called it."""
        return {r for r in self._not_there(call) if not self._may_have_come(r, call)}

    def may_lack(self, call: Call) -> set[int]:
        """Those, and the ranks of which it is not known, as spans were dropped, for instance."""
        if call.op in JOINING and call.group is not None:
            there = {c.rank for made in self.of_rank for c in made if c.group == call.group}
            return set(range(self.world_size)) - there
        return self._not_there(call)

    def _may_have_come(self, rank: int, call: Call) -> bool:
        """Whether a dropped span may be the rank's call: not if its open call is earlier."""
        if rank not in self.lossy:
            return False
        still = [c for c in self.of_rank[rank] if c.state == "open"]
        stands = _of_main_thread(still) or next(iter(still), None)
        if stands is None or stands.pairwise or call.pairwise:
            return True
        if stands.group != call.group or stands.seq is None or call.seq is None:
            return True
        return stands.seq > call.seq

    def _not_there(self, call: Call) -> set[int]:
        if call.op in JOINING and call.group is not None:
            return set()
        if call.op in JOINING:
            made = self._made[call.op, call.rank]
            return {r for r in range(self.world_size) if self._made[call.op, r] < made}
        if call.pairwise:
            return self._missing_peer(call)
        if call.group is None or call.seq is None:
            return set()
        there = self.met.get(call.group, {}).get(call.seq, {})
        ranks = self.members(call.group)
        return {
            r
            for r in needed(call.op, call.rank, call.peer, ranks)
            if r not in there or not _alike(there[r], call) or _at_odds(there[r], call, ranks)
        }

    def _missing_peer(self, call: Call) -> set[int]:
        if call.peer is None or call.pair is None:  # a recv from any rank
            return set(self.members(call.group or "world")) - {call.rank}
        met = self.messages.get(call.pair, {}).get(-1 if call.seq is None else call.seq, {})
        other = next((met[side] for side in met if side != call.side), None)
        # Objects are two messages, the first their size: a call that passes a tensor has one.
        halfway = other is not None and other.state == "done" and "object" not in other.op
        return {call.peer} if other is None or ("object" in call.op and halfway) else set()

    def stuck_for_good(self, alive: Iterable[int]) -> bool:
        """True if no living rank can proceed: recorded calls alone prove it.

        Each is in calls that lack a rank, and every such rank has ended or is stuck likewise.
        """
        standing = [self.open(rank) for rank in alive]
        return all(calls and all(map(self.missing, calls)) for calls in standing)

    def not_made(self, rank: int) -> Call | None:
        """The first call of another rank that this rank has not made."""
        if rank in self.lossy:
            return None
        beyond = []
        for group, numbers in self.met.items():
            mine = max((seq for seq, calls in numbers.items() if rank in calls), default=-1)
            if rank in self.members(group):
                beyond += [
                    c for seq, calls in numbers.items() if seq > mine for c in calls.values()
                ]
        return min(beyond, key=lambda call: call.t0_ns, default=None)

    def count_before(self, last: Call, like: Call) -> int:
        """How often a rank called the line of another rank's call before its own call `last`."""
        return sum(
            (call.op, call.site) == (like.op, like.site)
            for call in self.of_rank[last.rank]
            if call.t0_ns < last.t0_ns and not call.waits
        )

    def left(self, rank: int, group: str) -> Call | None:
        """The call by which a rank left a group, or all groups, unless it joined again."""
        for call in reversed(self.of_rank[rank]):
            if call.op == JOIN:
                return None
            if call.op == LEAVE and call.group in (None, group):
                return call
        return None


def _of_main_thread(calls: Sequence[Call]) -> Call | None:
    return next((call for call in calls if call.thread is None), None)


def _alike(call: Call, other: Call) -> bool:
    return (call.kind[0], call.look) == (other.kind[0], other.look)


def _at_odds(call: Call, other: Call, ranks: Sequence[int]) -> bool:
    """Whether two ranks name different roots, and so one waits for what the other will not do."""
    if call.peer is None or other.peer is None or call.peer == other.peer:
        return False
    way = exchanges(other.op, other.rank, other.peer, ranks).get(call.rank)
    back = exchanges(call.op, call.rank, call.peer, ranks).get(other.rank)
    return way is not None and back != -way


def _calls(spans: Iterable[Span], threads: Mapping[str, str]) -> Iterator[Call]:
    """A rank's calls. Asynchronous work is one call; a wait for it counts until it is done."""
    issued: set[tuple[object, ...]] = set()
    for span in spans:
        if span.op is None or span.kind not in (Kind.COMM, Kind.ISSUE, Kind.WAIT):
            continue
        state: State = "failed" if span.failed else "open" if span.t1_ns is None else "done"
        key = span.op, span.group, span.seq, span.peer, span.tag
        if span.kind == Kind.WAIT:
            if state == "done":
                continue
        elif span.seq is not None:
            if span.lane in NOT_OF_A_THREAD:  # work in flight blocks no thread
                state = "done"
                if key in issued:
                    continue
            issued.add(key)
        elif span.lane in NOT_OF_A_THREAD:
            continue
        yield Call(
            span.rank, span.op, span.group, span.seq, span.peer, span.nbytes, span.tensor,
            span.site, state, span.t0_ns, span.kind == Kind.WAIT, span.tag,
            owner=DDP if span.kind == Kind.COMM and span.name != span.op else "",
            thread=threads.get(span.lane),
        )  # fmt: skip
