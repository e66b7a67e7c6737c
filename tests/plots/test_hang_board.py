"""`plots.hang_board`: which ranks made which call, and where each is."""

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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch, plots
from ddp_lessons.plots.hang_board import as_text
from tests.support import faults

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def board(fault: str, nprocs: int, **options: Any) -> Any:
    run = launch(faults.train, (fault, 1, 1), nprocs=nprocs, timeout=2, check=False)
    return plots.hang_board(run, **options)


def cells(ax: Any, row: int) -> list[str]:
    """The texts of a row, from the left; the note beside it comes last."""
    found = [(t.get_position()[0], t.get_text()) for t in ax.texts if t.get_position()[1] == row]
    inside = [
        (t.get_position()[0], t.get_text())
        for t in ax.artists
        if hasattr(t, "get_text") and t.get_position()[1] == row
    ]
    return [text for _, text in sorted({*found, *inside})]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_another_call_stands_out_and_the_line_is_beside_it() -> None:
    ax = board("skipped", 3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1", "rank 2"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["call 1", "call 2", "call 3"]
    assert "another call than most ranks make" in legend(ax)
    *calls, note = cells(ax, 1)
    assert calls == ["all_reduce", "broadcast", "broadcast"]
    assert note.endswith("dist.broadcast(y, 0, group)")
    assert "all_reduce at" in ax.get_title(loc="left").replace("\n", " ")


def test_a_rank_that_did_not_come() -> None:
    ax = board("killed", 2, title="rank 1 is dead")
    assert ax.get_title(loc="left") == "rank 1 is dead"
    assert cells(ax, 1)[-2:] == ["–", "died: SIGKILL"]
    assert "did not come" in legend(ax)


@pytest.mark.parametrize("then", ["return", "barrier"])
def test_the_bucket_that_a_backward_waits_for_is_not_done(then: str) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Linear(4, 2))
        for _ in range(2 if rank == 1 else 3):
            model(torch.ones(1, 4)).sum().backward()
        if then == "barrier":
            dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    _, first, second, third, *_ = as_text(run).splitlines()
    assert [row.count("…") for row in (first, second, third)] == [1, int(then == "barrier"), 1]
    assert "all_reduce …  " in first
    assert ("barrier !…" if then == "barrier" else "–") in second


def test_unlike_tensors_show_their_shapes() -> None:
    ax = board("tensor mismatch", 3)
    assert any("(3,)" in text for text in cells(ax, 1))


def test_tensors_of_other_functions_are_not_compared() -> None:
    ax = board("extra", 3)
    assert not any("float32" in text for row in range(3) for text in cells(ax, row))


def test_the_names_of_groups_do_not_meet() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        one, two = dist.new_group([0, 1]), dist.new_group([0, 1])
        for group in (one, two, one):
            dist.all_reduce(torch.ones(1), group=group)
        dist.destroy_process_group()

    ax: Any = plots.hang_board(launch(work))
    ax.figure.canvas.draw()
    labels = ax.get_xticklabels()
    assert [" ".join(label.get_text().split()) for label in labels] == [
        "call 1 in group ranks 0 1",
        "call 1 in group ranks 0 1, no. 2",
        "call 2 in group ranks 0 1",
    ]
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


@pytest.mark.slow
def test_many_ranks_share_rows() -> None:
    ax = board("endless loop", 12)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 2
    assert "rank 1" in labels


def test_a_lonely_recv_has_a_column_of_its_own() -> None:
    ax = board("recv of nothing", 3)
    assert "1 ← 2" in [t.get_text() for t in ax.get_xticklabels()]


def test_only_the_last_calls_of_a_long_run_are_shown() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for _ in range(40):
            dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()

    ax = plots.hang_board(launch(work))
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "call 40"
    assert ax.get_xlabel() == "not shown: 34 earlier calls"
    assert ax.get_title(loc="left") == "every rank came to every call"


def test_a_run_without_any_call() -> None:
    ax = plots.hang_board(launch(lambda rank: rank))
    assert cells(ax, 0) == ["has returned"]


def test_on_given_axes() -> None:
    _, ax = plt.subplots()
    assert plots.hang_board(launch(lambda rank: rank), ax=ax) is ax
