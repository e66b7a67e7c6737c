"""Moves the warm forkserver's memory into huge pages: to fork a rank and to end it is quicker then.

Runs in the warm forkserver. For each page that a rank shares with it Linux copies an entry when the
rank is forked, and removes it when the rank ends; a huge page, of 2 MB, is one entry. To move all
memory takes some tenths of a second, so the parent asks for it, by a signal, when a launch is over
(processes/forkserver.py). Where Linux cannot (before 6.1), nothing happens.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from types import FrameType
from typing import Any

from ddp_lessons.system.memory import private_memory

REQUEST = signal.SIGUSR1
SIZE = 2 << 20  # bytes of a huge page, on x86-64 and with 4 KB pages on ARM
_COLLAPSE = 25  # MADV_COLLAPSE (madvise(2))
_before: Any = None  # what the signal did in this process before


def await_request() -> None:
    """Move this process's memory when REQUEST comes."""
    global _before
    if sys.platform == "linux":
        _before = signal.signal(REQUEST, _collapse)


def forget_request() -> None:
    """In a rank: have REQUEST do what it did before."""
    if _before is not None:
        signal.signal(REQUEST, _before)


def _collapse(_number: int, _frame: FrameType | None) -> None:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, end in list(private_memory()):
        start, end = -(-start // SIZE) * SIZE, end // SIZE * SIZE
        if start < end:
            libc.madvise(start, end - start, _COLLAPSE)  # as far as it can
