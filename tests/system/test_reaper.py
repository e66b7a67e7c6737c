"""Orphans outside a process's group are adopted by the ancestor that asked, found, and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddp_lessons.system.reaper import (
    has_ended,
    is_suspended,
    kill_and_wait,
    parent_of,
    remove_after,
)
from tests.support.checkout import ROOT

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="there are no subreapers"),
]

# A child starts a grandchild in a session of its own, and ends. The grandchild has a child, too.
LEAVE_BEHIND = """
import json, os, subprocess, sys, time
from ddp_lessons.system.reaper import adopt_orphans, end_children_of, has_ended, parent_of

GRANDCHILD = '''
import subprocess, sys, time
own = subprocess.Popen(["sleep", "64"])
print(own.pid, flush=True)
time.sleep(64)
'''
CHILD = f'''
import subprocess, sys
left = subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}], start_new_session=True,
                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
print(left.pid, left.stdout.readline(), flush=True)
'''

def leave_behind():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    return [int(pid) for pid in done.stdout.split()]

def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
"""


def in_subprocess(body: str) -> Any:
    """Run `body` in a process that may adopt and kill; return the JSON that it prints."""
    script = LEAVE_BEHIND + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_grandchild_becomes_the_child_of_who_adopts_and_is_ended_with_its_group() -> None:
    told = in_subprocess("""
        adopt_orphans()
        left, its_child = leave_behind()
        wait_until(lambda: parent_of(left) == os.getpid())
        parents = [parent_of(left) == os.getpid(), parent_of(its_child) == left]
        alive = [not has_ended(left), not has_ended(its_child)]
        found = end_children_of(os.getpid())
        wait_until(lambda: has_ended(left) and has_ended(its_child))
        print(json.dumps([parents, alive, found]))
    """)
    assert told == [[True, True], [True, True], True]


def test_who_does_not_ask_adopts_nothing() -> None:
    told = in_subprocess("""
        import signal
        left, its_child = leave_behind()
        mine = parent_of(left) == os.getpid()
        found = end_children_of(os.getpid())
        alive = not has_ended(left)
        os.killpg(left, signal.SIGKILL)
        wait_until(lambda: has_ended(left) and has_ended(its_child))
        print(json.dumps([mine, found, alive]))
    """)
    assert told == [False, False, True]


def test_the_callers_own_group_is_spared() -> None:
    told = in_subprocess("""
        ended = subprocess.Popen(["sleep", "65"])
        found = end_children_of(os.getpid())
        print(json.dumps([found, ended.wait(20)]))
    """)
    assert told == [True, -9]


def test_a_process_that_is_suspended_and_killed() -> None:
    child = subprocess.Popen(["sleep", "69"])
    assert not is_suspended(child.pid)
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: is_suspended(child.pid))
    kill_and_wait(child.pid)
    assert has_ended(child.pid)
    child.wait()
    kill_and_wait(child.pid)  # it has ended already
    assert not is_suspended(child.pid)


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_folder_goes_only_when_its_maker_has_gone(parent_lives: bool, tmp_path: Path) -> None:
    folder = tmp_path / "pymp-x"
    folder.mkdir()
    ours, others = folder / "listener-1", folder / "listener-2"
    ours.touch()
    others.touch()
    maker = subprocess.Popen(["sleep", "70"])
    if not parent_lives:
        maker.kill()
        maker.wait()
    remove_after(maker.pid, str(ours))
    assert not ours.exists()
    assert others.exists() == folder.exists() == parent_lives
    maker.kill()
    maker.wait()


def test_listeners(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    code = "from ddp_lessons.system.reaper import listeners; print(listeners())"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)
        one.listen()
        command = [sys.executable, "-c", code]
        said = subprocess.check_output(command, pass_fds=[one.fileno()], text=True, cwd=ROOT)
    assert said == f"{[(path, os.getpid())]}\n"


def test_parent_of() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    child = subprocess.Popen(["sleep", "66"])
    try:
        assert parent_of(child.pid) == os.getpid()
    finally:
        child.kill()
        child.wait()
    assert parent_of(child.pid) is None


def test_parent_of_a_process_with_an_odd_name(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([odd, "67"])
    try:
        wait_until(lambda: psutil.Process(child.pid).name() == "a) R 1 (b")
        assert parent_of(child.pid) == os.getpid()
        assert not has_ended(child.pid)
    finally:
        child.kill()
        child.wait()


def test_has_ended() -> None:
    child = subprocess.Popen(["sleep", "68"])
    assert not has_ended(child.pid)
    child.kill()
    wait_until(lambda: has_ended(child.pid))  # it is a zombie until somebody waits for it
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    child.wait()
    assert has_ended(child.pid)
    assert not has_ended(os.getpid())
