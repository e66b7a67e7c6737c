"""Spans on the device, with events of a simulated device.

tests/end_to_end/test_gpu.py tests on a GPU that CUDA's own events behave this way. Failures and
hangs of the device, which no test can cause there, are tested only here. And ranks on CPUs that
take gloo for NCCL run the Python code of NCCL's calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch
from ddp_lessons.instrumentation import collectives, cuda_events
from ddp_lessons.instrumentation.cuda_events import Stopwatch
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.records import Span
from ddp_lessons.wire.span_buffer import CallFacts, SpanBuffers, SpanWriter

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Gpu:
    """A device whose clock, in ms, is set by the test; `done` is how far it has come."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = float("inf")
        self.failed = False

    def look(self) -> None:
        if self.failed:
            raise RuntimeError("CUDA error: device-side assert triggered")


class Event:
    """As torch.cuda.Event."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._at = 0.0

    def record(self, _: Any) -> None:
        self._gpu.look()
        self._at = self._gpu.now

    def query(self) -> bool:
        self._gpu.look()
        return self._at <= self._gpu.done

    def synchronize(self) -> None:
        self._gpu.look()

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return other._at - self._at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(cuda_events, "_clocks", {})
    return made


@pytest.fixture
def buffers() -> Iterator[SpanBuffers]:
    buffers = SpanBuffers(1)
    yield buffers
    buffers.close()


@pytest.fixture
def recorder(buffers: SpanBuffers) -> Recorder:
    with buffers.sendable() as connection:
        return Recorder(0, SpanWriter(connection.fileno(), 0), lambda _: None, world_size=1)


def watch(recorder: Recorder, name: str = "all_reduce") -> Stopwatch:
    return Stopwatch(recorder, "gpu", name, CallFacts(name, "world", 0))


def lengths_ms(spans: list[Span]) -> list[float | None]:
    return [None if s.t1_ns is None else (s.t1_ns - s.t0_ns) / 1e6 for s in spans]


def test_a_span_has_the_times_of_the_device(
    gpu: Gpu, recorder: Recorder, buffers: SpanBuffers
) -> None:
    before_ns = time.perf_counter_ns()
    first = watch(recorder)
    gpu.now += 2.0
    first.stop()
    gpu.now += 5.0
    second = watch(recorder)
    gpu.now += 3.0
    second.stop()
    spans = buffers.spans(0)
    assert lengths_ms(spans) == [2.0, 3.0]
    assert {s.lane for s in spans} == {"cuda"}
    assert spans[1].t0_ns - spans[0].t0_ns == 7_000_000
    assert spans[0].t0_ns >= before_ns


def test_spans_that_overlap(gpu: Gpu, recorder: Recorder, buffers: SpanBuffers) -> None:
    first, second = watch(recorder, "a"), watch(recorder, "b")
    gpu.now += 4.0
    first.stop()
    gpu.now += 1.0
    second.stop()
    spans = buffers.spans(0)
    assert sorted(lengths_ms(spans)) == [4.0, 5.0]  # type: ignore[type-var]
    assert spans[0].t0_ns == spans[1].t0_ns


def test_it_is_open_until_the_device_is_there(
    gpu: Gpu, recorder: Recorder, buffers: SpanBuffers
) -> None:
    gpu.done = 0.5
    stopwatch = watch(recorder)
    gpu.now += 2.0
    stopwatch.stop()
    stopwatch.stop()
    assert lengths_ms(buffers.spans(0)) == [None]
    gpu.done = 2.0
    recorder.close()
    assert lengths_ms(buffers.spans(0)) == [2.0]


def test_a_device_that_hangs_keeps_nobody(
    gpu: Gpu, recorder: Recorder, buffers: SpanBuffers
) -> None:
    gpu.done = 0.5
    stopwatch = watch(recorder)
    gpu.now += 2.0
    stopwatch.stop()
    recorder.close()  # would not return
    assert lengths_ms(buffers.spans(0)) == [None]


@pytest.mark.parametrize("fails_at", ["clock", "start", "stop", "query"])
def test_a_device_that_fails_raises_nothing_here(
    fails_at: str, gpu: Gpu, recorder: Recorder, buffers: SpanBuffers
) -> None:
    if fails_at == "query":
        gpu.done = -1.0
    gpu.failed = fails_at == "clock"
    if fails_at == "start":
        watch(recorder).stop()
        gpu.failed = True
    stopwatch = watch(recorder)
    gpu.failed = gpu.failed or fails_at == "stop"
    stopwatch.stop()
    gpu.failed = True
    recorder.close()
    assert lengths_ms(buffers.spans(0))[-1] is None


def test_the_clock_is_read_anew_all_the_time(
    gpu: Gpu, recorder: Recorder, buffers: SpanBuffers
) -> None:
    """A float of 24 bits cannot hold an hour in milliseconds to the microsecond."""
    for _ in range(50):
        stopwatch = watch(recorder)
        gpu.now += 1.0
        stopwatch.stop()
        gpu.now += 99.0
    spans = buffers.spans(0)
    assert spans[-1].t0_ns - spans[0].t0_ns == 49 * 100_000_000


def test_cpu_tensors_are_on_no_device() -> None:
    assert cuda_events.of(torch.ones(1)) is None
    assert cuda_events.of([torch.ones(1)]) is None
    assert cuda_events.of([]) is None
    assert cuda_events.of(None) is None


# Ranks on CPUs that take gloo for NCCL


class HostEvent:
    """An event of a device that does all work at once."""

    def __init__(self, enable_timing: bool) -> None:
        self._at = 0.0

    def record(self, _: Any) -> None:
        self._at = time.perf_counter() * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: HostEvent) -> float:
        return other._at - self._at


def take_gloo_for_nccl() -> None:
    torch.cuda.Event = HostEvent
    torch.cuda.Stream = torch.cuda.current_stream = lambda device: None
    cuda_events.is_streamed = lambda process_group: True

    def of(tensor: Any) -> str | None:
        first = tensor[0] if isinstance(tensor, list) else tensor
        return "gpu" if isinstance(first, torch.Tensor) else None

    cuda_events.of = of


def calls(rank: int) -> list[Any]:
    take_gloo_for_nccl()
    dist.init_process_group("gloo")
    x, y, parts = torch.ones(100), torch.zeros(100), [torch.zeros(100) for _ in range(2)]
    if rank == 1:
        time.sleep(0.05)
    found = [dist.all_reduce(x)]
    dist.all_reduce(x, async_op=True).wait()
    dist.barrier()
    ops = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)]
    for handle in dist.batch_isend_irecv(ops):
        handle.wait()
    found.append(dist.send(x, 1) if rank == 0 else dist.recv(y, 0))
    dist.all_gather(parts, x)
    dist.destroy_process_group()
    return [*found, x[0].item(), y[0].item(), parts[1][0].item()]


@pytest.fixture(scope="module")
def called() -> Run:
    return launch(calls)


@pytest.mark.ranks
def test_every_kind_of_call_returns_what_it_returns_without(called: Run) -> None:
    assert called.values == [[None, None, 4.0, 4.0, 4.0], [None, 0, 4.0, 4.0, 4.0]]


@pytest.mark.ranks
def test_every_call_has_its_time_on_the_device(called: Run) -> None:
    for rank, last in ((0, "send"), (1, "recv")):
        spans = [s for s in called.ranks[rank].spans if s.lane == "cuda"]
        assert [(s.op, s.seq) for s in spans] == [
            ("all_reduce", 0),
            ("all_reduce", 1),
            ("isend", 0),
            ("irecv", 0),
            (last, 1),
            ("all_gather", 3),  # number 2 was the barrier, for which the caller waits on the host
        ]
        assert all(s.t1_ns is not None for s in spans)
    (first,) = [share for share in called.waits() if (share.rank, share.seq) == (0, 0)][:1]
    assert first.last_rank == 1
    assert first.wait_ns > 30_000_000


def batch_with_one_handle(rank: int) -> None:
    """As NCCL does it: the handle has no future, and stands for all calls of the batch."""
    take_gloo_for_nccl()
    dist.init_process_group("gloo")
    batched = collectives.batched("batch_isend_irecv", lambda ops: [dist.barrier(async_op=True)])
    x = torch.ones(1)
    ops = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, x, 1 - rank)]
    (handle,) = batched(ops)
    handle.wait()
    batched(ops)
    dist.destroy_process_group()


@pytest.mark.ranks
def test_a_batch_ends_when_its_one_handle_is_waited_for() -> None:
    run = launch(batch_with_one_handle)
    spans = [s for s in run.ranks[0].spans if s.lane == "cuda"]
    ended = [(s.op, s.seq, s.t1_ns is not None) for s in spans]
    assert sorted(ended) == [
        ("irecv", 0, True), ("irecv", 1, False), ("isend", 0, True), ("isend", 1, False)
    ]  # fmt: skip


class BucketsInFlight:
    """The stopwatches of buckets that gloo has not stopped yet.

    Gloo does so in a thread of its own, perhaps late; NCCL as soon as DDP asks for it.
    """

    def __init__(self) -> None:
        self._left: set[Stopwatch] = set()
        buckets = self

        class Counted(Stopwatch):
            def __init__(self, recorder: Recorder, on: str, name: str, *rest: Any) -> None:
                super().__init__(recorder, on, name, *rest)
                if name.startswith("bucket"):
                    buckets._left.add(self)

            def stop(self) -> None:
                super().stop()
                buckets._left.discard(self)

        cuda_events.Stopwatch = Counted  # type: ignore[assignment, misc]

    def wait(self) -> None:
        while self._left:
            time.sleep(0.001)


def trains(rank: int, late: float) -> float:
    take_gloo_for_nccl()
    buckets = BucketsInFlight()
    dist.init_process_group("gloo")
    net = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256))
    model = DistributedDataParallel(net, bucket_cap_mb=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        if rank == 1:
            time.sleep(late)
        model(torch.ones(4, 256)).sum().backward()
        optimizer.step()
    buckets.wait()
    dist.destroy_process_group()
    return float(next(model.parameters()).sum().item())


@pytest.mark.ranks
def test_buckets_have_times_of_the_device_and_nobody_waits_on_the_host() -> None:
    run = launch(trains, args=(0.03,))
    assert run.values[0] == run.values[1]
    assert run.unseen == []
    buckets = [s for s in run.ranks[0].spans if s.lane == "buckets"]
    assert {s.step for s in buckets} == set(range(6))
    assert all(s.t1_ns is not None for s in buckets)
    assert not any(s.kind == "wait" for s in run.spans())
    buffers = [s for s in run.ranks[0].spans if s.op == "broadcast" and s.lane == "cuda"]
    assert len(buffers) == 9  # one for the weights, two for the order of the buckets, one a step
    assert run.straggler()[:2] == ("chronic", 1)


def never_meets(rank: int) -> None:
    take_gloo_for_nccl()
    HostEvent.query = lambda self: False  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    if rank != 1:
        dist.all_reduce(torch.ones(1), async_op=True)
    while True:  # as torch.cuda.synchronize() does
        pass


@pytest.mark.slow
@pytest.mark.ranks
def test_a_hang_names_what_the_gpus_are_at() -> None:
    run = launch(never_meets, nprocs=3, timeout=2, check=False)
    text = run.explain()
    assert "ranks 0 and 2 have not finished on their GPUs: all_reduce" in text
    assert "dist.all_reduce(torch.ones(1), async_op=True)" in text
