"""`plots.statistics`: marks, bars, many ranks and channels."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest

from ddp_lessons import plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")


def bars(ax: Any) -> list[float]:
    return [float(segment[0][1]) for segment in ax.collections[0].get_segments()]


def test_each_rank_has_a_mark_and_the_truth_a_bar() -> None:
    ax = plots.statistics([[0.0, 2.0], [1.0, 4.0]], [0.5, 3.0], title="the finding")
    marks = [np.asarray(line.get_ydata()).tolist() for line in ax.lines]
    assert marks == [[0.0, 2.0], [1.0, 4.0]]
    assert bars(ax) == [0.5, 3.0]
    assert ax.get_title("left") == "the finding"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "rank 0",
        "rank 1",
        "the whole batch",
    ]
    assert len({line.get_marker() for line in ax.lines}) == 2


def test_marks_of_a_channel_stand_side_by_side_in_its_column() -> None:
    ax = plots.statistics([[0.0]] * 4, [0.0])
    places = [float(np.asarray(line.get_xdata())[0]) for line in ax.lines]
    assert places == sorted(places)
    assert len(set(places)) == 4
    assert max(map(abs, places)) < 0.4


@pytest.mark.parametrize(("ranks", "channels"), [(1, 1), (64, 8), (2, 500)])
def test_many_ranks_and_channels(ranks: int, channels: int) -> None:
    zeros = [0.0] * channels
    ax = plots.statistics([zeros] * ranks, zeros, legend=ranks > 2)
    ax.figure.canvas.draw()
    assert len(bars(ax)) == min(32, channels)
    assert ("the first 32 of 500" in ax.get_xlabel()) == (channels == 500)
    assert (ax.get_legend() is not None) == (ranks > 2)
    assert len(ax.get_xticks()) <= 18


@pytest.mark.parametrize(
    ("values", "truth", "said"),
    [
        ([], [], r"must be \(world_size, channels\)"),
        ([[1.0, 2.0]], [1.0], r"got \(1, 2\) and \(1,\)"),
        ([1.0], [1.0], "must be"),
        ([[float("nan")]], [1.0], "finite"),
    ],
)
def test_senseless_values_are_refused(values: Any, truth: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.statistics(values, truth)
