"""Metrics of a run, from its spans: waiting, transfer, overlap, bandwidth.

Runs in the parent, behind the methods of `Run` and the plots, on top of wait_states.py. The
functions return lists of named tuples, which `pandas.DataFrame` accepts. Odd spans never raise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from ddp_lessons.analysis.intervals import Intervals, common, length, union
from ddp_lessons.analysis.last_run import kept
from ddp_lessons.analysis.wait_states import Share, ended, meetings, waits
from ddp_lessons.wire.ops import GROUP_CALLS, RECVS
from ddp_lessons.wire.records import PROFILED, Kind, Lane

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, RunRecord
    from ddp_lessons.wire.records import Span


WARM_UP, MANY_STEPS = 2, 4  # drop the first 2 steps if there are more than 4


class Segment(NamedTuple):
    """A time in which a rank's main thread was held up.

    `kind` is "wait" (for ranks that had not come yet), "transfer", "data" (the next batch) or
    "group" (joining or leaving a process group). `share` is the rank's part in the collective.
    """

    rank: int
    kind: str
    step: int | None
    t0_ns: int
    t1_ns: int
    share: Share | None = None


class Overlap(NamedTuple):
    """A rank's communication in one step.

    `comm_ns` is how long at least one collective was in flight, `exposed_ns` how long the main
    thread was blocked meanwhile, `overlapped_ns` the rest. With NCCL the thread is hardly ever
    blocked: waiting of the device does not count as exposed. Of gloo's asynchronous reduce_scatter,
    isend and irecv the end is not known: they count as in flight until they are waited for.
    """

    rank: int
    step: int | None
    comm_ns: int
    exposed_ns: int
    overlapped_ns: int


class Total(NamedTuple):
    """How a rank's main thread spent the function's time; the parts add up to `seconds`.

    `compute_ns` is marked work without interruptions; work marked twice counts once. `other_ns` is
    unmarked time, and joining and leaving groups.
    """

    rank: int
    seconds: float
    compute_ns: int
    data_ns: int
    wait_ns: int
    transfer_ns: int
    other_ns: int


class Link(NamedTuple):
    """An operation's time once all ranks have come: `latency_ns` + bytes / `bytes_per_second`.

    `points` are (bytes, median time in ns), by size. `bytes_per_second` is infinite where the time
    does not grow with the size.
    """

    op: str
    group: str
    latency_ns: float
    bytes_per_second: float
    points: list[tuple[int, float]]


def after_warm_up(steps: Iterable[int | None]) -> list[int]:
    """The steps that count, in order: of more than four not the first two, the warm-up."""
    numbers = sorted({step for step in steps if step is not None})
    return numbers[WARM_UP:] if len(numbers) > MANY_STEPS else numbers


@kept
def segments(run: RunRecord) -> Sequence[Segment]:
    """The times in which main threads were held up, by rank and time."""
    by_rank: dict[int, list[Share]] = {}
    for share in waits(run):
        by_rank.setdefault(share.rank, []).append(share)
    return tuple(s for rank in run.ranks for s in _held(rank, by_rank.get(rank.rank, [])))


def overlap(run: RunRecord) -> list[Overlap]:
    """How much of each rank's communication overlapped with other work, by step.

    Joining and leaving groups does not count.
    """
    found = []
    for rank in run.ranks:
        held = union(blocked(rank))
        for step, intervals in _communication(rank).items():
            found.append(_overlap(rank.rank, step, union(intervals), held))
    return sorted(found, key=lambda o: (o.rank, -1 if o.step is None else o.step))


def totals(run: RunRecord) -> list[Total]:
    """How each rank's main thread spent its time, by rank."""
    held: dict[int, list[Segment]] = {rank.rank: [] for rank in run.ranks}
    for segment in segments(run):
        held[segment.rank].append(segment)
    return [_total(rank, held[rank.rank]) for rank in run.ranks]


def bandwidth(run: RunRecord) -> list[Link]:
    """Latency and bandwidth of each operation that was called with at least two sizes.

    The model is that of R. W. Hockney, "The communication challenge for MPP" (1994). It is fitted
    to the medians by least squares of the relative error, so small messages count, too.
    """
    times: dict[tuple[str, str], dict[int, list[int]]] = {}
    for op, group, nbytes, time_ns in measured(run):
        times.setdefault((op, group), {}).setdefault(nbytes, []).append(time_ns)
    links = []
    for (op, group), by_size in sorted(times.items()):
        points = [(nbytes, float(median(found))) for nbytes, found in sorted(by_size.items())]
        if len(points) > 1:
            links.append(Link(op, group, *_fit(points), points))
    return links


def measured(run: RunRecord) -> Iterator[tuple[str, str, int, int]]:
    """Op, group, bytes and time in ns of each collective that completed on all its ranks.

    The time runs from the last arrival until the last waiting rank leaves.
    """
    for meeting in meetings(run):
        spans = [span for span, _ in meeting.parts.values()]
        sizes = [span.nbytes for span in spans if span.nbytes is not None]
        ends = [t1_ns for rank, (_, t1_ns) in meeting.parts.items() if meeting.waits(rank)]
        if sizes and ends and meeting.complete and all(s.t1_ns is not None for s in spans):
            span = next((s for s in spans if s.op in RECVS), spans[0])
            time_ns = max(ends) - meeting.last_ns
            if time_ns > 0:
                yield span.op or span.name, span.group or "", max(sizes), time_ns


