"""Stacks and tracebacks in the learner's terms, from real dumps and real exceptions."""

from __future__ import annotations

import dataclasses
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, launch
from ddp_lessons.wire import stacks
from ddp_lessons.wire.owners import is_installed_here
from ddp_lessons.wire.records import Frame
from ddp_lessons.wire.stacks import describe

cloudpickle.register_pickle_by_value(sys.modules[__name__])

WORKER = stacks._WORKER
TORCH = f"{os.path.dirname(torch.__file__)}/distributed"
DUMP = f"""\
Thread 0x00007f3a1c5fe640 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/home/me/loader.py", line 7 in load

Current thread 0x00007f3a2f7fd740 (most recent call first):
  File "{TORCH}/distributed_c10d.py", line 5000 in barrier
  File "{TORCH}/c10d_logger.py", line 83 in wrapper
  File "{WORKER.replace("worker/main.py", "instrumentation/recording.py")}", line 150 in recorded
  File "/home/me/train.py", line 12 in step <odd> name
  File "/home/me/train.py", line 30 in work
  File "{WORKER}", line 180 in _carry_out
  File "{WORKER}", line 60 in main
  File "/usr/lib/python3.11/multiprocessing/process.py", line 108 in run

Thread 0x00007f3a0b7fe640 (most recent call first):
  <no Python frame>
"""


def test_parse_takes_the_thread_of_the_function_outermost_frame_first() -> None:
    frames = stacks.parse(DUMP)
    assert [(os.path.basename(f.filename), f.lineno, f.function) for f in frames] == [
        ("train.py", 30, "work"),
        ("train.py", 12, "step <odd> name"),
        ("recording.py", 150, "recorded"),
        ("c10d_logger.py", 83, "wrapper"),
        ("distributed_c10d.py", 5000, "barrier"),
    ]


def test_position_is_the_learners_line_and_the_call_below_it() -> None:
    frame, call = stacks.position(stacks.parse(DUMP))
    assert frame is not None
    assert (frame.filename, frame.lineno) == ("/home/me/train.py", 12)
    assert call == "barrier"


def test_waiting_for_the_store_is_waiting_to_join() -> None:
    own = Frame("/home/me/train.py", 3, "work")
    waiting = Frame(stacks._RENDEZVOUS, 50, "await_store")
    assert stacks.position([own, waiting]) == (own, "init_process_group")
    assert stacks.position([own]) == (own, None)
    assert stacks.position([]) == (None, None)


@pytest.mark.parametrize("dump", ["", "garbage\n", 'Thread 0x1:\n  File "/x.py", line 1 in f\n'])
def test_no_stack_from_what_is_none(dump: str) -> None:
    assert stacks.parse(dump) == ()


def hung(work: Any, **options: Any) -> Run:
    run: Run = launch(work, timeout=1, check=False, **options)
    assert run.hung_after is not None
    return run


@pytest.mark.ranks
def test_a_real_dump_of_several_threads() -> None:
    def work(rank: int) -> None:
        def load() -> None:
            time.sleep(60)

        for _ in range(3):
            threading.Thread(target=load, daemon=True).start()
        dist.init_process_group("gloo")
        wait_here(rank)

    def wait_here(rank: int) -> None:
        if rank == 1:
            time.sleep(60)
        dist.all_gather_object([None, None], rank)

    waiting, asleep = (rank.stack for rank in hung(work).ranks)
    assert [f.function for f in waiting[:2]] == ["work", "wait_here"]
    frame, call = stacks.position(waiting)
    assert frame is not None
    assert call == "all_gather_object"
    assert frame.source == "dist.all_gather_object([None, None], rank)"
    assert frame.filename == __file__
    frame, call = stacks.position(asleep)
    assert frame is not None
    assert (frame.source, call) == ("time.sleep(60)", None)


@pytest.mark.ranks
def test_a_real_dump_of_a_deep_stack() -> None:
    def work(rank: int) -> None:
        dive(120)

    def dive(depth: int) -> None:
        if depth == 0:
            time.sleep(60)
        dive(depth - 1)

    (rank,) = hung(work, nprocs=1).ranks
    frame, _ = stacks.position(rank.stack)
    assert frame is not None
    assert frame.source == "time.sleep(60)"


