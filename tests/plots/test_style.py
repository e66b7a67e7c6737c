"""Row labels, with machines where there are several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from ddp_lessons import Run
from ddp_lessons.plots import style
from tests.plots.test_timeline import made_up, rows

pytestmark = pytest.mark.ranks


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def named(hosts: Sequence[str | None], each: int = 2) -> Any:
    """The axes of a run with `each` ranks on every host."""
    run = made_up(each * len(hosts))
    ranks = [replace(r, group_rank=r.rank // each, host=hosts[r.rank // each]) for r in run.ranks]
    ax = style.new_axes(len(ranks))
    style.name_ranks(ax, Run("work", ranks, begin_ns=run.begin_ns))
    return ax


def lines(ax: Any) -> list[float]:
    """The heights of the horizontal lines."""
    return [float(line.get_ydata()[0]) for line in ax.lines]


@pytest.mark.parametrize("host", [None, "host0"])
def test_on_one_machine_the_ranks_suffice(host: str | None) -> None:
    ax = named([host], each=3)
    assert rows(ax) == ["rank 0", "rank 1", "rank 2"]
    assert lines(ax) == []


def test_two_hosts_are_named_with_a_line_between_them() -> None:
    ax = named(["one", "two"])
    assert rows(ax) == ["rank 0\none", "rank 1\none", "rank 2\ntwo", "rank 3\ntwo"]
    assert lines(ax) == [1.5]


@pytest.mark.parametrize("hosts", [(None, None), ("one", "one"), ("one", "one", "two")])
def test_nodes_are_numbered_where_hosts_do_not_tell_them_apart(hosts: Sequence[str]) -> None:
    ax = named(hosts, each=1)
    assert rows(ax) == [f"rank {n}\nnode {n}" for n in range(len(hosts))]
    assert lines(ax) == [n + 0.5 for n in range(len(hosts) - 1)]


def test_of_many_ranks_every_eighth_is_named_and_the_lines_stay() -> None:
    ax = named(["one", "two", "three", "four"], each=16)
    assert rows(ax) == [f"rank {rank}" for rank in range(0, 64, 8)]
    assert lines(ax) == [15.5, 31.5, 47.5]


@pytest.mark.parametrize(
    "names",
    [
        ("forward", "backward", "optimizer"),
        ("backward",),
        ("load", "forward", "backward"),
        ("load", "forward", "backward", "optimizer"),
        ("train", "load", "save", "evaluate"),
    ],
)
def test_the_parts_of_a_step_look_the_same_whatever_else_is_marked(names: Sequence[str]) -> None:
    found = style.fills(names)
    assert list(found) == list(names)
    usual = dict(zip(style.USUAL, style.WORK, strict=True))
    assert all(found[name] == usual[name] for name in names if name in usual)
    filled = [fill for fill in found.values() if fill]
    assert len({*filled}) == len(filled) == min(len(names), len(style.WORK))


@pytest.mark.parametrize("words", [3, 40])
def test_a_long_title_is_folded_before_the_edge_or_the_next_axes(words: int) -> None:
    title = "waits " * words
    figure, (left, right) = plt.subplots(1, 2)
    for ax in (left, right):
        style.head(ax, title, [])
        drawn = ax.title if ax.get_title() else ax._left_title
        box = drawn.get_window_extent()
        edge = right.get_window_extent().x0 if ax is left else figure.bbox.x1
        assert box.x1 <= edge
        assert " ".join(ax.get_title(loc="left").split()) == title.strip()
        assert ("\n" in ax.get_title(loc="left")) == (words == 40)
