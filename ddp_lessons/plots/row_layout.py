"""Interval arithmetic for bars: packing into rows, merging, gaps. Plots call it, in the parent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_lessons.analysis.intervals import union
from ddp_lessons.wire.records import Lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

Interval = tuple[float, float]  # left, right


def of_steps(run: Run, steps: tuple[int, int]) -> tuple[int, int]:
    """Begin and end, in ns, of the training steps from the first to the last of `steps`.

    Raises ValueError if no rank has such steps, TypeError if `steps` are no two numbers.
    """
    try:
        first, last = steps
    except (TypeError, ValueError):
        raise TypeError(
            f"steps={steps!r} are not two numbers: pass the first and the last, as steps=(2, 4)"
        ) from None
    numbered = [s for s in run.spans() if s.lane == Lane.STEPS and s.step is not None]
    shown = [s for s in numbered if first <= (s.step or 0) <= last]
    if not shown:
        raise ValueError(f"no rank has a step from {first} to {last}")
    end = max(rank.ended_ns for rank in run.ranks)
    return min(s.t0_ns for s in shown), max(s.t1_ns or end for s in shown)


def fractions(intervals: Iterable[tuple[int, int]], edges: np.ndarray) -> np.ndarray:
    """Which part of each column the intervals cover, `(columns,)`; `edges` are one more."""
    found = union(intervals)
    if not found:
        return np.zeros(len(edges) - 1)
    times = np.array(found, dtype=float)
    covered = np.concatenate([[0.0], np.cumsum(times[:, 1] - times[:, 0])])
    at = np.interp(edges, times.ravel(), np.repeat(covered, 2)[1:-1])
    covering: np.ndarray = np.diff(at) / np.diff(edges)
    return covering


def draw_fractions(
    ax: Axes,
    row: tuple[float, float],
    x: np.ndarray,
    parts: Iterable[tuple[np.ndarray, dict[str, Any]]],
) -> None:
    """Stack the parts of each column, each with its look, in a row: its top and its height."""
    top, height = row
    filled = np.zeros(len(x) - 1)
    for part, look in parts:
        below, filled = filled, filled + part
        if part.any():
            lower, upper = (top + height * (1 - y) for y in (below, filled))
            y1, y2 = (np.append(y, y[-1]) for y in (lower, upper))
            there = np.append(part > 0, False)
            there[1:] |= part > 0  # a column reaches to the next edge
            ax.fill_between(x, y1, y2, where=there, step="post", **look)


def pack(intervals: Sequence[Interval]) -> list[int]:
    """The row of each interval: no two overlap on a row, and there are as few rows as possible.

    The intervals must be sorted by their begin.
    """
    ends: list[float] = []  # of the last interval on each row
    rows = []
    for left, right in intervals:
        row = next((n for n, end in enumerate(ends) if end <= left), len(ends))
        ends[row : row + 1] = [right]
        rows.append(row)
    return rows


def merged(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    """The intervals; those that are closer than `gap` are merged."""
    found: list[Interval] = []
    for left, right in sorted(intervals):
        if found and left - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(found[-1][1], right))
        else:
            found.append((left, right))
    return found


def widest_gap(interval: Interval, covered: Iterable[Interval]) -> Interval:
    """The widest uncovered part of an interval."""
    left, right = interval
    edges = [left]
    for begin, end in merged(covered, 0.0):
        if left < end and begin < right:
            edges += [begin, end]
    edges.append(right)
    return max(zip(edges[::2], edges[1::2], strict=True), key=lambda gap: gap[1] - gap[0])
