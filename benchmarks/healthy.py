"""Runs random programs without errors: is any of them judged hung?

    python -m benchmarks.healthy --runs 500 --seed 0

A run's seed decides the ranks' program, their number, their pauses and the machine: one core for
all, three tenths of a processor, a slow network, or a freeze of the whole machine. A run is right
if every rank returns its value. Prints each run that is wrong, and a line of figures a machine; the
exit code is 1 if any was wrong.

Machines other than the plain one need root, and namespaces or control groups.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch, watch_ddp
from ddp_lessons.simulated import SimulatedLink

TIMEOUT = 60.0  # seconds without progress; programs pause for less
LONGEST = 4.0  # seconds of a pause
FROZEN = 3.0  # seconds of a freeze
QUOTA_US, PERIOD_US = 30_000, 100_000  # three tenths of a processor
RATES = ("5mbit", "10mbit", "20mbit", "50mbit")
CPU_GROUP = Path("/sys/fs/cgroup/cpu")

Draw = random.Random


def draw_of(seed: int, rank: int = -1) -> Draw:
    """A generator for one rank, or one that all ranks share."""
    return random.Random(f"{seed}/{rank}")


def pause(draw: Draw) -> None:
    """Make no visible progress for a while, in one of several ways; often return at once."""
    seconds = draw.choice((0.0, 0.0, 0.1, 1.0, draw.uniform(1.0, LONGEST)))
    match draw.randrange(4):
        case 0:
            time.sleep(seconds)
        case 1:
            subprocess.run(["sleep", str(seconds)], check=True)
        case 2:
            threading.Event().wait(seconds)
        case _:
            ends = time.process_time() + seconds / 4
            while time.process_time() < ends:
                pass


# The ranks' programs: each gets its rank and seed, joins, and returns at the end


def collectives(rank: int, seed: int) -> None:
    shared, own = draw_of(seed), draw_of(seed, rank)
    size = dist.get_world_size()
    for _ in range(shared.randint(2, 6)):
        kind, root = shared.randrange(7), shared.randrange(size)
        x = torch.ones(shared.choice((1, 1000, 200_000)))
        pieces = [x.clone() for _ in range(size)]
        pause(own)
        if kind == 0:
            dist.all_reduce(x)
        elif kind == 1:
            dist.broadcast(x, src=root)
        elif kind == 2:
            dist.gather(x, pieces if rank == root else None, root)
        elif kind == 3:
            dist.scatter(x, pieces if rank == root else None, root)
        elif kind == 4:
            dist.reduce(x, dst=root)
        elif kind == 5:
            dist.all_gather_object([None] * size, {"rank": rank})
        else:
            dist.barrier()


def training(rank: int, seed: int) -> None:
    shared, own = draw_of(seed), draw_of(seed, rank)
    width = shared.choice((64, 256, 512))
    layers = [nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.5)
    if shared.random() < 0.2:
        watch_ddp(model, SimulatedLink(shared.uniform(1, 20)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(shared.randint(2, 5)):
        pause(own)
        optimizer.zero_grad()
        batch = shared.randint(8, 64) * (4 if own.random() < 0.3 else 1)
        model(torch.randn(batch, width)).square().mean().backward()
        optimizer.step()


def uneven(rank: int, seed: int) -> None:
    own = draw_of(seed, rank)
    model = DistributedDataParallel(nn.Linear(50, 50))
    with model.join():
        for _ in range(own.randint(1, 4)):
            pause(own)
            model(torch.randn(4, 50)).sum().backward()


def some_return_early(rank: int, seed: int) -> None:
    shared, own = draw_of(seed), draw_of(seed, rank)
    members = sorted(shared.sample(range(dist.get_world_size()), 2))
    group = dist.new_group(members)
    dist.barrier()  # ranks that have joined may leave
    if rank in members:
        for _ in range(3):
            pause(own)
            dist.all_reduce(torch.ones(shared.choice((1, 300_000))), group=group)


def threads(rank: int, seed: int) -> None:
    shared, own = draw_of(seed), draw_of(seed, rank)
    group = dist.new_group()
    if shared.random() < 0.5:
        timer = threading.Timer(shared.uniform(0.5, LONGEST), dist.barrier, [group])
        timer.start()
        dist.barrier()
        timer.join()
    else:
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(dist.barrier, group)
            pause(own)
            dist.barrier()
            begun.result()


def sends(rank: int, seed: int) -> None:
    shared, own = draw_of(seed), draw_of(seed, rank)
    size = dist.get_world_size()
    x = torch.ones(shared.choice((1, 100_000)))
    for _ in range(shared.randint(1, 4)):
        pause(own)
        works = [dist.isend(x, (rank + 1) % size), dist.irecv(x.clone(), (rank - 1) % size)]
        pause(own)
        for work in works:
            work.wait()


def shared_place(rank: int, seed: int) -> None:
    """Ranks wait for each other by a file lock, or in the store; then in a barrier."""
    shared, own = draw_of(seed), draw_of(seed, rank)
    if shared.random() < 0.5:
        with open(Path(tempfile.gettempdir()) / f"lock-{seed}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(LONGEST / dist.get_world_size())
    else:
        store = dist.distributed_c10d._get_default_store()
        pause(own)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{r}" for r in range(dist.get_world_size())], timedelta(seconds=50))
    dist.barrier()


class Slow(torch.utils.data.Dataset):  # type: ignore[misc]
    """A dataset whose samples take a while."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        time.sleep(0.8)
        return index


