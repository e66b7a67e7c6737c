"""Adds torch.profiler's events of communication, on the same clock: ``launch(..., profile=True)``.

Runs in workers, called by worker/main.py. collectives.py records when the learner's code was in a
collective; the profiler records when a thread of gloo, or a kernel of NCCL, worked for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.records import Kind, Lane
from ddp_lessons.wire.span_buffer import CallFacts

if TYPE_CHECKING:
    from torch.autograd import _ProfilerResult

GLOO = "gloo:"
# Kernels on the device. (Their calls, "nccl:all_reduce", are copied there as annotations.)
NCCL_KERNELS = ("ncclDevKernel", "ncclKernel")


def start(recorder: Recorder) -> None:
    """Profile from now on; when the worker is done, write the events of communication as spans."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it logs to stderr
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.start()

    def write() -> None:
        profiler.stop()
        offset_ns = _clock_offset()
        for lane, name, t0_ns, t1_ns in _communication(profiler.profiler.kineto_results):
            facts = CallFacts(name.partition(":")[2] or name.partition("(")[0])
            begin_ns, end_ns = t0_ns - offset_ns, t1_ns - offset_ns
            recorder.buffer.begin(lane, Kind.COMM, name, begin_ns, end_ns, facts=facts)

    recorder.at_end.append(write)


def _clock_offset() -> int:
    """By how many ns the profiler's clock, that of the epoch, is ahead of `perf_counter_ns`.

    Of a few tries, the one in which the least time passed between the two readings.
    """
    tries = []
    for _ in range(5):
        before_ns = time.perf_counter_ns()
        epoch_ns = time.time_ns()
        after_ns = time.perf_counter_ns()
        tries.append((after_ns - before_ns, epoch_ns - (before_ns + after_ns) // 2))
    return min(tries)[1]


def _communication(results: _ProfilerResult) -> Iterator[tuple[str, str, int, int]]:
    """Lane, name, begin and end of the events of gloo's threads and NCCL's kernels; epoch ns."""
    for event in results.events():
        name = event.name()
        if name.startswith(GLOO):
            lane = Lane.GLOO
        elif name.startswith(NCCL_KERNELS) and "CUDA" in str(event.device_type()):
            lane = Lane.NCCL
        else:
            continue
        yield lane, name, event.start_ns(), event.start_ns() + event.duration_ns()
