"""Kills agents of torchrun at random moments: is the machine named, and is anything left?

    python -m benchmarks.agents --runs 20

Two agents, each a "node" with its own address, train with 1 or 2 ranks each; one agent gets a
SIGKILL. None of its processes may survive, and `load_run` must name the node that is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from ddp_lessons import load_run
from tests.support import torchrun

PATIENCE = 60.0  # seconds until all processes must have ended
TRAIN = """
    import os
    import torch, torch.distributed as dist
    from ddp_lessons import span

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(rank)
    while True:
        with span("compute"):
            x = torch.randn(200, 200, generator=generator)
            for _ in range(int(torch.randint(50, (1,), generator=generator))):
                x = (x @ x).clamp(-1, 1)
        dist.all_reduce(x)
"""


class Try(NamedTuple):
    """One killed agent: the verdict, the surviving processes, and the seconds."""

    node: int
    ranks: tuple[int, ...]
    kind: str
    said: tuple[int, ...]
    title: str
    seconds: float
    left: list[str]

    @property
    def right(self) -> bool:
        """True if the node's ranks were named and no process survived."""
        named = self.title.startswith(f"node {self.node} ")
        return self.kind == "killed" and self.said == self.ranks and named and not self.left


def main() -> None:
    """Kill the requested number of agents and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    options = parser.parse_args()
    tries = []
    for seed in range(options.seed, options.seed + options.runs):
        tries.append(one := kill_one(seed))
        print(f"seed {seed}: {'ok' if one.right else 'NO'} {one}", flush=True)
    seconds = [one.seconds for one in tries]
    print(f"{sum(one.right for one in tries)} of {len(tries)} right and clean")
    print(f"all had ended after {statistics.median(seconds):.1f} s (worst {max(seconds):.1f} s)")


def kill_one(seed: int) -> Try:
    """Kill an agent at a moment that follows from the seed."""
    chance = random.Random(seed)
    nprocs, node, after = chance.choice([1, 2]), chance.choice([0, 1]), chance.uniform(0, 2)
    with tempfile.TemporaryDirectory() as name:
        record = Path(name, "record")
        script = Path(name, "train.py")
        script.write_text(textwrap.dedent(TRAIN).lstrip())
        env = {"DDP_LESSONS_RECORD": str(record)}
        with torchrun.two_agents(script, nprocs, env) as agents:
            wait_until_all_train(record, 2 * nprocs, agents)
            time.sleep(after)
            return _judged(record, node)


def wait_until_all_train(record: Path, ranks: int, agents: list[subprocess.Popen[str]]) -> None:
    """Wait until every rank has joined."""
    while sum('"clock"' in file.read_text() for file in record.glob("*.jsonl")) < ranks:
        if any(agent.poll() is not None for agent in agents):
            raise RuntimeError("an agent ended before the training began")
        time.sleep(0.05)


def _judged(record: Path, node: int) -> Try:
    """Kill a node's agent (torchrun chooses the node's number) and check what is left."""
    before = load_run(record)
    ranks = tuple(rank.rank for rank in before.ranks if rank.group_rank == node)
    (victim,) = {psutil.Process(pid).ppid() for pid in _pids(record, ranks)}
    begin = time.monotonic()
    psutil.Process(victim).send_signal(signal.SIGKILL)
    while (left := _left(record)) and time.monotonic() - begin < PATIENCE:
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    verdict = load_run(record).verdict
    if verdict is None:
        return Try(node, ranks, "none", (), "", seconds, left)
    return Try(node, ranks, verdict.kind, verdict.ranks, verdict.title, seconds, left)


def _pids(record: Path, ranks: tuple[int, ...]) -> list[int]:
    files = [next(record.glob(f"rank_{rank}.*.jsonl")) for rank in ranks]
    return [json.loads(file.read_text().splitlines()[0])["began"]["pid"] for file in files]


def _left(record: Path) -> list[str]:
    """The agents and ranks that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("DDP_LESSONS_RECORD") == str(record)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[-60:]}")
    return found


if __name__ == "__main__":
    main()
