"""Times on the GPU, of collectives whose calls return before the work is done.

Runs in workers, and only where a group uses NCCL. There a call merely puts work into a stream of
the device: its own span is marked "issue", and CUDA events around the work say when it was done.
A span of the device begins when the tensors were ready and ends when the stream goes on.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from ddp_lessons.recording import Recorder
from ddp_lessons.tape import Facts

STREAMED = ("nccl", "xccl", "hccl")  # backends whose calls return at once


def is_streamed(process_group: Any) -> bool:
    """Whether the group's calls on CUDA tensors return before the work is done."""
    import torch.distributed as dist

    backends = dist.get_backend_config(process_group)  # "nccl", or "cpu:gloo,cuda:nccl"
    return any(part.rpartition(":")[2] in STREAMED for part in str(backends).split(","))


def of(tensor: Any) -> Any:
    """The CUDA device of a tensor, or of the first in a list; None for anything else."""
    first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
    return first.device if getattr(first, "is_cuda", False) else None


class Stopwatch:
    """A span on the device: `start` now, in the current stream, and `stop` in the one then."""

    def __init__(
        self, recorder: Recorder, device: Any, name: str, facts: Facts, lane: str = "cuda"
    ) -> None:
        self._recorder = recorder
        self._clock = _clock_of(device)
        self._span = (lane, name, recorder.step, facts)
        self._start = self._clock.mark()
        self._stopped = False

    def stop(self) -> None:
        """Note the end, once; it is written when the device has come there."""
        if not self._stopped:
            self._stopped = True
            self._clock.keep(self._recorder, self._span, self._start, self._clock.mark())


class Clock:
    """One device's events on the clock of the host, `time.perf_counter_ns`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._pending: deque[tuple[Recorder, tuple[str, str, int, Facts], Any, Any]] = deque()
        self._zero = self.mark()
        self._zero.synchronize()
        self._zero_ns = time.perf_counter_ns()

    def mark(self) -> Any:
        """An event in the current stream."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def keep(self, recorder: Recorder, span: Any, start: Any, stop: Any) -> None:
        """Write the span when its events have happened, at the latest when the worker ends."""
        if self.flush not in recorder.at_end:
            recorder.at_end.append(self.flush)
        self._pending.append((recorder, span, start, stop))
        while self._pending and self._pending[0][3].query():
            self._write(*self._pending.popleft())

    def flush(self) -> None:
        """Wait for the device and write what is left."""
        while self._pending:
            self._pending[0][3].synchronize()
            self._write(*self._pending.popleft())

    def _write(
        self, recorder: Recorder, span: tuple[str, str, int, Facts], start: Any, stop: Any
    ) -> None:
        lane, name, step, facts = span
        t0_ns, t1_ns = self._ns(start), self._ns(stop)
        recorder.tape.begin(lane, "comm", name, t0_ns, max(t0_ns + 1, t1_ns), step, facts)
        # An event tells the time since another in a float of 24 bits: that must not be long ago.
        self._zero, self._zero_ns = stop, t1_ns

    def _ns(self, event: Any) -> int:
        return self._zero_ns + int(self._zero.elapsed_time(event) * 1e6)


_clocks: dict[Any, Clock] = {}


def _clock_of(device: Any) -> Clock:
    if device not in _clocks:
        _clocks[device] = Clock(device)
    return _clocks[device]
