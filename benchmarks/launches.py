"""Runs launches that fail in many ways, and kills kernels: is anything left behind?

    python -m benchmarks.launches --runs 500 --kills 200 --seed 0

After each launch there must be no rank, no new descriptor, temporary file or shared memory, and the
next launch must return its values. Kernels get SIGKILL at a random moment: half of them while they
launch again and again, half after one launch, while spares are forked or wait. Then all their
processes and files must be gone within 2 s; shared memory that torch keeps in files has a manager
of torch's, which needs 2 s itself. Each run follows from its seed. Prints errors and figures; the
exit code is 1 if there were errors.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.leftovers import files, left
from ddp_lessons import LaunchError, launch
from ddp_lessons.processes import forkserver
from ddp_lessons.system import reaper
from tests.support.kernels import Kernel, is_spare

GONE_WITHIN = 10.0  # seconds, after a launch that a kernel survived
DEAD_WITHIN = 2.0  # seconds, after a kernel was killed
MANAGER = 3.0  # seconds more for shared memory of "file_system": torch's manager takes two
MARK = "DDP_LESSONS_BENCHMARK"  # a variable that marks a kernel's processes


def ident(rank: int) -> int:
    return rank


# The ranks' functions: each returns, fails or is ended


def trains(rank: int) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    for _ in range(20):
        model(torch.randn(4, 8)).sum().backward()


def raises(rank: int) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 1:
        raise ValueError("wrong")
    dist.barrier()


def exits(rank: int) -> None:
    sys.exit(rank)


def aborts(rank: int) -> None:
    os.abort()


def is_killed(rank: int) -> None:
    dist.init_process_group("gloo")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs(rank: int) -> None:
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()


def sleeps(rank: int) -> None:
    time.sleep(60)


def leaves_children(rank: int) -> None:
    subprocess.Popen(["sleep", "67"])
    subprocess.Popen(["sleep", "68"], start_new_session=True)
    if rank == 1:
        raise ValueError("wrong")


def shares_memory(rank: int) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensor = torch.ones(1000).share_memory_()
    if rank == 1:
        raise ValueError(tensor.sum().item())


def loads(rank: int) -> None:
    loader = torch.utils.data.DataLoader(range(100), num_workers=1)
    for value in loader:
        if rank == 1 and value == 5:
            raise ValueError("wrong")


def replaces_itself(rank: int) -> None:
    os.execv("/bin/false", ["false"])


PROGRAMS: tuple[Callable[[int], Any], ...] = (
    ident, trains, raises, exits, aborts, is_killed, hangs, sleeps, leaves_children, shares_memory,
    loads, replaces_itself,
)  # fmt: skip


# Damage to the launcher before or during a launch


def nothing() -> None: ...


def kill_forkserver() -> None:
    if pid := forkserver.server().pid:
        reaper.kill_and_wait(pid)


def suspend_forkserver() -> None:
    os.kill(forkserver.server().pid or 0, signal.SIGSTOP)


def feed_garbage() -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(forkserver.server()._server._forkserver_address)
        client.sendall(b"garbage")


def remove_folder() -> None:
    kill_forkserver()
    folder = Path(util.get_temp_dir())
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


HARMS: tuple[Callable[[], None], ...] = (
    kill_forkserver, suspend_forkserver, feed_garbage, remove_folder,
)  # fmt: skip


@contextlib.contextmanager
def few_files() -> Iterator[None]:
    """Allow too few descriptors to start 16 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 40, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def one_launch(draw: random.Random) -> str:
    """Launch something that may fail; return its description."""
    program = draw.choice(PROGRAMS)
    method = draw.choice(("forkserver",) * 5 + ("spawn",))
    kind = draw.randrange(10)
    what = f"{program.__name__}, {method}"
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == 0:
            what += ", few files"
            with few_files(), contextlib.suppress(LaunchError):
                launch(program, nprocs=16, timeout=1.5, check=False, start_method=method)
        elif kind == 1:
            what += ", an argument that cannot be sent"
            with contextlib.suppress(LaunchError):
                launch(lambda rank, lock: None, (threading.Lock(),), start_method=method)
        elif kind == 2:
            what += ", from a thread"
            options = {"timeout": 1.5, "check": False, "start_method": method}
            thread = threading.Thread(target=launch, args=(program,), kwargs=options)
            thread.start()
            thread.join()
        else:
            harm = draw.choice(HARMS) if kind < 5 else nothing
            what += f", {harm.__name__}"
            harm()
            launch(program, timeout=1.5, check=False, start_method=method)
    return what


