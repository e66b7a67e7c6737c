"""`launch(..., wait=False)`: the run goes on while the notebook is free, with the same promises."""

from __future__ import annotations

import functools
import gc
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import BadLaunch, LaunchError, WorkerFailed, WorkersHung, launch
from ddp_lessons.launcher import api
from ddp_lessons.processes.local import LocalWorkerGroup
from tests.support.kernels import Kernel, gone

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def until(rank: int, file: str) -> int:
    print("waiting")
    Path(f"{file}.{rank}").touch()
    while not Path(file).exists():
        time.sleep(0.01)
    return rank * 10


def test_it_returns_while_the_ranks_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = launch(until, (str(tmp_path / "go"),), wait=False)
    assert not running.done
    assert repr(running) == "Run of until on 2 ranks, running"
    with pytest.raises(TimeoutError, match=r"until still runs after 0.1 s"):
        running.wait(0.1)
    assert capsys.readouterr().out == ""
    (tmp_path / "go").touch()
    run = running.wait()
    assert run.values == [0, 10]
    assert capsys.readouterr().out == "[rank 0] waiting\n[rank 1] waiting\n"
    assert repr(running) == "Run of until on 2 ranks, ended: wait() returns its record"
    assert running.wait() is run
    assert running.stop() is run
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_when_it_has_ended_it_keeps_only_the_record(tmp_path: Path) -> None:
    def groups() -> int:
        gc.collect()
        return sum(type(thing) is LocalWorkerGroup for thing in gc.get_objects())

    before = groups()
    running = launch(until, (str(tmp_path / "go"),), wait=False)
    assert groups() == before + 1
    (tmp_path / "go").touch()
    assert running.wait().values == [0, 10]
    assert groups() == before


def test_several_run_at_once_and_launch_beside_them(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    runs = [launch(until, (str(file),), nprocs=1, wait=False) for file in files]
    assert launch(lambda rank: rank).values == [0, 1]
    files[1].touch()
    assert runs[1].wait().ok
    assert not runs[0].done
    files[0].touch()
    assert runs[0].wait().ok


def test_stop_ends_it_and_says_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = launch(until, (str(tmp_path / "never"),), wait=False)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    run = running.stop()
    assert run.interrupted
    assert not run.ok
    out = capsys.readouterr().out
    assert "[rank 1] waiting\nStopped.\n" in out
    assert "rank 0" in out.partition("Stopped.")[2]
    assert "test_running.py, line " in out


def fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("no rank 1")


def skips(rank: int) -> None:
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()
    else:
        dist.recv(torch.empty(1), src=0)


@pytest.mark.parametrize(("fn", "error"), [(fails, WorkerFailed), (skips, WorkersHung)])
def test_a_failure_is_raised_where_it_is_waited_for(
    fn: Callable[[int], None], error: type[LaunchError]
) -> None:
    running = launch(fn, wait=False)
    with pytest.raises(error, match="rank 1"):
        running.wait()
    assert launch(fn, wait=False, check=False).wait().verdict is not None


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    file = Path(__file__).open()
    with file, pytest.raises(LaunchError, match="cannot travel"):
        launch(until, (file,), wait=False)


class OwnLimit(Exception):
    pass


def over(number: int, frame: object) -> None:
    raise OwnLimit


def test_an_exception_while_it_is_waited_for_leaves_it_running(tmp_path: Path) -> None:
    running = launch(until, (str(tmp_path / "go"),), nprocs=1, wait=False)
    before = signal.signal(signal.SIGALRM, over)
    try:
        for wait in (running.wait, functools.partial(running.wait, math.inf)):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(OwnLimit):
                wait()
            assert not running.done
    finally:
        signal.signal(signal.SIGALRM, before)
    (tmp_path / "go").touch()
    assert running.wait().values == [0]


def stays(rank: int, file: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("worth keeping")
    until(rank, file)


def test_an_interrupt_while_it_stops_ends_it_at_once_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = (signal.SIGINT, 1000.0), (signal.SIGKILL, 10.0)
    monkeypatch.setattr(api, "AFTER_INTERRUPT", ladder)
    running = launch(stays, (str(tmp_path / "never"),), nprocs=1, wait=False)
    while not list(tmp_path.iterdir()):
        time.sleep(0.01)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            running.stop()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert running.done
    assert "[rank 0] worth keeping\n" in capsys.readouterr().out
    assert running.stop() is running.wait()
    assert running.stop().interrupted


def test_not_on_a_cluster() -> None:
    with pytest.raises(BadLaunch, match="Leave out wait= or cluster="):
        launch(fails, wait=False, cluster=object())


SCRIPT = """
import sys, time
from ddp_lessons import launch

def work(rank):
    time.sleep(100)

if __name__ == "__main__":
    running = launch(work, wait=False)
    time.sleep(1)
    print("goes", flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "time.sleep(100)"])
def test_it_ends_with_its_process(end: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "goes\n"
    ranks = psutil.Process(process.pid).children(recursive=True)
    if "sleep" in end:
        process.kill()
    assert process.wait(20) == {"pass": 0, "sys.exit(3)": 3}.get(end, -signal.SIGKILL)
    process.stdout.close()
    assert gone(ranks)


@pytest.mark.slow
@pytest.mark.system
def test_in_a_notebook(kernels: Callable[[], Kernel]) -> None:
    kernel = kernels()
    begun = kernel.run(
        """
        import time
        def work(rank):
            print("at work")
            time.sleep(1)
            return rank
        running = launch(work, wait=False)
        print(running.done)
        """
    )
    assert not begun.error, begun.error
    assert begun.stdout == "False\n"
    waited = kernel.run("print(running.wait().values)")
    assert waited.stdout == "[rank 0] at work\n[rank 1] at work\n[0, 1]\n"
