"""The first collective at which ranks disagree: same sequence number, different function or tensor.

A send and its recv may disagree likewise. Runs in the parent, on `Calls`. hangs.py explains hangs
with it, and diagnose.py warns of swapped calls whose numbers are silently wrong.
"""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from ddp_lessons.diagnosis import source_code
from ddp_lessons.diagnosis.calls import Call, Calls, Pair
from ddp_lessons.diagnosis.rank_state import frame_of, line, line_of
from ddp_lessons.diagnosis.verdict import Kind
from ddp_lessons.text import agree, listed, ranks_text
from ddp_lessons.wire.ops import FROM_ROOT, RECVS
from ddp_lessons.wire.records import Frame, split_site

# Dtypes as which tensors of other dtypes are viewed to send them, and complex ones, viewed as real.
RAW = ("uint8", "int8", "int16", "uint16", "bool", "float8", "complex")

_NOTHING = "no call"  # of a rank that makes no call after another

Why = Literal["order", "tensors", "sent", "objects"]


class Mismatch(NamedTuple):
    """The first sequence number of a group at which ranks made different calls.

    Attributes
    ----------
    calls : tuple of Call
        The calls of the ranks that made one; of a message the send and the recv.
    why : str
        "order" (other functions or roots, or the same lines in a different order) or "tensors"; of
        a message "sent" (the tensor received into is unlike the one sent) or "objects" (one side
        passes objects, the other a tensor).
    passed : str or None
        The line that the ranks at another line skipped, if that is known.
    """

    group: str
    seq: int
    calls: tuple[Call, ...]
    why: Why
    passed: str | None

    @property
    def kind(self) -> Kind:
        """The kind of verdict."""
        if self.why in ("tensors", "sent"):
            return "tensor mismatch"
        if self.why == "objects":
            return "unmatched send"
        return "different collectives" if self.passed is None else "skipped collective"

    @property
    def place(self) -> str:
        """`call 3`, or `call 3 of group 'ranks 0 2'`; `message 3 from rank 0 to rank 1`."""
        if self.calls[0].pairwise:
            send, recv = self.calls
            tag = f" with tag {send.tag}" if send.tag else ""
            return f"message {self.seq + 1} from rank {send.rank} to rank {recv.rank}{tag}"
        group = "" if self.group == "world" else f" of group {self.group!r}"
        return f"call {self.seq + 1}{group}"

    @property
    def sides(self) -> list[list[Call]]:
        """The calls in groups that agree, the largest first."""
        sides: dict[object, list[Call]] = defaultdict(list)
        for call in self.calls:
            order = call.kind, call.site
            sides[call.look if self.why == "tensors" else order].append(call)
        return sorted(sides.values(), key=lambda side: (-len(side), side[0].rank))

    @property
    def odd_ranks(self) -> tuple[int, ...]:
        """The ranks of the smallest side; all ranks if the sides are equal."""
        most, *_, least = self.sides
        return ranks_of(least if len(least) < len(most) else self.calls)

    @property
    def frame(self) -> Frame | None:
        """The line to look at first; of a message that of the recv."""
        odd = self.calls[-1] if self.calls[0].pairwise else self.sides[-1][0]
        return frame_of(self.passed or odd.site)

    @property
    def too_much(self) -> bool:
        """Whether a message has more bytes than its recv's tensor, so that gloo aborts the rank."""
        sent, taken = self.calls[0].nbytes, self.calls[-1].nbytes
        return self.why == "sent" and sent is not None and taken is not None and sent > taken

    def title(self) -> str:
        """What happened, in one line."""
        if self.why == "tensors":
            looks = listed(f"{side[0].tensor} on {_who(side)}" for side in self.sides)
            return f"{self.calls[0].name} was called with tensors that do not match: {looks}"
        if self.why == "sent":
            send, recv = self.calls
            return (
                f"rank {send.rank} sends {send.tensor} to rank {recv.rank}, "
                f"whose {recv.op} expects {recv.tensor}"
            )
        if self.why == "objects":
            send, recv = self.calls
            return f"rank {send.rank} calls {_name(send)}, which calls {recv.name}"
        if self.passed is None:
            alike = len({_name(side[0]) for side in self.sides}) == 1
            lines = [f" at {line_of(side[0].site)}" if alike else "" for side in self.sides]
            calls = (_calls(side, self.why) for side in self.sides)
            what = listed(f"{call}{line}" for call, line in zip(calls, lines, strict=True))
            return f"{self.place} is not the same on all ranks: {what}"
        callers = [call for call in self.calls if call.site == self.passed]
        others = [call for call in self.calls if call.site != self.passed]
        return (
            f"{_who(callers)} {agree(callers, 'calls', 'call')} {callers[0].name} at "
            f"{line_of(self.passed)}, which {_who(others)} skipped"
        )

    def lines(self) -> list[str]:
        """The calls, one line for each side, and for each thread."""
        parts = [
            [call for call in side if call.thread == thread]
            for side in self.sides
            for thread in dict.fromkeys(call.thread for call in side)
        ]
        return [f"{_calls(part, self.why)}{line(frame_of(part[0].site))}" for part in parts]


