"""Records a DDP model's gradient buckets: when each was in flight, and backward's wait for them.

Runs in workers. ddp_traffic.py and the hooks of ddp_buckets.py call it when DDP sends a bucket.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ddp_lessons.instrumentation import cuda_events
from ddp_lessons.instrumentation.group_registry import Group
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.ops import WAIT_FOR_BUCKETS
from ddp_lessons.wire.records import Kind
from ddp_lessons.wire.span_buffer import CallFacts, Slot

if TYPE_CHECKING:
    import torch


class Backward:
    """The buckets in flight, and the open span of backward's wait for them.

    Where a stream of the GPU does the work there is no such span: the host does not wait.
    """

    def __init__(self, recorder: Recorder, group: Group | None) -> None:
        self._recorder = recorder
        self._is_streamed = group is not None and group.streamed
        self._lock = threading.Lock()
        self._in_flight: set[Slot] = set()
        self._waiting: Slot = 0  # the open span, if there is one
        recorder.at_end.append(self.all_arrived)  # ends what a failed backward left open

    def begin(
        self, index: int, buffer: torch.Tensor, facts: CallFacts, t0_ns: int
    ) -> Callable[[], None]:
        """Note that DDP sends a bucket. Call the returned function when its gradients arrived.

        Index -1 is the map of unused parameters, for which backward waits like for a bucket.
        """
        name, lane = (f"bucket {index}", "buckets") if index >= 0 else ("unused parameters", "comm")
        on = cuda_events.of(buffer) if self._is_streamed else None
        if on is not None:
            return cuda_events.Stopwatch(self._recorder, on, name, facts, lane).stop
        slot = self._recorder.begin(Kind.COMM, name, t0_ns, facts, lane)
        with self._lock:
            self._in_flight.add(slot)
        return functools.partial(self._end, slot)

    def all_handed_over(self) -> None:
        """Note that DDP has sent the last bucket: from now on backward only waits."""
        with self._lock:
            if self._in_flight:
                now_ns = time.perf_counter_ns()
                self._waiting = self._recorder.begin(Kind.WAIT, WAIT_FOR_BUCKETS, now_ns)

    def all_arrived(self) -> None:
        """Note that backward goes on: its buckets have arrived, even if a callback is late."""
        for slot in list(self._in_flight):
            self._end(slot)

    def _end(self, slot: Slot) -> None:
        """Note that a bucket arrived, or failed. Called from a thread of the backend."""
        with self._lock:
            if slot not in self._in_flight:
                return
            self._in_flight.remove(slot)
            self._recorder.end(slot)
            if self._waiting and not self._in_flight:
                self._recorder.end(self._waiting)
                self._waiting = 0


class Turns:
    """Numbers the buckets of each backward. Every bucket comes once, in the order of its index."""

    def __init__(self, elements: int) -> None:
        self._elements = elements  # of all buckets together
        self._index = 0
        self._left = elements

    def next(self, elements: int) -> tuple[int, bool]:
        """The index of a bucket of so many elements, and whether it is the last of its backward."""
        if elements > self._left:  # the backward before this one was aborted
            self._index, self._left = 0, self._elements
        index = self._index
        self._index, self._left = index + 1, self._left - elements
        is_last = self._left <= 0
        if is_last:
            self._index, self._left = 0, self._elements
        return index, is_last
