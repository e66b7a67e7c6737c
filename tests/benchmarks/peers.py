"""The same small job for every launcher: join a gloo group, add up one number, leave.

Other launchers need their worker functions in a module that new processes can import.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

# The same surroundings for all: no look-up of host names, one thread a rank.
SURROUNDINGS = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RES_OPTIONS": "timeout:1 attempts:1",
}


def job(hold: str = "", with_ddp: bool = False) -> None:
    """Join, add up, leave; with `hold`, stay until that file is gone, in between."""
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if with_ddp:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 10))
        model(torch.ones(1, 10)).sum().backward()
    if hold:
        Path(f"{hold}.{dist.get_rank()}").touch()  # this rank is there
        while os.path.exists(hold):
            time.sleep(0.02)
    dist.destroy_process_group()


def ranked_job(rank: int, hold: str = "", with_ddp: bool = False) -> None:
    """`job` for launchers that pass the rank and set the variables."""
    job(hold, with_ddp)


def by_launch(ranks: int, hold: str = "", with_ddp: bool = False) -> None:
    """Run the job with this package."""
    from ddp_lessons import launch

    launch(ranked_job, args=(hold, with_ddp), nprocs=ranks)


def by_spawn(ranks: int, hold: str = "", with_ddp: bool = False) -> None:
    """Run the job with torch.multiprocessing.spawn, as PyTorch's tutorials do."""
    torch.multiprocessing.spawn(_spawned, args=(ranks, free_port(), hold, with_ddp), nprocs=ranks)


def _spawned(rank: int, ranks: int, port: int, hold: str, with_ddp: bool) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    job(hold, with_ddp)


def by_notebook_launcher(ranks: int, hold: str = "", with_ddp: bool = False) -> None:
    """Run the job with accelerate's notebook_launcher; it needs 2 ranks or more to start any."""
    from accelerate import notebook_launcher

    notebook_launcher(job, (hold, with_ddp), num_processes=ranks, use_port=str(free_port()))


def by_debug_launcher(ranks: int, hold: str = "", with_ddp: bool = False) -> None:
    """Run less than the job with accelerate's debug_launcher: it cannot leave the group.

    It joins before it calls the function, through a temporary file of which it expects that no rank
    has removed it; leaving the group would.
    """
    from accelerate import debug_launcher

    debug_launcher(_add_up, num_processes=ranks)


def _add_up() -> None:
    dist.all_reduce(torch.ones(1))


def free_port() -> int:
    """A port that is free now, as tutorials find one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LAUNCHERS: dict[str, Callable[..., None]] = {
    "ddp_lessons.launch": by_launch,
    "torch.multiprocessing.spawn": by_spawn,
    "accelerate notebook_launcher": by_notebook_launcher,
    "accelerate debug_launcher (does not leave)": by_debug_launcher,
}
