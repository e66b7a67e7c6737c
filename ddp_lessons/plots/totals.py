"""`plots.totals`: how each rank spent its time. Runs in the parent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddp_lessons.analysis.metrics import Segment, after_warm_up, segments
from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.plots.waits import HEIGHT, LOOKS, OWN, SEEN, WAIT, entries, finding
from ddp_lessons.results import RankResult
from ddp_lessons.run import Run
from ddp_lessons.wire.records import Lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = 8.5


@documented
def totals(
    run: Run, *, title: str | None = None, legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw one bar for each rank: its own work, waiting and transfer, with their lengths in ms.

    Parameters
    ----------
    {run}
    {title}; by default which rank makes the others wait, and why.
    legend : bool
        Whether to draw the legend; beside `plots.waits` once is enough.
    {ax}
        Its rows are those of `plots.waits`. The x axis is the mean ms of a training step, where
        there are steps (of more than four without the first two), and else ms of the function.
    """
    ax = ax or style.new_axes(run.world_size)
    steps = {*after_warm_up(s.step for s in run.spans() if s.lane == Lane.STEPS)}
    held: dict[int, list[Segment]] = {rank.rank: [] for rank in run.ranks}
    for segment in segments(run):
        if not steps or segment.step in steps:
            held[segment.rank].append(segment)
    parts = [_parts(rank, held[rank.rank], steps) for rank in run.ranks]
    longest = max([sum(by_kind.values()) for by_kind in parts] + [1e-6])
    ax.set_xlim(0, longest * 1.02)
    style.name_ranks(ax, run)
    for rank, by_kind in zip(run.ranks, parts, strict=True):
        _draw(ax, rank.rank, by_kind)
        style.mark_failure(ax, rank, sum(by_kind.values()))
    label = "mean ms per step" if steps else "ms in the function"
    ax.set_xlabel("\n".join([label, *style.losses(run)]))
    kinds = [kind for by_kind in parts for kind, ms in by_kind.items() if ms > SEEN * longest]
    style.head(ax, title or finding(run), entries(kinds) if legend else [])
    return ax


def _parts(rank: RankResult, held: list[Segment], steps: set[int]) -> dict[str, float]:
    """The ms of each kind, in drawing order."""
    marks = [s for s in rank.spans if s.lane == Lane.STEPS and s.step in steps]
    if steps:
        whole = sum((s.t1_ns or rank.ended_ns) - s.t0_ns for s in marks) / 1e6
    else:
        whole = rank.seconds * 1e3
    parts = {
        kind: sum(s.t1_ns - s.t0_ns for s in held if s.kind == kind) / 1e6
        for kind in LOOKS
        if kind != OWN
    }
    parts = {OWN: max(0.0, whole - sum(parts.values())), **parts}
    return {kind: ms / max(1, len(marks)) for kind, ms in parts.items()}


def _draw(ax: Axes, rank: int, parts: dict[str, float]) -> None:
    left = 0.0
    for kind, ms in parts.items():
        if ms > 0:
            ax.broken_barh([(left, ms)], (rank - HEIGHT / 2, HEIGHT), **LOOKS[kind])
            text = f"{ms:.0f}" if ms >= 9.5 else f"{ms:.1f}"
            plain = {"color": style.ink_on(LOOKS[kind]["facecolor"])}
            look = {"bbox": style.WAIT_LABEL} if kind == WAIT else plain
            style.write(ax, [text], (left, left + ms), rank, FONT, **look)
            left += ms
