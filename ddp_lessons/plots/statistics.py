"""`plots.statistics`: each rank's batch statistics and those of all ranks. Runs in the parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 6  # of the figure's height
MARKERS = "os^D"  # one a rank; more than four ranks look alike
COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
WIDTH = 0.36  # half of a channel's bar
MOST_CHANNELS = 32


@documented
def statistics(
    values: Sequence[Sequence[float]],
    truth: Sequence[float],
    *,
    name: str = "mean",
    legend: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one column for each channel: marks at the ranks' statistics, and a bar at the true one.

    Parameters
    ----------
    values : sequence
        `(world_size, channels)`: each rank's statistic of each channel. Of more than 32 channels
        only the first are drawn, and the axis says so.
    truth : sequence of float
        `(channels,)`: the statistic of the whole batch.
    name : str
        The name of the statistic, for the axis.
    legend : bool
        Whether to draw the legend; beside another such picture, once is enough.
    {title}.
    {ax}

    {raises}
        If the shapes do not fit, or a value is not finite.
    """
    by_rank, true = np.asarray(values, dtype=float), np.asarray(truth, dtype=float)
    _refuse_nonsense(by_rank, true)
    ranks, channels = by_rank.shape
    by_rank, true = by_rank[:, :MOST_CHANNELS], true[:MOST_CHANNELS]
    ax = ax or style.new_axes(ROWS)
    shown = np.arange(len(true))
    ax.hlines(true, shown - WIDTH, shown + WIDTH, colors=style.INK, linewidth=2.5, zorder=3)
    for rank, of_rank in enumerate(by_rank):
        ax.plot(shown + _aside(rank, ranks), of_rank, linestyle="", zorder=4, **_look(rank, ranks))
    ax.set_xlim(-0.6, len(true) - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    more = f" (the first {MOST_CHANNELS} of {channels})" if channels > MOST_CHANNELS else ""
    ax.set_xlabel(f"channel{more}")
    ax.set_ylabel(name)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    style.head(ax, title or f"{name} of each rank, and of all", _entries(ranks) if legend else [])
    return ax


def _refuse_nonsense(by_rank: np.ndarray, true: np.ndarray) -> None:
    if by_rank.ndim != 2 or 0 in by_rank.shape or true.shape != by_rank.shape[1:]:
        raise ValueError(
            "values must be (world_size, channels) and truth (channels,), got "
            f"{by_rank.shape} and {true.shape}"
        )
    if not (np.isfinite(by_rank).all() and np.isfinite(true).all()):
        raise ValueError("all statistics must be finite numbers")


def _aside(rank: int, ranks: int) -> float:
    """A mark's offset in its column: the ranks' marks stand side by side."""
    return (rank - (ranks - 1) / 2) / ranks * WIDTH * 1.6


def _look(rank: int, ranks: int) -> dict[str, Any]:
    if ranks > len(MARKERS):
        return {"marker": ".", "color": style.BLUE, "markersize": 4}
    return {
        "marker": MARKERS[rank],
        "color": COLOURS[rank],
        "markersize": 6,
        "markeredgecolor": style.INK,
        "markeredgewidth": 0.5,
    }


def _entries(ranks: int) -> list[Line2D]:
    several = ranks > len(MARKERS)
    names = ["one rank"] if several else [f"rank {rank}" for rank in range(ranks)]
    marks = [
        Line2D([], [], linestyle="", label=text, **_look(rank, ranks))
        for rank, text in enumerate(names)
    ]
    return [*marks, Line2D([], [], color=style.INK, linewidth=2.5, label="the whole batch")]
