"""Writes one thing after the other, whichever threads and signal handlers want to write.

Used in ranks, for their messages and for the facts of a script.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class InTurn:
    """Calls functions one at a time, and returns when they are done.

    A signal handler may interrupt a thread in such a function, and want to write, too. What it
    gives is then called when the handler has returned and that function is done.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = False

    def __call__(self, write: Callable[[], None]) -> None:
        self._waiting.append(write)
        with self._lock:
            while self._waiting and not self._busy:  # else a handler interrupted this thread
                self._busy = True
                try:
                    if self._waiting:  # a handler may have come just before
                        self._waiting.popleft()()
                finally:
                    self._busy = False
