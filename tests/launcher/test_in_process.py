"""`launch(..., in_process=True)`: the only rank is this process, and can be stepped through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_lessons import BadLaunch, launch

pytestmark = pytest.mark.system


def joins(rank: int, kept: list[Any]) -> tuple[int, str, str]:
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    kept.append(os.getpid())
    os.environ["LEFT"] = "behind"
    os.environ.pop("HOME", None)
    return dist.get_world_size(), os.environ["RANK"], os.environ["MINE"]


def test_it_is_this_process_as_a_rank() -> None:
    before = dict(os.environ)
    kept: list[int] = []
    run = launch(joins, (kept,), nprocs=1, env={"MINE": "yes"}, in_process=True)
    assert run.values == [(1, "0", "yes")]
    assert run.ok
    assert kept == [os.getpid()]  # the arguments are no copies
    assert dict(os.environ) == before
    assert not dist.is_initialized()
    assert repr(run) == "Run of joins on 1 rank:\n  rank 0 returned (1, '0', 'yes')"


def test_its_exception_is_raised_as_it_is() -> None:
    def fails(rank: int) -> None:
        dist.init_process_group("gloo")
        raise KeyError("mine")

    before = dict(os.environ)
    with pytest.raises(KeyError, match="mine"):
        launch(fails, nprocs=1, in_process=True)
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_one_rank_alone() -> None:
    with pytest.raises(BadLaunch, match="runs one rank, in this process, and not 2"):
        launch(lambda rank: rank, in_process=True)
    with pytest.raises(BadLaunch, match="starts no rank, so profile= and notes= can do nothing"):
        launch(lambda rank: rank, nprocs=1, in_process=True, profile=True, notes=True)


def test_a_group_of_the_learners_stays() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(BadLaunch, match="Leave it first"):
            launch(lambda rank: rank, nprocs=1, in_process=True)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


SCRIPT = """
from ddp_lessons import launch

def work(rank):
    x = 41
    breakpoint()
    return x + 1

if __name__ == "__main__":
    print("value", launch(work, nprocs=1, in_process=True).values)
"""


def test_a_debugger_steps_through_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    keys = "p rank, x\nx = 99\nc\n"
    done = subprocess.run(
        [sys.executable, script], input=keys, capture_output=True, text=True, timeout=60
    )
    assert "(0, 41)" in done.stdout
    assert "value [100]" in done.stdout