@pytest.mark.ranks
def test_a_real_dump_of_a_file_with_accents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "entraîneur_😀.py"
    path.write_text("import time\n\ndef work(rank):\n    time.sleep(60)\n")
    work = runpy.run_path(str(path))["work"]
    (rank,) = hung(work, nprocs=1).ranks
    frame, _ = stacks.position(rank.stack)
    assert frame is not None
    assert (frame.filename, frame.source) == (str(path), "time.sleep(60)")


def test_lines_of_packages_count_only_where_the_learner_has_none() -> None:
    own = Frame("/home/me/train.py", 3, "work")
    package = Frame("/opt/lib/python3.12/site-packages/helper/loop.py", 4, "loop")
    home = dataclasses.replace(package, at_home=True)
    waits = Frame(f"{TORCH}/distributed_c10d.py", 5000, "barrier")
    assert stacks.position([own, package, waits]) == (own, "barrier")
    assert stacks.position([package, waits]) == (package, "barrier")
    assert stacks.position([own, home, waits]) == (home, "barrier")


def thread_in(*frames: str) -> str:
    """The dump of a thread: its frames, innermost first, as FILE:FUNCTION."""
    split = [frame.rpartition(":") for frame in frames]
    lines = [f'  File "{file}", line 7 in {function}' for file, _, function in split]
    return "\n".join(["Thread 0x00007f3a1c5fe640 (most recent call first):", *lines, "", ""])


THREADING = "/usr/lib/python3.11/threading.py"
POOL = "/usr/lib/python3.11/concurrent/futures/thread.py"
FUTURES = "/usr/lib/python3.11/concurrent/futures/_base.py"
MULTI = "/usr/lib/python3.11/multiprocessing"


@pytest.mark.parametrize(
    ("thread", "may"),
    [
        ((f"{THREADING}:wait", f"{THREADING}:run"), True),  # a Timer
        (("/opt/lib/python3.11/site-packages/helper/monitor.py:run", f"{THREADING}:run"), True),
        (("/home/me/train.py:later", f"{THREADING}:run"), True),
        ((f"{POOL}:run", f"{POOL}:_worker", f"{THREADING}:run"), True),  # runs a C function
        ((f"{POOL}:_worker", f"{THREADING}:run"), False),
        ((f"{THREADING}:wait", "/usr/lib/python3.11/multiprocessing/queues.py:_feed"), False),
        (("/usr/lib/python3.11/multiprocessing/pool.py:_handle_results",), True),  # callbacks
        (("/opt/lib/python3.11/site-packages/tqdm/_monitor.py:run", f"{THREADING}:run"), False),
        ((f"{TORCH}/../utils/data/_utils/pin_memory.py:do", f"{THREADING}:run"), False),
        ((), False),
    ],
)
def test_another_thread_may_make_the_missing_call(thread: tuple[str, ...], may: bool) -> None:
    waits = DUMP[DUMP.index("Current thread") :]
    assert stacks.all_wait_for_others(waits)
    assert stacks.all_wait_for_others(thread_in(*thread) + waits) != may


# What the main thread calls below its own line, innermost first, and whether that ends only when a
# thread does: with a timeout it may end before, and what multiprocessing joins is a process.
WAITS = {
    "Thread.join()": ((f"{THREADING}:_wait_for_tstate_lock", f"{THREADING}:join"), True),
    "Future.result()": ((f"{THREADING}:wait", f"{FUTURES}:result"), True),
    "Process.join()": ((f"{MULTI}/popen_fork.py:wait", f"{MULTI}/process.py:join"), False),
    "JoinableQueue.join()": ((f"{MULTI}/queues.py:join",), False),
    "str.join of a generator": (("/home/me/train.py:join",), False),
}


@pytest.mark.parametrize("wait", WAITS)
def test_who_waits_for_a_process_may_go_on(wait: str) -> None:
    frames, forever = WAITS[wait]
    main = thread_in(*frames, "/home/me/train.py:work")
    in_barrier = thread_in(f"{TORCH}/distributed_c10d.py:barrier", "/home/me/train.py:upload")
    assert stacks.all_wait_for_others(in_barrier + main) == forever
    # What the main thread waits for may be a thread that runs a function of torch's.
    saver = thread_in(f"{TORCH}/../serialization.py:save", f"{THREADING}:run")
    assert not stacks.all_wait_for_others(in_barrier + saver + main)


