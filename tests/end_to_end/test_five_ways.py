"""One function, five ways: a cell, spawn, torchrun with one agent and with two, a cluster."""

from __future__ import annotations

import contextlib
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ddp_lessons import launch, load_run
from ddp_lessons.system.host import reserve_port
from tests.end_to_end.conftest import Trained
from tests.support import torchrun
from tests.support.clusters import cluster_of

pytestmark = [pytest.mark.slow, pytest.mark.system]

RANKS = 2
SPAWN = """
    import os, sys
    import torch.multiprocessing as mp
    import train

    def with_variables(rank, port):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        print(f"rank {rank} returned {train.train(rank, 5)}\\n", end="")

    if __name__ == "__main__":
        mp.spawn(with_variables, args=(sys.argv[1],), nprocs=2)
"""


def by_spawn(script: Path) -> list[str]:
    spawn = script.with_name("spawn.py")
    spawn.write_text(textwrap.dedent(SPAWN))
    with contextlib.closing(reserve_port()) as port:
        command = [sys.executable, str(spawn), str(port.getsockname()[1])]
        env = torchrun.environment(script, {})
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return torchrun.returned(done.stdout)


def by_two_agents(script: Path) -> list[str]:
    env = {"DDP_LESSONS_RECORD": "record"}
    with torchrun.two_agents(script, nprocs=1, env=env) as agents:
        texts = [agent.communicate(timeout=torchrun.PATIENCE)[0] for agent in agents]
    nodes = [rank.group_rank for rank in load_run(script.with_name("record")).ranks]
    assert nodes == [0, 1]
    return torchrun.returned("".join(texts))


def on_engines(script: Path) -> list[str]:
    train = runpy.run_path(str(script))["train"]
    with cluster_of(script.parent / "cluster", RANKS) as cluster:
        return launch(train, args=(5,), nprocs=RANKS, cluster=cluster.client).values


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(textwrap.dedent(torchrun.TRAIN).lstrip())
    return file


def in_a_cell(script: Path) -> list[str]:
    values = launch(runpy.run_path(str(script))["train"], args=(5,), nprocs=RANKS).values
    assert len(set(values)) == RANKS  # each rank has data of its own
    return values


@pytest.mark.parametrize("way", [by_spawn, by_two_agents, on_engines])
def test_every_way_gives_the_values_of_the_cell(
    script: Path, way: Callable[[Path], list[str]]
) -> None:
    assert way(script) == in_a_cell(script)


@pytest.mark.xdist_group("by one agent")
def test_so_does_one_agent(script: Path, by_one_agent: Trained) -> None:
    assert torchrun.returned(by_one_agent.text) == in_a_cell(script)
