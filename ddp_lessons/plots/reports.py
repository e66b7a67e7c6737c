"""`plots.reports`: what the ranks reported, over steps or seconds. Runs in the parent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ddp_lessons.plots import curves, style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

ROWS = 6  # of the figure's height
CROWD: dict[str, Any] = {"color": style.BLUE, "alpha": 0.4, "linewidth": 1}  # many ranks


@documented
def reports(
    run: Run,
    name: str | None = None,
    *,
    x: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a number that the ranks reported with `report`, one curve a rank.

    Parameters
    ----------
    run : Run
        A run whose function calls ``report(step=step, loss=loss.item())``.
    name : str, optional
        The number to draw; by default the first that is not `x`.
    x : str, optional
        The number on the x axis: by default "step" or "epoch" where they were reported, else
        "seconds" since the run began.
    {title}.
    {ax}

    {raises}
        If no rank reported such numbers.
    """
    rows = run.reports
    known = list(dict.fromkeys(key for row in rows for key in row if key != "rank"))
    x = x or next((key for key in ("step", "epoch") if key in known), "seconds")
    name = name or next((key for key in known if key not in (x, "seconds")), "a number")
    found = {
        rank: np.array(
            [(row[x], row[name]) for row in rows if row["rank"] == rank and {x, name} <= {*row}]
        )
        for rank in range(run.world_size)
    }
    found = {rank: points for rank, points in found.items() if len(points)}
    if not found:
        told = f"what was reported: {', '.join(known)}" if known else "no rank called report(...)"
        raise ValueError(f"no rank reported {name} over {x}; {told}")
    ax = ax or style.new_axes(ROWS)
    few = len(found) <= len(curves.LOOKS)
    for number, points in enumerate(found.values()):
        look = {**curves.LOOKS[number], "markersize": 5} if few else CROWD
        ax.plot(*points.T, markevery=max(1, len(points) // curves.MARKS), **look)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x != "seconds"))
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ends = {f"rank {rank}": p[np.isfinite(p[:, 1])][:, 1] for rank, p in found.items()}
    if few:
        ax.set_ylim(*ax.get_ylim())  # the scale is settled before labels find their places
        ax.set_xlim(right=max(points[:, 0].max() for points in found.values()))
        curves.label_ends(ax, {label: values for label, values in ends.items() if len(values)})
    below = ["seconds since the run began" if x == "seconds" else x]
    ax.set_xlabel("\n".join(below if few else [*below, f"a line for each of {len(found)} ranks"]))
    ax.set_ylabel(name)
    style.head(ax, title or f"{name}, as the ranks reported it", [])
    return ax
