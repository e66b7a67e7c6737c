"""`ddp-lessons doctor`: tell whether this machine can run ranks, and if not, why.

It runs in a process of its own, the command's, so it may ask CUDA what a notebook's kernel should
not touch. Heavy imports happen inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ddp_lessons
from ddp_lessons.capacity import NEEDS, available_memory

KERNEL_BYTES = 700 << 20  # the notebook's kernel with torch, and the forkserver
LEAST_SHARED = 64 << 20  # Docker's default /dev/shm; DataLoader workers exhaust it soon

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
OLD_CPU_QUOTA = [Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]

OK, NOTE, PROBLEM = "ok", "note", "problem"


class Finding(NamedTuple):
    """One line of the report: ok, note or problem, and what was found, in plain words."""

    mark: str
    text: str


def doctor() -> int:
    """Print the findings; 0 if ranks can be launched, else 1."""
    worst = OK
    for finding in examine():
        print(f"{finding.mark:>8}  {finding.text}", flush=True)
        worst = PROBLEM if finding.mark == PROBLEM else worst
    print()
    print(
        "Something above keeps ranks from running."
        if worst == PROBLEM
        else "This machine can run the lessons."
    )
    return 1 if worst == PROBLEM else 0


def examine() -> Iterator[Finding]:
    """Look at everything, one finding after the other."""
    yield on_python(platform.python_version(), sys.platform)
    yield on_cores(usable_cores())
    yield on_memory(available_memory())
    yield on_shared_memory(free_shared_memory())
    of_torch = list(on_torch())
    yield from of_torch
    yield on_jupyterlab()
    if all(finding.mark != PROBLEM for finding in of_torch):
        yield on_launch()


def on_python(version: str, system: str) -> Finding:
    """Judge the interpreter and the operating system."""
    if system == "win32":
        return Finding(PROBLEM, f"Python {version} on Windows: use WSL, the Linux inside Windows.")
    how = "ranks are forked" if system == "linux" else "ranks are spawned, which takes seconds"
    return Finding(OK, f"Python {version} on {platform.system()}: {how}.")


def usable_cores() -> int:
    """How many cores this process may use, within the quota of a container."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota() -> float:
    """How many cores' time a container may use (cgroup v2, else v1); infinity without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (file.read_text() for file in OLD_CPU_QUOTA)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def on_cores(cores: int) -> Finding:
    """Judge the number of cores."""
    if cores == 1:
        return Finding(
            NOTE, "1 core: ranks take turns, so timings show no speed-up. All else works."
        )
    return Finding(OK, f"{cores} cores.")


def on_memory(available: int, system: str = sys.platform) -> Finding:
    """Judge the memory, in numbers of ranks."""
    needs = NEEDS["forkserver" if system == "linux" else "spawn"]
    ranks = (available - KERNEL_BYTES) // needs.usual
    text = f"{available / 2**30:.1f} GB of memory free"
    if ranks < 2:
        return Finding(PROBLEM, f"{text}: too little for a kernel and 2 ranks. Close something.")
    if ranks < 8:
        return Finding(NOTE, f"{text}: enough for about {ranks} small ranks.")
    return Finding(OK, f"{text}: enough for the lessons.")


def free_shared_memory() -> int | None:
    """Free bytes of /dev/shm; None where there is no such place."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def on_shared_memory(free: int | None) -> Finding:
    """Judge the shared memory, through which DataLoader workers pass batches."""
    if free is None:
        return Finding(OK, "No /dev/shm on this system: shared memory is not limited by it.")
    text = f"{free / 2**20:,.0f} MB of shared memory free"
    if free <= LEAST_SHARED:
        return Finding(
            NOTE,
            f"{text}: DataLoader(num_workers=...) may fail with a bus error. "
            "In Docker, start the container with --shm-size=1g.",
        )
    return Finding(OK, f"{text}.")


def on_torch() -> Iterator[Finding]:
    """Judge torch, its backends and the GPUs."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        yield Finding(PROBLEM, f"torch cannot be imported: {error}")
        return
    yield Finding(OK, f"torch {torch.__version__}.")
    if not dist.is_available():
        yield Finding(PROBLEM, "This build of torch has no distributed package.")
        return
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield on_gloo(dist.is_gloo_available())
    yield on_nccl(dist.is_nccl_available(), torch.version.cuda is not None, len(gpus))
    yield on_gpus(gpus)


def on_gloo(available: bool) -> Finding:
    """Judge the backend for CPUs, which the lessons use."""
    if available:
        return Finding(OK, "Backend gloo (CPU): available. The lessons use it.")
    return Finding(PROBLEM, "Backend gloo (CPU) is missing from this build of torch.")


def on_nccl(available: bool, cuda_build: bool, gpus: int) -> Finding:
    """Judge the backend for NVIDIA GPUs."""
    if available and gpus:
        return Finding(OK, f"Backend nccl (NVIDIA GPUs): available, for up to {gpus} rank(s).")
    why = (
        "this is a CPU build of torch"
        if not cuda_build
        else "there is no GPU"
        if not gpus
        else "this build of torch lacks it"
    )
    return Finding(OK, f"Backend nccl (NVIDIA GPUs): not available, {why}. No lesson needs it.")


def on_gpus(names: list[str]) -> Finding:
    """List the GPUs."""
    return Finding(OK, f"GPUs: {', '.join(names) or 'none'}.")


def on_jupyterlab() -> Finding:
    """Judge JupyterLab."""
    try:
        return Finding(OK, f"JupyterLab {importlib.metadata.version('jupyterlab')}.")
    except importlib.metadata.PackageNotFoundError:
        return Finding(NOTE, "JupyterLab is not installed: pip install jupyterlab.")


def add_up(rank: int) -> float:
    """Join, add up and leave: what the launch below runs."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.tensor([float(rank + 1)])
    dist.all_reduce(x)
    dist.destroy_process_group()
    return float(x.item())


def on_launch() -> Finding:
    """Launch two ranks, for real."""
    try:
        run = ddp_lessons.launch(add_up, nprocs=2, check=False)
    except ddp_lessons.LaunchError as error:
        return Finding(PROBLEM, f"2 ranks could not be launched: {error}")
    if run.values == [3.0, 3.0]:
        return Finding(OK, "2 ranks were launched, joined a gloo group and added up.")
    return Finding(PROBLEM, f"2 ranks did not get through an all_reduce: {run.explain()}")
