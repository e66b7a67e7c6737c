"""`plots.shards`: texts, marks and refused arguments."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ddp_lessons import plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def lines(ax: Axes) -> list[str]:
    return [text for text in texts(ax) if text.startswith("epoch")]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def hatched(ax: Axes) -> int:
    return sum(bool(p.get_hatch()) for p in ax.patches if isinstance(p, Rectangle))


def test_every_sample_stands_in_its_rank_s_row_and_place() -> None:
    ax = plots.shards([[[3, 0]], [[1, 2]]], 4, title="the finding")
    ax.figure.canvas.draw()
    where = {t.get_text(): t.get_position() for t in ax.texts if t.get_text().isdigit()}
    assert where["3"][1] == where["0"][1] < where["1"][1] == where["2"][1]
    assert where["3"][0] == where["1"][0] < where["0"][0] == where["2"][0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert ax.get_title("left") == "the finding"
    assert lines(ax) == ["epoch 0: every sample once"]
    assert not hatched(ax)
    assert legend(ax) == []


def test_what_is_missing_and_what_is_double_is_named_and_marked() -> None:
    ax = plots.shards([[[0, 1], [0, 1]], [[1, 3], [2, 3]]], 4)
    assert lines(ax) == [
        "epoch 0: sample 1 more than once; sample 2 never",
        "epoch 1: every sample once",
    ]
    assert hatched(ax) == 2
    assert legend(ax) == ["seen more than once in the epoch"]


def test_epochs_are_counted_from_the_first() -> None:
    assert lines(plots.shards([[[0], [0]]], 1, first=4))[1].startswith("epoch 5: ")


def test_many_missing_ones_are_counted() -> None:
    assert lines(plots.shards([[[0]]], 9)) == ["epoch 0: 8 samples never"]


def test_equal_epochs_look_equal_and_larger_numbers_are_darker() -> None:
    ax = plots.shards([[[0, 5, 9], [0, 5, 9]]], 10)
    colours = [p.get_facecolor() for p in ax.patches]
    assert colours[:3] == colours[3:]
    grey = [sum(colour[:3]) for colour in colours[:3]]
    assert grey[0] > grey[1] > grey[2]


@pytest.mark.parametrize(("ranks", "total"), [(1, 1), (4, 1437), (32, 100), (64, 64)])
def test_many_ranks_and_samples_become_strips(ranks: int, total: int) -> None:
    values = [[list(range(rank, total, ranks))] for rank in range(ranks)]
    ax = plots.shards(values, total)
    ax.figure.canvas.draw()
    strips = total // ranks > 30 or ranks > 16
    assert len(ax.images) == (ranks if strips else 0)
    assert len(texts(ax)) == 1 + (0 if strips else total)
    assert plt.gcf().get_figheight() < 11


def test_in_strips_repeated_samples_that_follow_each_other_are_one_box() -> None:
    first, second = [*range(40), 7, 7], [*range(40, 90), 7]
    ax = plots.shards([[first], [second]], 90)
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    assert {(box.get_x(), box.get_width()) for box in boxes} == {(7, 1), (40, 2), (50, 1)}


def test_an_empty_shard_is_an_empty_row() -> None:
    assert lines(plots.shards([[[]], [[0]]], 1)) == ["epoch 0: every sample once"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "at least one"),
        ([[], []], "at least one"),
        ([[[0]], [[0], [1]]], r"2 ranks have \[1, 2\]"),
        ([[[4]]], r"\[4\] are no indices of 4 samples"),
        ([[[-1]]], "no indices"),
        ([[[0]] * 33] * 2, "more than 64 rows"),
    ],
)
def test_senseless_values_are_refused(values: list[list[list[int]]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.shards(values, 4)
