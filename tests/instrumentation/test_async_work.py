"""Spans of asynchronous work end once, however it is waited for, or stay open."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from ddp_lessons import Run, WorkerFailed, launch, span
from ddp_lessons.wire.ops import GROUP_CALLS
from ddp_lessons.wire.records import Span
from ddp_lessons.wire.span_buffer import MOST_SPANS
from tests.support.scheduling import about_to_wait, until_it_waits

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def marks(run: Run, rank: int = 0) -> list[Span]:
    """The spans of one rank's calls, except for joining and leaving."""
    return [s for s in run.ranks[rank].spans if s.lane != "process" and s.op not in GROUP_CALLS]


def in_flight(run: Run, rank: int = 0) -> list[Span]:
    return [s for s in marks(run, rank) if s.lane == "comm"]


def never_waits(rank: int, leaves: bool) -> None:
    """Rank 0 ends while its work is in flight: rank 1 comes late."""
    dist.init_process_group("gloo")
    if rank == 1:
        time.sleep(0.05)
    for _ in range(20):
        dist.all_reduce(torch.ones(1000), async_op=True)
    dist.barrier()
    for _ in range(20):
        dist.all_reduce(torch.ones(1000), async_op=True)
    if leaves:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [False, True])
def test_work_that_nobody_waits_for_breaks_nothing(leaves: bool) -> None:
    for _ in range(20):
        run = launch(never_waits, args=(leaves,), check=False)
        assert [rank.exitcode for rank in run.ranks] == [0, 0]
        assert [len(in_flight(run, rank)) for rank in (0, 1)] == [40, 40]


@pytest.mark.slow
def test_nor_where_the_interpreter_shuts_down() -> None:
    """The group is destroyed first; else plain torch aborts, as its work outlives Python."""
    run = launch(never_waits, args=(True,), start_method="spawn", check=False)
    assert [rank.exitcode for rank in run.ranks] == [0, 0]


def test_a_group_that_is_freed_with_work_in_flight() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for _ in range(20):
            group = dist.new_group([0, 1])
            handles = [dist.all_reduce(torch.ones(10), group=group, async_op=True)]
            dist.barrier()
            dist.destroy_process_group(group)
            del group, handles
        dist.destroy_process_group()

    run = launch(work)
    assert [rank.exitcode for rank in run.ranks] == [0, 0]
    assert len(in_flight(run)) == 20


def test_work_that_is_only_asked_for_ends_when_it_is_done() -> None:
    def work(rank: int) -> tuple[int, int]:
        """When it has called, and when it has long known that the work is done."""
        dist.init_process_group("gloo")
        time.sleep(0.1 * rank)
        before_ns = time.perf_counter_ns()
        handle = dist.all_reduce(torch.ones(1), async_op=True)
        while not handle.is_completed():
            time.sleep(0.001)
        time.sleep(0.1)
        after_ns = time.perf_counter_ns()
        dist.barrier()
        dist.destroy_process_group()
        return before_ns, after_ns

    run = launch(work)
    (flight,) = in_flight(run)
    assert flight.t1_ns is not None
    assert run.values[1][0] < flight.t1_ns < run.values[0][1]


def test_its_future_serves_as_well() -> None:
    def work(rank: int) -> float:
        dist.init_process_group("gloo")
        future = dist.all_reduce(torch.ones(1), async_op=True).get_future()
        value = future.then(lambda done: done.value()[0] * 10).wait()
        dist.destroy_process_group()
        return float(value)

    run = launch(work)
    assert run.values == [20.0, 20.0]
    assert [(s.kind, s.t1_ns is None) for s in marks(run)] == [("comm", False), ("issue", False)]


def test_a_send_that_is_not_waited_for_stays_open() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        other = 1 - rank
        handle = dist.isend(torch.ones(1), other)
        dist.recv(torch.zeros(1), other)
        dist.barrier()
        del handle

    run = launch(work)
    (flight,) = in_flight(run)
    assert (flight.op, flight.t1_ns) == ("isend", None)
    assert run.waits()
    assert run.overlap()


