"""`ddp-lessons doctor`: reports whether this machine can run ranks, and if not, why.

It runs in the command's own process, so it may initialise CUDA, which a notebook's kernel should
not. The functions that need heavy imports make them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import linecache
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ddp_lessons
from ddp_lessons.course import lesson_files
from ddp_lessons.launcher.memory_check import NEEDS
from ddp_lessons.system.memory import available_memory
from ddp_lessons.text import listed
from ddp_lessons.wire import stacks

KERNEL_BYTES = 700 << 20  # the notebook's kernel with torch, and the forkserver
LEAST_SHARED = 64 << 20  # Docker's default /dev/shm; DataLoader workers exhaust it soon

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

NEWEST = Path(__file__).with_name("newest.txt")  # the versions that `make newest` tested
MATTER = (  # lines, output and pictures depend on these
    *("torch", "cloudpickle", "numpy", "scikit-learn", "psutil", "matplotlib"),
    *("ipython", "ipykernel", "ipywidgets", "jupyterlab"),
)
OPTIONAL = ("ipyparallel",)
PIP_NAMES = {"sklearn": "scikit-learn"}

CELL = "<a cell of doctor>"
FAULTS = """
import torch, torch.distributed as dist

def fails(rank):
    if rank == 1:
        raise ValueError("on purpose")  # this line

def hangs(rank):
    dist.init_process_group("gloo")
    if rank == 1:
        dist.broadcast(torch.ones(1), src=0)  # this line: rank 0 never calls it
    dist.barrier()  # this line
"""
SOON = 3.0  # seconds within which both must be explained
GIVEN_UP = 10.0  # seconds after which a hang is stopped in any case
CURE = "cloudpickle==3.1.2"  # the last release whose pickles keep file names

OK, NOTE, PROBLEM = "ok", "note", "problem"


class Finding(NamedTuple):
    """One line of the report: ok, note or problem, and the finding in plain words."""

    mark: str
    text: str


def doctor() -> int:
    """Print the findings; return 0 if ranks can be launched, else 1."""
    worst = OK
    for finding in examine():
        print(f"{finding.mark:>8}  {finding.text}", flush=True)
        worst = PROBLEM if finding.mark == PROBLEM else worst
    print()
    print(
        "Something above keeps the lessons from working as they should."
        if worst == PROBLEM
        else "This machine can run the lessons."
    )
    return 1 if worst == PROBLEM else 0


def examine() -> Iterator[Finding]:
    """Yield the findings one by one."""
    yield on_python(platform.python_version(), sys.platform)
    yield on_cores(usable_cores())
    yield on_memory(available_memory())
    yield on_shared_memory(free_shared_memory())
    of_torch = list(on_torch())
    yield from of_torch
    yield from on_versions(tested())
    yield from on_lessons(missing_packages())
    if all(finding.mark != PROBLEM for finding in of_torch):
        launched = on_launch()
        yield launched
        if launched.mark != PROBLEM:
            yield from on_lines()


def on_python(version: str, system: str) -> Finding:
    """Judge the interpreter and the operating system."""
    if system == "win32":
        return Finding(PROBLEM, f"Python {version} on Windows: use WSL, the Linux inside Windows.")
    how = "ranks are forked" if system == "linux" else "ranks are spawned, which takes seconds"
    return Finding(OK, f"Python {version} on {platform.system()}: {how}.")


def usable_cores() -> int:
    """How many cores this process may use, including a container's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota() -> float:
    """A container's CPU quota in cores (cgroup v2); infinity without a limit."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or no number but "max"
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
    """Free bytes of /dev/shm; None if it does not exist."""
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
    why = "this build of torch lacks it" if cuda_build else "this is a CPU build of torch"
    if cuda_build and not gpus:
        why = "there is no GPU"
    return Finding(OK, f"Backend nccl (NVIDIA GPUs): not available, {why}. No lesson needs it.")


def on_gpus(names: list[str]) -> Finding:
    """List the GPUs."""
    if not names:
        return Finding(OK, "GPUs: none. Only the appendix has use for one, and shows what one did.")
    return Finding(OK, f"GPUs: {', '.join(names)}.")


def tested() -> dict[str, str]:
    """The newest versions of packages that the course was tested with."""
    lines = NEWEST.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def on_versions(newest: Mapping[str, str]) -> Iterator[Finding]:
    """List the versions that lines, output and pictures depend on, and untested newer ones."""
    installed = {}
    for name in MATTER:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(NOTE, f"{name} is not installed: pip install {name}.")
    newer = [n for n, v in installed.items() if _number(v) > _number(newest.get(n, v))]
    others = ", ".join(f"{n} {v}" for n, v in installed.items() if n not in newer)
    yield Finding(OK, f"Versions that the course was tested with, or older: {others}.")
    for name in newer:
        yield Finding(
            NOTE,
            f"{name} {installed[name]} is newer than the course was tested with, {newest[name]}. "
            f"If something breaks: pip install '{name}<={newest[name]}'",
        )


def _number(version: str) -> tuple[int, ...]:
    """The numbers of a version, without a suffix."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])


