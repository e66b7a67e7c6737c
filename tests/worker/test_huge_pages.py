"""The forkserver moves its memory into huge pages; ranks and launches are as before."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from ddp_lessons import launch
from ddp_lessons.processes import forkserver
from ddp_lessons.system import reaper
from ddp_lessons.worker.huge_pages import _COLLAPSE, REQUEST, SIZE
from tests.support.kernels import Kernel

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux moves memory into huge pages"),
]
MUCH = 50 << 20  # bytes


def in_huge_pages(pid: int) -> int:
    """Bytes of a process's memory, of no file, that are in huge pages."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"AnonHugePages: +(\d+)", rollup)[0]) << 10


def moves_memory() -> bool:
    """Whether this system moves memory into huge pages when asked to."""
    with mmap.mmap(-1, 2 * SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(2 * SIZE))
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        start = ctypes.addressof(here := ctypes.c_char.from_buffer(memory))
        moved: int = libc.madvise(-(-start // SIZE) * SIZE, SIZE, _COLLAPSE)
        del here
    return moved == 0


def until_moved(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while in_huge_pages(pid) < MUCH and time.monotonic() < deadline:
        time.sleep(0.05)
    return in_huge_pages(pid) >= MUCH


needs_a_system_that_does = pytest.mark.skipif(
    sys.platform == "linux" and not moves_memory(), reason="this system moves no memory"
)


@pytest.mark.slow
@needs_a_system_that_does
def test_a_kernel_s_forkserver_moves_its_memory_after_the_first_launch(kernel: Kernel) -> None:
    find = "from ddp_lessons.processes import forkserver; print(forkserver.server().pid)"
    pid = int(kernel.run(find).stdout)
    assert in_huge_pages(pid) < MUCH
    assert kernel.run("print(launch(lambda rank: rank).values)").stdout == "[0, 1]\n"
    assert until_moved(pid)
    assert kernel.run("print(launch(lambda rank: rank, nprocs=3).values)").stdout == "[0, 1, 2]\n"
    assert int(kernel.run(find).stdout) == pid


@pytest.mark.slow
@needs_a_system_that_does
def test_a_script_s_forkserver_does_so_after_some_launches() -> None:
    if pid := forkserver.server().pid:
        reaper.kill_and_wait(pid)
    pid = 0
    for number in range(forkserver.FEW):
        assert launch(lambda rank: rank).values == [0, 1]
        pid = forkserver.server().pid or 0
        assert in_huge_pages(pid) < MUCH or number == forkserver.FEW - 1
    assert until_moved(pid)


def asked(rank: int) -> tuple[bool, int]:
    """What a rank does with the request's signal, and whether a handler of its own gets it."""
    default = signal.getsignal(REQUEST) is signal.SIG_DFL
    seen: list[int] = []
    signal.signal(REQUEST, lambda number, _: seen.append(number))
    os.kill(os.getpid(), REQUEST)
    return default, seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_the_signal_is_the_learner_s_in_ranks(method: str) -> None:
    assert launch(asked, start_method=method).values == [(True, int(REQUEST))] * 2


def test_a_forkserver_that_awaits_no_request_is_not_ended_by_one() -> None:
    """Its handler may be gone: the signal would end it."""
    server = forkserver.server()
    launch(lambda rank: rank)
    before = server.pid
    server._launches, server._has_huge_pages = forkserver.FEW, False
    assert launch(lambda rank: rank).values == [0, 1]
    assert launch(lambda rank: rank).values == [0, 1]
    assert server.pid == before
