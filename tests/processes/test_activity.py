"""What a rank does is seen from outside: that it computes, gets no processor, or sends data."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ddp_lessons.processes.activity import (
    ActivitySampler,
    Sample,
    cpu_seconds,
    have_unsent_data,
    threads_of,
)

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc"),
]
SPIN = "while True: pass"
SLEEP = "import time\nwhile True: time.sleep(60)"
POLL = "import time\nwhile True: time.sleep(0.01)"
LAST = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
WAITS = "import sys, threading\nthreading.Thread(target=sys.stdin.read).start()\n"


@contextlib.contextmanager
def running(*programs: str) -> Iterator[list[int]]:
    """The ids of processes that run these programs, all on one processor, and have begun to."""
    core = min(os.sched_getaffinity(0))
    pin = f"import os, signal; signal.alarm(100); os.sched_setaffinity(0, {{{core}}})\n"
    begin = "print(flush=True)\n"
    with contextlib.ExitStack() as stack:
        started = []
        for program in programs:
            command = [sys.executable, "-c", pin + begin + program]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in started]


def samples(pid: int, number: int) -> list[Sample]:
    """So many samples of a process, but for the first, with which the next is compared."""
    sampler = ActivitySampler()
    found: list[Sample] = []
    while len(found) <= number:
        if (sample := sampler.sample(pid)) is not None:
            found.append(sample)
        time.sleep(0.05)
    return found[1:]


def waits(pid: int) -> bool:
    """Whether a process waits where its program does: no thread of it runs or wants to."""
    before = cpu_seconds(pid)
    time.sleep(0.3)
    ready = any(thread.ready for thread in threads_of(pid).values())
    return cpu_seconds(pid) == before and not ready


def test_a_process_that_gets_no_processor_is_not_idle() -> None:
    """Three others keep its core busy, and it comes last: it gets none for seconds."""
    with running(LAST + SPIN, SPIN, SPIN, SPIN) as (starved, *_):
        while os.sched_getscheduler(starved) != os.SCHED_IDLE:
            time.sleep(0.01)
        for sample in samples(starved, 8):
            assert (sample.activity, sample.queued) == ("busy", True)
            assert sample.starved > 0.9


@pytest.mark.parametrize("program", [SLEEP, POLL, WAITS])
def test_a_process_that_waits_is_idle(program: str) -> None:
    with running(program) as (waiting,):
        while not waits(waiting):
            time.sleep(0.05)
        found = samples(waiting, 8)
    assert {sample.activity for sample in found} == {"idle"}
    assert program == POLL or not any(sample.queued or sample.starved > 0.1 for sample in found)


def test_nothing_is_known_while_no_file_can_be_opened() -> None:
    sampler = ActivitySampler()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert sampler.sample(os.getpid()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sampler.sample(os.getpid()) is not None


def test_time_in_the_queue_for_a_processor_is_seen() -> None:
    """Six processes on one core: each waits for it for five sixths of the time."""
    with running(*[SPIN] * 6) as spinners:
        found = samples(spinners[0], 8)
    assert {sample.activity for sample in found} == {"busy"}
    assert min(sample.starved for sample in found) > 0.3


def test_data_that_nobody_has_received_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        assert not have_unsent_data([os.getpid()])
        one.setblocking(False)
        sent = 0
        try:
            while True:
                sent += one.send(bytes(1 << 20))
        except BlockingIOError:
            assert have_unsent_data([os.getpid()])
        other.settimeout(10)
        while sent:
            sent -= len(other.recv(1 << 20))
        deadline = time.monotonic() + 10
        while have_unsent_data([os.getpid()]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not have_unsent_data([os.getpid()])
        one.close()
        other.close()