@pytest.mark.parametrize("name", ["<string>", "<dynamic-code>", "<anything>", "/nowhere/x.py"])
def test_that_all_wait_does_not_hang_on_a_files_name(name: str) -> None:
    waits = DUMP[DUMP.index("Current thread") :]
    assert stacks.all_wait_for_others(waits.replace("/home/me/train.py", name))
    elsewhere = waits.replace("/home/me/train.py", name).replace(TORCH, "/home/me")
    assert not stacks.all_wait_for_others(elsewhere)


LEARNERS = """\
import json

def read(options):
    limit = 3
    return options["lr"]
    # after

def work(options):
    try:
        read(options)
    except KeyError as error:
        raise ValueError(f"incomplete: {options}") from error

def parse(text):
    try:
        1 / 0
    except ZeroDivisionError:
        return json.loads(text)

def below(depth): dive(depth - 1)
def dive(depth):
    if depth: below(depth)
    raise ValueError("deep")
"""


def rendered(function: str, argument: Any, directory: Path) -> list[str]:
    """The text of an exception raised through a learner's file, frame by frame."""
    path = directory / "learners.py"
    path.write_text(LEARNERS)
    functions = runpy.run_path(str(path))
    with pytest.raises(ValueError, match=r".") as caught:
        functions[function](argument)
    error = describe(caught.value)
    without_ours = tuple(f for f in error.frames if f.filename != __file__)
    return stacks.render(dataclasses.replace(error, frames=without_ours)).splitlines()


def test_a_chained_exception_is_told_in_order_with_its_lines_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rendered("work", {"momentum": 0.9}, tmp_path) == [
        "learners.py, line 10, in work",
        "        9     try:",
        "---->  10         read(options)",
        "       11     except KeyError as error:",
        "learners.py, line 5, in read",
        "        4     limit = 3",
        '---->   5     return options["lr"]',
        "        6     # after",
        "KeyError: 'lr'",
        "",
        "That caused the next exception:",
        "",
        "learners.py, line 12, in work",
        "       11     except KeyError as error:",
        '---->  12         raise ValueError(f"incomplete: {options}") from error',
        "ValueError: incomplete: {'momentum': 0.9}",
    ]


def test_of_a_recursion_each_line_is_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = rendered("dive", 40, tmp_path)
    assert [line for line in lines if "learners.py" in line or "left out" in line] == [
        "learners.py, line 22, in dive",
        "learners.py, line 20, in below",
        "[... 78 frames left out ...]",
        "learners.py, line 23, in dive",
    ]


def test_code_without_text_shows_no_empty_line() -> None:
    with pytest.raises(SyntaxError) as caught:
        eval("")
    assert describe(caught.value).text == 'File "<string>", line 0\nSyntaxError: invalid syntax'


def test_of_a_library_only_the_innermost_frame_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = rendered("parse", "{", tmp_path)
    assert "While that was handled, another exception happened:" in lines
    last = lines[lines.index("learners.py, line 18, in parse") :]
    assert last[:3] == [
        "learners.py, line 18, in parse",
        "       17     except ZeroDivisionError:",
        "---->  18         return json.loads(text)",
    ]
    assert last[3].startswith("json/decoder.py, line ")
    assert last[5].startswith("json.decoder.JSONDecodeError: Expecting property name")
    assert len(last) == 6


DUMPS = """
import faulthandler, sys, threading, time
for _ in range(3):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
def deep(calls):
    return deep(calls - 1) if calls else faulthandler.dump_traceback(sys.stdout)
deep(int(sys.argv[1]))
"""


@pytest.mark.parametrize("calls", [1, 200])
def test_a_dump_that_has_not_all_come_is_not_whole(calls: int) -> None:
    """A busy rank prints it in pieces: what is missing may be the thread that can still act."""
    command = [sys.executable, "-c", DUMPS, str(calls)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines(
        keepends=True
    )
    assert sum("hread 0x" in line for line in lines) == 4
    assert [n for n in range(len(lines) + 1) if stacks.is_whole("".join(lines[:n]))] == [len(lines)]


def fails_without_directory(rank: int) -> None:
    if rank == 1:
        shutil.rmtree(os.getcwd())
        exec(compile("raise ValueError('bad sample 17')", "made up", "exec"))
    time.sleep(100)


def test_the_working_directory_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = launch(fails_without_directory, check=False)
    assert "rank 1 raised ValueError: bad sample 17" in str(run)
    assert "rank 1 of 2 raised ValueError: bad sample 17" in run.explain()
    assert stacks.place_name("made up") == "made up"
    assert stacks.place_name(torch.__file__) == "torch/__init__.py"
    assert not is_installed_here("made up")
