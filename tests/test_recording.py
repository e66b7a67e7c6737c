"""What the ranks record of themselves: spans by hand, and every call of torch.distributed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.distributed import all_reduce

from ddp_lessons import Run, WorkerFailed, launch, span
from ddp_lessons.messages import Span
from ddp_lessons.tape import MOST_SPANS

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
    assert caught.value.run is not None
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


def collectives(rank: int) -> None:
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    all_reduce(x)
    from torch.distributed import all_reduce as reduce_all

    reduce_all(x)
    dist.barrier()
    dist.broadcast(x, 0)
    dist.all_gather_object([None] * dist.get_world_size(), {"rank": rank})
    dist.broadcast_object_list([rank], 0)
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    group = dist.new_group([0, 1])
    dist.all_reduce(x, group=group)
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_collectives_are_recorded_once_by_their_names(method: str) -> None:
    run = launch(collectives, start_method=method)
    for rank, point_to_point in enumerate(("send", "recv")):
        assert names(run, rank) == [
            "init_process_group",
            "all_reduce",
            "all_reduce",
            "all_reduce",
            "barrier",
            "broadcast",
            "all_gather_object",
            "broadcast_object_list",
            point_to_point,
            "new_group",
            "all_reduce",
            "destroy_process_group",
        ]
        assert {(s.kind, s.lane) for s in recorded(run, rank)} == {("comm", "main")}
        assert all(s.op == s.name for s in recorded(run, rank))


def test_a_collective_is_as_long_as_its_wait() -> None:
    def work(rank: int) -> tuple[int, int]:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            time.sleep(0.2)
        began = time.perf_counter_ns()
        dist.barrier()
        return began, time.perf_counter_ns()

    run = launch(work)
    early, late = (recorded(run, rank)[-1] for rank in (0, 1))
    for barrier, (began, ended) in zip((early, late), run.values, strict=True):
        assert barrier.t1_ns is not None
        assert began <= barrier.t0_ns < barrier.t1_ns <= ended
        assert barrier.t1_ns >= late.t0_ns  # nobody leaves before the last has come
    assert length(early) > length(late)


IN_FLIGHT = [("comm", "comm"), ("main", "issue"), ("main", "wait")]


def asynchronous(rank: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1), *args, **options).wait()
    dist.destroy_process_group()


def test_an_asynchronous_call_only_issues_the_work() -> None:
    run = launch(asynchronous, args=((), {"async_op": True}))
    assert [(s.lane, s.kind) for s in recorded(run) if s.op == "all_reduce"] == IN_FLIGHT


def test_also_where_it_says_so_by_position() -> None:
    run = launch(asynchronous, args=((dist.ReduceOp.SUM, None, True), {}))
    assert [(s.lane, s.kind) for s in recorded(run) if s.op == "all_reduce"] == IN_FLIGHT


def test_an_error_inside_a_collective_shows_no_recorder() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        group = dist.new_group([0, 1])
        with span("sync"):
            dist.broadcast(torch.ones(1), 7, group=group)

    with pytest.raises(WorkerFailed, match="ranks 0 and 1 of 2 raised ValueError") as caught:
        launch(work)
    text = str(caught.value)
    assert "dist.broadcast(torch.ones(1), 7, group=group)" in text
    assert "ddp_lessons" not in text
    assert "in recorded" not in text
    assert caught.value.run is not None
    assert names(caught.value.run)[1:] == ["new_group", "sync", "broadcast"]


def test_a_collective_keeps_its_signature_and_docstring() -> None:
    def work(rank: int) -> tuple[str, str, bool]:
        import inspect
        import pickle

        call: Any = dist.all_reduce
        same = pickle.loads(pickle.dumps(call)) is call
        return str(inspect.signature(call)), call.__doc__, same

    import inspect

    for signature, documentation, same in launch(work).values:
        assert signature == str(inspect.signature(dist.all_reduce))
        assert documentation == dist.all_reduce.__doc__
        assert same


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
    assert names(run, 0) == names(run, 1) == ["step"] * 10


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
