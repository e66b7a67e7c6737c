"""After its function returned, a rank waits for its threads, then runs its exit handlers."""

from __future__ import annotations

import atexit
import logging.handlers
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import Run, launch
from ddp_lessons.errors import WorkersHung

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

METHODS = ("forkserver", "spawn")


def goes_on() -> None:
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize("method", METHODS)
def test_threads_end_then_handlers_run_newest_first_as_in_a_script(method: str) -> None:
    def work(rank: int) -> int:
        def write_late() -> None:
            time.sleep(0.3)
            atexit.register(print, "handler of the thread")
            print("thread")

        atexit.register(sys.stdout.write, "first handler, without an end of line")
        atexit.register(lambda: 1 / 0)
        atexit.register(print, "second handler")
        threading.Thread(target=write_late).start()
        print("returns")
        return os.getpid()

    run = launch(work, nprocs=1, start_method=method)
    lines = run.ranks[0].lines
    assert lines[:4] == ["returns", "thread", "handler of the thread", "second handler"]
    assert "ZeroDivisionError: division by zero" in lines
    assert lines[-1] == "first handler, without an end of line"
    assert run.ranks[0].exitcode == 0


@pytest.mark.parametrize("method", METHODS)
def test_handlers_run_after_a_failure_and_sys_exit_too(method: str) -> None:
    def work(rank: int) -> None:
        atexit.register(print, "handler")
        if rank:
            raise ValueError("no")
        sys.exit()

    run = launch(work, check=False, start_method=method)
    assert [rank.status for rank in run.ranks] == ["returned", "raised"]
    assert [rank.lines for rank in run.ranks] == [["handler"], ["handler"]]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_standard_library_does_at_the_end_is_done(method: str, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        file = logging.FileHandler(tmp_path / f"{rank}.log")
        buffer = logging.handlers.MemoryHandler(1000, target=file)
        logging.getLogger("of the test").addHandler(buffer)
        logging.getLogger("of the test").warning("kept in a buffer")
        directory = tempfile.TemporaryDirectory(dir=tmp_path)
        vars(sys.modules["__main__"])["kept"] = directory  # as a variable of a script
        return directory.name

    (directory,) = launch(work, nprocs=1, start_method=method).values
    assert not Path(directory).exists()
    assert (tmp_path / "0.log").read_text() == "kept in a buffer\n"


def test_a_group_may_be_left_in_a_handler() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            atexit.register(dist.destroy_process_group)
        else:
            dist.destroy_process_group()

    run = launch(work)
    assert run.warnings == []


@pytest.mark.parametrize("method", METHODS)
def test_a_thread_that_never_ends_is_named_and_the_run_no_success(method: str) -> None:
    def work(rank: int) -> int:
        if rank == 0:
            threading.Thread(target=goes_on, name="saver").start()
        return rank + 5

    with pytest.raises(WorkersHung) as caught:
        launch(work, timeout=2, start_method=method)
    run, text = caught.value.run, str(caught.value)
    assert isinstance(run, Run)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("not ended", (0,))
    assert [rank.status for rank in run.ranks] == ["stopped", "returned"]
    assert run.ranks[0].kept_by == "thread 'saver'"
    assert "rank 0 has returned, but thread 'saver' goes on" in text
    assert "time.sleep(0.05)" in text
    assert "daemon=True" in text
    assert "rank 0 returned 5, but thread 'saver' went on at" in repr(run)
    assert run.values == [5, 6]


@pytest.mark.parametrize("method", METHODS)
def test_a_handler_that_never_ends_is_ended_by_the_timeout(method: str) -> None:
    def work(rank: int) -> None:
        atexit.register(goes_on)

    with pytest.raises(WorkersHung, match="an atexit handler goes on") as caught:
        launch(work, nprocs=1, timeout=2, start_method=method)
    assert "time.sleep(0.05)" in str(caught.value)
    assert "daemon=True" not in str(caught.value)


def test_a_child_of_multiprocessing_that_never_ends_is_said_to_keep_the_rank() -> None:
    def work(rank: int) -> None:
        multiprocessing.get_context("fork").Process(target=goes_on).start()

    run = launch(work, nprocs=1, timeout=2, check=False)
    assert run.ranks[0].kept_by == "a child process"
    assert "like any script, waits for the processes" in run.explain()


def test_a_process_that_does_not_end_nor_answer_is_no_success() -> None:
    def work(rank: int) -> None:
        atexit.register(os.kill, os.getpid(), signal.SIGSTOP)

    run = launch(work, nprocs=1, timeout=2, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "suspended"
    assert "rank 0 returned None, but its process went on" in repr(run)


def test_a_thread_that_prints_now_and_then_is_progress() -> None:
    def work(rank: int) -> None:
        def report() -> None:
            for number in range(4):
                time.sleep(0.5)
                print(number)

        threading.Thread(target=report).start()

    assert launch(work, nprocs=1, timeout=1.5).ranks[0].lines == ["0", "1", "2", "3"]


def test_who_waits_for_a_rank_that_returned_with_a_thread_is_told_so() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            threading.Thread(target=goes_on, name="saver").start()
            return
        dist.barrier()

    run = launch(work, timeout=2, check=False)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("returned early", (0,))
    assert "thread 'saver' goes on" in run.explain()


def test_a_rank_that_raised_while_a_thread_goes_on_has_raised() -> None:
    def work(rank: int) -> None:
        threading.Thread(target=goes_on, name="saver").start()
        raise ValueError("the reason")

    run = launch(work, check=False)
    assert [rank.status for rank in run.ranks] == ["raised", "raised"]
    assert "raised ValueError: the reason" in run.explain()


def test_exit_handlers_of_the_forkserver_are_not_the_ranks() -> None:
    def work(rank: int) -> int:
        return atexit._ncallbacks()

    assert launch(work, nprocs=1, start_method="forkserver").values == [3]
    assert launch(lambda rank: rank).values == [0, 1]  # and it is still there


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_a_rank_that_gets_no_processor_to_end_is_not_taken_for_one_that_never_does() -> None:
    """Three others keep its core busy, and it gives way to them: to end takes it seconds."""
    core = min(os.sched_getaffinity(0))

    def work(rank: int) -> int:
        if rank == 0:
            threading.Thread(target=goes_on, name="saver").start()
        else:
            os.sched_setaffinity(0, {core})
            os.nice(19)
        return rank + 5

    program = (
        f"import os, signal; signal.alarm(100); os.sched_setaffinity(0, {{{core}}})\nwhile 1: 0"
    )
    busy = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    try:
        run = launch(work, timeout=0.5, check=False, start_method="spawn")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("not ended", (0,))
    assert run.values == [5, 6]
