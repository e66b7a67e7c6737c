"""Records spans: what a worker did when. Runs in workers; does nothing anywhere else.

Learners mark work with `span`, and the steps of a training loop with `steps`. collectives.py
records the calls of torch.distributed, ddp_traffic.py what DDP sends. All of them write through the
worker's one `Recorder` into its span buffer (wire/span_buffer.py).
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

from ddp_lessons.instrumentation import torch_api
from ddp_lessons.instrumentation.call_sites import Sites
from ddp_lessons.system.host import processor_ns
from ddp_lessons.wire import stacks
from ddp_lessons.wire.messages import (
    Clock,
    GivesUp,
    Handling,
    Message,
    ThreadCalls,
    ThreadDied,
    Unseen,
)
from ddp_lessons.wire.ops import NEXT_BATCH
from ddp_lessons.wire.records import MOST_MISTAKES, Kind, Lane, Mistake, Report, Timeout
from ddp_lessons.wire.span_buffer import NO_FACTS, CallFacts, Slot, SpanWriter

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

MOST_TOLD = 100  # calls in `except` blocks, timeouts, and dead threads of a rank that are told
MOST_REPORTED = 50_000  # numbers of a rank
LONGEST_NAME = 40  # characters of one
METERED_NS = 20_000_000  # the processor's time is read at most once in so long: it takes 50 µs


class Recorder:
    """Writes one worker's spans into its buffer; knows its threads and its training step."""

    def __init__(
        self,
        rank: int,
        buffer: SpanWriter,
        send: Callable[[Message], None],
        *,
        world_size: int,
        one_clock: bool = True,
        host_of_rank_zero: str = "127.0.0.1",
        home: str | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size  # the number of ranks that were started
        self.home = home
        self.sites = Sites(home)
        self.buffer = buffer
        self.send = send
        self.host_of_rank_zero = host_of_rank_zero
        self.one_clock = one_clock  # all ranks are known to read the same clock
        self.visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")  # before the learner's code
        self.has_joined = False  # a process group
        self.step = 0
        self.metered_ns = 0  # when the processor's time is to be read again
        self.groups: list[dist.ProcessGroup] = []  # not freed: process_groups.leaving, ddp_traffic
        self.models: list[Callable[[], DistributedDataParallel | None]] = []  # weak references
        self.at_end: list[Callable[[], None]] = []  # called at the end, to write what is left
        self.plans: dict[Any, Any] = {}  # see collectives.Plan
        self._unseen: set[str] = set()  # what the parent knows
        # How many handles of asynchronous work calls returned, and how many of them were used, by
        # the mistake that the others are. next() of a count is atomic.
        self.handles: defaultdict[Mistake, Iterator[int]] = defaultdict(itertools.count)
        self.used_handles: defaultdict[Mistake, Iterator[int]] = defaultdict(itertools.count)
        self._issued = 0  # calls that only issued work and have ended
        self._mistakes: set[Mistake] = set()
        self._reported = 0  # numbers
        self._handled = 0  # calls made while an exception was handled
        self._timeouts: set[Timeout] = set()  # that the parent knows
        self._step_t0_ns = 0
        self._in_steps = False
        # The optimizer whose steps are the training's.
        self._stepping: weakref.ref[torch.optim.Optimizer] | None = None
        self._lanes: dict[int | None, str] = {threading.main_thread().ident: Lane.MAIN}
        self._lane_numbers = itertools.count(1)  # next() of it is atomic
        self._lanes_left: dict[int, str] = {}  # of threads that ended; their idents are used again
        self._of_thread = threading.local()
        self._died = 0  # threads that an exception ended

    def begin(
        self, kind: str, name: str, t0_ns: int, facts: CallFacts = NO_FACTS, lane: str = ""
    ) -> Slot:
        """Begin a span, now open, on `lane` or the calling thread's lane."""
        if not self._step_t0_ns:
            self._step_t0_ns = t0_ns
        lane = lane or self._lanes.get(get_ident()) or self.lane()
        slot = self.buffer.begin(lane, kind, name, t0_ns, 0, self.step, facts)
        if t0_ns >= self.metered_ns:
            self.meter(slot, t0_ns)
        return slot

    def meter(self, slot: Slot, t0_ns: int) -> None:
        """Note the processor's time of the main thread with a span that began now.

        Not where CUDA is used: there a thread that waits for the GPU may look busy.
        """
        self.metered_ns = t0_ns + METERED_NS
        cuda = sys.modules.get("torch.cuda")
        try:
            if cuda is None or not cuda.is_initialized():
                self.buffer.meter(slot, *processor_ns("/proc/self/schedstat"))
        except (OSError, ValueError):  # not on Linux
            self.metered_ns = sys.maxsize

    def end(self, slot: Slot) -> None:
        """End a span now."""
        self.buffer.end(slot, time.perf_counter_ns())

    def end_issue(self, slot: Slot) -> None:
        """End the span of a call that only issued work."""
        self.end(slot)
        self._issued += bool(slot)

    def heard(self) -> tuple[int, int]:
        """Numbers that stay the same as long as nothing ends here but calls that issue work.

        Until then no call can have brought word from another rank.
        """
        ended, dropped = self.buffer.ended
        return ended - self._issued, dropped

    def fail(self, slot: Slot, error: BaseException, *, met: bool = False) -> None:
        """Note that a call raised. One that torch refused loses its number, unless it `met` others.

        The call that another rank makes in its place has that number.
        """
        self.buffer.fail(slot)
        if not met and torch_api.refused(error):
            self.buffer.match(slot, -1, -1)

    @contextmanager
    def call(self, name: str, t0_ns: int, facts: CallFacts) -> Iterator[None]:
        """Record a call that returns when it is done, and none of the calls within it."""
        slot = self.begin(Kind.COMM, name, t0_ns, facts)
        try:
            with within_call():
                yield
        except BaseException as error:
            self.fail(slot, error)
            raise
        finally:
            self.end(slot)

    def lane(self) -> str:
        """The lane of the calling thread: "main", or "thread 1" and so on."""
        ident = get_ident()
        if (lane := self._lanes.get(ident)) is None:
            lane = self._lanes_left.pop(ident, None) or f"thread {next(self._lane_numbers)}"
            self._lanes[ident] = lane
            self._of_thread.end = _AtEnd(functools.partial(self._thread_ended, ident))
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            if ident in names:  # else it is not Python's, but one of torch's for a GPU
                self.send(ThreadCalls(lane, names[ident]))
        return lane

    def _thread_ended(self, ident: int) -> None:
        """Forget a thread, but not its lane: the next one with its identifier has another name."""
        self._lanes_left[ident] = self._lanes.pop(ident)
        for key in [key for key in self.plans if key[-1] == ident]:
            self.plans.pop(key, None)

    def thread_died(self, thread: str, error: BaseException) -> None:
        """Tell the parent that an exception ended a thread."""
        if self._died < MOST_TOLD:
            self._died += 1
            self.send(ThreadDied(thread, stacks.describe(error, self.home)))

    def begin_step(self, t0_ns: int, site: str | None = None) -> Slot:
        """Begin a step that `steps` counts, or one that an optimizer made at `site`."""
        self._in_steps = True
        return self.buffer.begin(
            Lane.STEPS, Kind.MARK, f"step {self.step}", t0_ns, 0, self.step, CallFacts(site=site)
        )

    def end_step(self, slot: Slot, t1_ns: int) -> None:
        """End a step that `steps` counts."""
        self.buffer.end(slot, t1_ns)
        self.step += 1
        self._in_steps = False

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Note progress, and end a training step unless `steps` counts them.

        If several optimizers take turns, only the steps of the first one count.
        """
        self.buffer.moved()
        if self._stepping is None:
            self._stepping = weakref.ref(optimizer)
        if self._in_steps or self._stepping() is not optimizer:
            return
        now_ns = time.perf_counter_ns()
        slot = self.begin_step(self._step_t0_ns or now_ns, self.sites.of(sys._getframe(1)))
        self.end_step(slot, now_ns)
        self._step_t0_ns = now_ns

    def gives_up(self, timeout: Any, call: str) -> None:
        """Tell the parent that a call will give up by itself, if it has a timeout."""
        if (after := seconds(timeout)) is None:
            return
        known = Timeout(after, call, self.sites.of(sys._getframe(1)))
        if known not in self._timeouts and len(self._timeouts) < MOST_TOLD:
            self._timeouts.add(known)
            self.send(GivesUp(known))

    def handling(self, site: str | None, error: BaseException, t0_ns: int) -> None:
        """Tell the parent that the call at `site` is made while an exception is handled."""
        if site is not None and self._handled < MOST_TOLD:
            self._handled += 1
            self.send(Handling(site, stacks.describe(error, self.home), t0_ns))

    def report(self, values: dict[str, float]) -> None:
        """Tell the parent what the learner reports."""
        self._reported += len(values)
        if self._reported <= MOST_REPORTED:
            self.send(Report(time.perf_counter_ns(), values))

    def unseen(self, what: str) -> None:
        """Tell the parent, once, how this rank communicates without being recorded."""
        if what not in self._unseen:
            self._unseen.add(what)
            self.send(Unseen(what))

    def notice(self, mistake: Mistake) -> None:
        """Tell the parent of a mistake, once."""
        if mistake not in self._mistakes and len(self._mistakes) < MOST_MISTAKES:
            self._mistakes.add(mistake)
            self.send(mistake)

    def notice_unused_handles(self) -> None:
        """Tell the parent of asynchronous work that nobody can wait for any more: the rank ends."""
        for mistake, returned in list(self.handles.items()):  # daemons may go on
            if next(returned) > next(self.used_handles[mistake]):
                self.notice(mistake)

    def compare_clock(self, clock: Clock | None) -> None:
        """Tell the parent how this rank's clock stands against rank 0's, if that is known."""
        if clock is not None:
            self.send(clock)

    def joined(self) -> None:
        """Drop the plans after a group was made or left; the first step begins no sooner."""
        self.has_joined = True
        self.plans.clear()
        if self.step == 0:
            self._step_t0_ns = 0

    def close(self) -> None:
        """Write what is left."""
        for write in self.at_end:
            write()


class _AtEnd:
    """Calls a function when it is freed: in a `threading.local`, when the thread ends."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __del__(self) -> None:
        self._function()


def seconds(timeout: Any) -> float | None:
    """The seconds of a timeout argument; None without one, or for one that torch refuses."""
    return timeout.total_seconds() if isinstance(timeout, timedelta) else None


inside: set[int] = set()  # idents of the threads that are in a recorded call
fetching: set[int] = set()  # of those that fetch a batch
_recorder: Recorder | None = None  # this process's one recorder; None outside workers


def use(recorder: Recorder | None) -> None:
    """Make `recorder` the recorder of this process."""
    global _recorder
    _recorder = recorder


def current() -> Recorder | None:
    """The recorder of this process; None outside workers."""
    return _recorder


def outermost() -> Recorder | None:
    """The recorder, unless this thread is in a recorded call.

    Object collectives call tensor collectives, and those wait for their work: only the call that
    the learner wrote counts.
    """
    return None if get_ident() in inside else _recorder


@contextmanager
def within_call() -> Iterator[None]:
    """Record none of the calls that this thread makes in the block."""
    thread = get_ident()
    inside.add(thread)
    try:
        yield
    finally:
        inside.remove(thread)


def in_worker() -> bool:
    """True in a process that launch() started."""
    return _recorder is not None


# A DataLoader's worker must not write into the rank's span buffer.
os.register_at_fork(after_in_child=lambda: use(None))


class span:
    """Mark a piece of work in a worker, so that the pictures show it.

    Use as a context manager: ``with span("forward"): ...``. Outside a launched worker it does
    nothing, so the same function runs under torchrun.
    """

    __slots__ = ("_name", "_slot")

    def __init__(self, name: str) -> None:
        self._name = name
        self._slot = 0

    def __enter__(self) -> span:
        if _recorder is not None:
            self._slot = _recorder.begin(Kind.COMPUTE, self._name, time.perf_counter_ns())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _recorder is not None:
            _recorder.end(self._slot)


def report(**values: SupportsFloat) -> None:
    """Report numbers of this moment, for live curves and for `run.reports`.

    ``report(step=step, loss=loss.item())``: each a number, or an array or tensor that holds one.
    Where no rank of `launch` or of a recorded script runs, it does nothing. Of a rank the first
    50,000 numbers are kept. Raises TypeError for what is no number.
    """
    if _recorder is None:
        return
    numbers = {}
    for name, value in values.items():
        try:
            numbers[name[:LONGEST_NAME]] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"report({name}=...) takes one number: {error}") from None
    _recorder.report(numbers)


