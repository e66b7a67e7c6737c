"""`plots.items`: boxes, counts, names and refused arguments."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from ddp_lessons import plots
from ddp_lessons.plots.tensors import COLOURS

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")


def boxes(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def test_each_item_is_in_its_column_and_in_the_row_of_its_worker() -> None:
    ax = plots.items([[[0], [2]], [[1], [3]]], 4, title="the finding")
    ax.figure.canvas.draw()
    assert [int(box.get_x()) for box in boxes(ax)] == [0, 2, 1, 3]
    assert [round(box.get_y() + box.get_height() / 2) for box in boxes(ax)] == [0, 1, 2, 3]
    colours = [to_hex(box.get_facecolor()) for box in boxes(ax)]
    assert colours == [colour.lower() for colour in (COLOURS[0],) * 2 + (COLOURS[1],) * 2]
    assert names(ax)[:2] == ["rank 0, worker 0", "rank 0, worker 1"]
    assert [text.get_text() for text in ax.texts] == ["1"] * 4
    assert ax.get_title("left") == "the finding"
    assert legend(ax) == []


def test_what_comes_twice_or_never_is_counted_and_marked() -> None:
    ax = plots.items([[[0, 1, 1]], [[0]]], 3)
    assert names(ax) == ["rank 0", "rank 1", "times in all"]
    assert [text.get_text() for text in ax.texts] == ["2", "2", "0"]
    assert legend(ax) == ["comes more than once"]
    assert len({box.get_linewidth() for box in boxes(ax)}) == 1


def test_shards_are_named_and_set_apart() -> None:
    ax = plots.items([[range(5)]], 5, shards=[3, 2])
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.texts][-2:] == ["shard 0", "shard 1"]
    assert [line.get_linestyle() for line in ax.lines].count(":") == 1


def test_many_ranks_differ_in_colour_or_hatching() -> None:
    ax = plots.items([[[rank]] for rank in range(6)], 6)
    looks = {(box.get_facecolor(), box.get_hatch()) for box in boxes(ax)}
    assert len(looks) == 6


@pytest.mark.parametrize(
    ("values", "total", "told"),
    [
        ([], 3, "0 workers"),
        ([[[0]]] * 25, 3, "25 workers"),
        ([[[0]]], 41, "41 items"),
        ([[[0]]], 0, "0 items"),
        ([[[7, -1]]], 3, r"\[-1, 7\] are no items of a stream of 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    values: list[list[list[int]]], total: int, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        plots.items(values, total)
