"""`plots.steps`: which rank takes which training steps. Runs in the parent."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ddp_lessons.analysis.wait_states import ended
from ddp_lessons.plots import row_layout, style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.results import RankResult
from ddp_lessons.run import Run
from ddp_lessons.text import count
from ddp_lessons.wire.ops import GROUP_CALLS, NEXT_BATCH
from ddp_lessons.wire.records import Kind, Lane, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.7  # of a row
GAP = 0.1  # between two steps
DRAWN_SINGLY = 60  # steps; more of them in a row are drawn as one bar
FONT = 8.5
MOST_ROOM = 0.5  # part of the width for the ranks' outcomes

TOGETHER, ALONE, WITHOUT, UNFINISHED = "together", "alone", "without", "unfinished"
LOOKS: dict[str, dict[str, Any]] = {
    TOGETHER: {"facecolor": style.BLUE},
    ALONE: {"facecolor": style.ORANGE},
    WITHOUT: style.WAIT_LOOK,
    UNFINISHED: {"facecolor": "white", **style.OPEN_EDGE},
}
NAMES = {
    TOGETHER: "a step of all ranks",
    ALONE: "a step that other ranks do not take",
    WITHOUT: "takes part in collectives, without a batch",
    UNFINISHED: "began and never finished",
}


@documented
def steps(
    run: Run, *, legend: bool = True, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw one row for each rank and one column for each training step: who takes it, who does not.

    A rank takes part without a batch if it is in a collective while another rank is in a step that
    it does not take itself, as under DDP's `join`.

    Parameters
    ----------
    {run}
        Its steps are those of `ddp_lessons.steps`, or else those of an optimizer. If a rank failed
        in a loop over `ddp_lessons.steps`, or soon after it, its last step counts as unfinished.
    legend : bool
        Whether to draw the legend.
    {title}; by default how many steps the ranks take.
    {ax}

    {raises}
        If no rank has a training step.
    """
    rows = [_row(rank) for rank in run.ranks]
    columns = max(len(row.begun) for row in rows)
    if not columns:
        raise ValueError("no training step was recorded; loop over ddp_lessons.steps(batches)")
    ax = ax or style.new_axes(run.world_size)
    _make_room(ax, rows, columns)
    style.name_rows(ax, run.world_size)
    kinds = [[_kind(row, rows, column) for column in range(columns)] for row in rows]
    for row, of_rank in zip(rows, kinds, strict=True):
        _draw(ax, row, of_rank)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick < columns])
    ax.set_xlabel("\n".join(["step", *style.losses(run)]))
    drawn = {kind for of_rank in kinds for kind in of_rank}
    handles = [Patch(**LOOKS[kind], label=NAMES[kind]) for kind in LOOKS if kind in drawn]
    style.head(ax, title or finding(run), handles if legend else [])
    return ax


def finding(run: Run) -> str:
    """The title: how many steps the ranks finish."""
    numbers = [_row(rank).finished for rank in run.ranks]
    least, most = min(numbers), max(numbers)
    if least == most:
        return f"{run.name}: {count(most, 'step')} on each rank"
    few, many = numbers.index(least), numbers.index(most)
    return f"{run.name}: {count(most, 'step')} on rank {many}, only {least} on rank {few}"


class _Row(NamedTuple):
    """One rank: its steps, and its collectives after the last step."""

    rank: RankResult
    begun: list[tuple[int, int]]  # ns
    finished: int
    calls: list[tuple[int, int]]


def _row(rank: RankResult) -> _Row:
    spans = [(span, (span.t0_ns, t1_ns)) for span, t1_ns in ended(rank.spans, rank.ended_ns)]
    begun = [(span, when) for span, when in spans if span.lane == Lane.STEPS]
    intervals = [when for _, when in begun]
    over = max((right for _, right in intervals), default=0)
    calls = sorted(when for span, when in spans if _is_call(span) and when[1] > over)
    unfinished = bool(begun) and _is_unfinished(rank, begun[-1][0])
    return _Row(rank, intervals, len(begun) - unfinished, calls)


def _is_call(span: Span) -> bool:
    return (
        span.lane == Lane.MAIN
        and span.kind in (Kind.COMM, Kind.WAIT)
        and span.name not in GROUP_CALLS
    )


def _is_unfinished(rank: RankResult, last: Span) -> bool:
    # An exception in a loop over ddp_lessons.steps closes the step's span, which begins with
    # fetching the batch. An optimizer's step is recorded only when it is over.
    of_loop = any(span.name == NEXT_BATCH and span.t0_ns == last.t0_ns for span in rank.spans)
    return last.t1_ns is None or (rank.status == "raised" and of_loop)


def _draw(ax: Axes, row: _Row, kinds: list[str]) -> None:
    """Draw a rank's cells, and the rank's outcome after the last one."""
    gap = GAP if len(kinds) <= DRAWN_SINGLY else 0.0
    for kind in {*kinds} - {""}:
        cells = [(n - 0.5 + gap / 2, n + 0.5 - gap / 2) for n, k in enumerate(kinds) if k == kind]
        bars = [(left, right - left) for left, right in row_layout.merged(cells, GAP / 2 - gap / 4)]
        ax.broken_barh(bars, (row.rank.rank - HEIGHT / 2, HEIGHT), **LOOKS[kind])
    end = max((n for n, kind in enumerate(kinds) if kind), default=-1) + 0.5
    ax.annotate(
        _outcome(row),
        (end, row.rank.rank),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=FONT,
        color=style.INK,
    )


def _kind(row: _Row, rows: list[_Row], column: int) -> str:
    """What a rank does in a step; "" if it takes no part."""
    takers = [other for other in rows if column < len(other.begun)]
    if row in takers:
        if column >= row.finished:
            return UNFINISHED
        return TOGETHER if len(takers) == len(rows) else ALONE
    return WITHOUT if any(_is_in_call(row, other.begun[column]) for other in takers) else ""


def _is_in_call(row: _Row, step: tuple[int, int]) -> bool:
    """True if the rank's last collective that begins before the end of the step overlaps it."""
    place = bisect_left(row.calls, (step[1], 0)) - 1
    return place >= 0 and row.calls[place][1] > step[0]


def _outcome(row: _Row) -> str:
    """How many steps a rank finished, and how it failed, if it did."""
    return f"{count(row.finished, 'step')}{style.failure(row.rank)}"


def _make_room(ax: Axes, rows: list[_Row], columns: int) -> None:
    """Set the x scale so that each rank's outcome fits after its steps."""
    points = max(len(_outcome(row)) for row in rows) * style.CHARACTER * FONT
    width = ax.get_window_extent().width / ax.figure.dpi * style.POINTS
    part = min(points / width, MOST_ROOM)
    ax.set_xlim(-0.6, columns - 0.4 + columns * part / (1 - part))