def first(calls: Calls, group: str, until: int | None = None) -> Mismatch | None:
    """The first mismatch in a group, up to number `until`; None if all calls agree."""
    for seq, by_rank in sorted(calls.met.get(group, {}).items()):
        if until is not None and seq > until:
            break
        if len(by_rank) > 1 and (why := _difference(calls.met[group], seq)):
            found = Mismatch(group, seq, tuple(by_rank.values()), why, None)
            if why == "order":
                if (shift := _shift(calls.met[group], found)) is not None:
                    return shift
                most, *_, least = found.sides
                passed = _passed_by(calls.met[group], seq, most[0].site, least[0].site)
                found = found._replace(passed=passed)
            return found if found.passed else _earlier(calls.met[group], found) or found
    return None


def _shift(numbers: Numbers, later: Mismatch) -> Mismatch | None:
    """Where ranks skipped a call like their next one, right before the calls differed.

    Until there each of their calls was that which the others made one call later.
    """
    found = None
    for seq in range(later.seq - 1, -1, -1):
        here = Mismatch(later.group, seq, tuple(numbers.get(seq, {}).values()), "order", None)
        if len(here.sides) != 2:
            return found
        for skipped, ahead in (here.sides, here.sides[::-1]):
            after = [numbers[seq + 1].get(call.rank) for call in skipped]
            if all(call is not None and call.site == ahead[0].site for call in after):
                found = here._replace(passed=skipped[0].site)
                break
        else:
            return found
    return found


def _earlier(numbers: Numbers, later: Mismatch) -> Mismatch | None:
    """Where ranks got out of step before calls differed: at a line that only some of them reach.

    Such as a forward that rank 0 makes alone: its first calls meet those of the others' next one.
    """
    for seq in sorted(numbers):
        if seq >= later.seq:
            return None
        found = Mismatch(later.group, seq, tuple(numbers[seq].values()), "order", None)
        if len(found.sides) != 2:
            continue
        sites = [side[0].site for side in found.sides]
        if (passed := source_code.optional(*sites)) is not None:
            return found._replace(passed=passed)
    return None


def messages(calls: Calls, ended: Sequence[int] = ()) -> list[Mismatch]:
    """The messages whose recv is unlike their send, the first sent first.

    `ended` are ranks that a message has ended.
    """
    found = list(_too_long_for_any(calls, ended))
    certain = _certain(calls)
    for pair, numbers in calls.messages.items():
        for seq, sides in numbers.items() if pair in certain else ():
            if len(sides) == 2 and (why := _unlike(sides["send"], sides["recv"])):
                met = sides["send"], sides["recv"]
                found.append(Mismatch(pair[0] or "", seq, met, why, None))
    return sorted(found, key=lambda message: message.calls[0].t0_ns)


def _certain(calls: Calls) -> set[Pair]:
    """The pairs whose recvs have numbers that are certain.

    A recv from any rank gets its number when it is done: not if nobody waits for it, and not
    the right one if it overtakes another.
    """
    numbers: defaultdict[Pair, list[int]] = defaultdict(list)
    unnumbered = set()  # the groups and receivers
    for call in (call for of_rank in calls.of_rank for call in of_rank):
        if call.op not in RECVS or call.waits:
            continue
        if call.pair is not None:
            numbers[call.pair].append(call.seq or 0)
        if call.seq is None and call.state == "done":
            unnumbered.add((call.group, call.rank))
    return {
        (group, sender, receiver, tag)
        for (group, sender, receiver, tag), found in numbers.items()
        if found == sorted(found) and (group, receiver) not in unnumbered
    }


def _too_long_for_any(calls: Calls, ended: Sequence[int]) -> Iterator[Mismatch]:
    """Messages that nobody took, too long for a recv from any rank that took none.

    That recv is one that never returned; or the rank has ended, perhaps before it waited for it.
    """
    open_ones = [
        call
        for rank in range(calls.world_size)
        for call in (*calls.open(rank), *(calls.of_rank[rank] if rank in ended else ()))
        if call.op in RECVS and call.peer is None and (call.state == "open" or call.seq is None)
    ]
    for (group, _, receiver, tag), numbers in calls.messages.items():
        for seq, sides in numbers.items():
            for recv in open_ones if sides.keys() == {"send"} else ():
                found = Mismatch(group or "", seq, (sides["send"], recv), "sent", None)
                if (recv.rank, recv.group, recv.tag) == (receiver, group, tag) and found.too_much:
                    yield found


