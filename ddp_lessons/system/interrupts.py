"""Counts a notebook's interrupts during a launch, and raises them only where that is safe.

Runs in the parent, in the thread of the cell, used by launcher/. A KeyboardInterrupt at an
arbitrary line could leave an unknown process behind, or lose the output of the ranks.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """How often the launch was interrupted so far."""

    def __init__(self) -> None:
        self.count = 0
        self._raised: BaseException | None = None
        self._before: Any = None

    @property
    def hurry(self) -> bool:
        """True if Stop was pressed more than once: end the ranks without waiting."""
        return self.count > 1

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was an interrupt; or what the learner's handler raised.

        Call it where the launch can be stopped.
        """
        if self.count:
            raise self._raised or KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It calls the learner's own, if there is one, which decides."""
        if self._is_pythons_or_ours(self._before):
            self.count += 1
        if self._before is signal.default_int_handler:
            return
        try:
            self._before(number, frame)
        except BaseException as error:
            self.count += 1
            self._raised = error

    def _is_pythons_or_ours(self, handler: Any) -> bool:
        """True for Python's handler, a notebook's in an async cell, and an outer launch's."""
        return (
            handler is signal.default_int_handler
            or isinstance(getattr(handler, "__self__", None), Interrupts)
            or str(getattr(handler, "__module__", "")).partition(".")[0] == "ipykernel"
        )

    @contextlib.contextmanager
    def counted(self) -> Iterator[Interrupts]:
        """Count the interrupts in the block; raise KeyboardInterrupt after it if there were any."""
        counted = self.count
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield self  # Python calls handlers in the main thread only
            return
        self._before = before
        signal.signal(signal.SIGINT, self.note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
        if self.count > counted:
            self.check()
