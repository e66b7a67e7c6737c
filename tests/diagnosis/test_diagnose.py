"""Explanations of hangs and failures: waiting ranks, their calls and lines, missing ranks."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import WorkerFailed, WorkersHung, launch
from ddp_lessons.diagnosis import advice

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_no_progress_names_every_ranks_line() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            time.sleep(60)
        dist.barrier()

    began = time.monotonic()
    with pytest.raises(WorkersHung) as caught:
        launch(work, nprocs=3, timeout=1.5)
    assert time.monotonic() - began < 30
    text = str(caught.value)
    first = text.splitlines()[0]
    assert first.startswith("ranks 0 and 2 wait in barrier, but rank 1 is idle at")
    assert "dist.barrier()" in text
    assert "rank 1 is idle" in text
    assert "time.sleep(60)" in text
    assert caught.value.rank == 1


def test_all_ranks_wait_for_each_other() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        x = torch.zeros(1)
        dist.recv(x, src=1 - rank)

    with pytest.raises(WorkersHung, match="ranks 0 and 1 wait for each other") as caught:
        launch(work, timeout=1.5)
    assert "ranks 0 and 1 wait in recv" in str(caught.value)
    assert advice.RECEIVES_FIRST in str(caught.value)


def test_a_deadlock_in_python() -> None:
    def work(rank: int) -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    with pytest.raises(WorkersHung, match=r"no rank made progress for 1 s") as caught:
        launch(work, timeout=1)
    assert "lock.acquire()" in str(caught.value)


def test_a_ring_in_which_all_send_first() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.send(torch.ones(1), (rank + 1) % 3)
        dist.recv(torch.ones(1), (rank - 1) % 3)

    with pytest.raises(WorkersHung, match="ranks 0, 1 and 2 wait in send") as caught:
        launch(work, nprocs=3, timeout=1)
    assert "isend" in str(caught.value)


def test_a_rank_that_ended_is_missed_long_before_the_timeout() -> None:
    def work(rank: int) -> str:
        if rank == 2:
            return "never joined"
        dist.init_process_group("gloo")
        return "joined"

    began = time.monotonic()
    with pytest.raises(WorkersHung) as caught:
        launch(work, nprocs=3, timeout=60)
    assert time.monotonic() - began < 30
    first = str(caught.value).splitlines()[0]
    assert first == "ranks 0 and 1 wait in init_process_group, but rank 2 has returned"
    assert caught.value.run is not None
    assert caught.value.run.values == [None, None, "never joined"]


def test_rank_zero_never_opens_its_store() -> None:
    def work(rank: int) -> None:
        if rank > 0:
            dist.init_process_group("gloo")

    with pytest.raises(WorkersHung, match="rank 1 waits in init_process_group, but rank 0 has ret"):
        launch(work)


def test_a_groups_own_timeout_is_the_learners_to_see() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            dist.init_process_group("gloo", timeout=timedelta(seconds=3))

    with pytest.raises(
        WorkerFailed, match="waited in init_process_group, but rank 1 has"
    ) as caught:
        launch(work)
    assert "DistStoreError" in str(caught.value)
    assert caught.value.rank == 1


def test_a_loop_that_moves_is_never_cut_short() -> None:
    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        steps = 0
        while steps < 12:
            time.sleep(0.25)
            dist.all_reduce(torch.ones(1))  # no print, no span: the collectives are progress
            steps += 1
        dist.destroy_process_group()
        return steps

    assert launch(work, timeout=1).values == [12, 12]


def test_a_training_loop_of_ddp_is_progress() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            time.sleep(0.25)
            optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
        dist.destroy_process_group()

    assert launch(work, timeout=1).ok


def test_printing_is_progress() -> None:
    def work(rank: int) -> None:
        for i in range(8):
            time.sleep(0.25)
            print(i)

    assert launch(work, timeout=1).ok


def test_a_slow_rank_is_not_taken_for_a_missing_one() -> None:
    def work(rank: int) -> str:
        if rank == 0:
            return "done early"
        until = time.monotonic() + 3
        while time.monotonic() < until:
            pass
        return "computed"

    assert launch(work).values == ["done early", "computed"]


def test_idle_ranks_outside_collectives_are_left_alone() -> None:
    run = launch(lambda rank: time.sleep(2.5 * rank))
    assert run.ok


def test_cause_before_collateral() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 2:
            raise ValueError("bad sample")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(WorkerFailed, match="rank 2 of 4 raised ValueError: bad sample") as caught:
        launch(work, nprocs=4)
    assert "lost their partner" in str(caught.value)
    assert "Connection" not in str(caught.value)


def test_a_hang_with_check_false_is_explained() -> None:
    run = launch(lambda rank: time.sleep(60), timeout=0.5, check=False)
    assert not run.ok
    assert run.explain().startswith("WorkersHung: no rank made progress for 0.5 s")
    assert {r.status for r in run.ranks} == {"stopped"}


def test_a_stopped_process_does_not_answer() -> None:
    def work(rank: int) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(WorkersHung, match="did not answer"):
        launch(work, timeout=1)
