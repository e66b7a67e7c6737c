"""Which rank keeps the others waiting, and why.

Runs in the parent, behind `Run.straggler` and the titles of plots. A rank is late because since
the last collective it did more than the ranks that now wait for it, or the same more slowly. So
what it spent its time on since then is compared with theirs. Odd spans never raise.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ddp_lessons.analysis.intervals import Intervals, common, length, union, without
from ddp_lessons.analysis.last_run import kept
from ddp_lessons.analysis.metrics import Segment, after_warm_up, segments
from ddp_lessons.analysis.wait_states import LATE_RECEIVER, LATE_SENDER, Share, ended, waits
from ddp_lessons.text import listed
from ddp_lessons.wire.ops import JOINING
from ddp_lessons.wire.records import Kind, Lane

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, RunRecord
    from ddp_lessons.wire.records import Span

MOST = 2 / 3  # of all waiting: a rank that causes so much is the straggler
NOTEWORTHY = 0.05  # of the ranks' time: less waiting is noise
EXPLAINED = 0.8, 1.25  # of a rank's lateness: what it spent so much more time on is the cause
NEVER_CAME = "calls to which a rank never came"
INPUT, SPAN, COMPUTE, STARVED, BLOCKED = "input", "span", "compute", "starved", "blocked"


class Cause(NamedTuple):
    """Why a rank is late: what it spends more time on than the ranks that wait for it.

    If several explain it, "starved" is told first, as a rank that lacks a processor takes longer
    in all that it does; then "input" and "span", as they are more specific than the others.

    Attributes
    ----------
    kind : str
        "starved" (its main thread was ready to run, and other threads or processes had the
        processor), "input" (it fetched batches, from a DataLoader or in `steps`), "span" (it was in
        the `span` named), "compute" (its main thread used a processor) or "blocked" (that thread
        did neither: it slept, or waited for a lock, a disk, a thread or a process).
    share : float
        The part of the lateness that this explains, from 0.8 to 1.
    span : str or None
        The name of the span; of spans within others, of the innermost that explains so much.
    """

    kind: str
    share: float
    span: str | None = None

    def __str__(self) -> str:
        doing = {
            STARVED: "waiting for a processor",
            INPUT: "fetching batches",
            SPAN: f"in its span {reprlib.repr(self.span)}",
            COMPUTE: "computing more",
            BLOCKED: "asleep or blocked",
        }
        return f"{100 * self.share:.0f} % of it {doing[self.kind]}"


class Straggler(NamedTuple):
    """The rank that keeps the others waiting, and why. As text it is a sentence.

    Attributes
    ----------
    kind : str
        "chronic" (one rank causes two thirds of the waiting or more), "rotating" (no rank does),
        "none" (less than 5 % of the ranks' time is waiting) or "unknown" (so little was seen, but
        not all: see `unseen`).
    rank : int or None
        The chronic straggler.
    share : float
        The part of all waiting that the worst rank causes, from 0 to 1.
    late_by_step : dict
        The rank that causes the most waiting, by step.
    unseen : tuple of str
        Communication that does not count: what was not recorded ("RPC"); "sends and recvs" if
        ranks wait in them, because in a pipeline they do so although none is slow; "calls to which
        a rank never came", if others wait in them; "dropped spans", if there are any.
    seconds : float
        How long the others, all together, wait for the worst rank, or for one that it held up.
    cause : Cause or None
        Why the chronic straggler is late; None if nothing explains 80 % of it, or it is not known:
        the processor's time is not recorded where CUDA is used, nor outside Linux.
    """

    kind: str
    rank: int | None
    share: float
    late_by_step: dict[int, int]
    unseen: tuple[str, ...] = ()
    seconds: float = 0.0
    cause: Cause | None = None

    def __str__(self) -> str:
        if self.kind == "chronic":
            time = f"{self.seconds:.1f} s" if self.seconds >= 1 else f"{self.seconds * 1e3:.0f} ms"
            why = "; why is not known" if self.cause is None else f": {self.cause}"
            return f"rank {self.rank} makes the others wait ({time} in all){why}"
        if self.kind == "rotating":
            return "the ranks take turns in making the others wait"
        if self.kind == "unknown":
            seen = "" if NEVER_CAME in self.unseen else "no rank is late for collectives; "
            return f"{seen}not judged: {listed(self.unseen)}"
        return "no rank makes the others wait"


@kept
def straggler(run: RunRecord) -> Straggler:
    """The rank that keeps the others waiting, if it is always the same one, and why.

    Only collectives count, no sends and recvs; in runs with steps only those inside a step, and of
    more than four steps not the first two, the warm-up. With NCCL the GPUs wait.
    """
    steps = [s for s in run.spans() if s.lane == Lane.STEPS and s.t1_ns is not None]
    counts = _counted({s.step for s in steps})
    held = segments(run)
    waiting = list(_waiting(run, held))
    noteworthy = NOTEWORTHY * _time(run, [s for s in steps if counts(s.step)])
    caused: Counter[int] = Counter()
    by_step: dict[int, Counter[int]] = {}
    in_pairs = sum(w.t1_ns - w.t0_ns for w in waiting if w.in_pair and counts(w.step))
    for step, late, ns in _blamed(waiting):
        if counts(step):
            caused[late] += ns
        if step is not None and counts(step):
            by_step.setdefault(step, Counter())[late] += ns
    late_by_step = {step: by_step[step].most_common(1)[0][0] for step in sorted(by_step)}
    in_vain = sum(w.t1_ns - w.t0_ns for w in waiting if not w.in_pair and w.late is None)
    unseen = (
        *run.unseen,
        *(["sends and recvs"] if in_pairs > noteworthy else []),
        *([NEVER_CAME] if in_vain > noteworthy else []),
        *(["dropped spans"] if run.lossy else []),
    )
    none = "unknown" if unseen else "none"
    if not caused:
        return Straggler(none, None, 0.0, late_by_step, unseen)
    worst, most_ns = caused.most_common(1)[0]
    share, seconds = most_ns / caused.total(), most_ns / 1e9
    if caused.total() < noteworthy:
        return Straggler(none, None, share, late_by_step, unseen, seconds)
    if share < MOST:
        return Straggler("rotating", None, share, late_by_step, unseen, seconds)
    begin_ns = min((s.t0_ns for s in steps if counts(s.step)), default=_all_joined_ns(run))
    windows = _windows([w for w in waiting if w.t1_ns > begin_ns], worst, counts, begin_ns)
    direct = [w for w in waiting if w.late == worst and counts(w.step)]
    cause = _cause(run, held, worst, windows, sum(w.t1_ns - w.t0_ns for w in direct))
    return Straggler("chronic", worst, share, late_by_step, unseen, seconds, cause)


def _counted(steps: set[int | None]) -> Callable[[int | None], bool]:
    """A function that says whether a step counts: not the warm-up, if there are enough steps."""
    if not steps:
        return lambda _: True
    counted = {*after_warm_up(steps)}
    return lambda step: step in counted


class _Waiting(NamedTuple):
    """A time in which a rank waits; `late` is the rank that makes it wait in a collective."""

    rank: int
    late: int | None
    step: int | None
    t0_ns: int
    t1_ns: int
    in_pair: bool  # in a send or recv


def _waiting(run: RunRecord, held: Iterable[Segment]) -> Iterator[_Waiting]:
    """The waiting of main threads, and of GPUs while the main thread goes on."""
    for segment in held:
        if segment.kind == "wait" and (share := segment.share) is not None:
            yield _waits(share, segment.step, segment.t0_ns, segment.t1_ns)
    on_device = {rank.rank: set(_on_device(rank)) for rank in run.ranks}
    for share in waits(run):
        if share.wait_ns and share.t0_ns in on_device[share.rank]:
            yield _waits(share, share.step, share.t0_ns, share.t0_ns + share.wait_ns)


def _waits(share: Share, step: int | None, t0_ns: int, t1_ns: int) -> _Waiting:
    in_pair = share.pattern in (LATE_SENDER, LATE_RECEIVER)
    late = None if in_pair else share.last_rank
    return _Waiting(share.rank, late, step, t0_ns, t1_ns, in_pair)


def _blamed(waiting: Iterable[_Waiting]) -> Iterator[tuple[int | None, int, int]]:
    """Step, rank and ns: by how much each rank makes others wait.

    A rank may be late because it had to wait itself, for a third one, since the last time that the
    others waited. So much of their waiting is because of that third one, if they did not share it.
    """
    since: dict[int, int] = {}
    of_rank: dict[int, list[_Waiting]] = {}  # by end
    for wait in sorted(waiting, key=lambda w: w.t1_ns):
        left_ns = wait.t1_ns - wait.t0_ns
        if wait.late is not None:
            begin_ns = since.get(wait.rank, 0)
            for earlier in reversed(of_rank.get(wait.late, [])):
                if earlier.t1_ns <= begin_ns or not left_ns:
                    break
                if earlier.late is not None and earlier.late not in (wait.late, wait.rank):
                    ns = min(left_ns, earlier.t1_ns - max(earlier.t0_ns, begin_ns))
                    left_ns -= ns
                    yield wait.step, earlier.late, ns
            yield wait.step, wait.late, left_ns
        of_rank.setdefault(wait.rank, []).append(wait)
        since[wait.rank] = wait.t1_ns


def _on_device(rank: RankResult) -> Iterator[int]:
    """Starts of collectives in which a GPU waited while the main thread went on."""
    blocked = any(s.kind == Kind.WAIT and s.op is None for s in rank.spans)  # for its buckets
    for span in rank.spans:
        if span.lane == Lane.CUDA or (span.lane == Lane.BUCKETS and not blocked):
            yield span.t0_ns


def _time(run: RunRecord, steps: Iterable[Span]) -> float:
    """The ns of all ranks together in the steps that count, or else in the function."""
    in_steps = sum((s.t1_ns or s.t0_ns) - s.t0_ns for s in steps)
    return in_steps or sum(rank.seconds for rank in run.ranks) * 1e9


def _all_joined_ns(run: RunRecord) -> int:
    """When the last rank had joined; without that, when the last one had begun."""
    joined = [
        min((s.t1_ns for s in rank.spans if s.op in JOINING and s.t1_ns), default=rank.started_ns)
        for rank in run.ranks
    ]
    return max((t_ns for t_ns in joined if t_ns is not None), default=run.begin_ns)


def _windows(
    waiting: Iterable[_Waiting], late: int, counts: Callable[[int | None], bool], begin_ns: int
) -> dict[int, Intervals]:
    """The times in which rank `late` fell behind each rank that waits for it, by that rank.

    Each reaches from the end of the wait before, when both went on, to the end of a wait for
    `late`. So the wait is as long as what `late` spent more in it outside of collectives.
    """
    since: dict[int, int] = {}
    found: dict[int, Intervals] = {}
    for wait in sorted(waiting, key=lambda w: w.t1_ns):
        if wait.late == late and counts(wait.step):
            found.setdefault(wait.rank, []).append((since.get(wait.rank, begin_ns), wait.t1_ns))
        since[wait.rank] = wait.t1_ns
        if wait.rank == late and wait.late is not None:
            since[wait.late] = wait.t1_ns
    return found


class _Way(NamedTuple):
    """A way to spend time; see `Cause`."""

    kind: str
    span: str | None = None


_INPUT, _COMPUTE, _STARVED, _BLOCKED = map(_Way, (INPUT, COMPUTE, STARVED, BLOCKED))
_ALL, _UNKNOWN = _Way("all"), _Way("unknown")


class _Own:
    """What a rank's main thread does outside of collectives."""

    def __init__(self, rank: RankResult, held: Iterable[Segment]) -> None:
        self._held = union((s.t0_ns, s.t1_ns) for s in held if s.kind != "data")
        marked: dict[_Way, Intervals] = {}
        for span, t1_ns in ended(rank.spans, rank.ended_ns):
            if span.lane == Lane.MAIN and span.kind in (Kind.DATA, Kind.COMPUTE):
                way = _INPUT if span.kind == Kind.DATA else _Way(SPAN, span.name)
                marked.setdefault(way, []).append((span.t0_ns, t1_ns))
        self.marked = {way: union(intervals) for way, intervals in marked.items()}
        self._metered = [
            (s.t0_ns, s.cpu_ns, s.queued_ns)
            for s in rank.spans
            if s.cpu_ns is not None and s.queued_ns is not None
        ]

    def spent(self, times: Intervals, marked: Iterable[_Way]) -> dict[_Way, float]:
        """The ns within these times, by way: on a processor, queued, blocked; and what is marked.

        Between two readings of the processor's time, it was used evenly.
        """
        own = without(times, self._held)
        used = queued = known = 0.0
        for (a, used_a, queued_a), (b, used_b, queued_b) in pairwise(self._metered):
            if inside := common([(a, b)], own):
                part = inside / (b - a - common([(a, b)], self._held))
                used += part * (used_b - used_a)
                queued += part * (queued_b - queued_a)
                known += inside
        whole = length(own)
        return {
            _ALL: whole,
            _UNKNOWN: whole - known,
            _COMPUTE: used,
            _STARVED: queued,
            _BLOCKED: known - used - queued,
            **{way: common(self.marked.get(way, []), own) for way in marked},
        }


