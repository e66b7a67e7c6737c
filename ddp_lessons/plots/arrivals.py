"""`plots.arrivals`: how late each rank comes to each collective. Runs in the parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.plots.waits import finding
from ddp_lessons.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_COLUMNS = 120
MOST_NUMBERS = 12  # most columns for which numbers are written
FONT = 8.5
LAST_LOOK: dict[str, Any] = {  # the mark of the last rank to arrive
    "marker": "o",
    "color": style.ORANGE,
    "markersize": 4,
    "markeredgecolor": style.INK,
    "markeredgewidth": 0.6,
}


@documented
def arrivals(run: Run, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a map: a row for each rank, a column for each collective, dark where the rank is late.

    A dot marks the last rank to arrive. In a run with training steps each column is a step, and
    shows the mean lateness over its collectives. White cells are ranks that did not take part.

    Parameters
    ----------
    {run}
    {title}; by default which rank makes the others wait, and why.
    {ax}
        Cells show the ms after the first arrival if there are few columns; else a colour bar does.

    {raises}
        If there is no collective.
    """
    columns, complete, names, what = _columns(run)
    each = -(-len(columns) // MOST_COLUMNS)
    late = _means(columns, each)
    ax = ax or style.new_axes(run.world_size)
    image = ax.imshow(late, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    style.name_ranks(ax, run)
    ax.set_ylim(run.world_size - 0.5, -0.5)
    _mark_last(ax, _means(complete, each))
    notes = []
    if late.shape[1] <= MOST_NUMBERS and run.world_size <= 16:
        _write_numbers(ax, late, image)
        notes = ["numbers: ms after the first"]
    else:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.01)
        bar.set_label("ms after the first")
    ticks = range(0, late.shape[1], max(1, late.shape[1] // 12))
    ax.set_xticks(list(ticks), [str(names[tick * each]) for tick in ticks])
    notes += [f"each column is the mean of {each}"] if each > 1 else []
    notes += ["white: took no part"] if np.isnan(late).any() else []
    ax.set_xlabel("\n".join([what, *notes, *style.losses(run)]))
    last = Line2D([], [], linestyle="", label="comes last", **LAST_LOOK)
    style.head(ax, title or finding(run), [last])
    return ax


Columns = Sequence[Sequence[float] | np.ndarray]


def _columns(run: Run) -> tuple[Columns, Columns, list[int], str]:
    """Each column's lateness in ms, `(ranks,)`, with NaN for absent ranks; numbers; their kind.

    The second columns are those of collectives to which all ranks came: they have a last one.
    """
    found = run.arrivals()
    if not found:
        raise ValueError("no collective was recorded: there is nothing that ranks come to")
    rows = [[np.nan if ns is None else ns / 1e6 for ns in a.lateness_ns] for a in found]
    nobody = [np.nan] * run.world_size
    complete = [
        row if a.last_rank is not None and np.isfinite(row).sum() > 1 else nobody
        for a, row in zip(found, rows, strict=True)
    ]
    steps = sorted({a.step for a in found if a.step is not None})
    if not steps:
        return rows, complete, list(range(len(rows))), "collective"
    at = [[place for place, a in enumerate(found) if a.step == step] for step in steps]
    of_steps = [[_mean([each[i] for i in places]) for places in at] for each in (rows, complete)]
    return of_steps[0], of_steps[1], steps, "step"


def _means(columns: Columns, each: int) -> np.ndarray:
    """The mean of so many columns each, `(ranks, columns)`."""
    return np.array([_mean(columns[i : i + each]) for i in range(0, len(columns), each)]).T


def _mean(rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The mean over rows without NaN values; NaN where all are NaN."""
    values = np.array(rows, dtype=float)
    there = ~np.isnan(values)
    counts = there.sum(axis=0)
    sums = np.where(there, values, 0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _mark_last(ax: Axes, late: np.ndarray) -> None:
    columns = [c for c in range(late.shape[1]) if not np.isnan(late[:, c]).all()]
    last = [int(np.nanargmax(late[:, c])) for c in columns]
    right = [c + 0.33 for c in columns] if late.shape[1] <= MOST_NUMBERS else columns
    ax.plot(right, last, linestyle="", zorder=3, **LAST_LOOK)


def _write_numbers(ax: Axes, late: np.ndarray, image: AxesImage) -> None:
    for (rank, column), ms in np.ndenumerate(late):
        if not np.isnan(ms):
            text = f"{ms:.0f}" if ms >= 9.5 else f"{ms:.1f}"
            ax.text(
                column - 0.05,
                rank,
                text,
                ha="center",
                va="center",
                fontsize=FONT,
                color=style.ink_on(image.cmap(image.norm(ms))),
            )
