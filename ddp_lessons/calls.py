"""What every rank called, in order, and who is awaited in which call. Runs in the parent.

Within a group, the n-th collective of one rank meets the n-th of the others. watch.py asks whether
anything can still move, hangs.py where it went wrong, and the hang board draws it all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ddp_lessons.joining import GROUP_CALLS, JOINING
from ddp_lessons.meetings import FROM_ROOT, members
from ddp_lessons.messages import Span
from ddp_lessons.signatures import RECVS, SENDS

# All ranks must pass as much data of the same type, or the call fails or mixes up the numbers.
LIKE = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast",
    "gather", "gather_into_tensor", "gather_single", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor",
)  # fmt: skip
# Of no thread of its own.
NOT_OWN_LANES = ("process", "steps", "comm", "buckets", "gloo", "nccl", "cuda")

State = Literal["done", "open", "failed"]


class Call(NamedTuple):
    """One rank's call of torch.distributed.

    Attributes
    ----------
    group, seq : str or None, int or None
        The group and the call's number in it; None for calls that make groups.
    peer : int or None
        The other rank of a send or recv; the root of a broadcast, reduce, gather or scatter.
    site : str or None
        The learner's line, see `sites.split`.
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
    waits: bool = False  # for asynchronous work, which was issued before

    @property
    def pairwise(self) -> bool:
        """It is a send or a recv."""
        return self.op in SENDS or self.op in RECVS

    @property
    def look(self) -> tuple[int | None, str] | None:
        """What must be the same on all ranks: bytes and dtype, for calls that ask for it."""
        if self.op not in LIKE or self.tensor is None:
            return None
        return self.nbytes, self.tensor.partition(" (")[0]


