"""A fixed sample of the campaign of faults: each is explained, and the next launch works.

The campaign itself draws them at random: `python -m benchmarks.faults`.
"""

from __future__ import annotations

import pytest

from benchmarks.faults import Host, Plan
from ddp_lessons import launch
from tests.support import faults

pytestmark = pytest.mark.ranks

FROM_INSIDE = [name for name in faults.FAULTS if name not in faults.FROM_OUTSIDE]
COMPILES = "skipped compiled"  # a slow test


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] if f == COMPILES else []) for f in FROM_INSIDE],
)
def test_every_fault_is_explained(fault: str, compiles: None) -> None:
    number = FROM_INSIDE.index(fault)
    world_size, victim, moment = 2 + number % 3, number % 2, number % faults.STEPS
    timeout = 30 if fault in faults.SLOW else 2
    args = fault, victim, moment
    run = launch(faults.train, args, nprocs=world_size, timeout=timeout, check=False)
    assert faults.judge(fault, victim, world_size, run) == "", run.explain()
    assert launch(_fine).values == [0, 1]


def _fine(rank: int) -> int:
    return rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("forkserver killed", "forkserver ended"),
        ("parent interrupted", "interrupted"),
        ("parent killed", "killed"),
    ],
)
def test_a_fault_from_outside_leaves_nothing(fault: str, outcome: str, tmp_path: object) -> None:
    host = Host(str(tmp_path), f"test-{fault}")
    try:
        report = host.ask(Plan(0, fault, 3, 0, 0, 0.8, "plain"))
        assert report["outcome"] == outcome
        assert host.left_behind() == []
        if fault != "parent killed":
            assert report["next"]
    finally:
        if host.process.poll() is None:
            host.close()
    assert host.left_behind() == []
