"""Ending what a rank left behind outside its own process group: children that called setsid.

Linux hands the orphans of a dead rank to its nearest ancestor that asked for them: the forkserver
asks (`preload.py`). So after a run, its children are ranks that still live, and orphans. Where
there is no forkserver, or no /proc, only a rank's own process group is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import stat
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ROUNDS, _PAUSE = 50, 0.002  # an orphan's own children become orphans, too: look again


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Have this process killed when its parent ends, or the thread that started it (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def listening_paths() -> list[str]:
    """The files of the sockets on which this process listens."""
    if not os.path.isdir("/proc/self/fd"):
        return []
    paths = (_listening_path(int(name)) for name in os.listdir("/proc/self/fd"))
    return [path for path in paths if path and os.path.exists(path)]


def _listening_path(descriptor: int) -> str | None:
    with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as one:
                listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                return str(one.getsockname()) if listens and one.family == socket.AF_UNIX else None
    return None


def remove_with_folder(path: str) -> None:
    """Remove a socket's file and its folder, which a parent that was killed could not.

    A forkserver that was killed before may have left a socket there, too.
    """
    folder = os.path.dirname(path)
    with contextlib.suppress(OSError):  # the parent did it
        os.unlink(path)
        for other in os.scandir(folder):
            if stat.S_ISSOCK(other.stat().st_mode) and not _is_served(other.path):
                os.unlink(other.path)
        os.rmdir(folder)


def _is_served(path: str) -> bool:
    """Whether a process listens on a socket's file."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def parent_of(pid: int) -> int | None:
    """The process id of a process's parent; None if it cannot be told."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def has_ended(pid: int) -> bool:
    """True if the process is gone, or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return True


def ends_soon(pid: int, seconds: float = 0.3) -> bool:
    """Wait a moment for a process to end: its pipes close a little before it has."""
    deadline = time.monotonic() + seconds
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return has_ended(pid)


def end_orphans_of(forkserver: int) -> None:
    """End the forkserver's children that are no processes started by this one.

    While another run of this process goes on (from another thread), its ranks may have children of
    their own there; then the run that ends last does the work.
    """
    for _ in range(_ROUNDS):
        started = multiprocessing.active_children()
        if any(process.name.startswith("rank ") for process in started):
            return
        if not end_children_of(forkserver, {process.pid for process in started}):
            return
        time.sleep(_PAUSE)


def end_children_of(pid: int, except_for: set[int | None] | None = None) -> bool:
    """SIGKILL the children of a process, with their process groups; True if there were any."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = {int(child) for child in file.read().split()} - (except_for or set())
    except OSError:
        return False
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(child) == child:
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
    return bool(children)