def _held(rank: RankResult, shares: Sequence[Share]) -> Iterator[Segment]:
    """The segments of one rank."""
    by_call: dict[tuple[str, str, int, int | None, int | None], list[Share]] = {}
    by_step: dict[int | None, list[Share]] = {}
    for share in shares:
        key = share.op, share.group, share.seq, share.peer, share.tag
        by_call.setdefault(key, []).append(share)
        by_step.setdefault(share.step, []).append(share)
    of_step = {step: _InTurn(found) for step, found in by_step.items()}
    spans = sorted(rank.spans, key=lambda span: span.t0_ns)
    for span, t1_ns in ended(spans, rank.ended_ns):
        if span.lane != Lane.MAIN or span.kind not in (Kind.COMM, Kind.WAIT, Kind.DATA):
            continue
        if span.kind == Kind.DATA:
            yield Segment(span.rank, "data", span.step, span.t0_ns, t1_ns)
        elif span.op in GROUP_CALLS:
            yield Segment(span.rank, "group", span.step, span.t0_ns, t1_ns)
        else:
            seq = -1 if span.seq is None else span.seq
            same = by_call.get((span.op or "", span.group or "", seq, span.peer, span.tag))
            if same is None and span.step in of_step:
                same = of_step[span.step].during(span.t0_ns, t1_ns)
            yield from _split(span, t1_ns, same or [])


class _InTurn:
    """Shares, of which one asks for those of one time after the other."""

    def __init__(self, shares: Iterable[Share]) -> None:
        self._later = deque(sorted(enumerate(shares), key=lambda pair: pair[1].t0_ns))
        self._now: list[tuple[int, Share]] = []

    def during(self, t0_ns: int, t1_ns: int) -> list[Share]:
        """Those that have begun by `t1_ns` and not ended by `t0_ns`, which never decreases."""
        while self._later and self._later[0][1].t0_ns < t1_ns:
            self._now.append(self._later.popleft())
        self._now = [pair for pair in self._now if pair[1].t1_ns > t0_ns]
        return [share for _, share in sorted(self._now)]


def _split(span: Span, t1_ns: int, shares: Iterable[Share]) -> Iterator[Segment]:
    """Split a blocked time: for each collective, waiting for its ranks and then transfer."""
    at_ns, share = span.t0_ns, None
    among = [s for s in shares if s.t0_ns < t1_ns and s.t1_ns > span.t0_ns]
    for share in sorted(among, key=lambda s: s.t0_ns + s.wait_ns):
        for kind, end_ns in (("wait", share.t0_ns + share.wait_ns), ("transfer", share.t1_ns)):
            end_ns = min(end_ns, t1_ns)
            if end_ns > at_ns:
                yield Segment(span.rank, kind, span.step, at_ns, end_ns, share)
                at_ns = end_ns
    if t1_ns > at_ns:
        yield Segment(span.rank, "transfer", span.step, at_ns, t1_ns, share)


def _communication(rank: RankResult) -> dict[int | None, Intervals]:
    by_step: dict[int | None, Intervals] = {}
    for span, t1_ns in ended(rank.spans, rank.ended_ns):
        if span.kind == Kind.COMM and span.lane not in PROFILED and span.op not in GROUP_CALLS:
            by_step.setdefault(span.step, []).append((span.t0_ns, t1_ns))
    return by_step


def blocked(rank: RankResult) -> Intervals:
    """When a rank's main thread was in a call of torch.distributed, or waited for such work.

    Joining and leaving groups does not count.
    """
    return [
        (span.t0_ns, t1_ns)
        for span, t1_ns in ended(rank.spans, rank.ended_ns)
        if span.lane == Lane.MAIN
        and span.kind in (Kind.COMM, Kind.WAIT)
        and span.op not in GROUP_CALLS
    ]


def _overlap(rank: int, step: int | None, comm: Intervals, blocked: Intervals) -> Overlap:
    whole, exposed = length(comm), common(comm, blocked)
    return Overlap(rank, step, whole, exposed, whole - exposed)


def _total(rank: RankResult, held: Sequence[Segment]) -> Total:
    marked = [
        (span.t0_ns, t1_ns)
        for span, t1_ns in ended(rank.spans, rank.ended_ns)
        if span.lane == Lane.MAIN and span.kind == Kind.COMPUTE
    ]
    stops = [(s.t0_ns, s.t1_ns) for s in held]
    compute = length(marked + stops) - length(stops)
    parts = {
        kind: length((s.t0_ns, s.t1_ns) for s in held if s.kind == kind)
        for kind in ("data", "wait", "transfer")
    }
    other = round(rank.seconds * 1e9) - compute - sum(parts.values())
    return Total(
        rank.rank,
        rank.seconds,
        compute,
        parts["data"],
        parts["wait"],
        parts["transfer"],
        max(0, other),
    )


def _fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency in ns and bytes per second by weighted least squares, neither negative."""
    weights = [1 / time**2 for _, time in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    both = sum(w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, points, strict=True))
    slope = both / spread
    if slope <= 0:
        return mean_t, float("inf")
    latency = mean_t - slope * mean_n
    if latency < 0:  # the best line through zero
        squares = sum(w * n * n for w, (n, _) in zip(weights, points, strict=True))
        slope = sum(w * n * t for w, (n, t) in zip(weights, points, strict=True)) / squares
    return max(0.0, latency), 1e9 / slope
