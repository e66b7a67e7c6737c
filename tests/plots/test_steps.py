"""`plots.steps`: even, uneven, joined, failed, long and interrupted runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import matplotlib
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch, plots, steps
from ddp_lessons.wire.records import Span
from tests.plots.test_timeline import legend, made_up, named_colours, rows

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("figures_closed")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOGETHER, ALONE = "a step of all ranks", "a step that other ranks do not take"
WITHOUT, UNFINISHED = "takes part in collectives, without a batch", "began and never finished"


def train(rank: int, counts: tuple[int, ...], join: bool, counted: bool = True) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join(enable=join):
        for _ in (steps if counted else iter)(range(counts[rank])):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
    dist.destroy_process_group()


def by_kind(ax: Any) -> dict[str, set[tuple[int, int]]]:
    """The (rank, step) of each cell, by the legend's text; bars are split into columns."""
    kinds = named_colours(ax)
    cells: dict[str, set[tuple[int, int]]] = {}
    for bars in ax.collections:
        kind = kinds[tuple(bars.get_facecolor()[0])]
        for path in bars.get_paths():
            box = path.get_extents()
            columns = range(round(box.x0 + 0.5), round(box.x1 + 0.5))
            row = round((box.y0 + box.y1) / 2)
            cells.setdefault(kind, set()).update((row, column) for column in columns)
    return cells


def said(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def all_of(rank: int, begin: int, end: int) -> set[tuple[int, int]]:
    return {(rank, column) for column in range(begin, end)}


@pytest.mark.ranks
def test_under_join_a_rank_takes_part_without_a_batch() -> None:
    ax = plots.steps(launch(train, ((2, 1, 4), True), nprocs=3))
    cells = by_kind(ax)
    assert cells[TOGETHER] == {(0, 0), (1, 0), (2, 0)}
    assert cells[ALONE] == {(0, 1)} | all_of(2, 1, 4)
    assert cells[WITHOUT] == all_of(0, 2, 4) | all_of(1, 1, 4)
    assert legend(ax) == [TOGETHER, ALONE, WITHOUT]
    assert rows(ax) == ["rank 0", "rank 1", "rank 2"]
    assert said(ax) == ["2 steps", "1 step", "4 steps"]
    assert ax.get_title("left") == "train: 4 steps on rank 2, only 1 on rank 1"
    assert [round(tick) for tick in ax.get_xticks()] == [0, 1, 2, 3]


@pytest.mark.ranks
def test_without_join_the_last_rank_fails_alone() -> None:
    run = launch(train, ((3, 4), False), check=False)
    ax = plots.steps(run, title="alone")
    assert by_kind(ax) == {TOGETHER: all_of(0, 0, 3) | all_of(1, 0, 3), UNFINISHED: {(1, 3)}}
    assert said(ax) == ["3 steps", "3 steps ✗ RuntimeError"]
    assert ax.get_title("left") == "alone"


@pytest.mark.ranks
def test_an_optimizers_steps_are_finished_when_they_are_noted() -> None:
    ax = plots.steps(launch(train, ((3, 4), False, False), check=False))
    assert by_kind(ax) == {TOGETHER: all_of(0, 0, 3) | all_of(1, 0, 3)}
    assert said(ax) == ["3 steps", "3 steps ✗ RuntimeError"]


@pytest.mark.ranks
def test_even_work_needs_one_colour() -> None:
    ax = plots.steps(launch(train, ((2, 2), True)), legend=False)
    assert ax.get_title("left") == "train: 2 steps on each rank"
    assert ax.get_legend() is None


def leave(rank: int, how: Callable[[], Any]) -> None:
    for step in steps(range(3)):
        if rank == 1 and step == 2:
            how()


@pytest.mark.ranks
def test_a_rank_that_dies_did_not_finish_its_step() -> None:
    ax = plots.steps(launch(leave, (lambda: os._exit(7),), check=False))
    assert by_kind(ax)[UNFINISHED] == {(1, 2)}
    assert said(ax) == ["3 steps", "2 steps ✗ exit code 7"]


def step(rank: int, number: int, length: int = 1_000) -> Span:
    t0_ns = 1_010_000_000 + number * 1_000
    return Span(rank, "steps", "mark", f"step {number}", t0_ns, t0_ns + length, number)


def made(counts: list[int]) -> Run:
    spans = [step(rank, n) for rank, number in enumerate(counts) for n in range(number)]
    return made_up(len(counts), spans)


@pytest.mark.parametrize("counts", [[1], [61, 40], [3000, 2000], [5] * 63 + [6]])
def test_long_runs_and_many_ranks(counts: list[int]) -> None:
    ax = plots.steps(made(counts))
    ax.figure.canvas.draw()
    together = {(rank, n) for rank in range(len(counts)) for n in range(min(counts))}
    assert by_kind(ax)[TOGETHER] == together
    assert len(ax.get_xticks()) <= 13
    right = ax.get_xlim()[1]
    assert max(counts) - 0.5 < right < 3 * max(counts)
    for text in ax.texts:
        assert text.get_window_extent().x1 <= ax.figure.bbox.x1


def test_long_rows_are_one_bar() -> None:
    ax = plots.steps(made([3000, 2000]))
    assert sum(len(bars.get_paths()) for bars in ax.collections) == 3


def test_a_rank_without_any_step_has_a_row() -> None:
    ax = plots.steps(made([0, 2]))
    assert by_kind(ax) == {ALONE: all_of(1, 0, 2)}
    assert said(ax) == ["0 steps", "2 steps"]


def test_without_steps_there_is_no_picture() -> None:
    with pytest.raises(ValueError, match="no training step was recorded"):
        plots.steps(made_up(2))
