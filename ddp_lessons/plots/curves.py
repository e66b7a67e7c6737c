"""Curves with labels at their ends, for `plots.losses` and `plots.differences`, in the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
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
APART = 0.09  # least distance of two labels, of the axes' height
BESIDE = 0.015  # of the axes' width: from a curve's end to its label
MARKS = 12  # on a curve
MARK = 0.03  # height of a mark, as a part of the curves' range
FONT = 9
LINE = 0.07  # of the axes' height: a line of text
TURN = 0.85  # of the axes' width: beyond it a mark's label stands on its left

Curves = dict[str, np.ndarray]


def checked(curves: Mapping[str, Sequence[float]]) -> Curves:
    """The curves as arrays.

    Raises ValueError unless there are one to four curves, not empty, of finite values.
    """
    arrays = {label: np.asarray(curve, dtype=float) for label, curve in curves.items()}
    if not 0 < len(arrays) <= len(LOOKS):
        raise ValueError(f"one to {len(LOOKS)} curves can be told apart, got {len(arrays)}")
    for label, curve in arrays.items():
        if curve.ndim != 1 or not len(curve) or not np.isfinite(curve).all():
            raise ValueError(f"{label!r} must be a list of finite numbers, one a step, got {curve}")
    return arrays


def draw(ax: Axes, xs: Mapping[str, np.ndarray], curves: Curves) -> None:
    """Draw the curves over their `xs`; `label_ends` comes after the scales are set."""
    values = list(curves.values())
    width = MARK * float(np.ptp(np.concatenate(values)))
    for number, (look, (label, curve)) in enumerate(zip(LOOKS, curves.items(), strict=False)):
        every = max(1, len(curve) // MARKS)
        # If it lies on an earlier curve, marks go between its marks, so that both are seen; of
        # curves that are equal the first is a wide band.
        hides = any(_is_on(curve, other, width) for other in values[:number])
        hidden = any(np.array_equal(curve, other) for other in values[number + 1 :])
        at = (every // 2 if hides else 0, every)
        band: dict[str, Any] = {"linewidth": 8, "alpha": 0.35} if hidden and not hides else {}
        ax.plot(xs[label], curve, label=label, markersize=5, markevery=at, **look, **band)
    ax.set_xlim(0, max(1, *(x[-1] for x in xs.values())))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _is_on(curve: np.ndarray, other: np.ndarray, width: float) -> bool:
    return curve.shape == other.shape and bool(np.abs(curve - other).max() <= width)


def label_ends(ax: Axes, curves: Curves) -> None:
    """Write each label beside the end of its curve; labels that would overlap share their place.

    A thin line in the curve's colour leads to a label that had to move.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {label: float(to_axes.transform((0, curve[-1]))[1]) for label, curve in curves.items()}
    colours = {label: look["color"] for label, look in zip(curves, LOOKS, strict=False)}
    for label, height in _spread(ends).items():
        lead = {"arrowstyle": "-", "color": colours[label], "relpos": (0, 0.5)}
        ax.annotate(
            label,
            (1, ends[label]),
            (1 + BESIDE, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={**lead, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
            va="center",
            color=style.INK,
            fontsize=FONT,
            annotation_clip=False,
        )


def _spread(ends: Mapping[str, float]) -> dict[str, float]:
    """Heights at least `APART` from each other, and as near to the ends as they can be."""
    labels = sorted(ends, key=lambda label: ends[label])
    groups: list[list[float]] = []  # of each label its end, less its distance in an even stack
    for number, label in enumerate(labels):
        groups.append([ends[label] - number * APART])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = [max(0.0, fmean(group)) for group in groups for _ in group]
    return {
        label: place + n * APART
        for n, (label, place) in enumerate(zip(labels, places, strict=True))
    }


def mark(ax: Axes, marks: Mapping[str, float]) -> None:
    """Draw a labelled vertical line for each mark, after the scales are set."""
    ax.set_xlim(right=max([ax.get_xlim()[1], *marks.values()]))
    low, high = ax.get_xlim()
    for row, (label, x) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        ax.axvline(x, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        left = (x - low) / (high - low) > TURN
        ax.annotate(
            label,
            (x, 1 - row * LINE),  # each lower than the last: marks may be close together
            (-4 if left else 4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=style.INK,
            fontsize=FONT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
