"""What a process passes on: read, and taken over by another one as far as it may."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lessons.system import process_attributes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

TAKES_OVER = """
import os, resource
from ddp_lessons.system import process_attributes as own
here = own.taken()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
lower = {**here.limits, resource.RLIMIT_NOFILE: (99, hard), resource.RLIMIT_CORE: (0, 0)}
wanted = own.ProcessAttributes(0o31, here.niceness + 3, frozenset([min(here.processors)]), lower)
wanted.take_over()
assert own.taken() == wanted, own.taken()
wanted._replace(niceness=-1000, processors=frozenset([10**5])).take_over()  # which it may not
assert own.taken().processors == wanted.processors
"""


def test_they_are_read() -> None:
    found = process_attributes.taken()
    assert found is not None
    umask = os.umask(0o22)
    os.umask(umask)
    assert found.umask == umask
    assert found.niceness == os.nice(0)
    assert found.limits[resource.RLIMIT_NOFILE] == resource.getrlimit(resource.RLIMIT_NOFILE)


def test_they_are_read_where_proc_does_not_tell_the_umask(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = process_attributes.taken()
    monkeypatch.setattr(Path, "read_text", lambda path: "Name:\tpython\n")
    assert process_attributes.taken() == expected


def test_another_process_takes_them_over() -> None:
    subprocess.run([sys.executable, "-c", TAKES_OVER], check=True)
