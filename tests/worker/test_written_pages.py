"""Spares have copied the pages that ranks write; what they hold is the same."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from ddp_lessons.worker import written_pages
from ddp_lessons.worker.written_pages import LONGEST, MOST
from tests.support.kernels import Kernel, is_spare

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="there is no forkserver"),
]
TRAINS = """
import resource
import torch, torch.distributed as dist
def joins(rank):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    dist.init_process_group("gloo")
    x = torch.tensor([rank + 1.0])
    dist.all_reduce(x)
    dist.destroy_process_group()
    return x.item(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def own_bytes(pid: int) -> int:
    """The memory that a process shares with no other."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"Private_Dirty: +(\d+)", rollup)[0]) << 10


def spares_settled(kernel: Kernel) -> list[int]:
    """The memory of each spare's own, once it does not grow any more."""
    seen: list[int] = []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        spares = [p.pid for p in kernel.process.children(recursive=True) if is_spare(p)]
        now = [own_bytes(pid) for pid in spares]
        if len(now) == 2 and now == seen:
            return now
        seen = now
        time.sleep(0.3)
    raise AssertionError(f"{len(seen)} spares")


@pytest.mark.slow
def test_spares_copy_beforehand_what_a_rank_has_written(kernel: Kernel) -> None:
    kernel.run(TRAINS)
    assert kernel.run("print(launch(lambda rank: rank).values)").stdout == "[0, 1]\n"
    few = max(spares_settled(kernel))  # nothing is known: no rank has joined
    faults = []
    for _ in range(4):
        values = eval(kernel.run("print(launch(joins).values)").stdout)
        assert [x for x, _ in values] == [3.0, 3.0]
        faults.append(min(count for _, count in values))
        many = min(spares_settled(kernel))
        assert few + 2_000_000 < many < few + MOST * mmap.PAGESIZE + 2_000_000
    assert max(faults[2:]) < 0.8 * faults[0], faults


def found() -> dict[int, int]:
    """The addresses and sizes of the pages that this process has written."""
    return dict(written_pages._PIECE.iter_unpack(written_pages.written()))


def test_pages_that_a_process_wrote_are_found_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(written_pages, "MOST", 1 << 40)  # this process has written many
    size = 100 * mmap.PAGESIZE
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = ctypes.addressof(here := ctypes.c_char.from_buffer(memory))
        for page in (3, 4, 50):
            memory[page * mmap.PAGESIZE] = 1
        pieces = {a: n for a, n in found().items() if start <= a < start + size}
        del here
    pages = {(a - start) // mmap.PAGESIZE: n // mmap.PAGESIZE for a, n in pieces.items()}
    assert pages == {3: 2, 50: 1}


def test_much_data_of_the_learner_is_left_out() -> None:
    data = torch.ones(50_000_000)
    assert data.sum() > 0
    assert sum(found().values()) <= MOST * mmap.PAGESIZE
    assert max(found().values()) <= LONGEST * mmap.PAGESIZE


def test_copying_stops_when_a_launch_comes() -> None:
    pieces = written_pages._PIECE.pack(0, mmap.PAGESIZE) * 1000
    asked: list[int] = []

    def is_needed() -> bool:
        asked.append(1)
        return len(asked) == 3

    written_pages.copy(pieces, is_needed)  # at address 0 there is no memory: that does not matter
    assert len(asked) == 3


def test_what_a_page_holds_stays() -> None:
    size = 8 * mmap.PAGESIZE
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(range(256)) * (size // 256))
        start = ctypes.addressof(here := ctypes.c_char.from_buffer(memory))
        written_pages.copy(written_pages._PIECE.pack(start, size), lambda: False)
        del here
        assert memory[:] == bytes(range(256)) * (size // 256)
