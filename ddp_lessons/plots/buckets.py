"""`plots.buckets`: DDP's gradient buckets in one training step. Runs in the parent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Patch

from ddp_lessons.analysis.intervals import length
from ddp_lessons.analysis.metrics import after_warm_up
from ddp_lessons.analysis.wait_states import ended
from ddp_lessons.plots import row_layout, style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.results import RankResult
from ddp_lessons.run import Run
from ddp_lessons.wire.ops import WAIT_FOR_BUCKETS
from ddp_lessons.wire.records import Kind, Lane, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANKS = 8
MOST_ROWS = 12  # of buckets under a rank
MAIN, BUCKET, GAP = 1.0, 0.45, 0.5  # heights, as parts of a rank's bar
NOTEWORTHY = 0.05  # of a step
FONT, SMALL = 8.5, 7.5

Look = dict[str, Any]
_OTHER: Look = {"facecolor": style.EDGE}
_UNMARKED: Look = {"facecolor": "white", "edgecolor": style.EDGE, "linewidth": 0.8}
_FLIGHT: Look = {"facecolor": style.ORANGE, "edgecolor": "white", "linewidth": 0.6}


@documented
def buckets(
    run: Run,
    *,
    step: int | None = None,
    ranks: Sequence[int] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one training step: each rank's work, and under it its gradient buckets in flight.

    Hatching marks exposed communication: the main thread could only wait for its buckets. The
    dotted line is the end of the step on the last rank.

    Parameters
    ----------
    run : Run
        A run whose ranks train a DistributedDataParallel model.
    step : int, optional
        The step; by default one of median length, of more than four not one of the first two.
        A step ends where an optimizer steps, or is a turn of `steps`.
    ranks : sequence of int, optional
        The ranks; by default all, or the first eight.
    {title}; by default the number of buckets and their exposed time.
    {ax}
        The x axis counts milliseconds from the start of the step on the first rank.

    {raises}
        If no buckets were recorded, or none in that step or on those ranks.
    """
    step = _typical_step(run) if step is None else step
    shown = _chosen(run, range(run.world_size)[:MOST_RANKS] if ranks is None else ranks)
    begin_ns, end_ns = _limits(run, step)
    rows = [_row(rank, step, begin_ns, end_ns) for rank in shown]
    if not any(row.buckets for row in rows):
        raise ValueError(f"no buckets were recorded in step {step} of these ranks")
    heights = [MAIN + BUCKET * row.depth + GAP for row in rows]
    # A notebook's text has the figure's size: it must not depend on which buckets overlap.
    most = min(MOST_ROWS, max(len(row.buckets) for row in rows))
    ax = ax or style.new_axes(len(rows), MAIN + BUCKET * most + GAP)
    ax.set_xlim(0, max((end_ns - begin_ns) / 1e6 * 1.02, ax.get_xlim()[1]))
    fills = style.fills(bar.name for row in rows for bar in row.work)
    works = {n: {"facecolor": fill} if fill else _OTHER for n, fill in fills.items()}
    tops = [sum(heights[:n]) for n in range(len(rows))]
    for row, top in zip(rows, tops, strict=True):
        _draw(ax, row, top, works)
    _name_rows(ax, rows, tops, sum(heights))
    ax.axvline((end_ns - begin_ns) / 1e6, color=style.INK, linestyle=":", linewidth=1)
    ax.set_xlabel("\n".join(_below(run, step, shown)))
    style.head(ax, title or _finding(rows, step), _legend(rows, works))
    return ax


class Bar(NamedTuple):
    """A drawn span: its name, begin and end in ms."""

    name: str
    left: float
    right: float

    @property
    def interval(self) -> row_layout.Interval:
        return self.left, self.right


class Row(NamedTuple):
    """One rank in the step."""

    rank: int
    step: list[Bar]
    work: list[Bar]
    waiting: list[Bar]
    buckets: list[Bar]
    places: list[int]  # row of each bucket, from the top

    @property
    def depth(self) -> int:
        """The number of bucket rows."""
        return max(self.places, default=0) + 1

    @property
    def unmarked(self) -> float:
        """The fraction of the step outside marked work."""
        whole = sum(bar.right - bar.left for bar in self.step)
        marked = sum(b - a for a, b in row_layout.merged([bar.interval for bar in self.work], 0.0))
        return 1 - marked / whole if whole else 0.0

    @property
    def exposed(self) -> float:
        """How long the main thread only waited, in ms."""
        return sum(bar.right - bar.left for bar in self.waiting)


def _chosen(run: Run, ranks: Sequence[int]) -> list[RankResult]:
    unknown = [rank for rank in ranks if rank not in range(run.world_size)]
    if unknown:
        raise ValueError(f"there is no rank {unknown[0]}: the last one is {run.world_size - 1}")
    return [run.ranks[rank] for rank in ranks]


def _typical_step(run: Run) -> int:
    found = {s.step for s in run.spans() if s.lane == Lane.BUCKETS}
    steps = after_warm_up(found)
    if found and not steps:
        raise ValueError(
            "buckets were recorded, but no training steps, of which this draws one. Let an "
            "optimizer step, or mark the steps: for batch in steps(batches)."
        )
    if not steps:
        raise ValueError(
            "no buckets were recorded. Only a DistributedDataParallel model sends them, in "
            "backward. If it has a hook of your own, register that by watch_ddp(model, hook)."
        )
    lengths = {step: end - begin for step in steps for begin, end in [_limits(run, step)]}
    middle = median(lengths.values())
    return min(steps, key=lambda step: abs(lengths[step] - middle))


