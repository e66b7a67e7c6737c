"""Holding a notebook's interrupt back for a moment. In the parent, in the thread of the cell."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


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
