"""Waiting and transfer in collectives: exact numbers from made-up runs, and real late ranks."""

from __future__ import annotations

import random
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cloudpickle
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, launch, steps
from ddp_lessons.analysis.wait_states import Share, exchanges, members, needed
from ddp_lessons.instrumentation.group_registry import LONGEST_DESCRIPTION, _ranges
from ddp_lessons.results import RankResult
from ddp_lessons.wire.ops import BY_TREE, DIRECT
from ddp_lessons.wire.records import Span
from ddp_lessons.wire.span_buffer import CallFacts, SpanBuffers, SpanWriter
from tests.support.scheduling import about_to_wait, until_it_waits

cloudpickle.register_pickle_by_value(sys.modules[__name__])

END = 1000  # when every made-up rank ends; all times here are in ns


def run_of(*spans: Span, ranks: int = 3, dropped: dict[int, int] | None = None) -> Run:
    """A run of 0 to 1000 ns whose ranks recorded these spans."""
    results = [
        RankResult(
            rank=rank,
            status="returned",
            value=None,
            output="",
            error=None,
            exitcode=0,
            spans=tuple(sorted((s for s in spans if s.rank == rank), key=lambda s: s.t0_ns)),
            began_ns=0,
            started_ns=1,
            ended_ns=END,
            dropped=(dropped or {}).get(rank, 0),
        )
        for rank in range(ranks)
    ]
    return Run("work", results, begin_ns=0)


def call(
    rank: int, t0: int, t1: int | None, op: str = "all_reduce", seq: int | None = 0, **more: Any
) -> Span:
    """A call of a collective, or of send or recv, on a rank's main thread."""
    facts = {"lane": "main", "kind": "comm", "group": "world", "nbytes": 8, **more}
    lane, kind = facts.pop("lane"), facts.pop("kind")
    return Span(rank, lane, kind, op, t0, t1, op=op, seq=seq, **facts)


def split(run: Run) -> dict[int, tuple[int, int]]:
    """Waiting and transfer by rank."""
    return {share.rank: (share.wait_ns, share.transfer_ns) for share in run.waits()}


def last(run: Run) -> set[int | None]:
    return {share.last_rank for share in run.waits()}


@pytest.mark.parametrize("op", [*BY_TREE, *DIRECT, "gather_object"])
@pytest.mark.parametrize("size", range(1, 10))
def test_what_a_rank_sends_another_one_receives(op: str, size: int) -> None:
    ranks = range(3, 3 + size)
    for root in ranks:
        for rank in ranks:
            for other, way in exchanges(op, rank, root, ranks).items():
                assert exchanges(op, other, root, ranks)[rank] == -way
                assert other in needed(op, rank, root, ranks)


@pytest.mark.parametrize("op", ["all_reduce", "barrier", "all_gather", "reduce_scatter"])
def test_all_wait_for_the_last(op: str) -> None:
    run = run_of(call(0, 100, 510, op), call(1, 400, 500, op), call(2, 300, 520, op))
    assert split(run) == {0: (300, 110), 1: (0, 100), 2: (100, 120)}
    assert last(run) == {1}
    assert {share.pattern for share in run.waits()} == {"all to all"}


@pytest.mark.parametrize("op", ["broadcast", "scatter", "broadcast_object_list"])
def test_the_others_wait_for_a_late_root(op: str) -> None:
    spans = [call(0, 100, 420, op), call(1, 400, 410, op), call(2, 600, 610, op)]
    run = run_of(*(s._replace(peer=1) for s in spans))
    assert split(run) == {0: (300, 20), 1: (0, 10), 2: (0, 10)}
    assert last(run) == {1}
    assert {share.pattern for share in run.waits()} == {"late root"}


@pytest.mark.parametrize("op", ["reduce", "gather", "gather_object"])
def test_an_early_root_waits_for_the_others(op: str) -> None:
    spans = [call(0, 100, 520, op), call(1, 400, 410, op), call(2, 500, 510, op)]
    run = run_of(*(s._replace(peer=0) for s in spans))
    assert split(run) == {0: (400, 20), 1: (0, 10), 2: (0, 10)}
    assert last(run) == {2}