def recvs_from_any(rank: int, folder: Path) -> list[int]:
    """Rank 0 takes four messages from rank 1, three of them from whoever sends.

    Each comes when rank 0 has waited for it for a while.
    """
    dist.init_process_group("gloo")
    if rank == 1:
        for number in range(4):
            until_it_waits(folder / f"{number}")
            dist.send(torch.ones(1), 0)
        return []
    about_to_wait(folder / "0")
    senders = [dist.recv(torch.zeros(1))]
    about_to_wait(folder / "1")
    handle: Any = dist.irecv(torch.zeros(1))
    handle.wait()
    senders.append(handle._source_rank())
    about_to_wait(folder / "2")
    dist.recv(torch.zeros(1), 1)
    about_to_wait(folder / "3")
    senders.append(dist.recv(torch.zeros(1)))
    return senders


def test_a_recv_from_any_rank_knows_afterwards_who_sent(tmp_path: Path) -> None:
    run = launch(recvs_from_any, (tmp_path,))
    assert run.values[0] == [1, 1, 1]
    recvs = [(s.op, s.seq, s.peer) for s in marks(run) if s.kind == "comm"]
    assert recvs == [("recv", 0, 1), ("irecv", 1, 1), ("recv", 2, 1), ("recv", 3, 1)]
    waits = [(s.op, s.seq, s.peer) for s in marks(run) if s.kind == "wait"]
    assert waits == [("irecv", 1, 1)]
    shares = [share for share in run.waits() if share.rank == 0]
    assert {share.last_rank for share in shares} == {1}
    assert sum(share.wait_ns for share in shares) > 30_000_000  # each message came late


def fills_its_buffer(rank: int) -> None:
    """Rank 0 ends while its second all_reduce is in flight."""
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        dist.send(torch.ones(1), 0)
        time.sleep(60)
    for _ in range(MOST_SPANS):
        with span("work"):
            pass
    handle = dist.irecv(torch.zeros(1))
    dist.all_reduce(torch.ones(1), async_op=True)
    handle.wait()
    os._exit(3)


def test_a_recv_from_any_rank_leaves_other_spans_alone_when_the_buffer_is_full() -> None:
    run = launch(fills_its_buffer, check=False)
    assert run.ranks[0].dropped > 0
    found = [(s.op, s.seq, s.peer) for s in in_flight(run)]
    assert found == [("all_reduce", 1, None)]


def test_calls_that_torch_coalesces() -> None:
    def work(rank: int) -> list[Any]:
        dist.init_process_group("gloo")
        a, b, c = torch.ones(2), torch.full((3,), 2.0), torch.ones(1)
        with _coalescing_manager():
            nothing = [dist.all_reduce(a), dist.all_reduce(b)]
        with _coalescing_manager(async_ops=True) as manager:
            kind = type(dist.all_reduce(c, async_op=True)).__name__
        manager.wait()
        dist.destroy_process_group()
        return [*nothing, kind, a.tolist(), b.tolist(), c.tolist()]

    run = launch(work)
    assert run.values[0] == [None, None, "_IllegalWork", [2.0] * 2, [4.0] * 3, [2.0]]
    assert [(s.op, s.seq) for s in marks(run) if s.kind == "comm"] == [
        ("all_reduce", 0),
        ("all_reduce", 1),
        ("all_reduce", 2),
    ]
    assert all(s.t1_ns is not None for s in marks(run))


def test_a_wait_that_fails_shows_no_recorder() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            handle = dist.irecv(torch.zeros(1), 1)
            handle.wait(timedelta(milliseconds=100))
        else:
            time.sleep(0.5)

    with pytest.raises(
        WorkerFailed, match="rank 0 waited in irecv, but rank 1 has returned"
    ) as caught:
        launch(work)
    text = str(caught.value)
    assert "handle.wait(timedelta(milliseconds=100))" in text
    assert "ddp_lessons" not in text
    assert isinstance(caught.value.run, Run)
    (wait,) = (s for s in marks(caught.value.run) if s.kind == "wait")
    assert wait.t1_ns is not None
