"""Lesson 18: ranks and the class balance, and how far each recipe's metric is from the true one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ddp_lessons.plots import style
from ddp_lessons.text import count
from ddp_lessons.widgets.explorer import Explorer, run_ranks, switch, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

Found = tuple[float, float]  # what a recipe gives, and what one process finds
ROUNDING = 1e-6
LEAST = 0.01  # width of the x axis
ROOM = 0.22  # for the text right of the rightmost value, as a part of the width
FONT = 9


def explore(recipes: Callable[[int, int, bool], dict[str, Found]]) -> Explorer:
    """Sliders for ranks and positives and a switch for the order, above each recipe's result.

    Parameters
    ----------
    recipes : callable
        ``recipes(rank, positives, by_class)`` gets how many of 100 samples are positive and whether
        they are sorted by class, and returns for each recipe its result and the true one.
    """
    controls = {
        "ranks": whole("ranks", 4, 1, 4),
        "positives": whole("positives in 100", 4, 1, 50),
        "by_class": switch("sorted by class", False),
    }

    def start(ranks: int, positives: int, by_class: bool) -> Run:
        return run_ranks(recipes, (positives, by_class), ranks)

    def draw(run: Run, ranks: int, positives: int, by_class: bool) -> Axes:
        order = ", sorted by class" if by_class else ""
        title = f"{positives} in 100 are positive, {count(ranks, 'rank')}{order}"
        return against_truth(run.values[0], errors=True, title=title)

    return Explorer(controls, start, draw)


def against_truth(
    found: Mapping[str, Found], *, errors: bool = False, title: str | None = None
) -> Axes:
    """Draw one row for each recipe: its result as a dot, the true value as a line across the row.

    Parameters
    ----------
    found : mapping of str to pair of float
        By recipe, what it gives, which may be nan, and what one process finds.
    errors : bool
        Whether the x axis has the errors, so that small ones are seen, and not the values.
    title : str, optional
        The title.
    """
    from matplotlib.lines import Line2D

    ax = style.new_axes(len(found) + 1, 0.85)
    ends: list[float] = []
    for row, (value, truth) in enumerate(found.values()):
        ends += _draw_row(ax, row, float(value), float(truth), float(truth) if errors else 0.0)
    low, high = min(ends), max(ends)
    width = max(high - low, LEAST)
    ax.set_xlim(low - 0.06 * width, high + ROOM * width)
    ax.set_ylim(len(found) - 0.4, -0.6)
    ax.set_yticks(range(len(found)), list(found))
    if errors:
        ax.set_xlabel("error: result minus that of one process")
    style.bare(ax)
    true = Line2D(
        [], [], color=style.INK, linestyle="none", marker="|", markersize=12, label="true"
    )
    right, wrong = (
        Line2D([], [], color=colour, linestyle="none", marker="o", label=label)
        for colour, label in ((style.BLUE, "the same"), (style.ORANGE, "another number"))
    )
    style.head(ax, title or "metric by recipe", [true, right, wrong])
    return ax


def _draw_row(ax: Axes, row: int, value: float, truth: float, origin: float) -> tuple[float, float]:
    """Draw a row on an axis that begins at `origin`; return the ends of what is drawn."""
    is_off = not abs(value - truth) <= ROUNDING  # so is nan
    text, at = f"{value:.3f}", truth - origin
    left = right = at
    if not math.isnan(value):
        text += f" ({value - truth:+.3f})" if is_off else ""
        left, right = sorted((value - origin, at))
        colour = style.ORANGE if is_off else style.BLUE
        ax.hlines(row, left, right, color=colour, linewidth=2)
        ax.plot(value - origin, row, "o", color=colour, markersize=8)
    ax.plot(at, row, "|", color=style.INK, markersize=17, markeredgewidth=2)
    ax.annotate(text, (right, row), (9, 0), textcoords="offset points", va="center", fontsize=FONT)
    return left, right


def by_bytes(sizes: Mapping[str, int], *, title: str | None = None) -> Axes:
    """Draw a bar for each form of the same results: its bytes.

    Parameters
    ----------
    sizes : mapping of str to int
        By form, the bytes that a rank gives to a call.
    title : str, optional
        The title.
    """
    ax = style.new_axes(len(sizes))
    bars = ax.barh(list(sizes), list(sizes.values()), color=style.BLUE, height=0.5)
    ax.bar_label(bars, [style.bytes_text(size) for size in sizes.values()], padding=4)
    ax.set(xlim=(0, 1.15 * max(sizes.values())), xlabel="bytes")
    ax.invert_yaxis()
    style.bare(ax)
    style.head(ax, title or "bytes by form", [])
    return ax


def learning_rates(by_rank: Sequence[Sequence[float]], *, title: str | None = None) -> Axes:
    """Draw the learning rate of each rank after each epoch, on a log scale.

    Parameters
    ----------
    by_rank : sequence of sequence of float
        By rank, the rate after each epoch. At most four ranks; the first has the widest line.
    title : str, optional
        The title.
    """
    ax = style.new_axes(5)
    colours = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
    for rank, (rates, colour) in enumerate(zip(by_rank, colours, strict=False)):
        width, marker = 2 + 2 * (len(by_rank) - 1 - rank), "os^D"[rank]
        epochs = range(1, len(rates) + 1)
        look = {"color": colour, "linewidth": width, "marker": marker, "label": f"rank {rank}"}
        ax.step(epochs, rates, where="post", **look)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.set(xlabel="epoch", ylabel="learning rate", xticks=range(1, len(by_rank[0]) + 1))
    ax.spines[["top", "right"]].set_visible(False)
    style.head(ax, title or "learning rates", ax.get_lines())
    return ax