@pytest.mark.parametrize("op", ["reduce", "gather", "gather_object"])
def test_a_rank_that_gives_waits_for_a_late_root_if_it_is_still_there(op: str) -> None:
    spans = [call(0, 500, 540, op), call(1, 100, 520, op), call(2, 200, 210, op)]
    run = run_of(*(s._replace(peer=0) for s in spans))
    assert split(run) == {0: (0, 40), 1: (400, 20), 2: (0, 10)}
    assert {s.rank: (s.last_rank, s.pattern) for s in run.waits()} == {
        0: (2, "early root"),
        1: (0, "late root"),
        2: (2, "early root"),
    }


@pytest.mark.parametrize("op", ["scatter", "broadcast", "broadcast_object_list"])
def test_the_root_waits_for_a_late_receiver_if_it_is_still_there(op: str) -> None:
    spans = [call(0, 100, 520, op), call(1, 200, 210, op), call(2, 500, 530, op)]
    run = run_of(*(s._replace(peer=0) for s in spans))
    assert split(run) == {0: (400, 20), 1: (0, 10), 2: (0, 30)}
    assert {s.rank: (s.last_rank, s.pattern) for s in run.waits()}[0] == (2, "early root")


@pytest.mark.parametrize("op", ["broadcast", "broadcast_object_list", "scatter_object_list"])
def test_in_a_tree_ranks_wait_for_those_that_pass_the_data_on(op: str) -> None:
    """From 0 to 1 and 2, from 1 to 3: rank 2 has it at once, though 1 is late."""
    ends = {0: (100, 520), 1: (500, 530), 2: (110, 120), 3: (120, 540)}
    run = run_of(*(call(r, *times, op)._replace(peer=0) for r, times in ends.items()), ranks=4)
    assert split(run) == {0: (400, 20), 1: (0, 30), 2: (0, 10), 3: (380, 40)}
    assert {s.rank: s.last_rank for s in run.waits() if s.wait_ns} == {0: 1, 3: 1}
    assert run.straggler()[:2] == ("chronic", 1)


def test_the_root_of_a_direct_call_waits_for_a_late_receiver_and_the_others_do_not() -> None:
    spans = [
        call(0, 100, 520, "scatter"),
        call(1, 200, 510, "scatter"),
        call(2, 500, 530, "scatter"),
    ]
    run = run_of(*(s._replace(peer=0) for s in spans))
    assert split(run) == {0: (400, 20), 1: (0, 310), 2: (0, 30)}


def test_a_recv_waits_for_its_send_and_a_send_for_its_recv() -> None:
    early = run_of(call(0, 300, 400, "send", peer=1), call(1, 100, 410, "recv", peer=0), ranks=2)
    assert split(early) == {0: (0, 100), 1: (200, 110)}
    late = run_of(call(0, 100, 400, "send", peer=1), call(1, 300, 410, "recv", peer=0), ranks=2)
    assert split(late) == {0: (200, 100), 1: (0, 110)}
    assert {share.pattern for share in late.waits()} == {"late receiver", "late sender"}
    assert late.arrivals() == []


def test_sends_and_recvs_belong_together_by_number_and_pair() -> None:
    run = run_of(
        call(0, 100, 200, "send", 0, peer=1),
        call(0, 300, 400, "send", 1, peer=1),
        call(1, 150, 200, "recv", 0, peer=0),
        call(1, 350, 400, "recv", 1, peer=0),
        call(2, 100, 200, "send", 0, peer=1),
        call(1, 500, 600, "recv", 0, peer=2),
    )
    waits = [(s.rank, s.op, s.wait_ns) for s in run.waits() if s.wait_ns]
    assert waits == [(0, "send", 50), (0, "send", 50), (2, "send", 100)]


def test_where_a_rank_never_came_all_is_waiting_and_nobody_is_blamed() -> None:
    run = run_of(call(0, 100, None), call(2, 200, None), call(1, 0, 50, "broadcast", 7, peer=1))
    shares = [share for share in run.waits() if share.op == "all_reduce"]
    assert [(s.rank, s.wait_ns, s.transfer_ns, s.open) for s in shares] == [
        (0, END - 100, 0, True),
        (2, END - 200, 0, True),
    ]
    assert {share.last_rank for share in shares} == {None}
    assert [a.last_rank for a in run.arrivals() if a.op == "all_reduce"] == [None]


