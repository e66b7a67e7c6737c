"""Small disks for tests: a file system in memory that only one command and its children see.

It takes the right to mount one in a namespace; where that is not allowed, the test is skipped with
the reason.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.allowed import cannot

_MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && '


def on_small_disk(folder: Path, kilobytes: int, saved: Path) -> tuple[str, ...]:
    """What to put before a command so that `folder` is a disk of its own of so many kB.

    Copies its folder "record", if there is one then, to `saved` when the command has ended.
    """
    _skip_where_not_allowed()
    folder.mkdir(exist_ok=True)
    record = f"{folder}/record"
    save = f'"$@"; code=$?; test ! -d "{record}" || cp -r --sparse=always "{record}" "{saved}"'
    script = f"{_MOUNT}{{ {save}; exit $code; }}"
    return ("unshare", "--mount", "sh", "-c", script, "sh", f"{kilobytes}k", str(folder))


def _skip_where_not_allowed() -> None:
    if reason := _why_not():
        cannot(reason)


@functools.cache
def _why_not() -> str:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "private mounts need Linux and unshare"
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    return f"private mounts are not allowed here: {tried.stderr.strip()}" * bool(tried.returncode)
