"""A rank that leaves a group wakes gloo's threads; that touches nothing of the learner's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="it uses a timer of Linux's"),
]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def seen(rank: int) -> tuple[int, list[int]]:
    """How many threads of gloo's wait before and while the block is left."""
    from ddp_lessons.instrumentation import gloo_threads

    dist.init_process_group("gloo")
    dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1))
    deadline = time.monotonic() + 20
    while len(found := set(gloo_threads._waiting())) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)  # one may just not wait
    timers = []
    with gloo_threads.woken():
        timers.append(Path("/proc/self/timers").read_text().count("ID:"))
    dist.destroy_process_group()
    timers.append(Path("/proc/self/timers").read_text().count("ID:"))
    return len(found), timers


def test_each_thread_of_gloos_is_woken_and_no_timer_is_left() -> None:
    for found, (within, after) in launch(seen).values:
        assert found == 2
        assert within >= 1
        assert after == 0


def has_a_handler(rank: int) -> tuple[int, bool]:
    calls: list[int] = []
    own = signal.SIGRTMAX - 3
    signal.signal(own, lambda number, frame: calls.append(number))
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    before = len(calls)
    os.kill(os.getpid(), own)
    while len(calls) == before:
        time.sleep(0.001)
    return before, calls == [own]


def test_a_signal_that_the_learner_uses_is_not_taken() -> None:
    assert launch(has_a_handler).values == [(0, True)] * 2


def leaves_again_and_again(rank: int) -> Any:
    """With a thread that sleeps and a child that is not to see the signal."""
    slept = threading.Event()
    thread = threading.Timer(0.3, slept.set)
    thread.start()
    sums = []
    for number in range(3):
        dist.init_process_group("gloo")
        group = dist.new_group([0, 2])
        x = torch.tensor([float(rank)])
        dist.all_reduce(x)
        sums.append(x.item() + number)
        if number == 1 and rank != 1:
            dist.destroy_process_group(group)
        dist.destroy_process_group()
    thread.join()
    code = (
        "import os, signal; signal.pthread_kill(__import__('threading').get_ident(), "
        "signal.SIGRTMAX - 3)"
    )
    child = subprocess.run([sys.executable, "-c", code], check=False).returncode
    return sums, slept.is_set(), -child == signal.SIGRTMAX - 3


def test_groups_are_left_as_often_as_one_likes() -> None:
    assert launch(leaves_again_and_again, nprocs=3).values == [([3.0, 4.0, 5.0], True, True)] * 3


def wakes(rank: int, last: int, left: Path) -> int:
    """How often a rank wakes gloo's threads, where rank `last` leaves when the others have left."""
    from ddp_lessons.instrumentation import gloo_threads

    calls: list[int] = []
    woken = gloo_threads.woken

    def counted() -> Any:
        calls.append(rank)
        return woken()

    gloo_threads.woken = counted
    dist.init_process_group("gloo")
    deadline = time.monotonic() + 20
    while rank == last and not left.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    dist.destroy_process_group()
    left.touch()
    return len(calls)


@pytest.mark.parametrize(("last", "woken"), [(1, [0, 1]), (0, [1, 1])])
def test_rank_0_takes_the_store_away_at_once_only_if_the_others_leave(
    last: int, woken: list[int], tmp_path: Path
) -> None:
    assert launch(wakes, (last, tmp_path / "left")).values == woken