def test_where_all_came_and_one_never_left_the_rest_is_transfer() -> None:
    run = run_of(call(0, 100, None), call(1, 300, 400), call(2, 200, 400))
    assert split(run) == {0: (200, END - 300), 1: (0, 100), 2: (100, 100)}
    assert [share.open for share in run.waits()] == [True, False, False]


def test_different_calls_under_one_number_do_not_meet() -> None:
    run = run_of(call(0, 100, 500), call(1, 100, 500, "broadcast", peer=0), call(2, 100, 500))
    assert len(run.arrivals()) == 2
    assert last(run) == {None}
    assert {a.last_rank for a in run.arrivals()} == {None}


def test_of_a_rank_that_lost_spans_nothing_is_claimed() -> None:
    spans = [call(0, 100, 500), call(2, 200, 500), call(1, 0, 50, "barrier", 9)]
    assert [s.op for s in run_of(*spans, dropped={1: 5}).waits()] == ["barrier"]
    assert len(run_of(*spans).waits()) == 3


@pytest.mark.parametrize(
    ("group", "ranks"),
    [("ranks 0 2", (0, 2)), ("rows: ranks 0-2", (0, 1, 2)), ("a b: ranks 1 2 #2", (1, 2))],
)
def test_a_group_consists_of_the_ranks_in_its_name(group: str, ranks: tuple[int, ...]) -> None:
    complete = [call(r, 100 * (r + 1), 500, group=group) for r in ranks]
    assert last(run_of(*complete)) == {ranks[-1]}
    assert last(run_of(*complete[:-1])) == {None}


@pytest.mark.parametrize("again", ["", " #2"])
@pytest.mark.parametrize("description", ["", "d" * LONGEST_DESCRIPTION + ": "])
@pytest.mark.parametrize("world_size", [128, 256])
def test_a_large_group_consists_of_the_ranks_in_its_name(
    world_size: int, description: str, again: str
) -> None:
    ranks = range(0, world_size, 2)
    facts = CallFacts("barrier", f"{description}ranks {_ranges(ranks)}{again}", 0)
    with closing(SpanBuffers(1)) as buffers, closing(buffers.sendable()) as connection:
        SpanWriter(connection.fileno(), 0).begin("main", "comm", "barrier", 10, 20, facts=facts)
        spans = buffers.spans(0)
    assert members(spans, world_size)(str(spans[0].group)) == tuple(ranks)


def test_of_a_group_whose_name_was_not_kept_nothing_is_claimed() -> None:
    assert run_of(*(call(rank, 100 * (rank + 1), 500, group=None) for rank in (0, 2))).waits() == []


def test_to_a_world_that_is_made_again_belong_those_who_joined_again() -> None:
    def joining(rank: int, at: int) -> Span:
        return call(rank, at, at + 5, "init_process_group", None, group=None)

    first = [joining(rank, 10) for rank in range(3)] + [call(r, 100 + r, 150) for r in range(3)]
    again = [joining(rank, 200) for rank in (0, 2)]
    spans = [*first, *again, call(0, 300, 400, group="world #2")]
    assert last(run_of(*spans)) == {2, None}
    assert last(run_of(*spans, call(2, 350, 400, group="world #2"))) == {2}


def test_groups_do_not_mix() -> None:
    spans = [call(r, 100 + r, 500, group=g) for g in ("world", "ranks 0-2") for r in range(3)]
    shares = run_of(*(s._replace(t0_ns=s.t0_ns + 10 * (s.group == "world")) for s in spans)).waits()
    assert {(s.group, s.wait_ns) for s in shares if s.rank == 0} == {("world", 2), ("ranks 0-2", 2)}


def test_arrivals_count_from_the_first() -> None:
    run = run_of(call(0, 100, 500), call(1, 400, 500), call(2, 250, 500), ranks=4)
    (arrival,) = run.arrivals()
    assert arrival.lateness_ns == (0, 300, 150, None)


def test_a_table_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(call(0, 100, 500), call(1, 400, 500), call(2, 250, 500))
    table = pd.DataFrame(run.waits())
    assert list(table.columns) == list(Share._fields)
    assert table.groupby("rank").wait_ns.sum().to_dict() == {0: 300, 1: 0, 2: 150}


def test_one_rank_waits_for_nobody() -> None:
    assert split(run_of(call(0, 100, 500), ranks=1)) == {0: (0, 400)}


