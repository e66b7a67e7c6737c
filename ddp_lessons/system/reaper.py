"""Ends what a rank left behind outside its own process group: children that called setsid.

Parents, engines and forkservers call it. Linux hands the orphans of a dead rank to the nearest
ancestor that asked for them: the forkserver asks (`preload_bare.py`). So after a run, the
forkserver's children are ranks that still live, and orphans. Without a forkserver, or without
/proc, only a rank's own process group is ended.

One kind of orphan is not killed: torch_shm_manager, which torch starts if tensors are shared with
the strategy "file_system". It alone knows the names of the shared memory, removes it when the last
process that uses it is gone, and ends 2 s later. A signal would end it before that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import time
from collections.abc import Container
from multiprocessing.connection import wait

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_CREDENTIALS = struct.Struct("3i")  # process, user and group (unix(7), SO_PEERCRED)
_ROUNDS, _PAUSE = 50, 0.002  # an orphan's own children become orphans, too: look again
_MANAGER = "torch_shm_manager"[:15]  # as the kernel keeps names (proc_pid_comm(5))
_MANAGER_ENDS = 10.0  # seconds that it may take after its 2, on a busy machine


def adopt_orphans() -> None:
    """Make this process the parent of the orphans of its descendants (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Have this process killed when its parent ends, or the thread that started it (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def kill_when_closed(pipe: int, whom: int) -> bool:
    """Have a process, or the group -`whom`, killed when a pipe's other end closes; False: cannot.

    Linux turns that into a signal (fcntl(2), F_SETOWN and F_SETSIG): no thread is needed, and a
    process that is suspended or stuck in C++ dies, too.
    """
    if not hasattr(fcntl, "F_SETSIG"):
        return False
    fcntl.fcntl(pipe, fcntl.F_SETOWN, whom)
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
    if wait([pipe], 0):  # it closed before the line above
        os.kill(whom, signal.SIGKILL)
    return True


def listeners() -> list[tuple[str, int]]:
    """The file of each socket on which this process listens, and the process that first did.

    That may have ended, and then nothing else tells which it was. 0 or this process: not known.
    """
    if not os.path.isdir("/proc/self/fd"):
        return []
    found = [_listener(int(name)) for name in os.listdir("/proc/self/fd")]
    return [each for each in found if each is not None and os.path.exists(each[0])]


def _listener(descriptor: int) -> tuple[str, int] | None:
    with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as one:
                if one.family == socket.AF_UNIX and one.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                ):
                    by = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                    return str(one.getsockname()), _CREDENTIALS.unpack(by)[0]
    return None


def remove_after(parent: int, path: str) -> None:
    """Remove a socket's file; if the parent process is gone, remove the folder that it made.

    A killed parent could not remove its folder. A live one keeps other sockets there.
    """
    with contextlib.suppress(OSError):
        os.unlink(path)
    if ends_soon(parent, seconds=2.0):
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def parent_of(pid: int) -> int | None:
    """The process id of a process's parent; None if it is unknown."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def has_ended(pid: int) -> bool:
    """True if the process is gone, or is a zombie."""
    return (_state_of(pid) or "X") in "ZX"


def _state_of(pid: int) -> str | None:
    """The letter for the process's state (proc(5)); None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt); True if that is unknown."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return True


def ends_soon(pid: int, seconds: float = 0.3) -> bool:
    """Wait a moment for a process to end: its pipes close a little before it has."""
    deadline = time.monotonic() + seconds
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return has_ended(pid)


def is_suspended(pid: int) -> bool:
    """True if a signal has stopped the process until it gets SIGCONT."""
    return _state_of(pid) == "T"


def kill_and_wait(pid: int) -> None:
    """Kill a child of this process, if it has not ended, and return when it has."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while not has_ended(pid):
        time.sleep(_PAUSE)


def end_all_children_of(pid: int, but: Container[int | None] = ()) -> None:
    """Kill the children of a process, `but` those, and their children, which it then adopts.

    Managers of shared memory are not killed; this waits for them to end.
    """
    for _ in range(_ROUNDS):
        if not end_children_of(pid, but):
            break
        time.sleep(_PAUSE)
    deadline = time.monotonic() + _MANAGER_ENDS
    while any(map(_is_manager, _children_of(pid))) and time.monotonic() < deadline:
        time.sleep(10 * _PAUSE)


def end_children_of(pid: int, but: Container[int | None] = ()) -> bool:
    """SIGKILL the children of a process, with their process groups; True if there were any."""
    children = {child for child in _children_of(pid) if child not in but and not _is_manager(child)}
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(child) == child:
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
    return bool(children)


def _children_of(pid: int) -> set[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return {int(child) for child in file.read().split()}
    except OSError:
        return set()


def _is_manager(pid: int) -> bool:
    """Whether the process is a torch_shm_manager, and not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError:
        return False
    return name == _MANAGER and rest.split()[0] not in "ZX"
