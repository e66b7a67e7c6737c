"""The calls of all ranks side by side, from spans made by hand."""

from __future__ import annotations

from typing import Any

from ddp_lessons.calls import Calls
from ddp_lessons.messages import Span


def call(rank: int, op: str, seq: int | None, t0: int = 1, **facts: Any) -> Span:
    """A call in the world that went on for 10 ns; `open=True`: it goes on."""
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
    assert seen(call(0, "broadcast", 0, peer=0)) == {2}


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
    assert Calls(ring).stuck_for_good({0: "recv", 1: "recv", 2: "recv"})
    everyone = [[call(r, "barrier", 0, open=True)] for r in range(3)]
    assert not Calls(everyone).stuck_for_good(dict.fromkeys(range(3), "barrier"))
    # Rank 2 may still come out of its recv, for rank 0 has sent; then it can join the barrier.
    spans = [
        [call(0, "send", 0, peer=2), call(0, "barrier", 0, 20, open=True)],
        [call(1, "barrier", 0, open=True)],
        [call(2, "recv", 0, peer=0, open=True)],
    ]
    names = {0: "barrier", 1: "barrier", 2: "recv"}
    assert not Calls(spans).stuck_for_good(names)


def test_ddps_own_calls_wait_for_those_that_make_none() -> None:
    spans = [[joined(0)], [joined(1), call(1, "barrier", 0, open=True)]]
    assert Calls(spans).stuck_for_good({0: "backward", 1: "barrier"})
    assert not Calls([[joined(0)], [joined(1)]]).stuck_for_good({0: "backward", 1: "backward"})


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
