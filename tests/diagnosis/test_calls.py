"""`Calls`, from spans made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.wire.records import Span


def call(rank: int, op: str, seq: int | None, t0: int = 1, **facts: Any) -> Span:
    """A call in the world that took 10 ns, or with `open=True` has not ended."""
    ends = None if facts.pop("open", False) else t0 + 10
    facts = {"lane": "main", "kind": "comm", "group": "world", **facts}
    lane, kind = facts.pop("lane"), facts.pop("kind")
    return Span(rank, lane, kind, op, t0, ends, op=op, seq=seq, **facts)


def joined(rank: int) -> Span:
    return call(rank, "init_process_group", None, 0, group=None)


def test_who_has_not_come() -> None:
    calls = Calls(
        [
            [joined(0), call(0, "all_reduce", 0, open=True)],
            [joined(1), call(1, "all_reduce", 0, open=True)],
            [joined(2)],
        ]
    )
    standing = calls.standing(0)
    assert standing is not None
    assert (standing.op, standing.state) == ("all_reduce", "open")
    assert calls.missing(standing) == {2}
    assert calls.standing(2) is None
    assert calls.not_made(2) == standing
    assert calls.not_made(0) is None


def test_another_function_or_size_has_not_come_either() -> None:
    big: dict[str, Any] = {"nbytes": 8, "tensor": "float32 (2,)"}
    calls = Calls(
        [
            [call(0, "all_reduce", 0, open=True, **big)],
            [call(1, "barrier", 0, open=True)],
            [call(2, "all_reduce", 0, open=True, nbytes=4, tensor="float32 (1,)")],
            [call(3, "all_reduce", 0, open=True, **{**big, "tensor": "float32 (1, 2)"})],
        ]
    )
    standing = calls.standing(0)
    assert standing is not None
    assert calls.missing(standing) == {1, 2}


def test_a_broadcast_waits_for_its_root_first() -> None:
    def seen(*roots_first: Span) -> set[int]:
        waiting = call(1, "broadcast", 0, open=True, peer=0)
        spans = [[joined(0), *roots_first], [joined(1), waiting], [joined(2)]]
        calls = Calls(spans)
        standing = calls.standing(1)
        assert standing is not None
        return calls.missing(standing)

    assert seen() == {0}
    assert seen(call(0, "broadcast", 0, peer=0)) == set()  # rank 2 receives it from rank 0


def test_sends_and_recvs_are_counted_in_pairs() -> None:
    spans = [
        [call(0, "send", 0, peer=1), call(0, "send", 1, 20, peer=1, open=True)],
        [call(1, "recv", 0, peer=0), call(1, "barrier", 0, 20, open=True)],
    ]
    calls = Calls(spans)
    second = calls.standing(0)
    assert second is not None
    assert calls.missing(second) == {1}


def test_asynchronous_work_counts_where_it_is_waited_for() -> None:
    facts: dict[str, Any] = {"nbytes": 4, "tensor": "float32 (1,)"}
    spans = [
        [
            call(0, "all_reduce", 0, 1, kind="issue", site="cell:3", **facts),
            call(0, "all_reduce", 0, 1, lane="comm", open=True, site="cell:3", **facts),
            call(0, "all_reduce", 0, 9, kind="wait", open=True, site="cell:4", **facts),
        ],
        [joined(1)],
    ]
    calls = Calls(spans)
    standing = calls.standing(0)
    assert standing is not None
    assert standing.site == "cell:4"
    assert calls.met["world"][0][0].site == "cell:3"
    assert calls.met["world"][0][0].state == "open"


def test_work_in_flight_that_nobody_waits_for_blocks_nobody() -> None:
    spans = [[call(0, "all_reduce", 0, lane="comm", open=True)], [joined(1)]]
    assert Calls(spans).standing(0) is None


def test_stuck_for_good() -> None:
    ring = [[call(r, "recv", 0, peer=(r + 1) % 3, open=True)] for r in range(3)]
    assert Calls(ring).stuck_for_good(range(3))
    assert Calls(ring).stuck_for_good([0, 1])  # rank 2 has ended
    everyone = [[call(r, "barrier", 0, open=True)] for r in range(3)]
    assert not Calls(everyone).stuck_for_good(range(3))
    # Rank 2's recv may still return, because rank 0 has sent; then rank 2 can join the barrier.
    spans = [
        [call(0, "send", 0, peer=2), call(0, "barrier", 0, 20, open=True)],
        [call(1, "barrier", 0, open=True)],
        [call(2, "recv", 0, peer=0, open=True)],
    ]
    assert not Calls(spans).stuck_for_good(range(3))
    computing = [[joined(0)], [joined(1), call(1, "barrier", 0, open=True)]]
    assert not Calls(computing).stuck_for_good([0, 1])
    assert Calls(computing).stuck_for_good([1])


def test_a_thread_that_can_go_on_makes_a_rank_go_on() -> None:
    group = "ranks 0 1"
    on_thread = call(0, "all_reduce", 0, group=group, lane="thread 1", open=True)
    spans = [
        [call(0, "barrier", 0, open=True), on_thread],
        [call(1, "all_reduce", 0, group=group, open=True)],
    ]
    assert not Calls(spans).stuck_for_good([0, 1])


@pytest.mark.parametrize(
    ("op", "needs"),
    [
        # Rank 1 sends to 2, 3 and 5; rank 2, which waits for it, forwards to 4 and 0.
        ("broadcast", {0: {1, 2}, 1: {2, 3, 5}, 2: {1, 4, 0}, 3: {1}, 4: {1, 2}, 5: {1}}),
        ("gather", {0: {1}, 1: {0, 2, 3, 4, 5}, 2: {1}, 3: {1}, 4: {1}, 5: {1}}),
        ("scatter", {0: {1}, 1: {0, 2, 3, 4, 5}, 2: {1}, 3: {1}, 4: {1}, 5: {1}}),
        ("reduce", {r: set(range(6)) - {r} for r in range(6)}),
        ("gather_object", {r: set(range(6)) - {r} for r in range(6)}),
    ],
)
def test_without_whom_a_call_does_not_return(op: str, needs: dict[int, set[int]]) -> None:
    everyone = [[joined(r)] for r in range(6)]
    for rank, needed in needs.items():
        spans = [list(calls) for calls in everyone]
        spans[rank].append(call(rank, op, 0, peer=1, open=True))
        calls = Calls(spans)
        assert calls.missing(calls.open(rank)[0]) == needed, rank


def bucket(rank: int, seq: int, **facts: Any) -> Span:
    return call(rank, "all_reduce", seq, lane="buckets", bucket=seq, **facts)


def test_backward_waits_for_the_bucket_to_which_others_have_not_come() -> None:
    waits = Span(0, "main", "wait", "wait for buckets", 5, None)
    mine = [joined(0), bucket(0, 0, open=True), bucket(0, 1, open=True)]
    theirs = [joined(1), bucket(1, 0), call(1, "barrier", 1, 20, open=True)]
    calls = Calls([[*mine, waits], theirs])
    standing = calls.standing(0)
    assert standing is not None
    assert (standing.op, standing.seq, standing.waits) == ("all_reduce", 1, True)
    assert calls.stuck_for_good([0, 1])
    assert not Calls([mine, theirs]).stuck_for_good([0, 1])  # there is more to compute
    both = [joined(1), bucket(1, 0), bucket(1, 1), call(1, "barrier", 2, 20, open=True)]
    assert not Calls([[*mine, waits], both]).stuck_for_good([0, 1])  # it is on its way


def test_leaving_the_group() -> None:
    left = call(1, "destroy_process_group", None, 50, group=None)
    calls = Calls([[joined(0)], [joined(1), left]])
    assert calls.left(0, "world") is None
    found = calls.left(1, "world")
    assert found is not None
    assert found.op == "destroy_process_group"


def test_leaving_a_subgroup_is_not_leaving_all() -> None:
    left = call(1, "destroy_process_group", None, 50, group="ranks 0 1")
    calls = Calls([[joined(0)], [joined(1), left]])
    assert calls.left(1, "world") is None
    assert calls.left(1, "ranks 0 1") is not None


def test_a_wait_for_an_irecv_is_no_second_recv() -> None:
    spans = [
        [
            call(0, "irecv", 0, 1, kind="issue", peer=1),
            call(0, "irecv", 1, 2, kind="issue", peer=1),
            call(0, "irecv", 0, 3, kind="wait", peer=1, open=True),
        ],
        [call(1, "send", 0, peer=0)],
    ]
    calls = Calls(spans)
    standing = calls.standing(0)
    assert standing is not None
    assert calls.missing(standing) == set()


def test_a_rank_whose_calls_were_not_kept_may_have_come() -> None:
    def missing(*of_rank_1: Span, lossy: tuple[int, ...] = (1,)) -> set[int]:
        waiting = call(0, "all_reduce", 7, open=True)
        calls = Calls([[joined(0), waiting], [joined(1), *of_rank_1]], lossy)
        standing = calls.standing(0)
        assert standing is not None
        assert calls.not_made(1) is None or not lossy
        return calls.missing(standing)

    assert missing(lossy=()) == {1}
    assert missing() == set()
    assert missing(call(1, "all_reduce", 3)) == set()
    assert missing(call(1, "all_reduce", 8, open=True)) == set()
    # What is open is kept always: there it is known.
    assert missing(call(1, "all_reduce", 6, open=True)) == {1}
    assert missing(call(1, "barrier", 7, open=True)) == {1}


def test_ranks_whose_calls_were_not_kept_are_not_stuck_for_sure() -> None:
    spans = [
        [joined(0), call(0, "all_reduce", 7, open=True)],
        [joined(1), call(1, "barrier", 8, open=True)],
    ]
    waiting = {0: "all_reduce", 1: "barrier"}
    assert Calls(spans).stuck_for_good(waiting)
    assert not Calls(spans, lossy=[1]).stuck_for_good(waiting)
