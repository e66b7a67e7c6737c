"""What is done with the times of the device, with events of a device made up here.

That CUDA's own events behave so is tested where there is a GPU, in tests/test_gpu.py. What CUDA can
do that no test there can ask for, such as failing or hanging, is tested only here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ddp_lessons import device
from ddp_lessons.device import Stopwatch
from ddp_lessons.messages import Span
from ddp_lessons.recording import Recorder
from ddp_lessons.tape import Facts, Tape, Tapes


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
    monkeypatch.setattr(device, "_clocks", {})
    return made


@pytest.fixture
def tapes() -> Iterator[Tapes]:
    tapes = Tapes(1)
    yield tapes
    tapes.close()


@pytest.fixture
def recorder(tapes: Tapes) -> Recorder:
    with tapes.sendable() as connection:
        return Recorder(0, Tape(connection.fileno(), 0), lambda _: None)


def watch(recorder: Recorder, name: str = "all_reduce") -> Stopwatch:
    return Stopwatch(recorder, "gpu", name, Facts(name, "world", 0))


def lengths_ms(spans: list[Span]) -> list[float | None]:
    return [None if s.t1_ns is None else (s.t1_ns - s.t0_ns) / 1e6 for s in spans]


def test_a_span_has_the_times_of_the_device(gpu: Gpu, recorder: Recorder, tapes: Tapes) -> None:
    before_ns = time.perf_counter_ns()
    first = watch(recorder)
    gpu.now += 2.0
    first.stop()
    gpu.now += 5.0
    second = watch(recorder)
    gpu.now += 3.0
    second.stop()
    spans = tapes.spans(0)
    assert lengths_ms(spans) == [2.0, 3.0]
    assert {s.lane for s in spans} == {"cuda"}
    assert spans[1].t0_ns - spans[0].t0_ns == 7_000_000
    assert spans[0].t0_ns >= before_ns


def test_spans_that_overlap(gpu: Gpu, recorder: Recorder, tapes: Tapes) -> None:
    first, second = watch(recorder, "a"), watch(recorder, "b")
    gpu.now += 4.0
    first.stop()
    gpu.now += 1.0
    second.stop()
    spans = tapes.spans(0)
    assert sorted(lengths_ms(spans)) == [4.0, 5.0]  # type: ignore[type-var]
    assert spans[0].t0_ns == spans[1].t0_ns


def test_it_is_open_until_the_device_is_there(gpu: Gpu, recorder: Recorder, tapes: Tapes) -> None:
    gpu.done = 0.5
    stopwatch = watch(recorder)
    gpu.now += 2.0
    stopwatch.stop()
    stopwatch.stop()
    assert lengths_ms(tapes.spans(0)) == [None]
    gpu.done = 2.0
    recorder.close()
    assert lengths_ms(tapes.spans(0)) == [2.0]


def test_a_device_that_hangs_keeps_nobody(gpu: Gpu, recorder: Recorder, tapes: Tapes) -> None:
    gpu.done = 0.5
    stopwatch = watch(recorder)
    gpu.now += 2.0
    stopwatch.stop()
    recorder.close()  # would not return
    assert lengths_ms(tapes.spans(0)) == [None]


@pytest.mark.parametrize("fails_at", ["clock", "start", "stop", "query"])
def test_a_device_that_fails_raises_nothing_here(
    fails_at: str, gpu: Gpu, recorder: Recorder, tapes: Tapes
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
    assert lengths_ms(tapes.spans(0))[-1] is None


def test_the_clock_is_read_anew_all_the_time(gpu: Gpu, recorder: Recorder, tapes: Tapes) -> None:
    """A float of 24 bits counts no microseconds in an hour of milliseconds."""
    for _ in range(50):
        stopwatch = watch(recorder)
        gpu.now += 1.0
        stopwatch.stop()
        gpu.now += 99.0
    spans = tapes.spans(0)
    assert spans[-1].t0_ns - spans[0].t0_ns == 49 * 100_000_000


def test_cpu_tensors_are_on_no_device() -> None:
    assert device.of(torch.ones(1)) is None
    assert device.of([torch.ones(1)]) is None
    assert device.of([]) is None
    assert device.of(None) is None
