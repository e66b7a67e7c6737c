"""Healthy runs in which nothing seems to move for seconds are not given up as hung.

Ranks that hardly get a processor, data on a slow network, a bucket held back: each was once taken
for a hang after one to ten seconds. Real hangs are still reported soon.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import WorkersHung, launch, watch_ddp
from ddp_lessons.launcher.watchdog import AFTER_INTERRUPT, Watchdog
from ddp_lessons.processes.local import LocalWorkerGroup, WorkerProcess
from ddp_lessons.processes.packing import pack
from ddp_lessons.simulated import SimulatedLink
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.wire.task import places
from tests.support.checkout import ROOT
from tests.support.hosts import skip_where_not_allowed

pytestmark = pytest.mark.ranks
ON_LINUX = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="ranks cannot be kept to one core"
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])


HEAD = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from ddp_lessons import launch
"""
# An ordinary training in which one rank has more to do; on one core the others wait long.
UNEVEN = """
def train(rank):
    dist.init_process_group("gloo")
    layers = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = DDP(nn.Sequential(*layers, nn.Linear(1024, 1)))
    for step in range(2):
        images = torch.randn(3072 if rank == 2 else 1536, 1024)
        model(images).square().mean().backward()
    dist.destroy_process_group()
    return "done"
print(launch(train, nprocs=12).values == ["done"] * 12)
"""
# DDP sends for seconds; a rank that has finished that is already in another call.
SLOW_DDP = """
def train(rank):
    dist.init_process_group("gloo")
    model = DDP(nn.Sequential(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 700)))
    for step in range(2):
        loss = model(torch.randn(4, 700)).square().mean()
        loss.backward()
        dist.all_reduce(loss.detach())
    dist.destroy_process_group()
    return "done"
print(launch(train, nprocs=3).values == ["done"] * 3)
"""
# One rank has returned; the others exchange data in a group without it.
SLOW_SUBGROUP = """
def work(rank):
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    if rank < 2:
        x = torch.ones(700_000)
        dist.all_reduce(x, group=group)
        return x[0].item()
print(launch(work, nprocs=3).values == [2.0, 2.0, None])
"""


def prints_true(script: str, *before: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, "-c", HEAD + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr


@pytest.mark.slow
@ON_LINUX
def test_ranks_that_hardly_get_a_processor() -> None:
    prints_true(UNEVEN, "taskset", "-c", str(min(os.sched_getaffinity(0))))


@contextlib.contextmanager
def one_busy_core(others: int) -> Iterator[int]:
    """A core that so many other processes keep busy."""
    core = min(os.sched_getaffinity(0))
    pinned = f"import os, signal; signal.alarm(100); os.sched_setaffinity(0, {{{core}}})"
    with contextlib.ExitStack() as stack:
        for _ in range(others):
            command = [sys.executable, "-c", f"{pinned}\nwhile True: pass"]
            process = stack.enter_context(subprocess.Popen(command, start_new_session=True))
            stack.callback(process.kill)
        yield core


@pytest.mark.slow
@ON_LINUX
def test_time_without_a_processor_does_not_count() -> None:
    def work(rank: int, core: int) -> str:
        os.sched_setaffinity(0, {core})
        until = time.thread_time() + 1.5
        while time.thread_time() < until:  # takes over 4 seconds beside the others
            pass
        return "done"

    with one_busy_core(2) as core:
        assert launch(work, (core,), nprocs=1, timeout=3).values == ["done"]


@ON_LINUX
def test_ranks_that_fail_alike_all_tell_it_where_one_gets_little_processor() -> None:
    def check(rank: int, core: int) -> None:
        if rank == 1:
            os.sched_setaffinity(0, {core})
            until = time.thread_time() + 0.6
            while time.thread_time() < until:  # takes over 1.5 seconds beside the others
                pass
        raise ValueError(f"rank {rank}: too few samples")

    with one_busy_core(3) as core:
        run = launch(check, args=(core,), nprocs=2, check=False)
    assert [rank.error and rank.error.summary for rank in run.ranks] == [
        f"ValueError: rank {rank}: too few samples" for rank in range(2)
    ]


@ON_LINUX
def test_an_endless_loop_without_a_processor_is_ended() -> None:
    def work(rank: int, core: int) -> None:
        os.sched_setaffinity(0, {core})
        while True:
            pass

    with one_busy_core(2) as core, pytest.raises(WorkersHung, match="made progress for 1 s"):
        launch(work, (core,), nprocs=1, timeout=1)


@pytest.mark.slow
@pytest.mark.xdist_group("hosts")
@pytest.mark.parametrize(("script", "rate"), [(SLOW_DDP, "20mbit"), (SLOW_SUBGROUP, "10mbit")])
def test_data_on_a_slow_network(script: str, rate: str) -> None:
    skip_where_not_allowed()
    # Use packets of the usual size, as those of lo are too large for the limit.
    slow = (
        "ip link set lo up mtu 1500 && "
        f"tc qdisc add dev lo root tbf rate {rate} burst 32kbit latency 400ms && "
        'exec "$@"'
    )
    prints_true(script, "unshare", "--net", "sh", "-c", slow, "sh")


def test_a_bucket_that_is_held_back() -> None:
    def train(rank: int) -> str:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Linear(500, 500))
        if rank == 0:  # its link takes 3 s for the 1 MB of gradients
            watch_ddp(model, SimulatedLink(1 / 3))
        model(torch.ones(1, 500)).sum().backward()
        dist.barrier()
        dist.destroy_process_group()
        return "done"

    assert launch(train).values == ["done", "done"]


