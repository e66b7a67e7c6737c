"""`plots.pipeline`: which stage works on which micro-batch when. Runs in the parent."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from ddp_lessons.analysis.intervals import Intervals, length, without
from ddp_lessons.analysis.metrics import blocked
from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.run import Run
from ddp_lessons.wire.records import Kind, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.7  # of a row
FONT = 8.5
WORKS = ("forward", "backward")
LOOKS = dict(zip(WORKS, style.WORK, strict=False))
IDLE = "idle"


@documented
def pipeline(
    run: Run,
    *,
    step: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one row for each rank: its spans `forward` and `backward`, numbered, and its idle time.

    The number is that of the micro-batch, if a rank takes micro-batches in order: the n-th forward
    and the n-th backward of a rank are those of micro-batch n. Idle is a rank between the first
    begin and the last end of any rank's work, also where it waits in a call of torch.distributed
    within such a span; behind its row stands which part of that time it was.

    Parameters
    ----------
    {run}
    step : int, optional
        The training step to show; by default all work.
    {title}; by default the function's name.
    {ax}
        The x axis counts milliseconds from the first begin, the same for all ranks.

    {raises}
        If no rank has such spans.
    """
    works = [span for span in run.spans() if _is_shown(span, step)]
    if not works:
        where = "" if step is None else f" in step {step}"
        raise ValueError(f"no rank has a span 'forward' or 'backward'{where}")
    begin = min(span.t0_ns for span in works)
    whole = max(span.t1_ns or span.t0_ns for span in works) - begin
    ax = ax or style.new_axes(run.world_size)
    ax.set_xlim(0, whole / 1e6 * 1.1)  # room for the share of idle time
    style.name_ranks(ax, run)
    for rank in run.ranks:
        mine = [span for span in works if span.rank == rank.rank]
        _draw_rank(ax, mine, blocked(rank), rank.rank, (begin, whole))
    since = "ms since the first forward began; numbers: the micro-batch"
    ax.set_xlabel("\n".join([since, *style.losses(run)]))
    present = {span.name for span in works}
    patches = [Patch(facecolor=look, label=name) for name, look in LOOKS.items() if name in present]
    patches.append(Patch(**style.WAIT_LOOK, label=IDLE))
    style.head(ax, title or run.name, patches)
    return ax


def _is_shown(span: Span, step: int | None) -> bool:
    named = span.kind == Kind.COMPUTE and span.name in WORKS and span.t1_ns is not None
    return named and step in (None, span.step)


def _draw_rank(
    ax: Axes, works: list[Span], held: Intervals, rank: int, limits: tuple[int, int]
) -> None:
    """Draw one row; `limits` are the begin and the length of the picture, in ns."""
    begin, whole = limits
    top = rank - HEIGHT / 2
    ax.broken_barh([(0, whole / 1e6)], (top, HEIGHT), **style.WAIT_LOOK)
    number: Counter[str] = Counter()
    busy: Intervals = []
    for span in sorted(works, key=lambda span: span.t0_ns):
        pieces = without([(span.t0_ns, span.t1_ns or span.t0_ns)], held)
        busy += pieces
        fill = LOOKS[span.name]
        bars = [(_ms(left, begin), (right - left) / 1e6) for left, right in pieces]
        ax.broken_barh(bars, (top, HEIGHT), color=fill, edgecolor="white", linewidth=0.5)
        if bars:
            left, width = max(bars, key=lambda bar: bar[1])
            text = str(number[span.name])
            where = (left, left + width)
            style.write(ax, [text], where, rank, FONT, color=style.ink_on(fill))
        number[span.name] += 1
    share = 1 - length(busy) / whole
    ax.text(whole / 1e6, rank, f" {share:.0%} {IDLE}", fontsize=FONT, va="center", color=style.INK)


def _ms(t_ns: int, begin_ns: int) -> float:
    return (t_ns - begin_ns) / 1e6
