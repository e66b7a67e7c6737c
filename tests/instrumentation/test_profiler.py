"""`launch(..., profile=True)`: torch.profiler's events begin within the recorded calls."""

from __future__ import annotations

import sys
import time

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, WorkerFailed, launch
from ddp_lessons.wire.records import Span

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SLACK = 200_000  # ns between two clocks that were read one after the other


def work(rank: int) -> None:
    dist.init_process_group("gloo")
    for _ in range(5):
        dist.all_reduce(torch.ones(100_000))
        time.sleep(0.005)
    dist.broadcast(torch.ones(10), src=1)
    dist.all_reduce(torch.ones(100_000), async_op=True).wait()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def profiled() -> Run:
    return launch(work, profile=True)


def lane(run: Run, rank: int, name: str) -> list[Span]:
    return [s for s in run.ranks[rank].spans if s.lane == name]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_collective_has_its_event_of_gloo_that_begins_in_its_own_time(
    profiled: Run, rank: int
) -> None:
    events = lane(profiled, rank, "gloo")
    names = [s.name for s in events]
    assert names == ["gloo:all_reduce"] * 5 + ["gloo:broadcast", "gloo:all_reduce"]
    assert {s.op for s in events} == {"all_reduce", "broadcast"}
    calls = [
        s for s in profiled.ranks[rank].spans if s.kind == "comm" and s.lane in ("main", "comm")
    ]
    calls = [s for s in calls if s.seq is not None]
    for event, call in zip(events, calls, strict=True):
        assert event.t1_ns is not None
        assert call.t1_ns is not None
        # Its end may come later: gloo's thread tells first that the call is done.
        assert call.t0_ns - SLACK <= event.t0_ns <= min(event.t1_ns, call.t1_ns + SLACK)


def test_what_is_worked_out_of_the_spans_is_not_disturbed(profiled: Run) -> None:
    assert len(profiled.waits()) == 7 * 2
    assert all(o.comm_ns > 0 for o in profiled.overlap())


def test_without_it_there_are_no_such_spans() -> None:
    assert lane(launch(work), 0, "gloo") == []


def test_nothing_is_printed_of_the_profiler(profiled: Run) -> None:
    assert [rank.output for rank in profiled.ranks] == ["", ""]


def test_a_failure_is_told_and_what_was_profiled_is_kept() -> None:
    def fails(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(10))
        raise ValueError("too late")

    with pytest.raises(WorkerFailed, match="too late"):
        launch(fails, profile=True)
    run = launch(fails, profile=True, check=False)
    assert [s.name for s in lane(run, 0, "gloo")] == ["gloo:all_reduce"]


def test_buckets_of_ddp_are_seen_without_watching_them() -> None:
    def train(rank: int) -> None:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
        for _ in range(3):
            model(torch.ones(1, 8)).sum().backward()
        dist.destroy_process_group()

    events = [s.name for s in lane(launch(train, profile=True), 0, "gloo")]
    assert events.count("gloo:all_reduce") >= 3
