"""Watches the ranks of a run: reads their pipes, notices failures and hangs, stops them.

launcher/api.py runs the `Watchdog` in the parent, in the cell's own thread, until every process has
ended. It decides only *that* a run has failed or hangs; `diagnosis/diagnose.py` says why.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence

from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.processes.base import CPU_SAMPLE_SECONDS, Worker, WorkerGroup
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.wire import stacks
from ddp_lessons.wire.messages import STACK_SIGNAL

START = 120.0  # seconds that a new process may take until it calls the function
END = 30.0  # seconds that it may take to end, after that, while it waits for a processor
TICK = 0.1  # seconds between two checks of the clock
GRACE = 1.0  # seconds that the others get after the first failure, to fail by themselves
QUIET = 1.0  # seconds without progress after which to ask whether anything can still move
LOOKING = 5  # times the duration of that check pass before the next one
FROZEN = 2.0  # seconds in which this thread did not run: then everything was frozen
SUSPECT = 5.0  # seconds without progress after which the panel says so
STARVED = 10  # times as long may take what waits for a processor

Ladder = Sequence[tuple[signal.Signals, float]]  # signals, and the seconds each is given
AFTER_FAILURE: Ladder = ((signal.SIGTERM, 0.5), (signal.SIGKILL, 10.0))
AFTER_INTERRUPT: Ladder = ((signal.SIGINT, 2.0), *AFTER_FAILURE)


class Watchdog:
    """Watches the ranks of one run.

    It calls `on_tick` about ten times a second, with its suspicion as text, "" mostly.
    """

    def __init__(
        self, group: WorkerGroup, on_tick: Callable[[str], None], interrupts: Interrupts
    ) -> None:
        self._group = group
        self._interrupts = interrupts
        self._workers = group.workers
        self._on_tick = on_tick
        self._ticked = 0.0
        self._suspicion = ""
        self._quiet = 0.0  # seconds without progress
        self._starved = 0.0  # and those of them in which a rank waited for a processor

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.alive]

    def until_ended(self, timeout: float) -> float | None:
        """Watch until every process has ended, then return None.

        After the first failure it stops the others, a moment later. Returns the seconds without
        progress if the run was given up as hung: after `timeout`, or sooner if nothing can move
        any more. While a rank waits for a processor the moment and the timeout stand still, but at
        most for nine times their length. After a freeze of everything, as in a paused container,
        the timeout begins anew. Raises KeyboardInterrupt; then the caller must stop the ranks.
        """
        grace: _Grace | None = None
        look_at = 0.0
        began = time.monotonic()
        sleep = _Sleep()
        while self.alive:
            self.pump(TICK)
            self._interrupts.check()
            now = time.monotonic()
            if sleep.seconds() > FROZEN + self._group.stack_wait:
                began = now
            quiet = now - max(began, *(worker.moved_at for worker in self._workers))
            if quiet > QUIET / 4:
                self._note_activity()
            self._count(quiet)
            patience = self._patience(timeout)
            suspect = quiet > SUSPECT
            self._suspicion = _suspicion(quiet, self._starved, patience) if suspect else ""
            if grace is None and any(worker.failed for worker in self._workers):
                grace = _Grace(now)
            if grace is not None:
                self._note_activity()
                if grace.is_over(now, self._kept()):
                    self.stop(AFTER_FAILURE)
            elif quiet > min(patience + self._starved, STARVED * patience):
                self._give_up()
                return timeout if patience == timeout else float(round(quiet))
            elif quiet > QUIET and now > look_at and self._all_seem_to_wait(timeout):
                if self._nothing_can_move():
                    self._give_up()
                    return quiet
                ended = time.monotonic()
                look_at = ended + max(QUIET, LOOKING * (ended - now))
        return None

    def _count(self, quiet: float) -> None:
        """Note how long no rank has made progress, and for how long one was kept from it."""
        if quiet < self._quiet:
            self._quiet = self._starved = 0.0
        self._starved += self._starving() * (quiet - self._quiet)
        self._quiet = quiet

    def _starving(self) -> float:
        """The share of the time in which the worst off of the ranks waits for a processor."""
        return max((worker.starved for worker in self.alive), default=0.0)

    def _kept(self) -> float:
        """The share of the time in which some rank is kept from failing by itself."""
        starts = any(worker.started_ns is None for worker in self.alive)
        return 1.0 if starts else self._starving()

    def _patience(self, timeout: float) -> float:
        """Seconds without progress after which the run hangs.

        A rank may take long to start and, where it gets no processor, to end.
        """
        if any(w.started_ns is None and w.exitcode is None for w in self._workers):
            return max(timeout, START)
        if any(w.queued and w.outcome is not None for w in self.alive):
            return max(timeout, END)
        return timeout

    def pump(self, seconds: float) -> None:
        """Take in what the ranks sent, waiting at most `seconds` for something to come."""
        self._group.pump(seconds)
        if time.monotonic() - self._ticked > TICK:
            self._ticked = time.monotonic()
            self._on_tick(self._suspicion)

    def stop(self, ladder: Ladder) -> None:
        """Ask every rank where it is, then end it: signal after signal, until all are gone.

        If Stop is pressed once more meanwhile, they get SIGKILL at once.
        """
        self.take_stacks()
        for worker in self.alive:
            worker.stopped = True
        for number, patience in ladder:
            if self._interrupts.hurry and number != signal.SIGKILL:
                continue
            self._send_all(number)
            deadline = time.monotonic() + patience
            while self.alive and time.monotonic() < deadline:
                self.pump(0.02)
                if self._interrupts.hurry and number != signal.SIGKILL:
                    break
        for worker in self.alive:
            worker.give_up()

    def _send_all(self, number: signal.Signals) -> None:
        """Send every rank a signal, all of them suspended meanwhile.

        Else the first would end, and others could note that their calls with it have ended, too.
        """
        alive = self.alive
        for worker in alive:
            worker.send_signal(signal.SIGSTOP)
        for worker in alive:
            if number == signal.SIGKILL:
                worker.signal_group(number)
                worker.send_signal(number)  # it may have no group of its own yet
            elif worker.started_ns is None:  # an interrupt would print where its imports are
                worker.send_signal(signal.SIGTERM)
            else:
                worker.send_signal(number)
        for worker in alive:
            worker.send_signal(signal.SIGCONT)

    def take_stacks(self) -> None:
        """Have every rank print its Python stack, also those that are blocked in C++.

        One that gets no processor has up to ten times as long.
        """
        workers = [worker for worker in self.alive if worker.started_ns is not None]
        for worker in workers:
            worker.stack_text = ""
            worker.send_signal(STACK_SIGNAL)
        share = max((worker.starved for worker in workers), default=0.0)
        patience = self._group.stack_wait * (1 + (STARVED - 1) * share)
        deadline = time.monotonic() + patience
        seen, since = "", time.monotonic()
        while time.monotonic() < deadline and not self._interrupts.hurry:
            self.pump(0.01)
            text = "".join(worker.stack_text for worker in workers)
            if text != seen:
                seen, since = text, time.monotonic()
            answered = all(
                stacks.is_whole(worker.stack_text)
                or worker.activity == "suspended"
                or not worker.alive
                for worker in workers
            )
            if answered and time.monotonic() - since > self._group.settle:
                return

    def _give_up(self) -> None:
        """Stop a run that hangs, once the activity of each rank is known."""
        self._note_activity()
        deadline = time.monotonic() + 2 * CPU_SAMPLE_SECONDS
        while any(w.activity is None for w in self.alive) and time.monotonic() < deadline:
            self.pump(TICK)
            self._note_activity()
        self.stop(AFTER_FAILURE)

    def _note_activity(self) -> None:
        for worker in self.alive:
            worker.note_activity()

    def _all_seem_to_wait(self, timeout: float) -> bool:
        """True if no rank starts, computes, or waits for a processor, as last noted.

        False if a call gives up by itself before our timeout: the learner should see that instead.
        """
        waiting = self.alive
        return (
            all(w.started_ns is not None and w.activity == "idle" and not w.queued for w in waiting)
            and not any(own.seconds < timeout for w in waiting for own in w.told.timeouts)
        )  # fmt: skip

    def _nothing_can_move(self) -> bool:
        """True if every rank waits in a call of torch.distributed that can never return.

        Only the ranks' recorded calls can prove it (`Calls.stuck_for_good`): a rank that has ended
        meets nobody, nor do ranks that wait for each other in a ring. Everything else can only
        speak against it, in case a call was not recorded: `_all_seem_to_wait`; data is on the way;
        a thread may call something. To see the threads, the ranks are asked for their stacks,
        which may disturb them, so this comes last.
        """
        waiting = self.alive
        moved_at = max(worker.moved_at for worker in waiting)
        lossy = (worker.rank for worker in self._workers if worker.dropped())
        calls = Calls(self._group.spans(), lossy)
        if not calls.stuck_for_good(worker.rank for worker in waiting):
            return False
        if self._group.have_data_on_the_way():
            return False
        self.take_stacks()
        if self.alive != waiting or max(worker.moved_at for worker in waiting) != moved_at:
            return False
        dumps = [worker.stack_text for worker in waiting]
        return all(stacks.is_whole(dump) and stacks.all_wait_for_others(dump) for dump in dumps)


class _Grace:
    """The moment that the others get after a failure, so that each can tell its own.

    Time in which one of them starts or waits for a processor does not count, up to a limit.
    """

    def __init__(self, now: float) -> None:
        self._began = self._looked = now
        self._had = 0.0

    def is_over(self, now: float, kept: float) -> bool:
        """True once they have had it; `kept` is the share of the last time that does not count."""
        self._had += (1 - kept) * (now - self._looked)
        self._looked = now
        return self._had > GRACE or now - self._began > STARVED * GRACE


class _Sleep:
    """Measures how long this thread did not run; by itself it waits only a tenth of a second."""

    def __init__(self) -> None:
        self._looked, self._ran = time.monotonic(), time.thread_time()

    def seconds(self) -> float:
        """The seconds since the last call in which the thread did not run."""
        now, ran = time.monotonic(), time.thread_time()
        slept = (now - self._looked) - (ran - self._ran)
        self._looked, self._ran = now, ran
        return slept


def _suspicion(quiet: float, starved: float, timeout: float) -> str:
    waited = f", of which one waited {starved:.0f} s for a processor" if starved >= 1 else ""
    limit = f"{timeout:g} s without those" if waited else f"{timeout:g} s"
    given_up = f"; after {limit} the run is given up" if timeout < math.inf else ""
    return f"no rank has made progress for {quiet:.0f} s{waited}{given_up}"
