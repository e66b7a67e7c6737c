"""Programs within a limit of memory, as Binder sets one: a control group of the kernel's.

Needs the right to make one: `why_not()` says what is missing. As a program it runs another one, if
it can within a limit, and fails if any of its processes was ended for want of memory:

    python -m tests.support.confined 1700 pytest ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest

from tests.support.allowed import REQUIRED

_OWN = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_PAUSE = 0.05  # seconds between two looks


def _parent() -> tuple[Path, bool]:
    """The control group of this process that governs memory, and whether it is of version 1."""
    found = [line.split(":", 2) for line in _OWN.read_text().splitlines()]
    for _, controllers, path in found:
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), True
    return _ROOT / found[-1][2].lstrip("/"), False


def why_not() -> str:
    """What keeps this process from making a control group; "" if nothing does."""
    try:
        with Confined(1 << 30):
            return ""
    except OSError as error:
        return f"no control group with a limit of memory can be made here: {error}"


def needed() -> pytest.MarkDecorator:
    """Skips a test where there can be no limit; DDP_LESSONS_LIMIT=required forbids that."""
    reason = "" if REQUIRED else why_not()
    return pytest.mark.skipif(bool(reason), reason=reason)


class Confined:
    """A control group with a limit, as a context manager; programs are put in by `start`.

    `peak` is the most that its programs had at once and that cannot be given up, in bytes: what
    they allocated and what they share, not the cache of files, which the kernel takes back.
    """

    def __init__(self, limit: int) -> None:
        parent, self._old = _parent()
        self._group = parent / f"ddp_lessons_{uuid.uuid4().hex[:8]}"
        self._limit = limit
        self.peak = 0
        self._ends = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._group.mkdir()
        try:
            name = "memory.limit_in_bytes" if self._old else "memory.max"
            (self._group / name).write_text(str(self._limit))
        except OSError:
            self._group.rmdir()
            raise
        self._looking.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._looking.join()
        while (self._group / "cgroup.procs").read_text():  # those that ended are being taken out
            time.sleep(0.01)
        self._group.rmdir()

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO[str] | int | None = subprocess.PIPE,
        stderr: int | None = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:
        """A program in the group, with all that it will start."""
        enter = f'echo $$ > "{self._group}/cgroup.procs" && exec "$@"'
        return subprocess.Popen(
            ["sh", "-c", enter, "sh", *command],
            env=env,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    @property
    def kills(self) -> int:
        """How many of its processes the kernel ended because the limit was reached."""
        name = "memory.oom_control" if self._old else "memory.events"
        return self._fact(name, "oom_kill")

    def _look(self) -> None:
        names = ("total_rss", "total_shmem") if self._old else ("anon", "shmem")
        while not self._ends.wait(_PAUSE):
            self.peak = max(self.peak, sum(self._fact("memory.stat", name) for name in names))

    def _fact(self, file: str, name: str) -> int:
        lines = (line.split() for line in (self._group / file).read_text().splitlines())
        return next(int(words[1]) for words in lines if words[0] == name)


def main(limit: str, *command: str) -> int:
    """Run a command with so many MB; its exit code."""
    if not REQUIRED and (reason := why_not()):
        print(f"{reason}: the limit of {limit} MB is not tried")
        os.execvp(command[0], command)
    with Confined(int(limit) << 20) as group:
        code = group.start(command, stdout=None, stderr=None).wait()
        print(
            f"memory: {group.peak >> 20} MB at most, of {limit} MB; processes ended: {group.kills}"
        )
        return code or int(group.kills > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
