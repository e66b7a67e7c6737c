"""All signals stay the learner's: asking for stacks uses none, and disturbs no healthy run."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import time
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch, report, span
from ddp_lessons.system.reaper import catches
from ddp_lessons.wire.messages import STACK_SIGNAL

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

linux = pytest.mark.skipif(sys.platform != "linux", reason="there are no real-time signals")
LEARNERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP, signal.SIGQUIT)


def with_handlers(rank: int) -> list[int]:
    """The signals that a handler of the learner's received."""
    got: list[int] = []
    for number in LEARNERS:
        signal.signal(number, lambda number, _: got.append(number))
        os.kill(os.getpid(), number)
    return got


@linux
def test_a_handler_of_the_learners_gets_its_signal() -> None:
    assert launch(with_handlers).values == [list(LEARNERS)] * 2


def prints_its_stack(rank: int) -> None:
    faulthandler.register(signal.SIGUSR1)


def prints_a_line(rank: int) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: print("still here", flush=True))


@pytest.mark.parametrize("prepares", [prints_its_stack, prints_a_line])
@linux
def test_a_hang_is_told_soon_beside_a_handler_that_prints(prepares: Any) -> None:
    def hangs(rank: int) -> None:
        prepares(rank)
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()
        else:
            dist.all_reduce(torch.ones(1))

    run = launch(hangs, timeout=60, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "different collectives"
    assert [rank.output for rank in run.ranks] == ["", ""]


def counts_and_prints() -> list[int]:
    """The signals that arrive from now on, as a trainer counts those of a preemption."""
    got: list[int] = []
    for number in LEARNERS:

        def requeue(number: int, _: Any) -> None:
            got.append(number)
            print("asking for requeue")

        signal.signal(number, requeue)
    return got


@linux
@pytest.mark.alone
def test_a_hang_without_proof_ends_at_its_timeout_beside_handlers_that_print() -> None:
    """What the package causes is no progress, and causes no line of the learner's."""

    def hangs(rank: int) -> None:
        dist.init_process_group("gloo")
        counts_and_prints()
        if rank == 0:
            time.sleep(1000)
        dist.barrier()

    began = time.monotonic()
    run = launch(hangs, timeout=3, check=False)
    assert time.monotonic() - began < 20
    assert run.verdict is not None
    assert run.verdict.ranks == (0,)
    assert run.hung_after == 3
    assert [rank.output for rank in run.ranks] == ["", ""]


@linux
def test_a_rank_that_others_wait_for_gets_no_signal() -> None:
    def slow(rank: int) -> list[int]:
        dist.init_process_group("gloo")
        got = counts_and_prints()
        if rank == 0:
            time.sleep(5)
        dist.barrier()
        dist.destroy_process_group()
        return got

    assert launch(slow).values == [[], []]


@linux
def test_a_rank_that_has_become_another_program_goes_on() -> None:
    """It has no handler any more, so the signal would end it."""

    def becomes(rank: int) -> str:
        if rank == 0:
            os.execlp("sh", "sh", "-c", "sleep 3; echo survived")
        time.sleep(3.5)
        return "returned"

    run = launch(becomes, check=False, timeout=20)
    assert run.ranks[0].output == "survived\n"
    assert run.ranks[1].value == "returned"


@linux
def test_who_catches_a_signal() -> None:
    child = subprocess.Popen(["sleep", "63"])
    try:
        assert not catches(child.pid, STACK_SIGNAL)
    finally:
        child.kill()
        child.wait()
    before = signal.signal(STACK_SIGNAL, lambda *_: None)
    try:
        assert catches(os.getpid(), STACK_SIGNAL)
    finally:
        signal.signal(STACK_SIGNAL, before)
    assert not catches(os.getpid(), STACK_SIGNAL)


def test_a_sleep_in_c_is_not_cut_short() -> None:
    """Python's own sleep goes on after a signal; one in a library returns early."""

    def sleeps(rank: int) -> float:
        dist.init_process_group("gloo")
        began = time.monotonic()
        if rank == 0:
            ctypes.CDLL(None).usleep(3_000_000)
        slept = time.monotonic() - began
        dist.barrier()
        dist.destroy_process_group()
        return slept

    assert launch(sleeps).values[0] >= 3.0


def takes_interrupts(rank: int) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_rank_takes_interrupts_though_its_parent_ignores_them(method: str) -> None:
    """As a shell's background process does, or an engine while it starts a rank."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert launch(takes_interrupts, nprocs=1, start_method=method).values == [True]
    finally:
        signal.signal(signal.SIGINT, before)


def reports_in_a_handler(rank: int) -> int:
    """How often the handler has reported, and marked a span."""
    beats = itertools.count()

    def beat(*_: Any) -> None:
        number = next(beats)
        report(beat=number)
        with span(f"beat {number}"):
            pass
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    signal.signal(signal.SIGALRM, beat)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    for step in range(5000):
        report(step=step)
        with span(f"step {step}"):
            pass
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return next(beats)


def test_a_handler_may_report_and_mark_spans_wherever_it_comes() -> None:
    run = launch(reports_in_a_handler, nprocs=1, timeout=20)
    counts = {"step": 5000, "beat": run.values[0]}
    for name, number in counts.items():
        assert [row[name] for row in run.reports if name in row] == list(range(number))
        spans = [s.name for s in run.spans() if s.name.startswith(name)]
        assert sorted(spans) == sorted(f"{name} {n}" for n in range(number))
