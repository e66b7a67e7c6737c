"""Finds what a launch left behind: processes, descriptors, temporary files, shared memory."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import psutil


def files() -> set[str]:
    """Temporary files and shared memory, except folders of multiprocessing and torch's cache."""
    known = ("pymp-", "torchinductor_")
    found = Path(tempfile.gettempdir()).iterdir()
    temporary = {str(path) for path in found if not path.name.startswith(known)}
    shared = Path("/dev/shm")
    return temporary | ({str(p) for p in shared.iterdir()} if shared.is_dir() else set())


def left() -> set[str]:
    """What exists now, except forkservers, which stay on purpose."""
    me = psutil.Process()
    processes = set()
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            own = child.ppid() == me.pid
            helper = own and ("forkserver" in command or "resource_tracker" in command)
            if not helper and child.status() != psutil.STATUS_ZOMBIE:
                processes.add(f"process {child.pid}")
    return {*processes, *files(), f"{me.num_fds()} descriptors"}