def test_a_timer_that_makes_the_missing_call() -> None:
    """None of the learner's lines is on the timer's stack before it goes off."""

    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        group, other = dist.new_group(), dist.new_group()
        timer = threading.Timer(4.0, dist.barrier, [other])
        if rank == 0:
            timer.start()
            dist.barrier(group)
            timer.join()
        else:
            dist.barrier(other)
            dist.barrier(group)
        dist.destroy_process_group()
        return "met"

    assert launch(work).values == ["met", "met"]


# How rank 0 spends three seconds in which the others wait; a thread of its own waits, too.
def in_a_process(upload: threading.Thread) -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))
    child.start()
    child.join()


def in_a_thread_with_a_timeout(upload: threading.Thread) -> None:
    upload.join(timeout=3)


def in_a_function_of_torch(upload: threading.Thread) -> None:
    reading, writing = os.pipe()
    data = torch.zeros(1_000_000)
    saver = threading.Thread(target=torch.save, args=(data, os.fdopen(writing, "wb")))
    saver.start()
    child = multiprocessing.get_context("fork").Process(target=_read_late, args=(reading, writing))
    child.start()
    os.close(reading)
    saver.join()
    child.terminate()
    child.join()


def _read_late(reading: int, writing: int) -> None:
    os.close(writing)
    time.sleep(3)
    while os.read(reading, 1 << 20):
        pass


@pytest.mark.parametrize(
    "spend", [in_a_process, in_a_thread_with_a_timeout, in_a_function_of_torch]
)
def test_a_rank_that_will_go_on_is_not_taken_for_one_that_waits_for_ever(
    spend: Callable[[threading.Thread], None],
) -> None:
    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        group = dist.new_group()
        upload = threading.Thread(target=dist.barrier, args=(group,))
        if rank == 0:
            upload.start()
            spend(upload)
        dist.barrier()
        if rank == 1:
            upload.start()
        upload.join()
        dist.destroy_process_group()
        return "done"

    assert launch(work, nprocs=2).values == ["done"] * 2


def test_the_callback_of_a_pool_may_make_the_missing_call() -> None:
    def work(rank: int) -> float:
        dist.init_process_group("gloo")
        got = torch.zeros(1)
        if rank == 0:
            dist.recv(got, 1)
            dist.barrier()
        else:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                send = dist.send
                pool.apply_async(time.sleep, (3,), callback=lambda _: send(torch.ones(1), 0))
                dist.barrier()
        dist.destroy_process_group()
        return float(got)

    assert launch(work, nprocs=2).values == [1, 0]


def test_a_world_without_a_rank_that_has_returned(tmp_path: Path) -> None:
    """Two of three ranks join, one of them late: they do not wait for the third."""

    def work(rank: int) -> str | None:
        if rank == 2:
            return None
        if rank == 1:
            time.sleep(3)
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        group = dist.new_group([rank], use_local_synchronization=True)
        dist.barrier(group)
        dist.destroy_process_group()
        return "joined"

    assert launch(work, nprocs=3).values == ["joined", "joined", None]


