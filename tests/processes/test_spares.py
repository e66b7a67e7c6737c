"""Processes that wait until they become ranks: used once, as fresh as others, never in the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest
import torch

from ddp_lessons import CannotSend, launch
from ddp_lessons.processes import forkserver, rank_process, spares
from ddp_lessons.system import reaper
from ddp_lessons.worker.spare import MOST_DESCRIPTORS, NAME
from tests.support.kernels import Kernel, gone, is_spare

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="there is no forkserver"),
]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def ident(rank: int) -> int:
    return os.getpid()


def spares_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if is_spare(child)]


def waiting(count: int, process: psutil.Process | None = None) -> list[psutil.Process]:
    """The spares of a process, once there are so many."""
    deadline = time.monotonic() + 20
    while len(found := spares_of(process or psutil.Process())) != count:
        assert time.monotonic() < deadline, f"there are {len(found)}"
        time.sleep(0.01)
    return found


@pytest.fixture(autouse=True)
def keeps_spares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a kernel."""
    monkeypatch.setenv("DDP_LESSONS_SPARES", "8")
    server = forkserver.server()
    server._spares._recent.clear()
    yield
    server.give_up_spares()
    waiting(0)


def test_each_becomes_a_rank_once() -> None:
    launch(ident, nprocs=3)
    first = {spare.pid for spare in waiting(3)}
    run = launch(lambda rank: (os.getpid(), os.getsid(0), psutil.Process().name()), nprocs=3)
    assert {pid for pid, _, _ in run.values} == first
    assert all(pid == session for pid, session, _ in run.values)
    assert NAME not in {name for _, _, name in run.values}
    assert not first & {spare.pid for spare in waiting(3)}


def test_more_ranks_than_spares_and_fewer() -> None:
    launch(ident, nprocs=2)
    two = {spare.pid for spare in waiting(2)}
    assert two < set(launch(ident, nprocs=4).values)
    waiting(4)
    launch(ident, nprocs=1)
    waiting(4)  # as many as one of the last launches had
    for _ in range(spares.LAUNCHES):
        launch(ident, nprocs=1)
    assert launch(ident, nprocs=1).ok


def state(rank: int, queue: Any) -> tuple[Any, ...]:
    queue.put(rank)
    return (
        os.environ.get("ONLY_NOW"),
        os.getcwd(),
        sys.path[0],
        sys.argv,
        torch.get_default_dtype(),
        multiprocessing.current_process().name,
        len(os.listdir("/proc/self/fd")),
    )


def draws(rank: int) -> tuple[Any, ...]:
    return random.random(), np.random.rand(), torch.rand(1).item(), os.urandom(4)


def test_the_state_is_that_of_the_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    launch(ident)
    monkeypatch.setenv("DDP_LESSONS_SPARES", "0")
    monkeypatch.setenv("ONLY_NOW", "yes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/somewhere")
    monkeypatch.setattr(sys, "argv", ["a", "b"])
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        waiting(2)
        by_spares = launch(state, (queue,)).values
        waiting(0)
        by_fork = launch(state, (queue,)).values
    finally:
        torch.set_default_dtype(dtype)
    assert by_spares == by_fork
    assert by_spares[0][:5] == ("yes", str(tmp_path), "/somewhere", ["a", "b"], torch.float64)
    assert [queue.get() for _ in range(4)].count(0) == 2


def test_no_two_ranks_draw_alike() -> None:
    launch(draws, nprocs=4)
    waiting(4)
    drawn = [*launch(draws, nprocs=4).values, *launch(draws, nprocs=4).values]
    for kind in zip(*drawn, strict=True):
        assert len(set(kind)) == 8


def end(spares: list[psutil.Process]) -> None:
    for spare in spares:
        spare.kill()
    assert gone(spares)


def kill_spares(server: forkserver.Forkserver) -> None:
    end(spares_of(psutil.Process()))


def suspend_spares(server: forkserver.Forkserver) -> None:
    for spare in spares_of(psutil.Process()):
        suspend(spare)


def kill_one_spare(server: forkserver.Forkserver) -> None:
    end(spares_of(psutil.Process())[:1])


def kill_server(server: forkserver.Forkserver) -> None:
    assert server.pid is not None
    reaper.kill_and_wait(server.pid)


def suspend_server(server: forkserver.Forkserver) -> None:
    suspend(psutil.Process(server.pid))


def suspend(process: psutil.Process) -> None:
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)


@pytest.mark.parametrize(
    "harm", [kill_spares, suspend_spares, kill_one_spare, kill_server, suspend_server]
)
def test_the_next_launch_works(harm: Callable[[forkserver.Forkserver], None]) -> None:
    launch(ident)
    before = waiting(2)
    harm(forkserver.server())
    assert launch(lambda rank: rank).values == [0, 1]
    assert gone(before)


