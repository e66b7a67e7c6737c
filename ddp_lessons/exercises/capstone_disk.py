"""The disk of lesson 20's check of `save`: it is slow, but by no number of seconds.

Runs in workers. A rank that is about to write, or to rename a file, waits until each other rank has
come as far as it can without it: its `save` has returned, or it has begun a call of the process
group that the writer has not come to, or it looks at the files again and again, or it writes as
well. So a rank that does not wait for the writer returns first, however fast or slow the machine
is; and no sleep helps, for a sleeping rank has not come.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

LOOKS = 20  # at the files in one `save`: a rank that looks so often waits for them
LIMIT = 5.0  # seconds of a save; for a rank that waits in a way that is not known here
SETTLED = 0.03  # seconds; for a rank that began a call and does not wait for it
CALLS = (
    *("allgather", "_allgather_base", "allreduce", "alltoall", "alltoall_base", "barrier"),
    *("broadcast", "gather", "monitored_barrier", "recv", "recv_anysource", "reduce"),
    *("reduce_scatter", "_reduce_scatter_base", "scatter", "send"),
)  # of a process group
CALL, LOOK, WRITE, RETURN = "call", "look", "write", "return"


class SlowDisk:
    """A rank's view of it: what the rank writes in a `save`, and what is then in danger.

    Attributes
    ----------
    path : str
        Where the checkpoint belongs; nothing else is in its folder at first.
    names : set of str
        The files of that folder that the rank wrote to, or that it gave this name.
    in_danger : str
        What had become of the last checkpoint while the rank wrote; "" for nothing.
    """

    def __init__(self, rank: int, folder: str) -> None:
        self._rank, self._marks = rank, folder
        self._folder = os.path.join(os.path.abspath(folder), "checkpoints")
        os.makedirs(self._folder, exist_ok=True)
        self.path = os.path.join(self._folder, "last.pt")
        self.names: set[str] = set()
        self.in_danger = ""
        self._save, self._sleep, self._stat = torch.save, time.sleep, os.stat
        self._number = 0  # of saves
        self._is_watching = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the rank's writes go to this disk; for a worker that ends soon."""
        sys.addaudithook(self._hear)  # for the rest of this process's life
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "save", self._written_by_python))
            stack.enter_context(mock.patch.object(time, "sleep", self._sleep_short))
            stack.enter_context(mock.patch.object(os, "stat", self._looked))
            for name in CALLS:
                if method := getattr(dist.ProcessGroup, name, None):
                    counted = self._counted(method)
                    stack.enter_context(mock.patch.object(dist.ProcessGroup, name, counted))
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch one `save` of the rank, which is over when this ends."""
        self.names, self.in_danger = set(), ""
        self._had_one = os.path.exists(self.path)
        self._end = time.monotonic() + LIMIT
        self._is_watching = True
        yield
        self._is_watching = False
        self._mark(RETURN)
        self._number += 1

    def _written_by_python(self, state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        """`torch.save`, whose own way to a file no audit hook hears of."""
        is_path = isinstance(file, str | os.PathLike)
        with open(file, "wb") if is_path else contextlib.nullcontext(file) as opened:
            self._save(state, opened, *args, **kwargs)

    def _sleep_short(self, seconds: float) -> None:
        self._sleep(min(seconds, 0.001))

    def _looked(self, path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if self._is_watching and self._name(path):
            self._mark(LOOK)
        return self._stat(path, *args, **kwargs)

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if self._is_watching:
                self._mark(CALL)
            return method(group, *args, **kwargs)

        return counted

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_watching:
            return
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            self._write(self._name(args[0]), is_whole=False)
        elif event in ("os.rename", "os.link"):
            self._write(self._name(args[1]), is_whole=True)
        elif event in ("open", "os.listdir", "os.scandir") and self._name(args[0]):
            self._mark(LOOK)

    def _name(self, path: object) -> str:
        """The name of a file in the folder of the checkpoint, "." for the folder; else ""."""
        if not isinstance(path, str | os.PathLike):
            return ""
        folder, name = os.path.split(os.path.abspath(os.fspath(path)))
        inside = folder == self._folder
        return name if inside else "." if os.path.join(folder, name) == self._folder else ""

    def _write(self, name: str, *, is_whole: bool) -> None:
        if not name:
            return
        self.names.add(name)
        if name == os.path.basename(self.path) and not is_whole:
            self.in_danger = f"{name} itself was incomplete"
        elif self._had_one and not self._exists(self.path):
            self.in_danger = f"{os.path.basename(self.path)} of the epoch before was gone"
        self._mark(WRITE)
        self._wait()

    def _exists(self, path: str) -> bool:
        try:
            self._stat(path)
        except FileNotFoundError:
            return False
        return True

    def _wait(self) -> None:
        """Return when no other rank can go on without this one."""
        others = [rank for rank in range(dist.get_world_size()) if rank != self._rank]
        while not all(map(self._has_come, others)) and time.monotonic() < self._end:
            self._sleep(0.001)
        if others:
            self._sleep(SETTLED)

    def _has_come(self, rank: int) -> bool:
        return (
            self._marked(RETURN, rank) > 0
            or self._marked(WRITE, rank) > 0
            or self._marked(LOOK, rank) >= LOOKS
            or self._marked(CALL, rank) > self._marked(CALL, self._rank)
        )

    def _mark(self, what: str) -> None:
        """Tell the other ranks that this one did it."""
        watching, self._is_watching = self._is_watching, False  # not to hear of this file
        with open(self._file(what, self._rank), "ab") as file:
            file.write(b".")
        self._is_watching = watching

    def _marked(self, what: str, rank: int) -> int:
        """How often a rank did it in this `save`."""
        try:
            return self._stat(self._file(what, rank)).st_size
        except FileNotFoundError:
            return 0

    def _file(self, what: str, rank: int) -> Path:
        return Path(self._marks, f"{what} of rank {rank} in save {self._number}")