def missing_packages() -> dict[str, list[str]]:
    """The lessons that need each package that is not installed."""
    missing: dict[str, list[str]] = {}
    folder = lesson_files.source()
    for lesson in lesson_files.lessons(folder):
        code = lesson_files.code(folder / lesson.file)
        imported = {*re.findall(r"^\s*(?:import|from) +(\w+)", code, re.M)}
        of_its_own = {*re.findall(r"(\w+)\.py\b", code)}  # modules that the lesson writes itself
        for name in sorted(imported - of_its_own):
            if importlib.util.find_spec(name) is None:
                missing.setdefault(name, []).append(lesson.number or lesson.name)
    return missing


def on_lessons(missing: Mapping[str, list[str]]) -> Iterator[Finding]:
    """Report missing packages, and what to install."""
    if not missing:
        yield Finding(OK, "Every package that a lesson imports is installed.")
    for name, lessons in missing.items():
        part = "; without it a part is skipped" if name in OPTIONAL else ""
        package = PIP_NAMES.get(name, name)
        yield Finding(NOTE, f"Lesson {listed(lessons)} imports {name}{part}: pip install {package}")


def add_up(rank: int) -> float:
    """Join, all_reduce and leave: the worker of `on_launch`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.tensor([float(rank + 1)])
    dist.all_reduce(x)
    dist.destroy_process_group()
    return float(x.item())


def on_launch() -> Finding:
    """Launch two ranks."""
    try:
        run = ddp_lessons.launch(add_up, nprocs=2, check=False)
    except ddp_lessons.LaunchError as error:
        return Finding(PROBLEM, f"2 ranks could not be launched: {error}")
    if run.values == [3.0, 3.0]:
        return Finding(OK, "2 ranks were launched, joined a gloo group and added up.")
    return Finding(PROBLEM, f"2 ranks did not get through an all_reduce: {run.explain()}")


def on_lines() -> Iterator[Finding]:
    """Make a rank fail and two ranks hang, and check that their lines are reported."""
    functions = cell()
    for name, what in (("fails", "a failure"), ("hangs", "a hang")):
        began = time.monotonic()
        run = ddp_lessons.launch(functions[name], nprocs=2, timeout=GIVEN_UP, check=False)
        yield on_line(what, run, time.monotonic() - began)


def cell() -> dict[str, Any]:
    """The functions of FAULTS, as a notebook cell defines them: their source is in no file."""
    linecache.cache[CELL] = len(FAULTS), None, FAULTS.splitlines(keepends=True), CELL
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(FAULTS, CELL, "exec"), names)
    return names


def on_line(what: str, run: ddp_lessons.Run, seconds: float) -> Finding:
    """Judge the verdict of a run that failed or hung on purpose."""
    frame = run.verdict.frame if run.verdict is not None else None
    if frame is None or "# this line" not in frame.source:
        found = f"only {stacks.line_name(frame)}" if frame is not None else "no line at all"
        return Finding(
            PROBLEM,
            f"The line of {what} on purpose did not come back, {found}: explanations will lack the "
            f"code. Most often a new release of cloudpickle is why. pip install '{CURE}'",
        )
    if seconds > SOON:
        return Finding(
            NOTE,
            f"The line of {what} on purpose came back only after {seconds:.0f} s: "
            "is the machine busy?",
        )
    return Finding(OK, f"The line of {what} on purpose came back at once.")
