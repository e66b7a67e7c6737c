"""What Linux passes on to the processes that a process starts, other than its variables.

A rank is a child of the forkserver, which may have begun before the notebook or script changed any
of this. Elsewhere ranks are children of the process that launches, and have it anyway.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class ProcessAttributes(NamedTuple):
    """Some attributes of a process. `limits` maps RLIMIT_NOFILE and others to (soft, hard)."""

    umask: int
    niceness: int
    processors: frozenset[int]
    limits: Mapping[int, tuple[int, int]]

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
        for kind, limit in self.limits.items():
            if limit != own.limits.get(kind):
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(kind, limit)


def taken() -> ProcessAttributes | None:
    """Those of this process; None if it is not on Linux."""
    if sys.platform != "linux":
        return None
    return ProcessAttributes(
        _umask(),
        os.getpriority(os.PRIO_PROCESS, 0),
        frozenset(os.sched_getaffinity(0)),
        dict(_limits()),
    )


def _umask() -> int:
    """The umask. Where /proc does not tell it, it can only be read by setting another."""
    found = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is not None:
        return int(found[1], 8)
    umask = os.umask(0o077)  # which gives nothing away, should another thread make a file now
    os.umask(umask)
    return umask


def _limits() -> Iterable[tuple[int, tuple[int, int]]]:
    for kind in {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}:
        with contextlib.suppress(OSError, ValueError):  # this system has no such limit
            yield kind, resource.getrlimit(kind)
