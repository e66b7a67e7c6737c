"""What ranks report: in the record, in order, and refused where it is no number."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from ddp_lessons import launch, load_run, report
from ddp_lessons.instrumentation.recording import LONGEST_NAME, MOST_REPORTED
from tests.support import torchrun

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_it_does_nothing_where_no_rank_runs() -> None:
    report(loss="no number")  # type: ignore[arg-type]


def train(rank: int) -> None:
    for step in range(3):
        report(step=step, loss=torch.tensor([1.0 / (step + 1 + rank)]), rate=np.float32(0.5))
    report(loss=math.nan, **{"n" * 100: 1})


@pytest.mark.ranks
def test_a_run_has_it_by_time() -> None:
    run = launch(train)
    assert [row["step"] for row in run.reports if row["rank"] == 1 and "step" in row] == [0, 1, 2]
    assert [row["seconds"] for row in run.reports] == sorted(row["seconds"] for row in run.reports)
    first = next(row for row in run.reports if row["rank"] == 1)
    assert {**first, "seconds": 0} == {
        "rank": 1, "seconds": 0, "step": 0, "loss": 0.5, "rate": 0.5,
    }  # fmt: skip
    last = run.ranks[0].reports[-1].values
    assert math.isnan(last["loss"])
    assert max(map(len, last)) == LONGEST_NAME


@pytest.mark.ranks
@pytest.mark.parametrize("value", ["0.5 s", None, torch.ones(2), [1.0], 1j])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    run = launch(lambda rank: report(loss=value), nprocs=1, check=False)
    assert "report(loss=...) takes one number" in run.explain()


def many(rank: int) -> None:
    for number in range(MOST_REPORTED):
        report(a=number, b=number)


@pytest.mark.ranks
def test_there_is_a_most() -> None:
    (rank,) = launch(many, nprocs=1).ranks
    assert len(rank.reports) == MOST_REPORTED // 2
    assert rank.reports[-1].values["a"] == MOST_REPORTED // 2 - 1


SCRIPT = """
import os, time
from ddp_lessons import report
for step in range(3):
    report(step=step, loss=1 / (step + 1))
"""


@pytest.mark.slow
@pytest.mark.system
def test_under_torchrun_it_is_in_the_record(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun.run(script, "--nproc-per-node=2", env={"DDP_LESSONS_RECORD": str(tmp_path / "record")})
    run = load_run(tmp_path / "record")
    for rank in run.ranks:
        assert [r.values for r in rank.reports] == [
            {"step": step, "loss": 1 / (step + 1)} for step in range(3)
        ]
    assert all(row["seconds"] > 0 for row in run.reports)


MANY = """
from ddp_lessons import report
for step in range(50_000):
    report(**{NAME: 1 / (step + 1)})
raise ValueError("the last line")
"""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "all_fit"), [("'train_loss'", True), ("chr(0x1f600) * 40", False)]
)
def test_a_record_is_readable_however_much_was_reported(
    tmp_path: Path, name: str, all_fit: bool
) -> None:
    script = tmp_path / "train.py"
    script.write_text(MANY.replace("NAME", name))
    torchrun.alone(script, env={"DDP_LESSONS_RECORD": str(tmp_path / "record")})
    (rank,) = load_run(tmp_path / "record").ranks
    assert rank.error is not None
    assert rank.error.text == "ValueError: the last line"
    assert (len(rank.reports) == MOST_REPORTED) == all_fit
    assert len(rank.reports) > MOST_REPORTED / 2