def _beyond(mine: dict[_Way, float], theirs: dict[_Way, float]) -> dict[_Way, float]:
    """By how many ns one rank spent more in each way than another; at least so many.

    A rank that computes more also queues more: that is no smaller share of the processor. So what
    it computes more counts with the queueing of the rank that queues less for what it computes.
    """
    more = {way: mine[way] - theirs[way] for way in mine}
    ready = more[_COMPUTE] + more[_STARVED]
    stretch = min(
        (spent[_STARVED] / spent[_COMPUTE] for spent in (mine, theirs) if spent[_COMPUTE] > 0),
        default=0.0,
    )
    more[_COMPUTE] *= 1 + stretch
    more[_STARVED] = ready - more[_COMPUTE]
    for way in (_COMPUTE, _STARVED, _BLOCKED):
        more[way] -= theirs[_UNKNOWN]
    return more


def _cause(
    run: RunRecord, held: Sequence[Segment], late: int, windows: dict[int, Intervals], wait_ns: int
) -> Cause | None:
    """What explains that the others waited `wait_ns` for rank `late`; None if nothing does."""
    by_rank: dict[int, list[Segment]] = {}
    for segment in held:
        by_rank.setdefault(segment.rank, []).append(segment)
    own = _Own(run.ranks[late], by_rank.get(late, []))
    least_ns = EXPLAINED[0] * wait_ns / max(1, len(windows))
    marked = {way: spans for way, spans in own.marked.items() if length(spans) >= least_ns}
    more: Counter[_Way] = Counter()
    for rank, times in windows.items():
        other = _Own(run.ranks[rank], by_rank.get(rank, []))
        more.update(_beyond(own.spent(times, marked), other.spent(times, marked)))  # adds them
    whole_ns = max(wait_ns, more[_ALL])
    least, most = EXPLAINED
    shares = {way: ns / whole_ns for way, ns in more.items() if least <= ns / whole_ns <= most}
    fitting = [way for way in reversed(marked) if way in shares]  # inner spans begin later
    unmarked = [way for way in (_COMPUTE, _STARVED, _BLOCKED) if way in shares]
    if unmarked == [_STARVED] or (len(unmarked) == 1 and not fitting):
        (way,) = unmarked
    elif fitting:
        way = min(fitting, key=lambda way: (length(marked[way]), way != _INPUT))
        half = length(marked[way]) / 2
        if any(common(marked[way], marked[other]) < half for other in fitting):
            return None  # two that have nothing to do with one another explain it
    else:
        return None
    return Cause(way.kind, min(1.0, shares[way]), way.span)
