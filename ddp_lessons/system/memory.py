"""Memory: how much is left, a file in it, which process the OOM killer takes first.

Parents and engines ask; ranks offer themselves to the OOM killer. Within a container, as on Binder,
its limits count, not the machine's memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FIRST_TO_END = "1000"  # the highest oom_score_adj
_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # of the machine, of this container


class _Files(NamedTuple):
    """The files in which a version of Linux's control groups reports memory."""

    root: Path
    limit: str
    usage: str
    cache: str  # the line of memory.stat that counts what the kernel can still reclaim


_VERSION_1 = _Files(
    Path("/sys/fs/cgroup/memory"),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_VERSION_2 = _Files(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")
_GROUPS = Path("/proc/self/cgroup")


def prefer_as_oom_victim() -> None:
    """Have the kernel kill this process before the notebook's if memory runs out (proc(5))."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # not Linux
        file.write(_FIRST_TO_END)


def kills() -> int | None:
    """How often the kernel has killed for want of memory so far; None if that cannot be read.

    The counts overlap, so the sum is no number of processes: compare two readings.
    """
    counts = []
    for path in _COUNTS:
        with contextlib.suppress(OSError), open(path) as file:
            lines = (line.split() for line in file)
            counts += [int(words[1]) for words in lines if words[0] == "oom_kill"]
    return sum(counts) if counts else None


def memory_file() -> int:
    """The descriptor of a new file without a name in the file system, in memory where possible."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ddp_lessons")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def private_memory() -> Iterator[tuple[int, int]]:
    """Where the memory of this process that is of no file starts and ends (proc_pid_maps(5))."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, access, _, _, inode, *_ = line.split()
            if access == "rw-p" and inode == "0":
                start, end = (int(address, 16) for address in span.split("-"))
                yield start, end


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
    """What each group leaves, from the process's own up to the root, which may be a container's."""
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
