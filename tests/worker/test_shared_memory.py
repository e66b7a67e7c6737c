"""Shared memory with a name is removed, however the ranks end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader

from ddp_lessons import launch
from tests.conftest import is_anothers

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.alone,  # other tests have memory there, too
    pytest.mark.xdist_group("shared memory"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm"),
]


def by_name(worker: int = 0) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")


def work(rank: int, how: str) -> None:
    by_name()
    kept = torch.ones(100_000).share_memory_()
    loader: Any = DataLoader([kept] * 50, batch_size=4, num_workers=1, worker_init_fn=by_name)
    batches = iter(loader)
    next(batches)
    match how:
        case "raise":
            raise ValueError("in the middle")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            print("here", flush=True)
            time.sleep(100)


def shared() -> set[str]:
    """The names of torch's shared memory, and of the folders of the processes that manage it."""
    temporary = Path(tempfile.gettempdir()).glob("torch-shm-dir-*")
    ours = (path for path in Path("/dev/shm").glob("torch_*") if not is_anothers(path))
    return {path.name for path in (*ours, *temporary)}


@pytest.mark.parametrize("how", ["return", "raise", "exit", "kill", "hang"])
def test_none_is_left_when_the_launch_is_over(how: str) -> None:
    before = shared()
    launch(work, (how,), nprocs=2, timeout=3, check=False, start_method="forkserver")
    assert shared() == before


@pytest.mark.slow
def test_under_spawn_it_goes_two_seconds_later() -> None:
    before = shared()
    launch(work, ("raise",), nprocs=1, check=False, start_method="spawn")
    deadline = time.monotonic() + 10
    while shared() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared() == before


@pytest.mark.slow
def test_it_goes_when_the_notebook_is_killed() -> None:
    before = shared()
    code = "from tests.worker.test_shared_memory import *; launch(work, ('hang',), nprocs=1)"
    script = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while shared() == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared() != before
    time.sleep(0.5)  # the loader's worker shares its batches, too
    script.kill()
    script.wait()
    deadline = time.monotonic() + 10
    while shared() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared() == before
