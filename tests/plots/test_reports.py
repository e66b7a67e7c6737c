"""`plots.reports`: a curve a rank of what was reported, or a plain refusal."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pytest

from ddp_lessons import RankResult, Report, Run, plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")


def run_with(*ranks: list[dict[str, float]]) -> Run:
    """A run whose ranks reported these numbers, a second apart."""
    results = [
        RankResult(
            rank=rank,
            status="returned",
            value=None,
            output="",
            error=None,
            exitcode=0,
            spans=(),
            began_ns=0,
            started_ns=0,
            ended_ns=1,
            reports=[Report(n * 10**9, values) for n, values in enumerate(reports, 1)],
        )
        for rank, reports in enumerate(ranks)
    ]
    return Run("train", results, begin_ns=0)


def drawn(ax: Any) -> list[list[list[float]]]:
    return [np.asarray(line.get_xydata()).tolist() for line in ax.lines]


def test_over_the_steps_that_were_reported() -> None:
    run = run_with(
        [{"step": 5, "loss": 2.0}, {"step": 6, "loss": 1.0}],
        [{"step": 5, "loss": 3.0}, {"rate": 1}],
    )
    ax = plots.reports(run)
    assert drawn(ax) == [[[5, 2], [6, 1]], [[5, 3]]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    texts: list[Any] = list(ax.texts)
    assert [text.get_text() for text in texts] == ["rank 0", "rank 1"]
    low, high = ax.get_ylim()
    assert texts[1].xy[1] == pytest.approx((3 - low) / (high - low))  # beside its curve's end
    assert ax.get_title("left") == "loss, as the ranks reported it"


def test_over_seconds_and_by_name() -> None:
    run = run_with([{"loss": 2.0, "rate": 0.1}, {"loss": 1.0, "rate": 0.2}])
    ax = plots.reports(run, "rate", title="mine")
    assert drawn(ax) == [[[1, 0.1], [2, 0.2]]]
    assert ax.get_xlabel() == "seconds since the run began"
    assert ax.get_title("left") == "mine"
    assert drawn(plots.reports(run, "rate", x="loss")) == [[[2, 0.1], [1, 0.2]]]


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    run = run_with([{"loss": 2.0}, {"loss": math.nan}, {"loss": 1.0}])
    ax = plots.reports(run)
    assert [text.get_text() for text in ax.texts] == ["rank 0"]
    assert len(drawn(ax)[0]) == 3


def test_many_ranks_are_thin_lines_without_labels() -> None:
    ax = plots.reports(run_with(*([{"step": 1, "loss": float(n)}] * 2 for n in range(20))))
    assert len(ax.lines) == 20
    assert not ax.texts


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"no rank called report\(\.\.\.\)"):
        plots.reports(run_with([], []))
    with pytest.raises(ValueError, match="what was reported: seconds, step"):
        plots.reports(run_with([{"step": 1}]), "loss")
