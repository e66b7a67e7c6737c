"""`plots.losses`: training losses over steps or samples. Runs in the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_lessons.plots import style
from ddp_lessons.plots.curves import checked, draw, label_ends, mark
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 6  # of the figure's height


@documented
def losses(
    curves: Mapping[str, Sequence[float]],
    *,
    batch: Mapping[str, int] | None = None,
    labels: bool = True,
    marks: Mapping[str, float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one curve for each training run.

    Parameters
    ----------
    curves : mapping of str to sequence of float
        By label, the loss after each step, `(steps,)`. At most four.
    batch : mapping of str to int, optional
        By label, the global batch size. With it, the x axis counts samples instead of steps, so
        runs with larger batches are not drawn shorter.
    labels : bool
        Whether to label the curves' ends; beside another picture of the same curves, once is
        enough.
    marks : mapping of str to float, optional
        By label, x positions of vertical lines.
    {title}.
    {ax}

    {raises}
        If there is nothing to draw or too much, a loss is not finite, or a batch is missing or
        smaller than 1.
    """
    arrays = checked(curves)
    sizes = {label: 1 if batch is None else batch.get(label, 0) for label in arrays}
    if min(sizes.values()) < 1:
        raise ValueError(f"each curve needs the size of its batch, at least 1; got {batch}")
    ax = ax or style.new_axes(ROWS)
    xs = {label: sizes[label] * np.arange(1, len(curve) + 1) for label, curve in arrays.items()}
    draw(ax, xs, arrays)
    low = min(0.0, *(float(curve.min()) for curve in arrays.values()))
    high = max(0.0, *(float(curve.max()) for curve in arrays.values()))
    room = 0.05 * ((high - low) or 1.0)
    ax.set_ylim(low - room * (low < 0), high + room)
    mark(ax, marks or {})
    if labels:
        label_ends(ax, arrays)
    ax.set_xlabel("steps" if batch is None else "samples seen")
    ax.set_ylabel("loss")
    style.head(ax, title or "loss", [])
    return ax
