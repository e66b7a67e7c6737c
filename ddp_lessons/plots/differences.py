"""`plots.differences`: errors of several computations, step by step. Runs in the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import NullLocator

from ddp_lessons.plots import style
from ddp_lessons.plots.curves import FONT, Curves, checked, draw, label_ends
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 6  # of the figure's height
MOST_TICKS = 5


@documented
def differences(
    values: Mapping[str, Sequence[float]],
    *,
    rounding: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one curve for each method, on a logarithmic scale with a line for exactly 0 if needed.

    Parameters
    ----------
    values : mapping of str to sequence of float
        By label, one difference a step, `(steps,)`: finite and not negative. At most four.
    rounding : float, optional
        The largest difference that rounding explains: the band below is shaded and labelled.
    {title}.
    {ax}

    {raises}
        If there is nothing to draw, too much, or a difference is negative or not finite.
    """
    curves = checked(values)
    negative = [label for label, curve in curves.items() if (curve < 0).any()]
    if negative:
        raise ValueError(f"{negative} have negative differences: take the absolute value")
    ax = ax or style.new_axes(ROWS)
    if rounding is not None:
        ax.axhspan(0, rounding, facecolor=style.PALE)
        ax.text(0, rounding, " only rounding", fontsize=FONT - 1, va="top", color=style.INK)
    draw(ax, {label: np.arange(len(curve)) for label, curve in curves.items()}, curves)
    _scale(ax, curves, rounding or 0.0)
    label_ends(ax, curves)
    ax.set_xlabel("step")
    ax.set_ylabel("difference")
    style.head(ax, title or "difference from the truth", [])
    return ax


def _scale(ax: Axes, curves: Curves, rounding: float) -> None:
    """Set a scale that is logarithmic down to the smallest power of ten; 0 has a place if seen."""
    seen = np.concatenate([*curves.values(), [rounding / 100]])  # the band is seen, too
    positive = seen[seen > 0] if (seen > 0).any() else np.ones(1)
    low, high = (int(np.floor(np.log10(value))) for value in (positive.min(), positive.max()))
    exponents = range(low, high + 2, max(1, (high + 1 - low) // MOST_TICKS))
    ticks = {10.0**e: f"$10^{{{e}}}$" for e in exponents}
    bottom, top = 10.0**low, positive.max() * 3
    if any((curve == 0).any() for curve in curves.values()):
        ax.set_ylim(-bottom / 4, top)
        ax.set_yscale("symlog", linthresh=bottom, linscale=0.5)
        ticks = {0: "0", **ticks}
    else:
        ax.set_ylim(bottom, top)
        ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(list(ticks), list(ticks.values()))
