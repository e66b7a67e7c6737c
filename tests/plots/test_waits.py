"""`plots.waits` and `plots.totals`, of real runs with a late rank and made-up ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import cloudpickle
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, launch, plots, steps
from ddp_lessons.wire.records import ErrorRecord, Span
from tests.plots.test_timeline import figure_of, legend, made_up, rows

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MS = 1_000_000
BEGAN = 1_000 * MS  # of made_up's runs; their functions start 10 ms later and end at 100 ms
OWN, WAITS, TRANSFER = "own work", "waits for a later rank", "transfer, all have come"


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def work(rank: int) -> None:
    dist.init_process_group("gloo")
    for _ in steps(range(8)):
        time.sleep(0.03 if rank == 2 else 0.0)
        dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def late() -> Run:
    return launch(work, nprocs=4)


def call(rank: int, begin: float, end: float | None, seq: int = 0, group: str = "world") -> Span:
    """An all_reduce from `begin` to `end` ms after the launch."""
    t1_ns = None if end is None else BEGAN + round(end * MS)
    t0_ns = BEGAN + round(begin * MS)
    return Span(rank, "main", "comm", "all_reduce", t0_ns, t1_ns, None, "all_reduce", group, seq)


def hatched(ax: Any) -> list[tuple[float, float, float]]:
    """(row, left, right) of every bar that means waiting."""
    boxes = [
        path.get_extents()
        for collection in ax.collections
        if collection.get_hatch() == "////"
        for path in collection.get_paths()
    ]
    return sorted((round((b.y0 + b.y1) / 2, 6), b.x0, b.x1) for b in boxes)


def lines(ax: Any) -> list[tuple[float, float]]:
    """(row, x) of the vertical lines."""
    found = [c.get_segments() for c in ax.collections if hasattr(c, "get_segments")]
    return [(float(s[:, 1].mean()), float(s[0, 0])) for segments in found for s in segments]


def texts(ax: Any) -> list[str]:
    ax.figure.canvas.draw()
    return [text.get_text() for text in ax.texts if text.get_text()]


@pytest.mark.ranks
def test_waiting_is_drawn_where_it_was(late: Run) -> None:
    ax = plots.waits(late, steps=(3, 3))
    (x0, x1) = ax.get_xlim()
    waits = hatched(ax)
    assert {row for row, _, _ in waits} >= {0, 1, 3}
    rows_of_3 = [s for s in late.waits() if s.step == 3 and s.wait_ns > 10 * MS]
    begin = min(s.t0_ns for s in late.spans() if s.lane == "steps" and s.step == 3)
    for share in rows_of_3:
        left = (share.t0_ns - begin) / MS
        expected = pytest.approx((share.rank, left, left + share.wait_ns / MS))
        assert any(bar == expected for bar in waits)
    assert x0 == 0
    assert max(right for _, _, right in waits) < x1


@pytest.mark.ranks
def test_the_last_arrival_is_marked_on_all_ranks_and_named(late: Run) -> None:
    ax = plots.waits(late, steps=(3, 4))
    assert sorted({round(row) for row, _ in lines(ax)}) == [0, 1, 2, 3]
    assert len({x for _, x in lines(ax)}) == 2
    assert "rank 2 comes last" in texts(ax)
    assert ax.get_title(loc="left") == str(late.straggler())
    assert ax.get_title(loc="left").startswith("rank 2 makes the others wait (")
    assert ax.get_xlabel() == "ms since step 3 began"
    assert legend(ax)[:3] == [OWN, WAITS, TRANSFER]


@pytest.mark.ranks
def test_by_default_start_up_is_left_out(late: Run) -> None:
    joined = max(s.t1_ns or 0 for s in late.spans() if s.op == "init_process_group")
    left = min(s.t0_ns for s in late.spans() if s.op == "destroy_process_group")
    _, right = plots.waits(late).get_xlim()
    assert right == pytest.approx((left - joined) / MS, rel=0.02)


@pytest.mark.ranks
def test_labels_of_last_arrivals_do_not_overlap(late: Run) -> None:
    ax = plots.waits(late)
    figure = figure_of(ax)
    figure.canvas.draw()
    named = [text for text in ax.texts if text.get_text() and text.get_position()[1] < -0.5]
    boxes = sorted((text.get_window_extent() for text in named), key=lambda box: box.x0)
    assert len(boxes) == 8
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))


@pytest.mark.parametrize(("second", "expected"), [(70, "rank 1 comes last"), (31, "rank 1 last")])
def test_all_last_arrivals_are_named_in_the_same_words(second: int, expected: str) -> None:
    """The middle label has the least room; the other two have enough in both cases."""
    ends = (20, second, 90)
    calls = [call(0, end - 8, end + 1, seq) for seq, end in enumerate(ends)]
    calls += [call(1, end, end + 1, seq) for seq, end in enumerate(ends)]
    ax = plots.waits(made_up(2, calls))
    assert [text for text in texts(ax) if "last" in text] == [expected] * 3


def test_groups_are_told_apart() -> None:
    calls = [call(0, 20, 60), call(1, 50, 60), call(2, 20, 90), call(3, 80, 90)]
    calls = [s._replace(group=f"ranks {'0 1' if s.rank < 2 else '2 3'}") for s in calls]
    ax = plots.waits(made_up(4, calls))
    assert sorted((round(row), x) for row, x in lines(ax)) == [(0, 40), (1, 40), (2, 70), (3, 70)]
    expected = {f"rank {r} comes last of ranks {r - 1} {r}" for r in (1, 3)}
    assert expected <= set(texts(ax))


def test_what_never_ended_is_drawn_as_open() -> None:
    ax: Any = plots.waits(made_up(2, [call(0, 40, None)]))
    assert (0, 30, 90) in [pytest.approx(bar) for bar in hatched(ax)]
    assert "60 ms, never ended" in texts(ax)
    (dashed,) = [c for c in ax.collections if c.get_hatch()]
    assert dashed.get_linestyle()[0][1] is not None
    assert "never ended" in legend(ax)


@pytest.mark.ranks
def test_a_failed_rank_is_marked() -> None:
    def fails(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            raise ValueError
        dist.barrier()

    assert " ✗ ValueError" in texts(plots.waits(launch(fails, check=False)))


@pytest.mark.ranks
@pytest.mark.parametrize("draw", [plots.waits, plots.timeline])
def test_a_rank_that_failed_before_what_is_shown(late: Run, draw: Callable[..., Any]) -> None:
    first, second, *more = late.ranks
    error = ErrorRecord("ValueError", "", ())
    second = replace(second, status="raised", error=error, ended_ns=second.began_ns)
    ax = draw(Run(late.name, [first, second, *more], begin_ns=late.begin_ns), steps=(3, 3))
    figure_of(ax).canvas.draw()
    (mark,) = (text for text in ax.texts if text.get_text() == " ✗ ValueError")
    inside, figure = ax.get_window_extent(), figure_of(ax).bbox
    assert mark.get_window_extent().x0 == pytest.approx(inside.x0, abs=10)
    assert inside.width > figure.width / 2


@pytest.mark.parametrize("ranks", [2, 64])
def test_thousands_of_collectives_become_means(ranks: int) -> None:
    spans = [
        call(rank, 10 + n * 0.01, 10 + n * 0.01 + 0.005 + 0.003 * (rank > 0), n)
        for rank in range(ranks)
        for n in range(10_000 // ranks)
    ]
    run = made_up(ranks, spans)
    began = time.process_time()
    ax = plots.waits(run)
    figure_of(ax).canvas.draw()
    assert time.process_time() - began < 20
    assert "the height of a colour is its part of" in ax.get_xlabel()
    assert len(ax.collections) <= 4 * ranks
    assert rows(ax)[:2] == ["rank 0", "rank 1"] if ranks == 2 else ["rank 0", "rank 8"]


@pytest.mark.ranks
def test_no_such_step(late: Run) -> None:
    with pytest.raises(ValueError, match="no rank has a step from 50 to 60"):
        plots.waits(late, steps=(50, 60))


@pytest.mark.ranks
def test_dropped_spans_are_admitted(late: Run) -> None:
    run = made_up(2)
    run.ranks[0] = replace(run.ranks[0], dropped=7)
    assert "rank 0: 7" in plots.waits(run).get_xlabel()
    assert "rank 0: 7" in plots.totals(run).get_xlabel()


def test_totals_add_up_to_the_function() -> None:
    calls = [call(0, 20, 60), call(1, 50, 60)]
    ax: Any = plots.totals(made_up(2, calls))
    ends: dict[int, float] = {}
    for collection in ax.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            row = round((box.y0 + box.y1) / 2)
            ends[row] = max(ends.get(row, 0), box.x1)
    assert ends == {0: pytest.approx(90), 1: pytest.approx(90)}
    assert texts(ax) == ["50", "30", "10", "80", "10"]
    assert ax.get_xlabel() == "ms in the function"
    assert legend(ax) == [OWN, WAITS, TRANSFER]


@pytest.mark.ranks
def test_totals_of_steps_are_means(late: Run) -> None:
    ax = plots.totals(late, legend=False, title="In each step")
    assert ax.get_xlabel() == "mean ms per step"
    assert ax.get_legend() is None
    waits = {row: right - left for row, left, right in hatched(ax)}
    assert all(20 < waits[rank] < 45 for rank in (0, 1, 3))
    assert waits.get(2, 0) < 10


@pytest.mark.ranks
def test_both_beside_one_another(late: Run) -> None:
    figure, (left, right) = plt.subplots(1, 2, width_ratios=[3, 1], layout="constrained")
    assert plots.waits(late, ax=left) is left
    assert plots.totals(late, ax=right, legend=False) is right
    figure.canvas.draw()
    assert rows(left) == rows(right)
    assert plt.get_fignums() == [figure.number]
    assert left.get_window_extent().width > 1.8 * right.get_window_extent().width


def hangs(rank: int) -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        dist.broadcast(torch.ones(1), 1)
    dist.barrier()


@pytest.mark.ranks
def test_a_hang_is_the_title_where_nobody_can_be_blamed() -> None:
    run = launch(hangs, nprocs=3, check=False)
    assert run.verdict is not None
    for plot in (plots.waits, plots.totals, plots.arrivals):
        title = plot(run).get_title(loc="left")
        assert " ".join(title.split()) == f"hangs: {run.verdict.title}"


def test_a_failure_after_the_steps_shown_is_not_drawn() -> None:
    marks = [
        Span(r, "steps", "mark", f"step {n}", t0, t0 + 10 * MS, n)
        for r in range(2)
        for n, t0 in enumerate((BEGAN + 20 * MS, BEGAN + 30 * MS))
    ]
    ranks = [replace(r, status="died", exitcode=-9) for r in made_up(2, marks).ranks]
    run = Run("work", ranks, begin_ns=BEGAN)
    assert not any("SIGKILL" in text for text in texts(plots.waits(run, steps=(0, 1))))
    assert any("SIGKILL" in text for text in texts(plots.waits(run)))
    assert any("SIGKILL" in text for text in texts(plots.totals(run)))


def test_groups_that_are_made_or_left_on_the_way_do_not_cut_the_picture() -> None:
    def group(rank: int, op: str, begin: float, end: float, name: str | None = None) -> Span:
        return call(rank, begin, end, group="")._replace(name=op, op=op, group=name, seq=None)

    spans = [
        span
        for rank in range(2)
        for span in (
            group(rank, "init_process_group", 10, 20),
            call(rank, 22, 24, 0),
            group(rank, "new_group", 30, 40),
            group(rank, "destroy_process_group", 50, 55, "ranks 0 1"),
            group(rank, "destroy_process_group", 80 + rank, 85),
        )
    ]
    assert plots.waits(made_up(2, spans)).get_xlim()[1] == pytest.approx(60, rel=0.02)


@pytest.mark.parametrize("plot", [plots.waits, plots.timeline])
def test_one_number_is_no_pair_of_steps(plot: Any) -> None:
    with pytest.raises(TypeError, match="steps=2 are not two numbers"):
        plot(made_up(2), steps=2)


def test_a_failure_after_the_first_rank_has_left_is_marked_at_the_edge() -> None:
    leaves = call(0, 60, 65)._replace(name="destroy_process_group", op="destroy_process_group",
                                      group=None, seq=None)  # fmt: skip
    first, second = made_up(2, [call(0, 20, 30), call(1, 25, 30), leaves]).ranks
    run = Run("work", [first, replace(second, status="died", exitcode=-9)], begin_ns=BEGAN)
    ax = plots.waits(run)
    (mark,) = [text for text in ax.texts if "SIGKILL" in text.get_text()]
    assert mark.get_position()[0] <= ax.get_xlim()[1]
