"""Processes that a forkserver has forked beforehand, so that the next launch need not wait for it.

Runs in the parent, called by forkserver.py, which lets one thread at a time in. What a spare does
is in worker/spare.py.
"""

from __future__ import annotations

import collections
import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons.system import memory
from ddp_lessons.system.notebook import in_kernel

if TYPE_CHECKING:
    from ddp_lessons.processes.rank_process import Spare

LAUNCHES = 3  # as many of the last ones count
MOST = 64
MEMORY = 16_000_000  # bytes of a spare's own
DESCRIPTORS = 3  # that the parent holds of each
SHARE = 8  # at most one part in so many of what is left is for spares


class Spares:
    """The spares of one forkserver."""

    def __init__(self, server: Any) -> None:
        self._server = server  # of multiprocessing
        self._waiting: list[Spare] = []
        self._recent: collections.deque[int] = collections.deque(maxlen=LAUNCHES)

    @property
    def pids(self) -> set[int | None]:
        """Their process ids; waits until they have been forked."""
        return {spare.known_pid() for spare in self._waiting}

    def take(self, become: Callable[[Spare], bool]) -> Spare | None:
        """A spare that has `become` a rank; None if there is none that can."""
        while self._waiting:
            spare = self._waiting.pop(0)
            try:
                if spare.usable and become(spare):
                    return spare
            except BaseException:
                spare.give_up()
                raise
            spare.give_up()
        return None

    def note(self, ranks: int) -> None:
        """Note that a launch had so many ranks."""
        self._recent.append(ranks)

    def fill(self, written: bytes) -> None:
        """Have as many as one of the last launches had ranks, if that is allowed.

        Only asks for them: the forkserver forks them while this process goes on, and they make
        their own copies of the pages that ranks have `written`.
        """
        from ddp_lessons.processes.rank_process import Spare

        for spare in [spare for spare in self._waiting if not spare.usable]:
            self._waiting.remove(spare)
            spare.give_up()
        wanted = min(max(self._recent), most())
        try:
            while len(self._waiting) < wanted:
                self._waiting.append(Spare(self._server, written))
        except OSError:
            self.give_up()

    def give_up(self) -> int:
        """End them; how many there were."""
        given_up, self._waiting = self._waiting, []
        for spare in given_up:
            spare.give_up()
        return len(given_up)

    def forget(self) -> None:
        """In a forked copy of their owner: they, too, end when their owner does."""
        for spare in self._waiting:
            spare.forget()
        self._waiting = []


def most() -> int:
    """How many this process may keep: in a kernel, what memory and descriptors easily allow.

    A script seldom launches again. The environment variable DDP_LESSONS_SPARES sets another number.
    """
    told = os.environ.get("DDP_LESSONS_SPARES", "")
    if told.isdecimal():
        return int(told)
    if not in_kernel():
        return 0
    of_memory = memory.available_memory() // SHARE // MEMORY
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    of_descriptors = (soft - len(os.listdir("/proc/self/fd"))) // SHARE // DESCRIPTORS
    return max(0, min(MOST, of_memory, of_descriptors))
