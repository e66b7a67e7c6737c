"""`plots.differences`: curves, labels, the scale down to zero."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
import numpy as np
import pytest

from ddp_lessons import plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")


def labels(ax: Any) -> dict[str, float]:
    """The labels at the ends, with their heights."""
    return {text.get_text(): text.xyann[1] for text in ax.texts if hasattr(text, "xyann")}


def end_of_the_first(ax: Any) -> float:
    """The height at which the first curve ends."""
    return float(ax.texts[0].xy[1])


def test_each_curve_has_its_values_a_look_and_a_label() -> None:
    curves = {"sum": [1.0, 1.0], "mean": [1e-8, 0.0]}
    ax = plots.differences(curves, title="the finding")
    assert ax.get_title("left") == "the finding"
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.lines}
    assert drawn == curves
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 2
    assert labels(ax)["sum"] > labels(ax)["mean"]


def test_zero_has_a_place_of_its_own_below_the_smallest() -> None:
    ax = plots.differences({"a": [0.0, 3e-6, 2.0]})
    ax.figure.canvas.draw()
    heights = [ax.transData.transform((0, value))[1] for value in (0, 3e-6, 2)]
    box = ax.get_window_extent()
    assert box.y0 < heights[0] < heights[1] - 5 < heights[2] < box.y1
    assert ax.get_yticklabels()[0].get_text() == "0"
    assert len(ax.get_yticks()) <= 9


def test_labels_of_curves_that_end_together_stand_apart() -> None:
    ax = plots.differences({name: [0.5, 0.5] for name in "abcd"})
    heights = sorted(labels(ax).values())
    assert all(b - a >= 0.08 for a, b in itertools.pairwise(heights))
    assert sum(heights) / 4 == pytest.approx(end_of_the_first(ax)), "around the curves' end"


def test_labels_that_have_room_stand_at_their_curves_ends() -> None:
    ax = plots.differences({"near": [1e-7], "far": [1.0]})
    assert labels(ax)["near"] == pytest.approx(end_of_the_first(ax))


def test_rounding_is_a_named_band() -> None:
    ax = plots.differences({"a": [1.0]}, rounding=1e-6)
    assert " only rounding" in [text.get_text() for text in ax.texts]
    low, high = ax.get_ylim()
    assert low < 1e-6 / 10 < 1e-6 < high


def test_without_a_zero_the_scale_is_logarithmic() -> None:
    ax = plots.differences({"a": [1e-7, 2.0], "b": [3e-3, 1e-2]})
    ax.figure.canvas.draw()
    assert ax.get_yscale() == "log"
    assert "0" not in [label.get_text() for label in ax.get_yticklabels()]
    assert ax.get_ylim()[0] <= 1e-7


@pytest.mark.parametrize("curves", [{"a": [0.0]}, {"a": [0.0] * 500}, {"a": [1e-300, 1e300]}])
def test_odd_values_are_drawn(curves: dict[str, list[float]]) -> None:
    plots.differences(curves).figure.canvas.draw()


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ({}, "got 0"),
        ({name: [1.0] for name in "abcde"}, "got 5"),
        ({"a": []}, "'a' must be a list of finite numbers"),
        ({"a": [float("nan")]}, "finite"),
        ({"a": [1.0], "b": [-1.0]}, r"\['b'\] have negative differences"),
    ],
)
def test_senseless_values_are_refused(curves: dict[str, list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.differences(curves)