FROZEN = """
import time
def work(rank):
    print("begun", flush=True)
    ends = time.process_time() + 1.5  # on a busy machine, too, far less than the timeout
    while time.process_time() < ends:
        pass
    return "done"
print(launch(work, timeout=5).values == ["done"] * 2)
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="tells a session's processes apart by Linux")
def test_a_pause_of_everything_is_no_hang() -> None:
    """As by `docker pause`: no process runs for longer than the timeout, not even the parent."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HEAD + FROZEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        tree = psutil.Process(parent.pid)
        # The forkserver, two ranks and the resource tracker: the ranks have begun to compute.
        while sum(sum(p.cpu_times()[:2]) > 0.5 for p in tree.children(recursive=True)) < 3:
            assert parent.poll() is None
            time.sleep(0.05)
        everyone = [tree, *tree.children(recursive=True)]
        for process in everyone:
            process.suspend()
        time.sleep(8)
        for process in everyone:
            process.resume()
        out, _ = parent.communicate(timeout=60)
    assert out.splitlines()[-1:] == ["True"], out


def test_without_a_limit_only_proof_ends_a_run() -> None:
    def waits(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()

    run = launch(waits, timeout=None, check=False)
    assert run.hung_after is not None or run.ranks[0].error is not None
    assert not run.ok


def test_a_broadcast_returns_where_gloo_has_passed_it_on() -> None:
    """Ranks 3 and 5 get it from the root, so rank 2, which waits for them, does not hang."""

    def work(rank: int) -> float:
        dist.init_process_group("gloo")
        store = dist.distributed_c10d._get_default_store()
        x = torch.full((1 << 20,), float(rank))
        if rank == 2:
            store.wait(["3", "5"])
        dist.broadcast(x, src=1)
        if rank in (3, 5):
            store.set(str(rank), "passed")
            dist.recv(torch.ones(1), src=2, tag=rank)
        elif rank == 2:
            for other in (3, 5):
                dist.send(torch.ones(1), dst=other, tag=other)
        dist.destroy_process_group()
        return float(x[0])

    assert launch(work, nprocs=6).values == [1.0] * 6


@pytest.mark.alone
def test_a_rank_that_skips_the_backward_of_the_others_is_still_told_soon() -> None:
    def train(rank: int) -> None:
        dist.init_process_group("gloo")
        model = watch_ddp(DistributedDataParallel(nn.Linear(5, 5)))
        loss = model(torch.ones(1, 5)).sum()
        if rank != 1:
            loss.backward()
        dist.broadcast(torch.ones(2), src=0)

    began = time.monotonic()
    run = launch(train, nprocs=3, timeout=30, check=False)
    assert run.verdict is not None
    assert run.hung_after is not None
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_sample_of_the_campaign(tmp_path: Path) -> None:
    """See benchmarks/healthy.py, which runs hundreds, also on stranger machines."""
    command = [sys.executable, "-m", "benchmarks.healthy", "--runs", "5"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command += ["--seed", "100", "--machine", "plain"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_call_that_fails_again_and_again_is_no_progress() -> None:
    def retries(rank: int) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=1))
        if rank == 1:
            time.sleep(100)
        while True:
            try:
                dist.all_reduce(torch.ones(1))
            except RuntimeError:
                time.sleep(0.1)

    with pytest.raises(WorkersHung, match="made progress for 4 s"):
        launch(retries, timeout=4)


def test_a_rank_that_starts_is_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(100)")
    variables = {"PYTHONPATH": str(tmp_path)}
    task = pack(str, variables, profile=False, notes=False, post_mortem=False)
    interrupts = Interrupts()
    with LocalWorkerGroup(places(1, 1), "spawn") as group:
        group.start(task, str, (), interrupts)
        (worker,) = group.workers
        interrupts.count = 2
        Watchdog(group, lambda _: None, interrupts).stop(AFTER_INTERRUPT)
        if worker.alive:
            worker.send_signal(signal.SIGKILL)
            pytest.fail("it still runs")
        assert worker.exitcode == -signal.SIGKILL


def test_no_rank_notes_how_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if this process gets no processor between two of its signals."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Linear(2, 2))
        if rank == 0:
            dist.barrier()
        else:
            model(torch.ones(1, 2)).sum().backward()

    send = WorkerProcess.send_signal

    def send_and_pause(worker: WorkerProcess, number: int) -> None:
        send(worker, number)
        if number == signal.SIGTERM:
            time.sleep(0.2)

    monkeypatch.setattr(WorkerProcess, "send_signal", send_and_pause)
    run = launch(work, nprocs=3, timeout=60, check=False)
    assert [rank.status for rank in run.ranks] == ["stopped"] * 3
    for rank in run.ranks:
        assert [s.name for s in rank.spans if s.t1_ns is None and s.op is not None], rank
    assert "rank 0 waits in barrier" in run.explain()
    assert "ranks 1 and 2 wait in backward" in run.explain()
