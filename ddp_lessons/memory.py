"""What the kernel says of processes that it killed because memory had run out. In the parent."""

from __future__ import annotations

import contextlib

_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # of the machine, of this container


def kills() -> int | None:
    """How many it has killed so far; None where that cannot be read.

    The counts overlap and stand for no number of processes: compare two readings.
    """
    found = []
    for path in _COUNTS:
        with contextlib.suppress(OSError), open(path) as file:
            lines = (line.split() for line in file)
            found += [int(words[1]) for words in lines if words[0] == "oom_kill"]
    return sum(found) if found else None