def test_what_ranks_leave_is_ended_and_spares_are_not() -> None:
    launch(ident)
    before = {spare.pid for spare in waiting(2)}
    left = launch(
        lambda rank: subprocess.Popen(["sleep", "61"], start_new_session=True).pid, nprocs=1
    ).values
    assert not any(map(psutil.pid_exists, left))
    assert before & {spare.pid for spare in waiting(2)}


def test_an_argument_that_cannot_be_sent() -> None:
    launch(ident)
    waiting(2)
    with pytest.raises(CannotSend, match=r"args\[0\]"):
        launch(state, ((n for n in "ab"),))
    assert launch(lambda rank: rank).values == [0, 1]


@pytest.fixture
def default_timeout() -> Iterator[None]:
    """As before a data set is downloaded."""
    socket.setdefaulttimeout(30)
    yield
    socket.setdefaulttimeout(None)


def test_a_default_timeout_of_sockets_is_not_theirs(default_timeout: None) -> None:
    def work(rank: int, data: bytes) -> tuple[int, torch.Tensor]:
        return os.getpid(), torch.zeros(500_000)

    launch(work, (b"x" * 500_000,), nprocs=2)
    two = {spare.pid for spare in waiting(2)}
    assert {pid for pid, _ in launch(work, (b"x" * 500_000,), nprocs=2).values} == two


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process have 2,048 files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2048, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_above_1023(many_files: None) -> None:
    """`select.select` takes none of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(1024):
            stack.enter_context(open(os.devnull))
        for _ in range(2):
            assert launch(lambda rank: rank).values == [0, 1]
            waiting(2)


def adds_one(rank: int, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor[rank] += 1


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *(("forkserver", more) for more in (-3, -2, -1, 0, MOST_DESCRIPTORS + 1)),
        pytest.param("spawn", 0, marks=pytest.mark.slow),
    ],
)
def test_more_descriptors_than_one_message_takes(method: str, more: int, many_files: None) -> None:
    """Tensors, each of which needs one, are shared with the ranks as with `mp.spawn`."""
    tensors = [torch.tensor([n, -n]) for n in range(MOST_DESCRIPTORS + more)]
    for times in (1, 2):
        launch(adds_one, (tensors,), start_method=method)
        assert [tensor.tolist() for tensor in tensors] == [
            [n + times, times - n] for n in range(len(tensors))
        ]
        if method == "forkserver":
            waiting(2)


def test_they_end_after_a_rest_whenever_the_next_launch_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if it comes in the moment in which they end."""
    monkeypatch.setattr(rank_process, "REST", 0.1)
    launch(ident, nprocs=3)
    for number in range(12):
        time.sleep(0.07 + 0.005 * number)
        assert launch(lambda rank: rank, nprocs=3).values == [0, 1, 2]
    waiting(0)


FEW_FILES = """
    import resource, time
    import psutil
    from ddp_lessons import launch
    def ident(rank):
        return rank
    launch(ident, nprocs=8)
    process = psutil.Process()
    used = process.num_fds()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, most))
    print(launch(ident, nprocs=3).values, process.num_fds() <= used)
"""


@pytest.mark.slow
def test_they_are_given_up_first_where_descriptors_run_short() -> None:
    command = [sys.executable, "-c", textwrap.dedent(FEW_FILES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.stdout, done.stderr) == ("[0, 1, 2] True\n", "")


FORKS = """
    import os, signal, sys
    from ddp_lessons import launch
    launch(lambda rank: rank, nprocs=3)
    child = os.fork()
    if not child:
        signal.pause()
    print(child, flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_a_forked_copy_of_their_owner_does_not_keep_them() -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        spares = waiting(3, psutil.Process(owner.pid))
        owner.kill()
        assert gone(spares)
        assert child.is_running()
        child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_they_end_with_a_kernel(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they have been suspended."""
    monkeypatch.delenv("DDP_LESSONS_SPARES")
    with Kernel() as kernel:
        kernel.run("launch(lambda rank: rank, nprocs=3)")
        spares = waiting(3, kernel.process)
        if end == signal.SIGSTOP:
            for spare in spares:
                spare.suspend()
        os.kill(kernel.pid, signal.SIGKILL if end == signal.SIGSTOP else end)
        assert gone(spares)


@pytest.mark.slow
def test_a_kernel_that_shall_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_LESSONS_SPARES", "0")
    with Kernel() as kernel:
        kernel.run("launch(lambda rank: rank, nprocs=3)")
        time.sleep(0.3)
        assert spares_of(kernel.process) == []


def test_a_script_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDP_LESSONS_SPARES")
    assert launch(ident).ok
    time.sleep(0.1)
    assert spares_of(psutil.Process()) == []