class Calls:
    """The calls of all ranks. Made from the spans of each rank, by rank."""

    def __init__(self, spans: Sequence[Sequence[Span]]) -> None:
        self.world_size = len(spans)
        self.members = members([s for rank in spans for s in rank], self.world_size)
        self.of_rank = [list(_calls(rank)) for rank in spans]
        self.met: dict[str, dict[int, dict[int, Call]]] = {}  # group, number, rank
        self._pairs: Counter[tuple[str | None, str, int, int | None]] = Counter()
        self._made: Counter[tuple[str, int]] = Counter()  # groups made, by function and rank
        self._in_flight = [[s for s in rank if _is_in_flight(s)] for rank in spans]
        for call in (call for rank in self.of_rank for call in rank):
            self._sort_in(call)

    def _sort_in(self, call: Call) -> None:
        if call.op in GROUP_CALLS:
            self._made[call.op, call.rank] += 1
        elif call.pairwise:
            self._pairs[call.group, _side(call), call.rank, call.peer] += not call.waits
        elif call.group is not None and call.seq is not None:
            there = self.met.setdefault(call.group, {}).setdefault(call.seq, {})
            before = there.get(call.rank)
            waits = before if call.waits else None
            there[call.rank] = waits._replace(state=call.state) if waits else call

    def standing(self, rank: int) -> Call | None:
        """The call in which a rank stands: the one that is open, or that raised at last."""
        mine = self.of_rank[rank]
        still = [call for call in mine if call.state == "open"]
        if still:
            return still[0]
        return mine[-1] if mine and mine[-1].state == "failed" else None

    def stands_recorded(self, rank: int) -> bool:
        """True if a rank stands in a call that was recorded, and not in one of DDP's own."""
        call = self.standing(rank)
        return call is not None and call.state == "open"

    def missing(self, call: Call) -> set[int]:
        """The ranks without which a call cannot return, and that have not made theirs."""
        if call.op in JOINING:
            made = self._made[call.op, call.rank]
            return {r for r in range(self.world_size) if self._made[call.op, r] < made}
        if call.pairwise:
            return self._missing_peer(call)
        if call.group is None or call.seq is None:
            return set()
        there = self.met.get(call.group, {}).get(call.seq, {})
        awaited = set(self.members(call.group)) - {call.rank}
        if call.op in FROM_ROOT and call.peer in awaited - set(there):
            awaited = {call.peer}  # else others on the way from the root
        return {
            r
            for r in awaited
            if r not in there or there[r].op != call.op or there[r].look != call.look
        }

    def _missing_peer(self, call: Call) -> set[int]:
        other = "recv" if _side(call) == "send" else "send"
        if call.peer is None:  # a recv from anyone: all others
            return set(range(self.world_size)) - {call.rank}
        theirs = self._pairs[call.group, other, call.peer, call.rank]
        return {call.peer} if call.seq is None or theirs <= call.seq else set()

    def stuck_for_good(self, waiting: Mapping[int, str]) -> bool:
        """True if every living rank waits for one that has ended, or itself waits for ever.

        `waiting` names the call in which each living rank is. Of DDP's own collectives only those
        that `watch_ddp` sees are recorded: a rank with one in flight waits for those that did not
        come to it, else for all that are in another call.
        """
        stuck = {}
        for rank, name in waiting.items():
            call = self.standing(rank)
            if call is not None and self.stands_recorded(rank):
                stuck[rank] = self.missing(call)
            elif self._in_flight[rank]:
                stuck[rank] = {r for flight in self._in_flight[rank] for r in self._absent(flight)}
            else:
                stuck[rank] = {r for r in range(self.world_size) if waiting.get(r) != name}
        while free := {rank for rank, missing in stuck.items() if not missing}:
            stuck = {r: m - free for r, m in stuck.items() if r not in free}
        return stuck.keys() == waiting.keys()

    def _absent(self, flight: Span) -> set[int]:
        """The ranks that have not come to a collective in flight; none if it is not known which."""
        if flight.group is None or flight.seq is None:
            return set()
        there = self.met.get(flight.group, {}).get(flight.seq, {})
        return {r for r in self.members(flight.group) if r not in there or there[r].op != flight.op}

    def not_made(self, rank: int) -> Call | None:
        """Another rank's call: the first that this rank did not come to."""
        beyond = []
        for group, numbers in self.met.items():
            mine = max((seq for seq, calls in numbers.items() if rank in calls), default=-1)
            if rank in self.members(group):
                beyond += [
                    c for seq, calls in numbers.items() if seq > mine for c in calls.values()
                ]
        return min(beyond, key=lambda call: call.t0_ns, default=None)

    def left(self, rank: int, group: str) -> Call | None:
        """The call by which a rank left a group, or all, if it has and did not join again."""
        for call in reversed(self.of_rank[rank]):
            if call.op == "init_process_group":
                return None
            if call.op == "destroy_process_group" and call.group in (None, group):
                return call
        return None


def _calls(spans: Iterable[Span]) -> Iterator[Call]:
    """A rank's calls. Asynchronous work is one call; a wait for it counts while it goes on."""
    issued: set[tuple[object, ...]] = set()
    for span in spans:
        if span.op is None or span.kind not in ("comm", "issue", "wait"):
            continue
        state: State = "failed" if span.failed else "open" if span.t1_ns is None else "done"
        key = span.op, span.group, span.seq, span.peer
        if span.kind == "wait":
            if state == "done":
                continue
        elif span.seq is not None:
            if span.lane in NOT_OWN_LANES:  # what is in flight blocks nobody by itself
                state = "done"
                if key in issued:
                    continue
            issued.add(key)
        elif span.lane in NOT_OWN_LANES:
            continue
        yield Call(
            span.rank, span.op, span.group, span.seq, span.peer, span.nbytes, span.tensor,
            span.site, state, span.t0_ns, span.kind == "wait",
        )  # fmt: skip


def _is_in_flight(span: Span) -> bool:
    return span.t1_ns is None and span.lane in ("comm", "buckets") and span.kind == "comm"


def _side(call: Call) -> str:
    return "send" if call.op in SENDS else "recv"
