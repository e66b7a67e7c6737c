"""Union, difference, length and overlap of time intervals in ns.

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


def without(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Intervals:
    """The parts of a union that no other interval covers, sorted."""
    left: Intervals = []
    cuts, at = [cut for cut in union(others) if cut[0] < cut[1]], 0
    for begin, end in union(some):
        while at < len(cuts) and cuts[at][0] < end:
            left.append((begin, max(begin, cuts[at][0])))
            begin = max(begin, cuts[at][1])
            if begin > end:
                break
            at += 1
        left.append((begin, max(begin, end)))
    return [(begin, end) for begin, end in left if begin < end]


def common(some: Intervals, others: Intervals) -> int:
    """The length of the intersection of two unions."""
    total = 0
    for begin, end in some:
        at = bisect_right(others, begin, key=lambda other: other[1])  # the first that ends later
        while at < len(others) and others[at][0] < end:
            total += min(end, others[at][1]) - max(begin, others[at][0])
            at += 1
    return total
