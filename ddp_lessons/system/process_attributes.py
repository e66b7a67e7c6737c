"""What Linux passes on to the processes that a process starts, other than its variables.

A rank is a child of the forkserver, which may have begun before the notebook or script changed any
of this. Elsewhere ranks are children of the process that launches, and have it anyway.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class ProcessAttributes(NamedTuple):
    """Some attributes of a process. `limits` maps names as RLIMIT_NOFILE to (soft, hard)."""

    umask: int
    niceness: int
    processors: frozenset[int]
    limits: Mapping[str, tuple[int, int]]

    def take_over(self) -> None:
        """Set what is otherwise in this process, as far as it may: a hard limit cannot rise."""
        own = taken()
        if own is None or own == self:
            return
        os.umask(self.umask)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, self.niceness)
        with contextlib.suppress(OSError):  # processors that this process must not use
            os.sched_setaffinity(0, self.processors)
        for name, limit in self.limits.items():
            if limit != own.limits.get(name):
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(getattr(resource, name), limit)


def taken() -> ProcessAttributes | None:
    """Those of this process; None if it is not on Linux."""
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return ProcessAttributes(
        int(status.partition("\nUmask:")[2].split(maxsplit=1)[0], 8),
        os.getpriority(os.PRIO_PROCESS, 0),
        frozenset(os.sched_getaffinity(0)),
        {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if "RLIMIT_" in n},
    )
