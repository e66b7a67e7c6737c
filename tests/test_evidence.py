"""The lines beside a verdict: the last call of a rank, and what became of the others."""

from __future__ import annotations

import pytest

from ddp_lessons import evidence
from tests.by_hand import error, lost, made, record, run_of

BAD = error("ValueError: a bad batch", 9)


@pytest.mark.parametrize(
    ("open", "line"),
    [
        (True, "It was in all_reduce: /home/learner/train.py, line 8"),
        (False, "Its last call was all_reduce: /home/learner/train.py, line 8"),
    ],
)
def test_the_last_call(open: bool, line: str) -> None:
    calls = made(1, "barrier", "all_reduce", open=open)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(calls, 1, 2)])
    assert evidence.last_call(run, run.ranks[1]) == [line]


def test_a_rank_that_called_nothing() -> None:
    run = run_of([record(made(0, "barrier"), 0, 2), record([], 1, 2)])
    assert evidence.last_call(run, run.ranks[1]) == []


def test_nobody_else() -> None:
    run = run_of([record([], 0, 1, raised=BAD)])
    assert evidence.others(run, [0]) == []


def test_those_that_returned_are_not_told_of() -> None:
    records = [record([], 0, 2, raised=BAD), record([], 1, 2, returned=True)]
    assert evidence.others(run_of(records), [0]) == []


def test_ranks_that_lost_their_partner_at_one_line_share_a_line() -> None:
    at_one_line = [lost(made(r, "barrier"), r, 4) for r in (0, 1)]
    elsewhere = lost(made(2, "barrier", "all_reduce"), 2, 4)
    run = run_of([*at_one_line, elsewhere, record([], 3, 4, raised=BAD)])
    at = "/home/learner/train.py, line"
    assert evidence.others(run, [3]) == [
        "",
        f"Ranks 0 and 1 lost their partner by that, waiting in barrier, {at} 7.",
        f"Rank 2 lost its partner by that, waiting in all_reduce, {at} 8.",
    ]


def test_an_error_of_its_own_came_later() -> None:
    other = error("KeyError: 'labels'", 12)
    run = run_of([record([], 0, 2, raised=BAD), record([], 1, 2, raised=other)])
    assert evidence.others(run, [0]) == ["", "rank 1 failed later: raised KeyError: 'labels'"]


def test_of_many_that_were_stopped_four_are_named() -> None:
    calls = {rank: made(rank, "barrier", open=True) for rank in range(7)}
    run = run_of(record(calls[r], r, 7) if r else record([], 0, 7, raised=BAD) for r in range(7))
    first, *named, rest = evidence.others(run, [0])
    assert first == ""
    where = "waiting in barrier, /home/learner/train.py, line 7"
    assert named == [f"rank {r} was stopped, {where}" for r in (1, 2, 3, 4)]
    assert rest == "... and 2 more ranks were stopped"
