"""Watching the ranks of a run from the parent: pump their pipes, see who is stuck, stop them.

`Watch` works in the cell's own thread until every process has ended. It decides only *that* a run
has failed or hangs; `diagnosis.py` says why.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from types import FrameType

from ddp_lessons import stacks
from ddp_lessons.diagnosis import waits_for_others
from ddp_lessons.processes import STACK_SIGNAL, WorkerProcess

START = 120.0  # seconds that a new process may take until it calls the function
TICK = 0.1  # seconds between two looks at the clock
GRACE = 1.0  # seconds that the others get after the first failure
QUIET = 1.0  # seconds without progress after which a rank that has ended is missed
STACK_WAIT = 0.5  # seconds that a rank has to print its stack
SETTLE = 0.03  # seconds of silence after which a stack is taken to be complete

Ladder = Sequence[tuple[signal.Signals, float]]  # signals, and the seconds each is given
AFTER_FAILURE: Ladder = ((signal.SIGTERM, 0.5), (signal.SIGKILL, 10.0))
AFTER_INTERRUPT: Ladder = ((signal.SIGINT, 2.0), *AFTER_FAILURE)


class Watch:
    """The watch over the ranks of one run; `on_tick` is called about ten times a second."""

    def __init__(self, workers: Sequence[WorkerProcess], on_tick: Callable[[], None]) -> None:
        self._workers = workers
        self._on_tick = on_tick
        self._polled = 0.0

    @property
    def alive(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.alive]

    def until_ended(self, timeout: float) -> float | None:
        """Watch until every process has ended, then return None.

        After the first failure the others are stopped. Returns the seconds without progress if the
        run was given up as hung: after `timeout`, or sooner where a rank that has ended is awaited.
        """
        failed_at: float | None = None
        missed_at = 0.0
        began = time.monotonic()
        while self.alive:
            self.pump(TICK)
            now = time.monotonic()
            quiet = now - max(began, *(worker.moved_at for worker in self._workers))
            if failed_at is None and any(worker.failed for worker in self._workers):
                failed_at = now
            if failed_at is not None:
                if now - failed_at > GRACE:
                    self.stop(AFTER_FAILURE)
            elif quiet > (timeout if self._all_started else max(timeout, START)):
                self.stop(AFTER_FAILURE)
                return timeout
            elif quiet > QUIET and now - missed_at > QUIET:
                missed_at = now
                if self._someone_ended_is_awaited(timeout):
                    self.stop(AFTER_FAILURE)
                    return quiet
        return None

    @property
    def _all_started(self) -> bool:
        return all(w.started_ns is not None or w.exitcode is not None for w in self._workers)

    def pump(self, seconds: float) -> None:
        """Take in what the ranks sent, waiting at most `seconds` for something to come."""
        sources = {r: worker for worker in self.alive for r in worker.readers}
        ends = {worker.sentinel: worker for worker in self.alive}
        ready = wait([*sources, *ends], timeout=seconds)
        for source in ready:
            if source in sources:
                sources[source].read(source)
        # A child that a spawned rank forked keeps its sentinel open: look at all now and then.
        everyone = time.monotonic() - self._polled > TICK
        for worker in self.alive if everyone else [ends[s] for s in ready if s in ends]:
            worker.poll()
        if everyone:
            for worker in self.alive:
                worker.look_at_tape()
            self._polled = time.monotonic()
            self._on_tick()

    def stop(self, ladder: Ladder) -> None:
        """Ask every rank where it is, then end it: signal after signal, until all are gone."""
        self.take_stacks()
        for worker in self.alive:
            worker.stopped = True
        for number, patience in ladder:
            for worker in self.alive:
                worker.signal_group(number) if number == signal.SIGKILL else worker.send_signal(
                    number
                )
            deadline = time.monotonic() + patience
            while self.alive and time.monotonic() < deadline:
                self.pump(0.02)

    def take_stacks(self) -> None:
        """Have every rank print its Python stack, also those that are blocked in C++."""
        asked = [w for w in self.alive if w.started_ns is not None and w.outcome is None]
        for worker in asked:
            worker.stack_text = ""
            worker.send_signal(STACK_SIGNAL)
        deadline = time.monotonic() + STACK_WAIT
        seen, since = "", time.monotonic()
        while time.monotonic() < deadline:
            self.pump(0.01)
            text = "".join(worker.stack_text for worker in asked)
            if text != seen:
                seen, since = text, time.monotonic()
            answered = all(worker.stack_text or not worker.alive for worker in asked)
            if answered and time.monotonic() - since > SETTLE:
                return

    def _someone_ended_is_awaited(self, timeout: float) -> bool:
        """True if a rank has ended and every other waits, idle, in a call of torch.distributed.

        Such a run can never go on. Only if the learner gave the process group a timeout of its own
        that ends before ours, the wait will end by itself, and is theirs to see.
        """
        waiting = self.alive
        if len(waiting) == len(self._workers) or any(w.started_ns is None for w in waiting):
            return False
        if any(w.group_timeout is not None and w.group_timeout < timeout for w in waiting):
            return False
        before = [worker.cpu_seconds() for worker in waiting]
        self.take_stacks()
        if self.alive != waiting:
            return False
        used = [w.cpu_seconds() - b for w, b in zip(waiting, before, strict=True)]
        return max(used) < 0.02 and all(
            waits_for_others(stacks.parse(worker.stack_text)) for worker in waiting
        )


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold the interrupt back until the block has ended; a second one gets through at once.

    For moments at which a KeyboardInterrupt would leave a process behind that nobody knows.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers interrupts to the main thread only
        return
    pending: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, _: FrameType | None) -> None:
        if pending:
            raise KeyboardInterrupt
        pending.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending:  # also instead of an error, which the interrupt may have caused
            signal.raise_signal(signal.SIGINT)
