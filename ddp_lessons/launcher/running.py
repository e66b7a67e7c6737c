"""`RunningRun`: a run that goes on while the notebook is free, from `launch(..., wait=False)`.

Runs in the parent. launcher/api.py has started the ranks, in the thread of the cell; a thread of
this module watches them. It prints nothing: `wait` and `stop` do, in the cell that calls them.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from ddp_lessons.errors import show_without_frames
from ddp_lessons.run import Run
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.text import count


class RunningRun:
    """A run whose ranks are at work. It ends with this process at the latest.

    Attributes
    ----------
    name : str
        The name of the function.
    world_size : int
        The number of ranks.
    """

    def __init__(
        self,
        name: str,
        world_size: int,
        watch: Callable[[], Run],
        show: Callable[[Run], None],
        interrupts: Interrupts,
        *,
        check: bool,
    ) -> None:
        self.name = name
        self.world_size = world_size
        self._show, self._interrupts = show, interrupts
        self._check = check
        self._shown = False
        self._run: Run | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()  # as an exception may end a thread's join() for good
        self._thread = threading.Thread(
            target=self._work, args=(watch,), name=f"launch of {name}", daemon=True
        )
        atexit.register(self._end)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether all ranks have ended."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until all ranks have ended, print their output, and return the record of the run.

        Raises TimeoutError after `timeout` seconds; the run goes on. Raises what `launch` raises if
        a rank failed, unless `launch` was called with ``check=False``. The Stop button ends the
        run. The output is printed once.
        """
        self._await_end(timeout)
        if not self.done:
            raise TimeoutError(f"{self.name} still runs after {timeout:g} s; wait() waits on.")
        run = self._ended()
        if self._check:
            run.raise_for_failure()
        return run

    def stop(self) -> Run:
        """End the run, as the Stop button does; print and return what came of it.

        The Stop button, pressed meanwhile, ends it at once.
        """
        if not self.done:
            self._interrupts.count += 1
        self._await_end()
        return self._ended()

    def _await_end(self, timeout: float | None = None) -> None:
        """Wait until the run has ended: at most for `timeout` seconds, unless it is to end.

        Raises KeyboardInterrupt once the run that it ended has ended and is shown.
        """
        try:
            with self._interrupts.counted():
                self._over.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
                if self._interrupts.count:
                    self._over.wait()
                if self.done:
                    self._thread.join()  # which holds the ranks' processes until then
        except KeyboardInterrupt as stopped:
            show_without_frames(stopped)
            if self.done:
                self._ended()
            raise

    def _work(self, watch: Callable[[], Run]) -> None:
        """Watch the ranks, in a thread. Only it holds `watch`, and so the ranks' processes."""
        try:
            self._run = watch()
        except BaseException as error:  # a fault of ours: `wait` raises it
            self._error = error
        atexit.unregister(self._end)
        self._over.set()

    def _end(self) -> None:
        self._interrupts.count += 1
        self._over.wait()

    def _ended(self) -> Run:
        if self._error is not None:
            raise self._error
        assert self._run is not None
        if not self._shown:
            self._shown = True
            self._show(self._run)
        return self._run

    def __repr__(self) -> str:
        now = "ended: wait() returns its record" if self.done else "running"
        return f"Run of {self.name} on {count(self.world_size, 'rank')}, {now}"
