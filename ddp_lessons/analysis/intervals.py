"""Union, length and overlap of time intervals in ns.

Runs in the parent, for analysis/metrics.py and the plots.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Intervals = list[tuple[int, int]]


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The union of intervals, sorted; none touches the next."""
    whole: Intervals = []
    for begin, end in sorted(intervals):
        if whole and begin <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], end)
        else:
            whole.append((begin, end))
    return whole


def length(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    return sum(end - begin for begin, end in union(intervals))


def common(some: Intervals, others: Intervals) -> int:
    """The length of the intersection of two unions."""
    total = 0
    for begin, end in some:
        at = bisect_right(others, begin, key=lambda other: other[1])  # the first that ends later
        while at < len(others) and others[at][0] < end:
            total += min(end, others[at][1]) - max(begin, others[at][0])
            at += 1
    return total