@pytest.mark.parametrize("op", ["reduce", "broadcast", "gather", "barrier"])
def test_alone_in_a_group_a_rank_waits_for_nobody(op: str) -> None:
    run = run_of(call(1, 100, 500, op, group="ranks 1", peer=1))
    assert split(run) == {1: (0, 400)}


TREE = ({1, 2}, {0, 3}, {0}, {0, 1})  # of 4 ranks, counted from the root: whom each needs


def counted(
    spans: dict[int, tuple[int, int]],
    awaited: set[int],
    waiting: set[int],
    partners: dict[int, set[int]],
) -> Any:
    """The split, by checking every nanosecond."""
    found = {}
    for rank, (t0, t1) in spans.items():
        missing = [t for t in range(t0, t1) if any(spans[other][0] > t for other in awaited)]
        wait = len(missing) if rank in waiting else 0
        for partner in partners.get(rank, ()):
            if spans[partner][0] <= t1:  # perhaps the rank was there only until it came
                wait = max(wait, sum(spans[partner][0] > t for t in range(t0, t1)))
        found[rank] = (wait, t1 - t0 - wait)
    return found


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("op", ["all_reduce", "broadcast", "reduce", "recv"])
def test_counting_every_nanosecond_finds_the_same(op: str, seed: int) -> None:
    numbers = random.Random(seed)
    ranks = {*range(2 if op == "recv" else 4)}
    root = numbers.randrange(len(ranks))
    times = {rank: numbers.randrange(1, 500) for rank in ranks}
    spans = {rank: (t0, t0 + numbers.randrange(400)) for rank, t0 in times.items()}
    awaited = {"broadcast": {root}, "reduce": ranks - {root}}.get(op, ranks)
    partners = {
        "broadcast": {r: {(n + root) % 4 for n in TREE[(r - root) % 4]} for r in ranks},
        "reduce": {r: ranks - {r} for r in ranks},
    }.get(op, {})
    waiting = ranks - awaited if op in ("broadcast", "reduce") else ranks
    peers = {rank: 1 - rank if op == "recv" else root for rank in ranks}
    ops = {rank: "send" if op == "recv" and rank == root else op for rank in ranks}
    made = [call(rank, *spans[rank], ops[rank], peer=peers[rank]) for rank in ranks]
    assert split(run_of(*made, ranks=len(ranks))) == counted(spans, awaited, waiting, partners)


def test_nothing_at_all() -> None:
    run = run_of()
    for found in (run.waits(), run.arrivals(), run.overlap(), run.bandwidth()):
        assert not found


def late_rank(rank: int, late: int) -> list[int]:
    """20 steps, in each of which one rank sleeps; returns when the rank called, in ns."""
    dist.init_process_group("gloo")
    called_ns = []
    for _ in steps(range(20)):
        if rank == late:
            time.sleep(0.03)
        called_ns.append(time.perf_counter_ns())
        dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()
    return called_ns


@pytest.mark.ranks
@pytest.mark.alone
def test_a_rank_that_is_late_by_30_ms_is_found_and_so_is_the_wait() -> None:
    run = launch(late_rank, args=(2,), nprocs=4)
    calls = list(zip(*run.values, strict=True))  # of each step
    named = {share.step: share.last_rank for share in run.waits() if share.step is not None}
    # A rank that got no processor for as long may have been the last in a step.
    assert list(named.values()) == [called.index(max(called)) for called in calls]
    assert list(named.values()).count(2) >= 15
    for rank in (0, 1, 3):
        waits = [s.wait_ns for s in run.waits() if s.rank == rank and s.step is not None]
        late = [max(called) - called[rank] for called in calls]
        assert sorted(waits)[10] == pytest.approx(sorted(late)[10], rel=0.1)


@pytest.mark.ranks
def test_two_groups_of_a_real_run_have_late_ranks_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        late = rank in (1, 2)
        (until_it_waits if late else about_to_wait)(tmp_path / f"group {rank // 2}")
        dist.all_reduce(torch.ones(1), group=groups[rank // 2])
        dist.destroy_process_group()

    shares = launch(work, nprocs=4).waits()
    assert {(s.group, s.last_rank) for s in shares} == {("ranks 0 1", 1), ("ranks 2 3", 2)}
    assert {s.rank for s in shares if s.wait_ns > 20_000_000} == {0, 3}
