"""What pictures with curves share: looks that differ in grey, too, and labels at the ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ddp_lessons.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": style.BLUE, "marker": "o"},
    {"color": style.ORANGE, "marker": "s", "linestyle": "--"},
    {"color": style.GREEN, "marker": "^", "linestyle": ":"},
    {"color": style.PURPLE, "marker": "D", "linestyle": "-."},
)
APART = 0.09  # of the axes' height between two labels, at least
MARKS = 12  # on a curve
FONT = 9
LINE = 0.07  # of the axes' height: a line of text
TURN = 0.85  # of the axes' width: from here on a mark's label stands left of it

Curves = dict[str, np.ndarray]


def checked(curves: Mapping[str, Sequence[float]]) -> Curves:
    """The curves as arrays.

    Raises
    ------
    ValueError
        If there is none or there are more than four, or one is empty or has a value that is not
        finite.
    """
    arrays = {label: np.asarray(curve, dtype=float) for label, curve in curves.items()}
    if not 0 < len(arrays) <= len(LOOKS):
        raise ValueError(f"one to {len(LOOKS)} curves can be told apart, got {len(arrays)}")
    for label, curve in arrays.items():
        if curve.ndim != 1 or not len(curve) or not np.isfinite(curve).all():
            raise ValueError(f"{label!r} must be a list of finite numbers, one a step, got {curve}")
    return arrays


def draw(ax: Axes, xs: Mapping[str, np.ndarray], curves: Curves) -> None:
    """Draw the curves over their `xs`; call `label_ends` when the scales are set."""
    for number, (look, (label, curve)) in enumerate(zip(LOOKS, curves.items(), strict=False)):
        every = max(1, len(curve) // MARKS)
        # On top of an equal curve, marks between its marks: both are seen.
        hides = any(np.array_equal(curve, other) for other in list(curves.values())[:number])
        at = (every // 2 if hides else 0, every)
        ax.plot(xs[label], curve, label=label, markersize=5, markevery=at, **look)
    ax.set_xlim(0, max(1, *(x[-1] for x in xs.values())))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def label_ends(ax: Axes, curves: Curves) -> None:
    """Write each label beside its curve's end, moved up where it would cover another."""
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = {label: to_axes.transform((0, curve[-1]))[1] for label, curve in curves.items()}
    lowest = -APART
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        lowest = max(float(height), lowest + APART)
        ax.annotate(
            label,
            (1, lowest),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=style.INK,
            fontsize=FONT,
            annotation_clip=False,
        )


def mark(ax: Axes, marks: Mapping[str, float]) -> None:
    """Draw a vertical line for each mark, labelled at its top; call it when the scales are set."""
    ax.set_xlim(right=max([ax.get_xlim()[1], *marks.values()]))
    low, high = ax.get_xlim()
    for row, (label, x) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        ax.axvline(x, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        left = (x - low) / (high - low) > TURN
        ax.annotate(
            label,
            (x, 1 - row * LINE),  # each lower than the last: they may be close together
            (-4 if left else 4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=style.INK,
            fontsize=FONT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
