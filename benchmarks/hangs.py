"""How soon a hang is named, on a quiet machine and on a starved one: `python -m benchmarks.hangs`.

Seconds from the moment when the last rank is ready to hang, to launch's error; medians and the
longest. Starved: launcher and ranks share one core with three busy processes. Linux only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch
from ddp_lessons.processes import forkserver

BUSY = [sys.executable, "-c", "while True: pass"]


def skips_a_collective(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    Path(folder, str(rank)).write_text(str(time.time()))
    if rank != 1:
        dist.all_reduce(torch.ones(1))
    dist.barrier()


def skips_a_backward(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.randn(2, 8)).sum().backward()
    Path(folder, str(rank)).write_text(str(time.time()))
    if rank != 1:
        model(torch.randn(2, 8)).sum().backward()
    dist.barrier()


def once(fn: Callable[[int, str], None], nprocs: int) -> float:
    """Seconds until the hang is named, as what it is."""
    with tempfile.TemporaryDirectory() as folder:
        run = launch(fn, (folder,), nprocs=nprocs, check=False, timeout=30)
        ended = time.time()
        ready = max(float(Path(folder, str(rank)).read_text()) for rank in range(nprocs))
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("skipped collective", (1,))
    return ended - ready


def series(machine: str, nprocs: int, times: int) -> None:
    for fn in (skips_a_collective, skips_a_backward):
        took = [once(fn, nprocs) for _ in range(times)]
        print(
            f"{machine}, {nprocs} ranks, {fn.__name__}: {statistics.median(took):.1f} s, "
            f"{max(took):.1f} at most",
            flush=True,
        )


def main() -> None:
    series("quiet", 4, 10)
    pid = forkserver.server().pid
    assert pid is not None
    for process in (0, pid):
        os.sched_setaffinity(process, {0})
    others = [subprocess.Popen(BUSY) for _ in range(3)]
    try:
        series("starved", 4, 6)
        series("starved", 12, 4)
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
