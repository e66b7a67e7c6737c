"""However often and whenever Stop is pressed, all ranks end, and the cell says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from ddp_lessons.system.interrupts import Interrupts
from tests.support.checkout import ROOT
from tests.support.kernels import Kernel


@pytest.fixture
def handler() -> Iterator[list[str]]:
    """Install a handler of the learner's; yield the list of what it notes."""
    written: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: written.append("mine"))
    yield written
    signal.signal(signal.SIGINT, before)


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def counted(times: int, asks: bool, error: Exception | None = None) -> Interrupts:
    """Press Stop `times` times in a `counted` block, which then calls `check` or raises `error`."""
    with Interrupts().counted() as interrupts:
        interrupts.check()
        press(times)
        assert (interrupts.count, interrupts.hurry) == (times, times > 1)
        if asks:
            interrupts.check()
        if error is not None:
            raise error
    return interrupts


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("asks", [True, False])
def test_interrupts_are_counted_and_raised_where_asked_or_after(times: int, asks: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        counted(times, asks)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert counted(0, asks).count == 0


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="mine"):
        counted(1, False, ValueError("mine"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_learners_handler_decides(handler: list[str]) -> None:
    with Interrupts().counted() as interrupts:
        press(2)
        interrupts.check()
        assert interrupts.count == 0
    assert handler == ["mine", "mine"]


def test_what_the_learners_handler_raises_is_raised_where_asked() -> None:
    def raises(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("my limit")

    before = signal.signal(signal.SIGINT, raises)
    try:
        with pytest.raises(TimeoutError, match="my limit"):
            counted(1, True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_counts_for_the_launch_around_too() -> None:
    outer = Interrupts()

    def nested() -> None:
        with outer.counted():
            counted(1, True)

    with pytest.raises(KeyboardInterrupt):
        nested()
    assert outer.count == 1


def test_other_threads_leave_the_handler_alone() -> None:
    seen = []

    def enter() -> None:
        with Interrupts().counted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


STUBBORN = """
import os, signal, threading, time
from ddp_lessons import launch
def work(rank):
    print("begun", flush=True)
    while True:
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            pass  # it saves a checkpoint, say
"""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.alone
@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_cell_that_is_stopped_so_many_times(kernel: Kernel, times: int) -> None:
    presses = f"""
def presses():
    time.sleep(1.5)
    for _ in range({times}):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    over.set()
over = threading.Event()
threading.Thread(target=presses).start()
launch(work)
"""
    kernel.run("from ddp_lessons import launch; launch(lambda rank: rank);")
    cell = kernel.run(STUBBORN + presses)
    assert cell.error == "KeyboardInterrupt"
    assert cell.stdout.startswith("[rank 0] begun\n[rank 1] begun\nStopped.\nrank 0 stopped at ")
    assert cell.stdout.count("Stopped.") == 1
    # The last press may come after the run, wherever the kernel is then. (No `join`: if that is
    # interrupted, Python 3.11 takes the thread for ended.)
    while kernel.run("over.wait(); print('over')").stdout != "over\n":
        pass
    following = kernel.run("launch(lambda rank: rank).values")
    assert not following.error, following.error
    assert following.result["text/plain"] == "[0, 1]"


@pytest.mark.slow
@pytest.mark.system
def test_a_sample_of_the_campaign(tmp_path: Path) -> None:
    """See benchmarks/interrupts.py, which presses a thousand times and more."""
    command = [sys.executable, "-m", "benchmarks.interrupts", "--runs", "20"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
