"""How many ranks the memory of this machine carries.

Runs in the parent: `launch` asks before it starts ranks, `ddp-lessons doctor` tells. Within a
container, as on Binder, its limits count, not the machine's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from ddp_lessons.errors import BadLaunch
from ddp_lessons.wording import count


class Needs(NamedTuple):
    """Bytes of memory of its own that a rank takes. Measured with torch 2.13 on Linux."""

    least: int  # to join a group and leave it: 14 MB forked, 145 MB with an interpreter of its own
    usual: int  # to train a small model with DDP


NEEDS = {"forkserver": Needs(14 << 20, 60 << 20), "spawn": Needs(145 << 20, 220 << 20)}


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


def check(ranks: int, start_method: str) -> str:
    """A notice if memory may run out with so many ranks, else "".

    Raises
    ------
    BadLaunch
        They need more memory than is left, whatever they do.
    """
    available, needs = available_memory(), NEEDS[start_method]
    if ranks * needs.usual <= available:
        return ""
    least, free, fit = _text(ranks * needs.least), _text(available), available // needs.usual
    if ranks * needs.least > available:
        raise BadLaunch(
            f"{count(ranks, 'rank')} would take at least {least} of memory, and {free} are left. "
            + (f"Launch fewer: about {fit} that train a small model. " if fit else "")
            + "Other notebooks hold memory, too: shut down the kernels that you no longer need."
        )
    return (
        f"Notice: {count(ranks, 'rank')} will take {least} of memory, more if they train, and "
        f"{free} are left. Should it run out, launch {f'about {fit}' if fit else 'one'}."
    )


def available_memory() -> int:
    """Bytes of memory that can still be used, within the limits of a container."""
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


def _text(size: int) -> str:
    return f"{size / 2**20:.0f} MB" if size < 2**30 else f"{size / 2**30:.1f} GB"