def launches(seeds: range) -> collections.Counter[str]:
    """The errors after each launch."""
    wrong: collections.Counter[str] = collections.Counter()
    for method in ("forkserver", "spawn"):
        launch(ident, start_method=method)
    before = left()
    for seed in seeds:
        what = f"seed {seed}"
        try:
            what += f", {one_launch(random.Random(seed))}"
            if launch(ident).values != [0, 1]:
                wrong[f"{what}: the next launch"] += 1
        except Exception as error:
            wrong[f"{what}: {error!r}"] += 1
        deadline = time.monotonic() + GONE_WITHIN
        while (more := left() - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        if more:
            wrong[f"{what}: left {sorted(more)}"] += 1
            before = left()
    return wrong


def marked(mark: str) -> list[psutil.Process]:
    """The live processes that inherited a kernel's mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Kill(NamedTuple):
    """A kernel that was killed."""

    what: str
    spares: int  # that waited then
    seconds: float  # until all was gone
    wrong: str  # what was left, if it was not


def kill_a_kernel(seed: int) -> Kill:
    """Kill a kernel while it launches, or while spares wait for the next launch."""
    draw = random.Random(seed)
    program = draw.choice(PROGRAMS)
    method = draw.choice(("forkserver", "spawn"))
    rests = method == "forkserver" and draw.random() < 0.75
    ranks = draw.randint(2, 8) if rests else 2
    delay = draw.uniform(0.0, 1.5 if method == "forkserver" else 5.0)
    before = temporary()
    mark = os.environ[MARK] = f"{os.getpid()}/{seed}"
    first_cell = f"from {__spec__.name} import *"
    options = f"nprocs={ranks}, start_method={method!r}, check=False"
    options += ", timeout=1.5" if rests else ""
    with Kernel(first_cell) as kernel:
        before.add(kernel.manager.connection_file)
        if rests:
            kernel.run(f"launch({program.__name__}, {options})")
        else:
            kernel.start(f"while True: launch({program.__name__}, {options})")
        time.sleep(delay)
        spares = sum(map(is_spare, kernel.process.children(recursive=True)))
        os.kill(kernel.pid, signal.SIGKILL)
        killed = time.monotonic()
        most = DEAD_WITHIN + MANAGER * (program is shares_memory)
        while more := [*marked(mark), *(temporary() - before)]:
            if time.monotonic() - killed > most:
                break
            time.sleep(0.02)
        seconds = time.monotonic() - killed
    what = f"seed {seed}, {program.__name__}, {method}, {'at rest' if rests else 'at work'}"
    return Kill(what, spares, seconds, f"killed after {delay:.2f} s: left {more}" if more else "")


def temporary() -> set[str]:
    """All temporary files and multiprocessing's folders: a killed kernel must leave none."""
    return files() | {str(p) for p in Path(tempfile.gettempdir()).iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()
    folder = tempfile.mkdtemp()
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)  # after multiprocessing's
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    failed = launches(range(chosen.seed, chosen.seed + chosen.runs))
    print(*failed, sep="\n")
    took = time.monotonic() - began
    print(f"{chosen.runs} launches, {len(failed)} wrong, {took:.0f} s", flush=True)
    killed = [kill_a_kernel(seed) for seed in range(chosen.seed, chosen.seed + chosen.kills)]
    wrong = [f"{kill.what}, {kill.wrong}" for kill in killed if kill.wrong]
    print(*wrong, sep="\n")
    took = time.monotonic() - began - took
    print(f"{chosen.kills} kernels killed, {len(wrong)} wrong, {took:.0f} s")
    waited = [kill for kill in killed if kill.spares]
    print(f"{len(waited)} of them had spares, {sum(kill.spares for kill in waited)} in all")
    for kill in sorted(killed, key=lambda kill: kill.seconds)[-3:]:
        print(f"all was gone after {kill.seconds:.2f} s: {kill.what}, {kill.spares} spares")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
