"""Memory: how much can still be used, whom the kernel ends first when it runs out, and that it did.

Within a container, as on Binder, its limits count, not the machine's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FIRST_TO_END = "1000"  # the highest oom_score_adj
_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # of the machine, of this container


class _Files(NamedTuple):
    """Where a version of Linux's control groups tells about memory."""

    root: Path
    limit: str
    usage: str
    cache: str  # the line of memory.stat with what is given up before memory runs out


_VERSION_1 = _Files(
    Path("/sys/fs/cgroup/memory"),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_VERSION_2 = _Files(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")
_GROUPS = Path("/proc/self/cgroup")


def prefer_as_oom_victim() -> None:
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


def available_memory() -> int:
    """Bytes of memory that can still be used, within the limits of a container."""
    import psutil

    machine = psutil.virtual_memory()
    return max(0, min([int(machine.available), *_left_within_limits(int(machine.total))]))


def _left_within_limits(total: int) -> Iterator[int]:
    """What each control group above this process leaves, if its limit is below `total`."""
    with contextlib.suppress(OSError):
        for line in _GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield from _left(_VERSION_1, path, total)
            elif not controllers:
                yield from _left(_VERSION_2, path, total)


def _left(files: _Files, path: str, total: int) -> Iterator[int]:
    """From the process's own group up to the root, where a container sees its own."""
    own = files.root / path.lstrip("/")
    for group in (own, *own.parents):
        if group.is_relative_to(files.root):
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
                limit = int((group / files.limit).read_text())
                if limit < total:
                    usage = int((group / files.usage).read_text())
                    yield limit - usage + _cache(group / "memory.stat", files.cache)


def _cache(file: Path, name: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
