"""`plots.tensors`: cells, colours, and refused arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import cloudpickle
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from matplotlib.colors import to_hex, to_rgb

from ddp_lessons import launch, plots
from ddp_lessons.plots.tensors import COLOURS
from tests.plots.test_timeline import figure_of, rows

cloudpickle.register_pickle_by_value(sys.modules[__name__])

GREY = (0.299, 0.587, 0.114)  # how red, green and blue become grey


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def cells(ax: Any) -> list[tuple[int, str, str]]:
    """(rank, number, colour) of every cell, row by row from the left."""
    boxes = [(patch.get_bbox(), to_hex(patch.get_facecolor())) for patch in ax.patches]
    texts = [text for text in ax.texts if text.get_text() not in ("", "–")]
    found = [
        (round(box.y0 + box.height / 2), box.x0, text.get_text(), colour)
        for (box, colour), text in zip(boxes, texts, strict=True)
    ]
    return [(rank, text, colour) for rank, _, text, colour in sorted(found)]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


@pytest.mark.ranks
def test_a_real_collective_in_the_colours_of_its_ranks() -> None:
    def gather(rank: int) -> list[torch.Tensor]:
        dist.init_process_group("gloo")
        pieces = [torch.empty(2) for _ in range(2)]
        dist.all_gather(pieces, torch.arange(2.0) + 10 * rank)
        dist.destroy_process_group()
        return pieces

    before = [torch.arange(2.0) + 10 * rank for rank in range(2)]
    ax = plots.tensors(before, launch(gather).values)
    assert rows(ax) == ["rank 0", "rank 1"]
    first, second = (colour.lower() for colour in COLOURS[:2])
    gathered = [("0", first), ("1", first), ("10", second), ("11", second)]
    assert [cell[1:] for cell in cells(ax) if cell[0] == 0] == [*gathered[:2], *gathered]
    assert [cell[1:] for cell in cells(ax) if cell[0] == 1] == [*gathered[2:], *gathered]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["before", "after"]


def test_a_sum_belongs_to_nobody() -> None:
    ax: Any = plots.tensors([[1], [2]], [[3], None])
    assert [cell[1:] for cell in cells(ax)][1] == ("3", "#ffffff")
    assert [bool(patch.get_hatch()) for patch in ax.patches] == [False, True, False]
    assert legend(ax) == ["put together from several ranks"]
    assert legend(plots.tensors([[1], [2]], [[2], [1]])) == []


def test_who_has_nothing_gets_a_dash() -> None:
    ax = plots.tensors([[1], [2]], [[3], None])
    assert len(ax.patches) == 3
    assert [(round(t.get_position()[1]), t.get_text()) for t in ax.texts][-2:-1] == [(1, "–")]


def test_what_a_rank_has_before_is_its_own_though_others_have_the_same() -> None:
    ax = plots.tensors([[1], [1]], [[2], [2]])
    colours = [cell[2] for cell in cells(ax)]
    assert colours[::2] == [colour.lower() for colour in COLOURS[:2]]


def test_colours_are_told_apart_in_grey() -> None:
    greys = [sum(c * w for c, w in zip(to_rgb(c), GREY, strict=True)) for c in COLOURS]
    assert all(lighter - darker > 0.07 for darker, lighter in pairwise([*greys, 1.0]))


def test_more_ranks_than_colours_are_told_apart_by_hatching() -> None:
    ax: Any = plots.tensors([[rank] for rank in range(8)], [None] * 8)
    assert len({(p.get_facecolor(), p.get_hatch()) for p in ax.patches}) == 8


def test_axes_and_title() -> None:
    figure, given = plt.subplots()
    ax = plots.tensors([1, 2], [2, 1], title="swapped", ax=given)
    assert ax is given
    assert ax.get_title(loc="left") == "swapped"
    assert plt.get_fignums() == [figure.number]
    assert figure_of(plots.tensors([1], [1])) is not figure


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [([1, 2], [1], "before has 2 ranks and after 1"), ([[0] * 99], [None], "24 are legible")],
)
def test_what_cannot_be_drawn(before: Any, after: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.tensors(before, after)


@pytest.mark.parametrize(("number", "text"), [(1234.567, "1235"), (0.125, "0.12"), (7.0, "7")])
def test_a_number_is_as_long_as_its_cell_has_room(number: float, text: str) -> None:
    ax = plots.tensors([[number] * 8] * 2, [[number] * 8] * 2)
    ax.figure.canvas.draw()
    assert {t.get_text() for t in ax.texts if t.get_text()} == {text}
