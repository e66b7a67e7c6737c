"""Healthy runs in which for seconds nothing seems to move: none may be given up as hung.

Ranks that hardly get a processor, data on a slow network, a bucket held back: each was once judged
a standstill after one to ten seconds. And hangs beside them are still told soon.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch, watch_ddp
from ddp_lessons.processes import has_unsent_data, queued_seconds
from ddp_lessons.simulated import SimulatedLink
from tests.hosts import skip_where_not_allowed

cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROOT = Path(__file__).parent.parent
HEAD = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from ddp_lessons import launch
"""
# An ordinary training; one rank has more to do, and on one core all wait for it for long.
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
# DDP sends for seconds, and who has done with that is in another call already.
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
# A rank has returned, and the others exchange data in a group of their own.
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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="ranks cannot be kept to one core")
def test_ranks_that_hardly_get_a_processor() -> None:
    prints_true(UNEVEN, "taskset", "-c", str(min(os.sched_getaffinity(0))))


@pytest.mark.parametrize(("script", "rate"), [(SLOW_DDP, "20mbit"), (SLOW_SUBGROUP, "10mbit")])
def test_data_on_a_slow_network(script: str, rate: str) -> None:
    skip_where_not_allowed()
    # Packets of the usual size: those of lo are too large for such a limit.
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
    assert time.monotonic() - began < 8


def spin(stop: Callable[[], bool]) -> None:
    while not stop():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_time_in_the_queue_for_a_processor_is_seen() -> None:
    """Six processes on one core: each stands in the queue for five sixths of the time."""
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    spinners = [context.Process(target=spin, args=(ended.is_set,)) for _ in range(6)]
    for spinner in spinners:
        spinner.start()
        os.sched_setaffinity(spinner.pid or 0, {0})
    before = [queued_seconds(spinner.pid or 0) for spinner in spinners]
    time.sleep(1.0)
    after = [queued_seconds(spinner.pid or 0) for spinner in spinners]
    ended.set()
    for spinner in spinners:
        spinner.join()
    assert min(b - a for a, b in zip(before, after, strict=True)) > 0.3
    quiet = queued_seconds(os.getpid())
    time.sleep(0.5)
    assert queued_seconds(os.getpid()) - quiet < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_data_that_nobody_has_received_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        assert not has_unsent_data(os.getpid())
        one.setblocking(False)
        sent = 0
        try:
            while True:
                sent += one.send(bytes(1 << 20))
        except BlockingIOError:
            assert has_unsent_data(os.getpid())
        other.settimeout(10)
        while sent:
            sent -= len(other.recv(1 << 20))
        deadline = time.monotonic() + 10
        while has_unsent_data(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not has_unsent_data(os.getpid())
        one.close()
        other.close()
