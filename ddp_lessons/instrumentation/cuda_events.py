"""Measures on the GPU the collectives whose calls return before the work is done.

Runs in workers, called by async_work.py and backward.py, and only where a group uses NCCL. There a
call only puts work into a stream of the device: its own span is marked "issue", and CUDA events
around the work tell when it was done. A span on the device begins when the tensors were ready and
ends when the stream goes on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.torch_api import STREAMED
from ddp_lessons.wire.records import Kind, Lane
from ddp_lessons.wire.span_buffer import CallFacts, Slot, SpanWriter

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

PATIENCE = 1.0  # seconds that the device has to finish after the function has ended
PAUSE = 0.001  # seconds between two looks at it


def is_streamed(process_group: dist.ProcessGroup) -> bool:
    """Whether the group's calls on CUDA tensors return before the work is done."""
    return any(backend in STREAMED for backend in backends_of(process_group).values())


def backends_of(process_group: dist.ProcessGroup) -> dict[str, str]:
    """The backends of a group by the kind of device, such as {"cpu": "gloo", "cuda": "nccl"}."""
    import torch.distributed as dist

    config = str(dist.get_backend_config(process_group))  # "cuda:nccl", or "cpu:gloo,cuda:nccl"
    return dict(part.split(":") for part in config.split(","))


def of(tensor: Any) -> torch.device | None:
    """The CUDA device of a tensor, or of the first in a list; None for anything else.

    None also while a CUDA graph is captured: its work runs later, perhaps many times.
    """
    first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
    if not getattr(first, "is_cuda", False):
        return None
    return None if is_capturing() else first.device


def is_capturing() -> bool:
    """Whether a CUDA graph is captured. A callback of a future would then break the capture."""
    import torch

    # A build without CUDA would raise an error.
    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())


class Stopwatch:
    """A span on the device, from now in the current stream to `stop` in the stream current then.

    It stays open in the span buffer until its times are known, so that a rank that hangs or is
    killed shows what its device was doing.
    """

    def __init__(
        self,
        recorder: Recorder,
        device: torch.device,
        name: str,
        facts: CallFacts,
        lane: str = Lane.CUDA,
    ) -> None:
        self._recorder = recorder
        self._clock = _clock_of(device)
        self._slot = recorder.begin(Kind.COMM, name, time.perf_counter_ns(), facts, lane)
        self._start = self._clock.mark()
        self._stopped = False

    def stop(self) -> None:
        """Note the end, once; it is written when the device gets there."""
        if not self._stopped:
            self._stopped = True
            self._clock.keep(self._recorder, self._slot, self._start, self._clock.mark())


class _Pending(NamedTuple):
    """A span whose times are not read yet, and its two events."""

    buffer: SpanWriter
    slot: Slot
    start: torch.cuda.Event
    stop: torch.cuda.Event


class DeviceClock:
    """One device's events on the clock of the host, `time.perf_counter_ns`.

    A device that has failed raises at each later call. The learner should see that at a line of
    their own: here it only ends the measuring.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[_Pending] = deque()
        self._spare: list[torch.cuda.Event] = []  # to be used again: making one takes 7 µs
        self._lock = threading.Lock()
        self._failed = False
        self._zero: torch.cuda.Event  # set unless the device has failed
        self._zero_ns = 0
        try:
            self._zero, self._zero_ns = _now(device)
        except RuntimeError:
            self._failed = True

    def mark(self) -> torch.cuda.Event | None:
        """An event in the current stream; None if the device has failed."""
        import torch

        if self._failed:
            return None
        try:
            event = self._event()
            event.record(torch.cuda.current_stream(self._device))
        except RuntimeError:
            self._failed = True
            return None
        return event

    def _event(self) -> torch.cuda.Event:
        import torch

        try:
            return self._spare.pop()
        except IndexError:  # other threads pop, too
            return torch.cuda.Event(enable_timing=True)

    def keep(
        self,
        recorder: Recorder,
        slot: Slot,
        start: torch.cuda.Event | None,
        stop: torch.cuda.Event | None,
    ) -> None:
        """Write the span when its events have happened, at the latest when the worker ends."""
        if self._failed:
            return
        if self.flush not in recorder.at_end:
            recorder.at_end.append(self.flush)
        with self._lock:
            self._pending.append(_Pending(recorder.buffer, slot, start, stop))
        self.write()

    def flush(self) -> None:
        """Write what is left, waiting at most `PATIENCE`: hung work must not hold up an error."""
        deadline = time.monotonic() + PATIENCE
        while self.write() and time.monotonic() < deadline:
            time.sleep(PAUSE)

    def write(self) -> bool:
        """Write the spans that have ended; True if others may still end."""
        with self._lock:
            try:
                while self._pending and self._pending[0].stop.query():
                    self._write(self._pending.popleft())
            except RuntimeError:
                self._failed = True
            return bool(self._pending) and not self._failed

    def _write(self, span: _Pending) -> None:
        t0_ns, t1_ns = self._ns(span.start), self._ns(span.stop)
        span.buffer.began(span.slot, t0_ns)
        span.buffer.end(span.slot, max(t0_ns + 1, t1_ns))
        # elapsed_time is a float of 24 bits, so the reference event must be recent. It is the
        # start, because the next span may start before this one ends.
        self._spare += (self._zero, span.stop)
        self._zero, self._zero_ns = span.start, t0_ns

    def _ns(self, event: torch.cuda.Event) -> int:
        return self._zero_ns + int(self._zero.elapsed_time(event) * 1e6)


def _now(device: torch.device) -> tuple[torch.cuda.Event, int]:
    """An event that has just happened, and its time; in an idle stream, so it waits for no work."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.Stream(device))
    event.synchronize()
    return event, time.perf_counter_ns()


_clocks: dict[torch.device, DeviceClock] = {}


def _clock_of(device: torch.device) -> DeviceClock:
    if device not in _clocks:
        _clocks[device] = DeviceClock(device)
    return _clocks[device]
