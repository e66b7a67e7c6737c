"""`plots.memory`: bars, sizes, names and refused arguments."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from ddp_lessons import plots

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")

WHOLE = {"parameters": 4e6, "gradients": 4e6, "optimizer": 8e6}
SHARE = {kind: nbytes / 2 for kind, nbytes in WHOLE.items()}


def bars(ax: Any) -> list[tuple[float, float, float]]:
    """(row, left, right) of each bar, from the top and the left."""
    boxes = [patch.get_bbox() for patch in ax.patches]
    return sorted((round((box.y0 + box.y1) / 2, 6), box.x0, box.x1) for box in boxes)


def texts(ax: Any) -> list[str]:
    ax.figure.canvas.draw()
    return [text.get_text() for text in ax.texts if text.get_text()]


def rows(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_each_rank_has_a_bar_of_its_kinds_below_the_name_of_the_stage() -> None:
    ax = plots.memory({"DDP": [WHOLE, WHOLE], "ZeRO 3": [SHARE, SHARE]}, title="the finding")
    assert rows(ax) == ["rank 0", "rank 1"] * 2
    assert legend(ax) == ["parameters", "gradients", "optimizer"]
    first, last = bars(ax)[:3], bars(ax)[-3:]
    assert [(left, right) for _, left, right in first] == [(0, 4), (4, 8), (8, 16)]
    assert [(left, right) for _, left, right in last] == [(0, 2), (2, 4), (4, 8)]
    assert len({row for row, _, _ in bars(ax)}) == 4
    assert first[0][0] < last[0][0]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    said = texts(ax)
    assert {"DDP", "ZeRO 3", " 16 MB", " 8 MB"} <= set(said)
    assert said.count("4") == 2 + 1  # where all ranks have the same, it is written once
    assert said.count(" 16 MB") == 2
    assert ax.get_xlabel() == "MB kept by a rank"
    assert ax.get_title("left") == "the finding"


def test_ranks_may_keep_different_amounts_and_kinds() -> None:
    ax = plots.memory({"": [{"a": 100}, {"b": 50, "a": 0}, {}]})
    assert [(left, right) for _, left, right in bars(ax)] == [(0, 100), (0, 50)]
    colours = {patch.get_facecolor() for patch in ax.patches}
    assert len(colours) == 2
    assert legend(ax) == ["a", "b"]
    assert {" 100 B", " 50 B", " 0 B"} <= set(texts(ax))


def test_a_size_is_written_where_it_differs_from_the_rank_above() -> None:
    ax = plots.memory({"": [{"a": 100}, {"a": 100}, {"a": 90}, {"a": 100}]})
    assert [t for t in texts(ax) if t.isdigit()] == ["100", "90", "100"]


def test_pictures_with_a_limit_have_the_same_axis() -> None:
    small, large = (plots.memory({"": [kept]}, limit=32e6) for kept in (SHARE, WHOLE))
    assert small.get_xlim() == large.get_xlim() == (0, 32)


def test_a_figure_of_its_own_or_the_axes_given() -> None:
    _, given = plt.subplots()
    assert plots.memory({"DDP": [WHOLE]}, ax=given) is given
    assert plots.memory({"DDP": [WHOLE]}) is not given
    assert len(plt.get_fignums()) == 2


def test_names_are_never_taken_for_formulas() -> None:
    ax = plots.memory({r"$\frac$": [{"$x$": 1}]}, title="$5")
    assert r"$\frac$" in texts(ax)
    assert legend(ax) == ["$x$"]


def test_many_rows_fit_into_a_page() -> None:
    ax: Any = plots.memory({str(n): [WHOLE] * 16 for n in range(4)})
    assert ax.figure.get_size_inches()[1] < 12


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "at least one"),
        ({"DDP": []}, "at least one"),
        ({"DDP": [{}]}, "at least one"),
        ({"DDP": [WHOLE], "ZeRO": []}, "at least one"),
        ({"DDP": [dict.fromkeys("abcde", 1.0)]}, "more than 4 kinds"),
        ({"DDP": [WHOLE] * 65}, "65 rows are more than 64"),
        ({"DDP": [{"a": -1.0}]}, "no numbers of bytes"),
        ({"DDP": [{"a": math.nan}]}, "no numbers of bytes"),
        ({"DDP": [{"a": math.inf}]}, "no numbers of bytes"),
    ],
)
def test_senseless_values_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.memory(values)
