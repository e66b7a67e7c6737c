"""Kills engines of a cluster at random moments: is each named, and is anything left?

    python -m benchmarks.engines --kills 20 --seed 0

Four engines of a real cluster on loopback. A kill's seed decides the engine and the moment, from
before the launch is sent to long after all ranks have joined. The engine is then replaced. This
process looks at the machine from outside: all processes of the run must be gone, and the next
launch must work.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import psutil

from benchmarks.tables import machine
from ddp_lessons import LaunchError, Run, launch
from tests.support.clusters import Cluster, cluster_of

WORLD = 4
LATEST = 1.5  # seconds from the launch to the kill, at most
SETTLE = 5.0  # seconds for the engine's child processes to end


class Kill(NamedTuple):
    """The result of one kill."""

    seed: int
    victim: int  # rank
    delay: float
    said: str  # the verdict's title, or launch()'s error
    right: bool  # the engine is named, or all ranks had returned
    seconds: float  # from the kill to the verdict
    left: list[str]  # processes


def train(rank: int) -> int:
    """Call collectives in a loop."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.ones(1000)
    end = time.monotonic() + LATEST
    while True:
        dist.all_reduce(x)
        if not isinstance(_all_agree(time.monotonic() < end), int):
            break
    dist.destroy_process_group()
    return rank


def _all_agree(more: bool) -> int | None:
    """1 while any rank wants more."""
    import torch
    import torch.distributed as dist

    wanted = torch.tensor([float(more)])
    dist.all_reduce(wanted)
    return 1 if wanted.item() else None


def main() -> None:
    """Kill engines, judge the results and print them."""
    options = argparse.ArgumentParser()
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    print(machine("torch", "ipyparallel"))
    with (
        tempfile.TemporaryDirectory() as directory,
        cluster_of(Path(directory), WORLD) as cluster,
    ):
        found = [_kill(cluster, seed) for seed in range(given.seed, given.seed + given.kills)]
    wrong = [kill for kill in found if not kill.right or kill.left]
    middle = statistics.median(kill.seconds for kill in found)
    slowest = max(kill.seconds for kill in found)
    print(
        f"{len(found)} kills: {len(found) - len(wrong)} right, {len(wrong)} wrong; "
        f"from the kill to the verdict {middle:.2f} s (median), {slowest:.2f} s at most"
    )
    raise SystemExit(bool(wrong))


def _kill(cluster: Cluster, seed: int) -> Kill:
    draw = random.Random(seed)
    victim, delay = draw.randrange(WORLD), draw.uniform(0, LATEST)
    number = sorted(cluster.client.ids)[victim]
    pid = cluster.pid(number)
    before = _processes()
    killed_at: list[float] = []
    children: list[psutil.Process] = []

    def kill() -> None:
        children.extend(psutil.Process(pid).children(recursive=True))
        os.kill(pid, signal.SIGKILL)
        killed_at.append(time.monotonic())

    timer = threading.Timer(delay, kill)
    timer.start()
    said, run = _said(cluster)
    ended = time.monotonic()
    timer.join()
    right = f"engine {number} " in said if run is None or not run.ok else run.values == [0, 1, 2, 3]
    kill_ = Kill(
        seed,
        victim,
        delay,
        said,
        right,
        max(0.0, ended - killed_at[0]),
        _left(before - {child.pid for child in children} - {pid}),
    )
    print(
        f"seed {seed}: rank {victim} after {delay:.2f} s: {said} ({kill_.seconds:.2f} s)"
        f"{'' if right else ' WRONG'}{' LEFT ' + str(kill_.left) if kill_.left else ''}",
        flush=True,
    )
    while len(cluster.client.ids) > WORLD - 1:
        time.sleep(0.01)
    cluster.add()
    assert launch(train, nprocs=WORLD, cluster=cluster.client).values == [0, 1, 2, 3]
    return kill_


def _said(cluster: Cluster) -> tuple[str, Run | None]:
    try:
        run = launch(train, nprocs=WORLD, cluster=cluster.client, check=False, timeout=20)
    except LaunchError as error:
        return " ".join(str(error).split()), None
    return (run.verdict.title if run.verdict else "all ranks returned"), run


def _left(others: set[int]) -> list[str]:
    """Surviving processes of the run or the engine; `others` are unrelated ones."""
    deadline = time.monotonic() + SETTLE
    while (left := _processes() - others) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [_described(pid) for pid in left]


def _processes() -> set[int]:
    """This machine's processes that belong to this program, except zombies."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and _ours(process):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def _ours(process: psutil.Process) -> bool:
    variables: dict[str, Any] = process.environ()
    return variables.get("IPYTHONDIR") == os.environ.get("IPYTHONDIR")


def _described(pid: int) -> str:
    try:
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())[:80]}"
    except psutil.Error:
        return f"{pid} gone by now"


if __name__ == "__main__":
    main()