def loaders(rank: int, seed: int) -> None:
    workers = draw_of(seed).randrange(2)
    for _ in torch.utils.data.DataLoader(Slow(), num_workers=workers):
        pause(draw_of(seed, rank))
    dist.barrier()


PROGRAMS: tuple[Callable[[int, int], None], ...] = (
    collectives, training, uneven, some_return_early, threads, sends, shared_place, loaders,
)  # fmt: skip


def run_program(rank: int, seed: int, index: int) -> str:
    dist.init_process_group("gloo")
    PROGRAMS[index](rank, seed)
    if index != PROGRAMS.index(some_return_early):
        dist.barrier()
        dist.destroy_process_group()
    return "done"


# The machines


@contextmanager
def _plain() -> Iterator[list[str]]:
    yield []


@contextmanager
def _one_core() -> Iterator[list[str]]:
    yield ["taskset", "-c", str(min(os.sched_getaffinity(0)))]


@contextmanager
def _little_processor() -> Iterator[list[str]]:
    group = CPU_GROUP / f"ddp-lessons-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        while (group / "cgroup.procs").read_text():
            time.sleep(0.05)
        group.rmdir()


@contextmanager
def _slow_network(rate: str) -> Iterator[list[str]]:
    # Packets of the usual size: those of lo are too large for these rates.
    slow = (
        "ip link set lo up mtu 1500 && "
        f"tc qdisc add dev lo root tbf rate {rate} burst 32kbit latency 400ms && "
        'exec "$@"'
    )
    yield ["unshare", "--net", "sh", "-c", slow, "sh"]


class Machine(NamedTuple):
    """The machine of the host and its ranks, and the most ranks on it."""

    enter: Callable[[], object]
    most_ranks: int
    frozen: bool = False


MACHINES = {
    "plain": Machine(_plain, 6),
    "one core": Machine(_one_core, 12),
    "0.3 processors": Machine(_little_processor, 3),
    **{f"{rate} network": Machine(partial(_slow_network, rate), 4) for rate in RATES},
    "frozen": Machine(_plain, 4, frozen=True),
}


def host(machine: str) -> None:
    """Read seeds, one a line, and print the result of each."""
    launch(lambda rank: rank)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        seed = int(line)
        draw = draw_of(seed)
        index, ranks = draw.randrange(len(PROGRAMS)), draw.randint(2, MACHINES[machine].most_ranks)
        began = time.monotonic()
        run = launch(run_program, (seed, index), nprocs=ranks, timeout=TIMEOUT, check=False)
        told = {
            "seed": seed,
            "program": PROGRAMS[index].__name__,
            "ranks": ranks,
            "seconds": round(time.monotonic() - began, 1),
            "right": run.values == ["done"] * ranks and not run.warnings,
            "explain": run.explain(),
        }
        print(json.dumps(told), flush=True)


def _freeze(tree: psutil.Process, seconds: float) -> None:
    """Suspend a host and all its child processes for a while."""
    everyone = [tree, *tree.children(recursive=True)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in everyone:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if number == signal.SIGSTOP:
            time.sleep(seconds)


def campaign(machine: str, seeds: range) -> Iterator[dict[str, object]]:
    """The result of each seed on a machine."""
    where = MACHINES[machine]
    with where.enter() as before:  # type: ignore[attr-defined]
        command = [*before, sys.executable, "-m", __spec__.name, "--host", machine]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
            lines = (line for line in process.stdout if line.startswith(("{", '"')))
            assert json.loads(next(lines)) == "ready"
            for seed in seeds:
                process.stdin.write(f"{seed}\n")
                process.stdin.flush()
                if where.frozen:
                    time.sleep(draw_of(seed, -2).uniform(0.2, 2.0))
                    _freeze(psutil.Process(process.pid), FROZEN)
                yield json.loads(next(lines))
            process.stdin.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500, help="in all, shared out to the machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", choices=MACHINES, action="append")
    parser.add_argument("--host", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.host:
        host(chosen.host)
        return 0
    machines = chosen.machine or list(MACHINES)
    each = -(-chosen.runs // len(machines))
    wrong = 0
    for number, machine in enumerate(machines):
        first = chosen.seed + number * each
        told = list(campaign(machine, range(first, first + each)))
        for one in told:
            if not one["right"]:
                print(machine, json.dumps({k: one[k] for k in one if k != "explain"}))
                print(one["explain"])
        bad = sum(not one["right"] for one in told)
        longest = max(float(str(one["seconds"])) for one in told)
        print(f"{machine}: {each - bad} of {each} right, at most {longest:.0f} s a run", flush=True)
        wrong += bad
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
