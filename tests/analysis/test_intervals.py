"""Interval arithmetic, compared with counting every nanosecond."""

from __future__ import annotations

import random

import pytest

from ddp_lessons.analysis.intervals import Intervals, common, length, union, without


def drawn(numbers: random.Random) -> Intervals:
    """Some intervals from 0 to 200, a few of them empty."""
    begins = (numbers.randrange(180) for _ in range(numbers.randrange(12)))
    return [(begin, begin + numbers.randrange(20)) for begin in begins]


def covered(intervals: Intervals) -> set[int]:
    return {t for begin, end in intervals for t in range(begin, end)}


@pytest.mark.parametrize("seed", range(50))
def test_counting_finds_the_same(seed: int) -> None:
    numbers = random.Random(seed)
    some, others = drawn(numbers), drawn(numbers)
    assert covered(union(some)) == covered(some)
    assert length(some) == len(covered(some))
    assert common(union(some), union(others)) == len(covered(some) & covered(others))
    assert without(some, others) == union(without(some, others))
    assert covered(without(some, others)) == covered(some) - covered(others)


def test_a_union_is_in_order_and_nothing_in_it_touches() -> None:
    assert union([(5, 7), (1, 3), (3, 4), (2, 3), (6, 9)]) == [(1, 4), (5, 9)]
    assert union([]) == []
    assert common([(1, 4)], []) == 0