def _limits(run: Run, step: int) -> tuple[int, int]:
    """Start of the step on the first rank and its end on the last, in ns."""
    spans = [
        (span.t0_ns, t1_ns)
        for rank in run.ranks
        for span, t1_ns in ended(rank.spans, rank.ended_ns)
        if span.step == step
    ]
    if not spans:
        raise ValueError(f"no rank has a step {step}")
    return min(t0 for t0, _ in spans), max(t1 for _, t1 in spans)


def _row(rank: RankResult, step: int, begin_ns: int, end_ns: int) -> Row:
    found: dict[str, list[Bar]] = {"steps": [], "compute": [], "wait": [], "buckets": []}
    for span, t1_ns in ended(rank.spans, rank.ended_ns):
        kind = span.kind if span.lane == Lane.MAIN else span.lane
        if kind == Kind.WAIT and span.name != WAIT_FOR_BUCKETS:
            continue  # for work of the learner's
        if span.step == step and kind in found:
            left, right = (span.t0_ns - begin_ns) / 1e6, (min(t1_ns, end_ns) - begin_ns) / 1e6
            found[kind].append(Bar(_name(span), left, right))
    flights = found["buckets"]
    places = [min(p, MOST_ROWS - 1) for p in row_layout.pack([bar.interval for bar in flights])]
    return Row(rank.rank, found["steps"], found["compute"], found["wait"], flights, places)


def _name(span: Span) -> str:
    """A span's label; that of a bucket has its size."""
    if span.lane != Lane.BUCKETS or span.nbytes is None:
        return span.name
    open_end = ", never ended" if span.t1_ns is None else ""
    return f"{span.name}  {style.bytes_text(span.nbytes)}{open_end}"


def _draw(ax: Axes, row: Row, top: float, works: Mapping[str, Look]) -> None:
    for bar in row.step:
        ax.broken_barh([(bar.left, bar.right - bar.left)], (top, MAIN), **_UNMARKED)
    for bar in row.work:
        ax.broken_barh([(bar.left, bar.right - bar.left)], (top, MAIN), **works[bar.name])
    waits = [(bar.left, bar.right - bar.left) for bar in row.waiting]
    ax.broken_barh(waits, (top, MAIN), **style.WAIT_LOOK)
    for bar, place in zip(row.buckets, row.places, strict=True):
        below = top + MAIN + 0.06 + place * BUCKET
        ax.broken_barh([(bar.left, bar.right - bar.left)], (below, BUCKET - 0.04), **_FLIGHT)
        short = bar.name.partition("  ")[0]
        texts = [bar.name, short, short.removeprefix("bucket ")]
        style.write(ax, texts, bar.interval, below + 0.2, SMALL)
    over = [bar.interval for bar in row.waiting]
    for bar in row.work:
        inner = [b.interval for b in row.work if b is not bar and _within(b, bar)]
        where = row_layout.widest_gap(bar.interval, over + inner)
        ink = style.ink_on(works[bar.name]["facecolor"])
        style.write(ax, [bar.name], where, top + MAIN / 2, FONT, color=ink)
    for bar in row.waiting:
        texts = [f"exposed {bar.right - bar.left:.0f} ms", f"{bar.right - bar.left:.0f} ms"]
        style.write(ax, texts, bar.interval, top + MAIN / 2, FONT, bbox=style.WAIT_LABEL)


def _within(inner: Bar, outer: Bar) -> bool:
    return outer.left <= inner.left and inner.right <= outer.right


def _name_rows(ax: Axes, rows: Sequence[Row], tops: Sequence[float], bottom: float) -> None:
    names = {top + MAIN / 2: f"rank {row.rank}" for row, top in zip(rows, tops, strict=True)}
    for row, top in zip(rows, tops, strict=True):
        if row.buckets:
            names[top + MAIN + 0.06 + row.depth * BUCKET / 2] = "buckets"
    ax.set_yticks(list(names), list(names.values()))
    ax.set_ylim(bottom - GAP / 2, -GAP / 2)
    style.bare(ax)


def _below(run: Run, step: int, shown: Sequence[RankResult]) -> list[str]:
    lines = [f"ms since step {step} began; the dotted line is its end"]
    if len(shown) < run.world_size:
        lines.append(f"{len(shown)} of {run.world_size} ranks")
    return [*lines, *style.losses(run)]


def _finding(rows: Iterable[Row], step: int) -> str:
    """The title: the number of buckets, and their exposed time on the worst rank."""
    worst = max(rows, key=lambda row: row.exposed)
    in_flight = length((round(b.left * 1e6), round(b.right * 1e6)) for b in worst.buckets) / 1e6
    number = len(worst.buckets)
    what = "1 bucket" if number == 1 else f"{number} buckets"
    return (
        f"{what} in step {step}: {worst.exposed:.0f} of {in_flight:.0f} ms of communication "
        f"exposed on rank {worst.rank}"
    )


def _legend(rows: Sequence[Row], works: Mapping[str, Look]) -> list[Patch]:
    others = [name for name, look in works.items() if look is _OTHER]
    patches = [Patch(**look, label=name) for name, look in works.items() if name not in others]
    if others:
        patches.append(Patch(**_OTHER, label=others[0] if len(others) == 1 else "other work"))
    if any(row.unmarked > NOTEWORTHY for row in rows):
        patches.append(Patch(**_UNMARKED, label="unmarked"))
    patches.append(Patch(**_FLIGHT, label="bucket in flight"))
    if any(row.waiting for row in rows):
        patches.append(Patch(**style.WAIT_LOOK, label="main thread waits for buckets"))
    return patches
