"""`plots.bandwidth`: how a collective's time grows with its size. Runs in the parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ddp_lessons.analysis.metrics import Link, measured
from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
MARKERS = "os^Dv"
LINES = ("-", "--", ":", "-.")
HEIGHT = 3.6  # inches
FONT = 8.5


@documented
def bandwidth(run: Run, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the time of each collective over its bytes, and the fit latency + bytes / bandwidth.

    A time runs from the last rank's arrival until the last rank leaves. Small marks are single
    collectives, large marks their medians; `run.bandwidth()` computes the fit.

    Parameters
    ----------
    run : Run
        A run that calls an operation with at least two sizes, better five, each several times.
    {title}; by default the operations.
    {ax}
        Both axes are logarithmic: bytes of one rank's tensor, and milliseconds.

    {raises}
        If no operation was called with two sizes.
    """
    links = run.bandwidth()
    if not links:
        raise ValueError(
            "there is nothing to fit: call a collective with at least two sizes of tensors, some "
            "times each"
        )
    ax = ax or style.new_axes(1, (HEIGHT - 1.15) / 0.42)
    groups = {link.group for link in links}
    named = len(groups) > 1
    curves = [_draw(ax, run, link, n, _label(link, named)) for n, link in enumerate(links)]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: style.bytes_text(n)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
        low, high = axis.get_view_interval()
        if high < 30 * low:  # of powers of ten there would be one, or none
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.set_xlabel("\n".join(["bytes of one rank's tensor", *style.losses(run)]))
    ax.set_ylabel("ms after the last arrival")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(alpha=0.3)
    style.head(ax, title or _finding(links), [])
    ax.legend(handles=curves, fontsize=FONT, frameon=False, loc="upper left")
    return ax


def _draw(ax: Axes, run: Run, link: Link, number: int, label: str) -> Line2D:
    """Draw the points of one operation and its fit; return its entry in the legend."""
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)]
    singles = [(n, t / 1e6) for op, group, n, t in measured(run) if (op, group) == link[:2]]
    ax.plot(*_xy(singles), marker, color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
    medians = [(n, t / 1e6) for n, t in link.points]
    ax.plot(*_xy(medians), marker, color=colour, markersize=7, markeredgecolor=style.INK)
    sizes = np.geomspace(max(1, link.points[0][0]), link.points[-1][0], 100)
    fit = (link.latency_ns + sizes / link.bytes_per_second * 1e9) / 1e6
    line = LINES[number % len(LINES)]
    ax.plot(sizes, fit, line, color=colour, linewidth=1.8, label=label, marker=None)
    return Line2D(
        [], [], label=label, color=colour, linestyle=line, marker=marker, markeredgecolor=style.INK
    )


def _xy(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [n for n, _ in points], [t for _, t in points]


def _label(link: Link, with_group: bool) -> str:
    group = f" of {link.group}" if with_group else ""
    speed = link.bytes_per_second
    each = "" if np.isinf(speed) else f" + n / ({style.bytes_text(int(speed))}/s)"
    return f"{link.op}{group}: {link.latency_ns / 1e6:.2g} ms{each}"


def _finding(links: Sequence[Link]) -> str:
    names = list(dict.fromkeys(link.op for link in links))
    flat = list(dict.fromkeys(link.op for link in links if np.isinf(link.bytes_per_second)))
    if len(flat) == len(names):
        return f"{', '.join(names)}: the time does not grow with the size"
    but = f" (not of {', '.join(flat)})" if flat else ""
    return f"{', '.join(names)}: small messages cost latency, large ones bandwidth{but}"
