"""Spans marked by hand are recorded in one thread or several, but not in a rank's children."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import Run, WorkerFailed, launch, span
from ddp_lessons.wire.records import Span
from ddp_lessons.wire.span_buffer import MOST_SPANS

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def recorded(run: Run, rank: int = 0) -> list[Span]:
    """What one rank recorded itself, by start time."""
    return [s for s in run.spans() if s.rank == rank and s.lane != "process"]


def names(run: Run, rank: int = 0) -> list[str]:
    return [s.name for s in recorded(run, rank)]


def length(s: Span) -> float:
    assert s.t1_ns is not None
    return (s.t1_ns - s.t0_ns) / 1e9


def test_a_span_has_the_name_and_the_length_of_its_work() -> None:
    def work(rank: int) -> tuple[int, int, int, int]:
        around = time.perf_counter_ns()
        with span("forward"):
            began = time.perf_counter_ns()
            sum(range(100_000))
            ended = time.perf_counter_ns()
        return around, began, ended, time.perf_counter_ns()

    run = launch(work)
    for rank, (around, began, ended, after) in enumerate(run.values):
        (forward,) = recorded(run, rank)
        assert (forward.rank, forward.kind, forward.name) == (rank, "compute", "forward")
        assert forward.t1_ns is not None
        assert around <= forward.t0_ns <= began
        assert ended <= forward.t1_ns <= after


OUTSIDE = """
from ddp_lessons import span
with span("outer") as s, span("inner"):
    print("works")
assert s is not None
try:
    with span("fails"):
        raise KeyError
except KeyError:
    print("raises")
import sys
print("torch" in sys.modules)
"""


def test_outside_a_worker_it_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True)
    assert done.stdout.split() == ["works", "raises", "False"], done.stderr
    call = dist.all_reduce
    with span("in the parent"):
        run = launch(lambda rank: None)
    assert recorded(run) == []
    assert dist.all_reduce is call
    assert "ddp_lessons" not in call.__code__.co_filename


def test_nested_spans_and_one_that_is_used_again() -> None:
    def work(rank: int) -> None:
        step = span("step")
        for _ in range(2):
            with step, span("forward"), span("layer"):
                pass

    outer, inner, innermost, *again = recorded(launch(work, nprocs=1))
    assert [s.name for s in (outer, inner, innermost)] == ["step", "forward", "layer"]
    assert [s.name for s in again] == ["step", "forward", "layer"]
    assert outer.t0_ns <= inner.t0_ns <= innermost.t0_ns
    assert length(innermost) <= length(inner) <= length(outer)
    assert outer.t1_ns is not None
    assert outer.t1_ns <= again[0].t0_ns


def test_spans_of_several_threads() -> None:
    def work(rank: int) -> None:
        def load(number: int) -> None:
            for _ in range(100):
                with span(f"load {number}"):
                    time.sleep(0)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert Counter(names(launch(work, nprocs=1))) == {f"load {n}": 100 for n in range(3)}


def test_no_span_is_lost_between_threads() -> None:
    def work(rank: int) -> None:
        sys.setswitchinterval(1e-6)

        def load() -> None:
            for _ in range(20_000):
                with span("load"):
                    pass

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(names(launch(work, nprocs=1))) == 80_000


def test_a_span_that_fails_is_recorded_too() -> None:
    def work(rank: int) -> None:
        with span("backward"):
            raise ValueError("no gradient")

    with pytest.raises(WorkerFailed, match="no gradient") as caught:
        launch(work, nprocs=1)
    assert isinstance(caught.value.run, Run)
    assert names(caught.value.run) == ["backward"]


def test_ten_thousand_spans_arrive() -> None:
    def work(rank: int) -> None:
        for n in range(10_000):
            with span(f"step {n}"):
                pass

    run = launch(work)
    for rank in (0, 1):
        assert names(run, rank) == [f"step {n}" for n in range(10_000)]


def test_beyond_the_bound_spans_are_dropped_and_counted() -> None:
    def work(rank: int) -> None:
        for _ in range(MOST_SPANS + 1234):
            with span("step"):
                pass

    (rank,) = launch(work, nprocs=1).ranks
    assert len([s for s in rank.spans if s.lane == "main"]) == MOST_SPANS
    assert rank.dropped == 1234


@pytest.mark.parametrize(
    "context",
    [
        "fork",
        pytest.param(None),
    ],
)
def test_workers_of_a_data_loader_record_nothing(context: str | None) -> None:
    class Squares:
        def __getitem__(self, index: int) -> int:
            with span("item"):
                return index * index

        def __len__(self) -> int:
            return 40

    def work(rank: int) -> int:
        from torch.utils.data import DataLoader

        total = 0
        for batch in DataLoader(
            Squares(), batch_size=4, num_workers=2, multiprocessing_context=context
        ):
            with span("step"):
                total += int(batch.sum())
        return total

    run = launch(work)
    assert run.values == [20540, 20540]
    fetched = [name for _ in range(10) for name in ("DataLoader", "step")]
    assert names(run, 0) == names(run, 1) == [*fetched, "DataLoader"]  # the last finds no more


def test_a_forked_child_records_nothing() -> None:
    def work(rank: int) -> str:
        with span("before"):
            pass
        child = os.fork()
        if child == 0:
            for _ in range(200):
                with span("child"):
                    pass
            os._exit(0)
        os.waitpid(child, 0)
        with span("after"):
            pass
        return "parent"

    run = launch(work)
    assert run.values == ["parent"] * 2
    assert names(run, 0) == names(run, 1) == ["before", "after"]


def test_nor_does_it_report_as_the_rank_when_it_returns() -> None:
    def work(rank: int) -> str:
        with span("before"):
            pass
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        os.waitpid(child, 0)
        os._exit(3)

    run = launch(work, nprocs=1, check=False)
    assert run.ranks[0].status == "died"
    assert names(run) == ["before"]