def batches(fetch: Callable[[Any], T]) -> Callable[[Any], T]:
    """Wrap `__next__` of a DataLoader's iterator: mark the time that it takes as data."""

    @functools.wraps(fetch)
    def fetched(self: Any) -> T:
        recorder, thread = _recorder, get_ident()
        if recorder is None or thread in fetching:
            return fetch(self)
        slot = recorder.begin(Kind.DATA, "DataLoader", time.perf_counter_ns())
        fetching.add(thread)
        try:
            return fetch(self)
        finally:
            fetching.discard(thread)
            recorder.end(slot)

    return fetched


def steps(batches: Iterable[T]) -> Iterator[T]:
    """Iterate over `batches` and mark each turn of the loop as one training step.

    ``for images, labels in steps(loader): ...``. Fetching the batch belongs to its step, and is
    marked as data. Without this, each step of an optimizer ends a training step. Outside a
    launched worker it only iterates.
    """
    source = iter(batches)
    while True:
        recorder, thread = _recorder, get_ident()
        t0_ns = time.perf_counter_ns()
        fetching.add(thread)
        try:
            batch = next(source)
        except StopIteration:
            return
        finally:
            fetching.discard(thread)
        if recorder is None:
            yield batch
            continue
        t1_ns = time.perf_counter_ns()
        recorder.buffer.begin(recorder.lane(), Kind.DATA, NEXT_BATCH, t0_ns, t1_ns, recorder.step)
        slot = recorder.begin_step(t0_ns)
        try:
            yield batch
        finally:
            recorder.end_step(slot, time.perf_counter_ns())
