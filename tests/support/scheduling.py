"""For tests that must hold on a busy machine: how long a process got no processor, and whose turn.

A sleep of one rank is no order: the other one may get no processor for longer.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from pathlib import Path

from ddp_lessons.system.host import processor_ns

ASLEEP = 0.1  # s
LIMIT = 120.0  # s


def queued_seconds(pid: int) -> float:
    """How long a process's threads have waited for a processor, ready to run (Linux; else 0).

    The kernel adds a wait when it is over (kernel documentation, sched-stats).
    """
    total_ns = 0
    for file in glob.iglob(f"/proc/{pid}/task/*/schedstat"):
        with contextlib.suppress(OSError, ValueError):
            total_ns += processor_ns(file)[1]
    return total_ns / 1e9


def about_to_wait(file: Path) -> None:
    """Say, in a file that another rank knows, that this process next waits for that rank."""
    new = file.with_suffix(".new")
    new.write_text(f"{os.getpid()}")
    new.rename(file)


def until_it_waits(file: Path) -> None:
    """Return when the process that wrote the file sleeps: its main thread, for a while.

    A thread that is ready to run and only gets no processor does not sleep.
    """
    began = awake = time.monotonic()
    while time.monotonic() < awake + ASLEEP:
        time.sleep(0.002)
        if not (file.exists() and _sleeps(file.read_text())):
            awake = time.monotonic()
        assert awake < began + LIMIT, f"{file.name}: it did not come to wait"


def _sleeps(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
