"""Memory that runs out: whom the kernel ends first (said in the worker), and that it did."""

from __future__ import annotations

import contextlib

_FIRST_TO_END = "1000"  # the highest oom_score_adj
_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # of the machine, of this container


def offer_this_process() -> None:
    """Have the kernel end this process first when memory runs out, not the notebook's (proc(5))."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # not Linux
        file.write(_FIRST_TO_END)


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
