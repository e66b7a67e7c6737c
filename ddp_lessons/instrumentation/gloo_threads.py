"""Lets a rank leave a gloo group at once, instead of 10 ms later for each other rank.

Runs in workers, called by process_groups.py. gloo has a thread that waits for its connections by
epoll, 10 ms at a time, and closing each of them waits until this thread has come round once more.
Here a timer of Linux's interrupts its wait while the group is left (timer_create(2)): epoll_wait
then returns, and the thread comes round. What torch does is the same, only sooner.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

EVERY = 500_000  # nanoseconds
_SIGNAL = signal.SIGRTMAX - 3 if sys.platform == "linux" else 0  # if nobody else uses it
_MONOTONIC, _TO_THREAD = 1, 4  # CLOCK_MONOTONIC, SIGEV_THREAD_ID
_EPOLL_WAITS = ("232", "281", "22")  # epoll_wait and epoll_pwait of x86-64, epoll_pwait of ARM
_EVENTS, _MILLISECONDS = "0x40", "0xa"  # with which gloo calls it


class _Event(ctypes.Structure):  # sigevent
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_char * 44),
    )


class _Times(ctypes.Structure):  # itimerspec: interval and first time, in seconds and nanoseconds
    _fields_ = (("numbers", ctypes.c_long * 4),)


@contextlib.contextmanager
def woken() -> Iterator[None]:
    """Interrupt the waits of gloo's threads again and again within the block."""
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux" and (threads := list(_waiting())):
            libc = ctypes.CDLL(None)
            if _take_signal(libc):
                for thread in threads:
                    _start_timer(libc, thread, stack)
        yield


def _take_signal(libc: ctypes.CDLL) -> bool:
    """Give the signal a handler that does nothing; False if it has another one.

    The handler stays: without it, a signal that is still on its way would end the process.
    """
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    nothing = ctypes.cast(libc.getppid, ctypes.c_void_p)  # a signal may call it (signal-safety(7))
    before = libc.signal(_SIGNAL, nothing)
    if before in (None, nothing.value):  # None is SIG_DFL
        return True
    libc.signal(_SIGNAL, before)
    return False


def _start_timer(libc: ctypes.CDLL, thread: int, stack: contextlib.ExitStack) -> None:
    timer = ctypes.c_void_p()
    event = _Event(signal=_SIGNAL, notify=_TO_THREAD, thread=thread)
    if libc.timer_create(_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
        stack.callback(libc.timer_delete, timer)
        times = _Times((ctypes.c_long * 4)(0, EVERY, 0, EVERY))
        libc.timer_settime(timer, 0, ctypes.byref(times), None)


def _waiting() -> Iterator[int]:
    """The threads of this process that wait as gloo's do (proc_pid_syscall(5))."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/self/task/{thread}/syscall") as file:
                number, _, _, events, milliseconds, *_ = file.read().split() + [""] * 5
            if number in _EPOLL_WAITS and (events, milliseconds) == (_EVENTS, _MILLISECONDS):
                yield int(thread)
