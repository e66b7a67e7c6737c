"""Small curves of what ranks report, drawn while they run: for the panel, twice a second.

Runs in the parent, used by live_panel.py. They are SVG, as drawing with matplotlib would take a
processor from the ranks for a tenth of a second each time; `plots.reports` draws the picture to
keep.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from ddp_lessons.processes.base import Worker
from ddp_lessons.wire.records import Report

MOST_CURVES, MOST_RANKS = 3, 16  # names that are drawn, and ranks of each
MOST_POINTS = 200  # of a curve
X_NAMES = ("step", "epoch")  # reported numbers that are no curves but their x axis
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # as in the pictures (plots/style.py)
WIDTH, HEIGHT, EDGE = 260, 90, 6  # pixels

Points = list[tuple[float, float]]


def html_of(workers: Sequence[Worker]) -> str:
    """The curves of the numbers reported first, a line a rank; "" if nothing was reported."""
    reports = {worker.rank: worker.told.reports for worker in workers[:MOST_RANKS]}
    names = {
        name: None
        for of_rank in reports.values()
        for report in of_rank
        for name in report.values
        if name not in X_NAMES
    }
    drawn = [_drawn(name, reports) for name in list(names)[:MOST_CURVES]]
    return f"<div>{''.join(drawn)}</div>" if drawn else ""


def dot(rank: int) -> str:
    """A dot in the colour of the rank's curves."""
    return f"<span style='color:{_colour(rank)}' aria-hidden='true'>● </span>"


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def points(name: str, reports: Sequence[Report]) -> Points:
    """The values of a reported number over the reported step, or else in their order."""
    found: Points = []
    for report in reports:
        if name in report.values:
            x = next((report.values[x] for x in X_NAMES if x in report.values), len(found))
            found.append((x, report.values[name]))
    return found


def _drawn(name: str, reports: dict[int, list[Report]]) -> str:
    curves = {rank: _thinned(points(name, of_rank)) for rank, of_rank in reports.items()}
    finite = [p for curve in curves.values() for p in curve if math.isfinite(sum(p))]
    last = next((curve[-1][1] for curve in curves.values() if curve), math.nan)
    heading = f"{html.escape(name)} {last:.4g}"
    across, up = (_range([point[n] for point in finite] or [0.0]) for n in (0, 1))
    lines = "".join(
        f"<polyline fill='none' stroke-width='1.5' stroke='{_colour(rank)}' "
        f"points='{' '.join(part)}'/>"
        for rank, curve in curves.items()
        for part in _parts(curve, across, up)
    )
    return (
        f"<svg width='{WIDTH}' height='{HEIGHT}' role='img' aria-label='{heading}'>"
        f"<text x='{EDGE}' y='14' font-size='12' fill='currentColor'>{heading}</text>"
        f"<rect x='{EDGE}' y='20' width='{WIDTH - 2 * EDGE}' height='{HEIGHT - 24}' fill='none' "
        f"stroke='#999999' stroke-width='0.5'/>{lines}</svg>"
    )


def _thinned(curve: Points) -> Points:
    """Not more points than can be told apart, the last one among them."""
    return curve[:: -max(1, len(curve) // MOST_POINTS)][::-1]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _parts(
    curve: Points, across: tuple[float, float], up: tuple[float, float]
) -> Iterator[list[str]]:
    """The curve in pixels, in parts between values that are no numbers."""
    part: list[str] = []
    for x, y in curve:
        if math.isfinite(x + y):
            right = (x - across[0]) / (across[1] - across[0]) * (WIDTH - 4 * EDGE)
            above = (y - up[0]) / (up[1] - up[0]) * (HEIGHT - 24 - 2 * EDGE)
            part.append(f"{2 * EDGE + right:.1f},{HEIGHT - 4 - EDGE - above:.1f}")
        elif part:
            yield part
            part = []
    if part:
        yield part
