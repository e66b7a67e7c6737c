"""Clocks of several machines are compared, by real stores and ranks whose clocks are shifted."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.instrumentation import clock_sync, rendezvous
from ddp_lessons.wire.messages import Clock

cloudpickle.register_pickle_by_value(sys.modules[__name__])

HOUR_NS = 3_600_000_000_000


class Clocks(threading.local):
    """A clock for each thread, some ns ahead of this machine's."""

    ahead_ns = 0

    def perf_counter_ns(self) -> int:
        return time.perf_counter_ns() + self.ahead_ns

    def name(self) -> str:
        return f"clock {self.ahead_ns}"


def measured(monkeypatch: pytest.MonkeyPatch, *ahead_ns: int) -> list[Clock]:
    """What every rank measures; each is a thread whose clock is `ahead_ns` ahead."""
    shifted, store = Clocks(), dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    monkeypatch.setattr(clock_sync, "time", shifted)
    monkeypatch.setattr(clock_sync, "clock_id", shifted.name)

    def rank(number: int) -> Clock:
        shifted.ahead_ns = ahead_ns[number]
        return clock_sync._measured(store, number, len(ahead_ns))

    with ThreadPoolExecutor(len(ahead_ns)) as threads:
        return list(threads.map(rank, range(len(ahead_ns))))


def holds(clock: Clock, ahead_ns: int) -> bool:
    """Whether the measured offset is within its claimed error."""
    return abs(clock.behind_ns + ahead_ns) <= clock.within_ns


def test_ranks_of_one_clock_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, 0, 0, 0) == [Clock(0, 0)] * 3


@pytest.mark.parametrize("ahead_ns", [HOUR_NS, -HOUR_NS, 1])
def test_another_clock_is_found_as_exactly_as_is_claimed(
    monkeypatch: pytest.MonkeyPatch, ahead_ns: int
) -> None:
    first, second = measured(monkeypatch, 0, ahead_ns)
    assert first == Clock(0, 0)
    assert holds(second, ahead_ns)
    assert 0 < second.within_ns < HOUR_NS


def test_one_rank_answers_for_all_of_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, 0, HOUR_NS, -HOUR_NS, HOUR_NS, 0)
    assert found[0] == found[4] == Clock(0, 0)
    assert found[1] == found[3]
    assert holds(found[1], HOUR_NS)
    assert holds(found[2], -HOUR_NS)


def joins(rank: int, ahead_ns: int) -> Any:
    """Measure as a rank whose clock is ahead, through the store of the group."""
    now = SimpleNamespace(perf_counter_ns=lambda: time.perf_counter_ns() + ahead_ns)
    vars(clock_sync).update(time=now, clock_id=lambda: f"clock {ahead_ns}")
    dist.init_process_group("gloo")
    found = [clock_sync.against_rank_zero() for _ in range(2)]  # also when ranks join once more
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.ranks
def test_ranks_compare_through_the_store_by_which_they_met() -> None:
    values = launch(lambda rank: joins(rank, HOUR_NS * (rank % 2)), nprocs=3).values
    assert values[0] == values[2] == [Clock(0, 0)] * 2
    assert all(holds(clock, HOUR_NS) for clock in values[1])


@pytest.mark.ranks
def test_ranks_of_one_machine_have_one_clock() -> None:
    def compare(rank: int) -> Any:
        dist.init_process_group("gloo")
        found = clock_sync.against_rank_zero()
        dist.destroy_process_group()
        return found

    assert launch(compare).values == [Clock(0, 0)] * 2


@pytest.mark.ranks
def test_a_rank_that_does_not_take_part_is_not_waited_for_long() -> None:
    def compare(rank: int) -> Any:
        dist.init_process_group("gloo")
        store = dist.distributed_c10d._get_default_store()
        before, rendezvous.PATIENCE = store.timeout, timedelta(seconds=0.5)
        found = clock_sync.against_rank_zero() if rank != 1 else "nothing"
        assert store.timeout == before
        dist.barrier()
        dist.destroy_process_group()
        return found

    assert launch(compare, nprocs=3).values == [None, "nothing", None]
