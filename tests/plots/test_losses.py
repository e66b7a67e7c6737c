"""`plots.losses`: over steps or samples, labels, and refused arguments."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest

from ddp_lessons import plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")
CURVES = {"1 rank": [2.0, 1.5, 1.0, 0.5], "4 ranks": [2.0]}


def drawn(ax: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in ax.lines}


def test_against_steps() -> None:
    ax = plots.losses(CURVES, title="the finding")
    assert drawn(ax) == {"1 rank": [[1, 2], [2, 1.5], [3, 1], [4, 0.5]], "4 ranks": [[1, 2]]}
    assert ax.get_xlabel() == "steps"
    assert ax.get_title("left") == "the finding"
    assert {text.get_text() for text in ax.texts} == set(CURVES)


def test_against_samples_equal_work_is_equally_wide() -> None:
    ax = plots.losses(CURVES, batch={"1 rank": 16, "4 ranks": 64}, labels=False)
    assert [points[-1][0] for points in drawn(ax).values()] == [64, 64]
    assert ax.get_xlabel() == "samples seen"
    assert not ax.texts


def test_the_scale_begins_at_zero_and_curves_differ_without_colour() -> None:
    ax = plots.losses({name: [1.0, 2.0] for name in "abcd"})
    assert ax.get_ylim()[0] == 0
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 4


@pytest.mark.parametrize("apart", [0.0, 0.5])  # of 29
def test_marks_of_curves_that_coincide_stand_beside_each_other(apart: float) -> None:
    curve = [float(step) for step in range(30)]
    ax = plots.losses({"a": curve, "b": [loss + apart for loss in curve], "c": curve[::-1]})
    assert [line.get_markevery() for line in ax.lines] == [(0, 2), (1, 2), (0, 2)]
    widths = [line.get_linewidth() for line in ax.lines]
    assert widths[1] == widths[2]
    assert (widths[0] > 3 * widths[1]) == (apart == 0)  # of equal curves the first is a band


def test_marks_say_where_something_happened() -> None:
    ax = plots.losses({"a": [2.0] * 10}, marks={"late": 10, "killed": 4, "saved": 3}, labels=False)
    texts: dict[str, Any] = {text.get_text(): text for text in ax.texts}
    assert {n: text.xy[0] for n, text in texts.items()} == {"saved": 3, "killed": 4, "late": 10}
    lines: list[Any] = list(ax.lines[1:])
    assert [line.get_xdata()[0] for line in lines] == [3, 4, 10]
    assert texts["killed"].xy[1] < texts["saved"].xy[1], "labels of close marks are apart"
    assert [texts[name].get_ha() for name in ("killed", "late")] == ["left", "right"]


@pytest.mark.parametrize(
    ("curves", "batch", "said"),
    [
        ({}, None, "got 0"),
        ({"a": [float("inf")]}, None, "'a' must be a list of finite numbers"),
        ({"a": [1.0]}, {"b": 3}, "needs the size of its batch"),
        ({"a": [1.0]}, {"a": 0}, "at least 1"),
    ],
)
def test_senseless_values_are_refused(curves: Any, batch: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.losses(curves, batch=batch)


def test_negative_losses_are_seen() -> None:
    ax = plots.losses({"a": [0.5, -1.0, -2.0]})
    low, high = ax.get_ylim()
    assert low < -2
    assert high > 0.5
    assert plots.losses({"a": [2.0, 1.0]}).get_ylim()[0] == 0
