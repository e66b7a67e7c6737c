"""Watching the ranks of a run from the parent: pump their pipes, see who is stuck, stop them.

`Watch` works in the cell's own thread until every process has ended. It decides only *that* a run
has failed or hangs; `diagnosis.py` says why.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from ddp_lessons import stacks
from ddp_lessons.calls import Calls
from ddp_lessons.crew import Crew
from ddp_lessons.workers import NOTED_OVER, STACK_SIGNAL, Worker

START = 120.0  # seconds that a new process may take until it calls the function
TICK = 0.1  # seconds between two looks at the clock
GRACE = 1.0  # seconds that the others get after the first failure
QUIET = 1.0  # seconds without progress after which to ask whether anything can still move

Ladder = Sequence[tuple[signal.Signals, float]]  # signals, and the seconds each is given
AFTER_FAILURE: Ladder = ((signal.SIGTERM, 0.5), (signal.SIGKILL, 10.0))
AFTER_INTERRUPT: Ladder = ((signal.SIGINT, 2.0), *AFTER_FAILURE)


class Watch:
    """The watch over the ranks of one run; `on_tick` is called about ten times a second."""

    def __init__(self, crew: Crew, on_tick: Callable[[], None]) -> None:
        self._crew = crew
        self._workers = crew.workers
        self._on_tick = on_tick
        self._ticked = 0.0

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.alive]

    def until_ended(self, timeout: float) -> float | None:
        """Watch until every process has ended, then return None.

        After the first failure the others are stopped. Returns the seconds without progress if the
        run was given up as hung: after `timeout`, or sooner where nothing can move any more.
        """
        failed_at: float | None = None
        looked_at = 0.0
        began = time.monotonic()
        while self.alive:
            self.pump(TICK)
            now = time.monotonic()
            quiet = now - max(began, *(worker.moved_at for worker in self._workers))
            if quiet > QUIET / 4:
                self._note_activity()
            if failed_at is None and any(worker.failed for worker in self._workers):
                failed_at = now
            if failed_at is not None:
                if now - failed_at > GRACE:
                    self.stop(AFTER_FAILURE)
            elif quiet > (timeout if self._all_started else max(timeout, START)):
                self._give_up()
                return timeout
            elif quiet > QUIET and now - looked_at > QUIET:
                looked_at = now
                if self._nothing_can_move(timeout):
                    self._give_up()
                    return quiet
        return None

    @property
    def _all_started(self) -> bool:
        return all(w.started_ns is not None or w.exitcode is not None for w in self._workers)

    def pump(self, seconds: float) -> None:
        """Take in what the ranks sent, waiting at most `seconds` for something to come."""
        self._crew.pump(seconds)
        if time.monotonic() - self._ticked > TICK:
            self._ticked = time.monotonic()
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
        for worker in self.alive:
            worker.give_up()

    def take_stacks(self) -> None:
        """Have every rank print its Python stack, also those that are blocked in C++."""
        asked = [w for w in self.alive if w.started_ns is not None and w.outcome is None]
        for worker in asked:
            worker.stack_text = ""
            worker.send_signal(STACK_SIGNAL)
        deadline = time.monotonic() + self._crew.stack_wait
        seen, since = "", time.monotonic()
        while time.monotonic() < deadline:
            self.pump(0.01)
            text = "".join(worker.stack_text for worker in asked)
            if text != seen:
                seen, since = text, time.monotonic()
            answered = all(worker.stack_text or not worker.alive for worker in asked)
            if answered and time.monotonic() - since > self._crew.settle:
                return

    def _give_up(self) -> None:
        """Stop a run that hangs, once it is known of each rank whether it is busy."""
        self._note_activity()
        deadline = time.monotonic() + 2 * NOTED_OVER
        while any(w.activity is None for w in self.alive) and time.monotonic() < deadline:
            self.pump(TICK)
            self._note_activity()
        self.stop(AFTER_FAILURE)

    def _note_activity(self) -> None:
        for worker in self.alive:
            worker.note_activity()

    def _nothing_can_move(self, timeout: float) -> bool:
        """True if every rank waits, idle, in a call of torch.distributed, and none can be met.

        Where ranks share few cores, one that computes may hardly get any of them: that is not idle.

        A rank that has ended meets nobody; nor do ranks that wait for each other in a ring. Only
        where a call gives up by itself before our timeout, that is the learner's to see.
        """
        waiting = self.alive
        if any(w.started_ns is None for w in waiting):
            return False
        if any(w.own_timeout is not None and w.own_timeout < timeout for w in waiting):
            return False
        if any(worker.activity != "idle" or worker.queued for worker in waiting):
            return False
        moved_at = max(worker.moved_at for worker in waiting)
        self.take_stacks()
        if self.alive != waiting or max(worker.moved_at for worker in waiting) != moved_at:
            return False
        if not all(stacks.all_wait_for_others(worker.stack_text) for worker in waiting):
            return False
        return self._stuck_for_good()

    def _stuck_for_good(self) -> bool:
        found = [(w.rank, stacks.position(stacks.parse(w.stack_text)).call) for w in self.alive]
        waiting = {rank: call for rank, call in found if call is not None}
        calls = Calls(self._crew.spans())
        if any(w.sending for w in self.alive) and not all(map(calls.stands_recorded, waiting)):
            return False  # what DDP sends by itself is still on its way
        return calls.stuck_for_good(waiting)