def ranks_of(calls: Sequence[Call]) -> tuple[int, ...]:
    """The ranks that made the calls."""
    return tuple(sorted(call.rank for call in calls))


Numbers = dict[int, dict[int, Call]]  # the calls in a group by number and rank


def _difference(numbers: Numbers, seq: int) -> Why | None:
    calls = list(numbers[seq].values())
    if len({call.kind for call in calls}) > 1:
        return "order"
    if len({call.site for call in calls}) > 1 and _out_of_step(numbers, seq):
        return "order"
    if len({call.look for call in calls}) == 1:
        return None
    return "order" if _came_from(numbers, seq) else "tensors"


def _came_from(numbers: Numbers, seq: int) -> bool:
    """Whether a rank has called before at the line at which another rank is now."""
    here = numbers[seq]
    sites = {call.site for call in here.values()}
    return any(
        numbers[before][rank].site in sites - {call.site}
        and not source_code.exclusive(numbers[before][rank].site, call.site)
        for rank, call in here.items()
        for before in numbers
        if before < seq and rank in numbers[before]
    )


def _unlike(send: Call, recv: Call) -> Why | None:
    """How a recv is unlike its send. As many raw bytes of another dtype are meant so."""
    if ("object" in send.op) != ("object" in recv.op):
        return "objects"
    if send.tensor is None or recv.tensor is None:
        return None
    dtypes = {send.dtype, recv.dtype}
    raw = any(dtype.startswith(RAW) for dtype in dtypes)
    return "sent" if send.nbytes != recv.nbytes or (len(dtypes) > 1 and not raw) else None


def _out_of_step(numbers: Numbers, seq: int) -> bool:
    """Whether one rank's call here is another rank's next call.

    Different lines alone prove nothing: branches of an `if rank == 0` often make the same call. But
    a rank that makes both calls fixes their order.
    """
    here, then = numbers[seq], numbers.get(seq + 1, {})
    ways = {
        (call.site, then[rank].site if rank in then else _NOTHING) for rank, call in here.items()
    }
    for at, follows in ways:
        if follows is _NOTHING or source_code.exclusive(at, follows):
            continue
        for other, their_next in ways:
            if _source(other) == _source(at) or _source(other) != _source(follows):
                continue
            if their_next is _NOTHING or _source(their_next) == _source(at):
                return True
    return False


def _passed_by(numbers: Numbers, at: int, one: str | None, other: str | None) -> str | None:
    """Of two lines at which ranks make call `at`, the one that the ranks at the other have skipped.

    None if it is unknown, as in the branches of one `if`.
    """
    if one is None or other is None or one == other:
        return None
    if (optional := source_code.optional(one, other)) is not None:
        return optional
    past = {seq: calls for seq, calls in numbers.items() if seq < at}
    forth, back = _follows(past, one, other), _follows(past, other, one)
    if forth != back:
        return one if forth else other
    if forth and (usual := _usual(past, at, one, other)) is not None:
        return usual
    before = {call.site for call in past.get(at - 1, {}).values()}
    return source_code.next_of(one, other, before.pop() if len(before) == 1 else None)


def _usual(past: Numbers, at: int, one: str, other: str) -> str | None:
    """Of two lines that follow each other in turn, the one that usually comes at call `at`."""
    before = {call.site for call in past.get(at - 1, {}).values()}
    usual = [
        line
        for line in (one, other)
        if any(site is not None and _follows(past, site, line) for site in before)
    ]
    return usual[0] if len(usual) == 1 else None


def _follows(numbers: Numbers, one: str, other: str) -> bool:
    """Whether some rank called at line `other` right after line `one`."""
    for seq, calls in numbers.items():
        then = numbers.get(seq + 1, {})
        for rank, call in calls.items():
            if call.site == one and rank in then and then[rank].site == other:
                return True
    return False


def _source(site: str | None) -> str:
    """The text of a call's line; the line itself where its text is not known."""
    if site is None:
        return ""
    return linecache.getline(*split_site(site)).strip() or site


def _who(calls: Sequence[Call]) -> str:
    return ranks_text(ranks_of(calls))


def _calls(side: Sequence[Call], why: Why) -> str:
    """`rank 0 calls all_reduce`, with its tensor or its thread where that matters."""
    call = side[0]
    tensor = f" with {call.tensor}" if why in ("tensors", "sent") else ""
    threads = {call.thread for call in side}
    thread = f" in thread {call.thread!r}" if call.thread and len(threads) == 1 else ""
    return f"{_who(side)} {agree(side, 'calls', 'call')} {_name(call)}{tensor}{thread}"


def _name(call: Call) -> str:
    """`all_reduce`, `broadcast from rank 1`, `send to rank 1`."""
    if call.peer is None:
        return call.name
    return f"{call.name} {'from' if call.op in (*FROM_ROOT, *RECVS) else 'to'} rank {call.peer}"
