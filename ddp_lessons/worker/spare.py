"""A process that was forked before it is needed: it waits until it becomes a rank.

The parent's side is `Spare` in processes/rank_process.py. Until a rank's process object comes, with
its file descriptors, through a socket, the process changes nothing: it is as fresh then as one that
is forked at the launch.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from dataclasses import dataclass
from multiprocessing import forkserver, process, resource_tracker, spawn
from multiprocessing.connection import wait
from typing import Any

from ddp_lessons.system import reaper
from ddp_lessons.worker import settings, written_pages

NAME = "ddp-spare"  # of the process while it waits (proc_pid_comm(5)): at most 15 characters
MOST_DESCRIPTORS = 250  # that travel with one message (unix(7), SCM_MAX_FD)


@dataclass(frozen=True)
class Waiting:
    """What a forkserver's child runs in place of multiprocessing's process object.

    It ends after `rest` seconds without a launch. Meanwhile it copies the pages that a rank writes.
    """

    rest: float
    written: bytes  # see written_pages.py

    def _bootstrap(self, parent_sentinel: int) -> int:
        server: Any = forkserver._forkserver
        tracker: Any = resource_tracker._resource_tracker
        reaper.kill_when_closed(parent_sentinel, os.getpid())
        own_name = _rename(NAME)
        settings.take_over(settings.taken(with_seed=False))  # its own: touches the pages it needs
        with socket.socket(fileno=server._inherited_fds[0]) as channel:
            written_pages.copy(self.written, lambda: bool(wait([channel], 0)))
            descriptors = _descriptors(channel, self.rest)
            if descriptors is None:
                return 0
            _rename(own_name)
            os.close(tracker._fd)
            tracker._fd, *server._inherited_fds = descriptors
            rank = _rank(channel)
        return 0 if rank is None else int(rank._bootstrap(parent_sentinel))


class MoreDescriptors:
    """Makes the process that loads it receive the descriptors that one message had no room for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_more, ()


def _receive_more() -> None:
    """Receive them through the last of those that came: a socket, which takes their place."""
    inherited: list[int] = forkserver._forkserver._inherited_fds  # type: ignore[attr-defined]
    with socket.socket(fileno=inherited.pop()) as channel:
        begun = b"+"
        while begun:
            begun, descriptors, *_ = socket.recv_fds(channel, 1, MOST_DESCRIPTORS)
            inherited += descriptors


def _descriptors(channel: socket.socket, rest: float) -> list[int] | None:
    """Wait for a rank's descriptors. None if no launch came, or the parent has ended."""
    if not wait([channel], rest):
        # From now on the parent cannot write, and takes another process; what it has written
        # already can still be read.
        channel.shutdown(socket.SHUT_RD)
    try:
        begun, descriptors, *_ = socket.recv_fds(channel, 1, MOST_DESCRIPTORS)
    except ConnectionError:
        return None
    return descriptors if begun else None


def _rank(channel: socket.socket) -> Any:
    """Read how to prepare, and do; then the rank. None if the parent could not write it all."""
    current: Any = process.current_process()
    current._inheriting = True  # as multiprocessing's spawn._main does
    try:
        with channel.makefile("rb") as stream:
            spawn.prepare(pickle.load(stream))
            return pickle.load(stream)
    except (EOFError, ConnectionError, pickle.UnpicklingError):
        return None
    finally:
        del current._inheriting


def _rename(name: str) -> str:
    """Change the name of this process, as `ps` and /proc show it; the name that it had."""
    old = ""
    with contextlib.suppress(OSError), open("/proc/self/comm", "r+") as file:
        old = file.read().rstrip("\n")
        file.write(name)
    return old
