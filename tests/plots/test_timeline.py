"""`plots.timeline`, of real runs and large made-up ones: rows, bars, legend, title, size."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.distributed as dist
from matplotlib.transforms import Bbox

from ddp_lessons import Run, launch, plots, span
from ddp_lessons.results import RankResult
from ddp_lessons.wire.records import Span

cloudpickle.register_pickle_by_value(sys.modules[__name__])

START_UP, UNMARKED = "start-up", "in the function, unmarked"
GROUP, CALL = "joining or leaving the group", "in a collective"


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def train(rank: int) -> None:
    dist.init_process_group("gloo")
    for _ in range(3):
        with span("forward"):
            time.sleep(0.01 * (1 + rank))
        with span("backward"):
            time.sleep(0.01)
        dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained() -> Run:
    return launch(train, nprocs=4)


def made_up(ranks: int, spans: Sequence[Span] = (), *, called: bool = True) -> Run:
    """A run of 100 ms in which rank 0 recorded these spans."""
    second = 1_000_000_000
    began, started, ended = second, second + 10_000_000, second + 100_000_000

    def life(rank: int) -> list[Span]:
        start_up = Span(rank, "process", "mark", START_UP, began, started if called else ended)
        function = Span(rank, "process", "mark", "work", started, ended)
        return [start_up, function] if called else [start_up]

    results = [
        RankResult(
            rank=rank,
            status="returned" if called else "died",
            value=None,
            output="",
            error=None,
            exitcode=0,
            spans=(*life(rank), *(s for s in spans if s.rank == rank)),
            began_ns=began,
            started_ns=started if called else None,
            ended_ns=ended,
        )
        for rank in range(ranks)
    ]
    return Run("work", results, begin_ns=began)


def figure_of(ax: Any) -> Any:
    return ax.figure


def rows(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def named_colours(ax: Any) -> dict[tuple[float, ...], str]:
    handles = ax.get_legend().legend_handles
    return dict(zip([handle.get_facecolor() for handle in handles], legend(ax), strict=True))


def bars(ax: Any) -> list[tuple[float, float, float]]:
    """(row, left, right) of every bar, whether it was drawn alone or in a collection."""
    paths = [path for collection in ax.collections for path in collection.get_paths()]
    boxes = [patch.get_bbox() for patch in ax.patches] + [path.get_extents() for path in paths]
    return sorted(((box.y0 + box.y1) / 2, box.x0, box.x1) for box in boxes)


def colours_of(ax: Any) -> list[tuple[float, tuple[float, ...]]]:
    """(left, colour) of every bar, from the left."""
    alone = [(patch.get_bbox().x0, patch.get_facecolor()) for patch in ax.patches]
    collected = [
        (path.get_extents().x0, tuple(collection.get_facecolor()[0]))
        for collection in ax.collections
        for path in collection.get_paths()
    ]
    return sorted(alone + collected)


@pytest.mark.ranks
def test_a_figure_of_its_own_or_the_axes_given(trained: Run) -> None:
    ax = plots.timeline(trained)
    assert isinstance(ax, matplotlib.axes.Axes)
    assert len(plt.get_fignums()) == 1
    figure, given = plt.subplots()
    assert plots.timeline(trained, ax=given) is given
    assert len(plt.get_fignums()) == 2
    assert figure.axes == [given]


@pytest.mark.ranks
def test_bars_lie_where_the_spans_say(trained: Run) -> None:
    ax = plots.timeline(trained)
    drawn = bars(ax)
    expected = sorted(
        (s.rank, (s.t0_ns - trained.begin_ns) / 1e6, (s.t1_ns - trained.begin_ns) / 1e6)
        for s in trained.spans()
        if s.t1_ns is not None
    )
    assert len(drawn) == 4 * (2 + 1 + 3 * 3 + 1)
    for bar, (rank, left, right) in zip(drawn, expected, strict=True):
        assert bar == pytest.approx((rank, left, right))
    left_end, right_end = ax.get_xlim()
    assert left_end == 0
    assert max(right for _, _, right in drawn) < right_end
    assert ax.get_xlabel() == "ms since the launch"


@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_every_rank_has_its_row(ranks: int) -> None:
    ax = plots.timeline(made_up(ranks))
    assert rows(ax) == [f"rank {rank}" for rank in range(ranks)]
    bottom, top = ax.get_ylim()
    assert top < 0 <= ranks - 1 < bottom  # rank 0 is the uppermost


def test_of_many_ranks_every_eighth_is_named() -> None:
    ax = plots.timeline(made_up(64))
    assert rows(ax) == [f"rank {rank}" for rank in range(0, 64, 8)]
    assert {round(row, 6) for row, _, _ in bars(ax)} == set(range(64))
    assert figure_of(ax).get_size_inches()[1] < 12


@pytest.mark.ranks
def test_title(trained: Run) -> None:
    assert plots.timeline(trained).get_title(loc="left") == "train on 4 ranks"
    own = plots.timeline(trained, title="rank 3 is late")
    assert own.get_title(loc="left") == "rank 3 is late"


def test_title_of_one_rank() -> None:
    assert plots.timeline(made_up(1)).get_title(loc="left") == "work on 1 rank"


@pytest.mark.ranks
def test_the_legend_names_what_is_there(trained: Run) -> None:
    assert legend(plots.timeline(trained)) == [
        START_UP,
        UNMARKED,
        "forward",
        "backward",
        GROUP,
        CALL,
    ]
    assert legend(plots.timeline(made_up(2))) == [START_UP, UNMARKED]
    issued = Span(0, "main", "issue", "all_reduce", 1_050_000_000, 1_051_000_000)
    assert legend(plots.timeline(made_up(2, [issued]))) == [START_UP, UNMARKED, CALL]


def test_the_legend_where_no_function_was_called() -> None:
    assert legend(plots.timeline(made_up(2, called=False))) == [START_UP]


def test_work_never_has_the_colour_of_other_work_in_the_legend() -> None:
    names = ["load", "forward", "backward", "step"]
    spans = [
        Span(0, "main", "compute", name, 1_020_000_000 + n * 10**7, 1_030_000_000 + n * 10**7)
        for n, name in enumerate(names)
    ]
    ax = plots.timeline(made_up(1, spans))
    named = named_colours(ax)
    colours = [named.get(colour, "") for left, colour in colours_of(ax) if left >= 20]
    assert colours[:3] == names[:3]
    assert colours[3] not in names[:3]


def test_a_span_that_never_ended_goes_on_to_the_end_of_its_rank() -> None:
    still_open = Span(0, "main", "comm", "barrier", 1_050_000_000, None)
    ax = plots.timeline(made_up(1, [still_open]))
    assert (50, 100) in [pytest.approx((left, right)) for _, left, right in bars(ax)]
    assert "barrier never ended" in [text.get_text() for text in ax.texts]
    assert legend(ax)[-1] == "never ended"


def test_what_is_in_flight_lies_under_the_main_thread_and_nothing_covers_another() -> None:
    spans = [
        Span(0, "main", "compute", "backward", 1_020_000_000, 1_080_000_000),
        Span(0, "buckets", "comm", "bucket 0", 1_030_000_000, 1_060_000_000),
        Span(0, "buckets", "comm", "bucket 1", 1_040_000_000, 1_070_000_000),
        Span(0, "comm", "comm", "all_reduce", 1_061_000_000, 1_090_000_000),
    ]
    ax = plots.timeline(made_up(1, spans))
    rows = {left: row for row, left, _ in bars(ax)}
    assert rows[20] < rows[30] < rows[40]  # downwards
    assert rows[61] == rows[30]
    assert "in flight" in legend(ax)


def test_a_call_stands_over_the_work_that_contains_it_whichever_was_drawn_first() -> None:
    """A sharded model's forward and backward call collectives; in one step calls come first."""
    ms = 1_000_000
    spans = [
        Span(0, "main", kind, name, 1_000_000_000 + left * ms, 1_000_000_000 + right * ms)
        for kind, name, left, right in (
            ("comm", "all_gather", 15, 20),
            ("compute", "forward", 30, 60),
            ("compute", "layer", 35, 55),
            ("comm", "all_gather", 40, 50),
            ("compute", "layer", 70, 80),
        )
    ]
    ax: Any = plots.timeline(made_up(1, spans))
    order = [
        (box.x0, box.x1, c.get_zorder())
        for c in ax.collections
        for box in (path.get_extents() for path in c.get_paths())
    ]
    at = {(round(left), round(right)): above for left, right, above in order}
    assert at[10, 100] < at[30, 60] < at[35, 55] < at[40, 50] < 2
    assert at[15, 20] == at[70, 80] == at[30, 60]


def test_what_is_in_flight_for_less_than_a_pixel_is_seen() -> None:
    """A white edge would cover all of it: NCCL's all_reduce of one rank takes 10 µs."""
    spans = [Span(0, "cuda", "comm", "all_reduce", 1_050_000_000, 1_050_010_000)]
    ax = plots.timeline(made_up(1, spans))
    figure_of(ax).canvas.draw()
    box = ax.get_window_extent()
    picture = np.asarray(figure_of(ax).canvas.buffer_rgba())[::-1].astype(int)
    inside = picture[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)]
    assert (inside[..., 0] - inside[..., 2] > 100).any()  # orange: the legend lies outside


def test_groups_are_told_apart() -> None:
    calls = [
        Span(0, "main", "comm", "all_reduce", start, start + 10_000_000, None, "all_reduce", group)
        for group, start in (("world", 1_020_000_000), ("ranks 0 2", 1_040_000_000))
    ]
    ax: Any = plots.timeline(made_up(1, calls))
    assert legend(ax)[-2:] == ["in a collective", "collective of ranks 0 2"]
    hatches = [handle.get_hatch() for handle in ax.get_legend().legend_handles[-2:]]
    assert len(set(hatches)) == 2
    assert {c.get_hatch() for c in ax.collections} >= set(hatches)


def test_dropped_spans_are_admitted() -> None:
    run = made_up(2)
    run.ranks[1] = replace(run.ranks[1], dropped=1234)
    assert "rank 1: 1,234" in plots.timeline(run).get_xlabel()


def test_steps_are_marked_over_the_bar() -> None:
    step = Span(0, "steps", "mark", "step 0", 1_020_000_000, 1_080_000_000, 0)
    ax: Any = plots.timeline(made_up(1, [step]))
    ((x, y), (same, _)) = ax.collections[-1].get_segments()[0]
    assert x == same == 80
    assert y < -0.35


def in_steps() -> Run:
    """Four steps of 20 ms on rank 0, one after the other from 10 ms on, with a span in each."""
    starts = [1_010_000_000 + n * 20_000_000 for n in range(4)]
    steps = [
        Span(0, "steps", "mark", f"step {n}", t0, t0 + 20_000_000, n) for n, t0 in enumerate(starts)
    ]
    work = [Span(0, "main", "compute", f"w{n}", t0, t0 + 9**7, n) for n, t0 in enumerate(starts)]
    return made_up(2, [*steps, *work])


def test_some_of_the_steps_are_shown() -> None:
    ax: Any = plots.timeline(in_steps(), steps=(1, 2))
    assert ax.get_xlim() == pytest.approx((0, 40))
    assert ax.get_xlabel() == "ms since step 1 began"
    assert legend(ax) == [UNMARKED, "w1", "w2"]
    (marks,) = [c for c in ax.collections if hasattr(c, "get_segments")]
    assert [segment[0][0] for segment in marks.get_segments()] == pytest.approx([0, 20, 40])
    assert rows(ax) == ["rank 0", "rank 1"]


def test_steps_that_are_chosen_have_their_numbers_over_the_bar() -> None:
    ax: Any = plots.timeline(in_steps(), steps=(1, 2))
    numbers = [t for t in ax.texts if t.get_text().startswith("step ")]
    assert [t.get_text() for t in numbers] == ["step 1", "step 2"]
    assert [t.get_position()[0] for t in numbers] == pytest.approx([10, 30])
    assert all(-0.6 < t.get_position()[1] < -0.35 for t in numbers)
    assert not any("step" in t.get_text() for t in plots.timeline(in_steps()).texts)


def test_steps_that_go_beyond_the_last_are_those_that_there_are() -> None:
    assert plots.timeline(in_steps(), steps=(3, 99)).get_xlim() == pytest.approx((0, 20))


@pytest.mark.parametrize("steps", [(4, 9), (2, 1), (-2, -1)])
def test_steps_that_no_rank_has(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"no rank has a step from {steps[0]} to {steps[1]}"):
        plots.timeline(in_steps(), steps=steps)


def test_names_are_written_where_they_fit() -> None:
    wide = Span(0, "main", "compute", "forward", 1_020_000_000, 1_080_000_000)
    narrow = Span(0, "main", "compute", "loss", 1_090_000_000, 1_090_100_000)
    texts = [text.get_text() for text in plots.timeline(made_up(1, [wide, narrow])).texts]
    assert "forward 60 ms" in texts
    assert not any("loss" in text for text in texts)


def test_names_and_titles_are_never_taken_for_formulas() -> None:
    name = r"$\frac$ costs $5"
    second = 1_000_000_000
    run = made_up(1, [Span(0, "main", "compute", name, second + 10_000_000, second + 90_000_000)])
    ax: Any = plots.timeline(run, title=name)
    ax.figure.savefig(io.BytesIO())
    assert name in [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_title(loc="left") == name


@pytest.mark.ranks
def test_a_failed_run() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            raise ValueError("bad sample")
        dist.barrier()

    run = launch(work, nprocs=3, check=False)
    assert not run.ok
    ax = plots.timeline(run)
    assert rows(ax) == ["rank 0", "rank 1", "rank 2"]
    assert legend(ax) == [START_UP, UNMARKED, GROUP, CALL]
    assert " ✗ ValueError" in [text.get_text() for text in ax.texts]


def test_ten_thousand_spans() -> None:
    spans = [
        Span(n % 4, "main", "compute", "step", start, start + 30_000)
        for n in range(10_000)
        for start in [1_010_000_000 + n * 9_000]
    ]
    run = made_up(4, spans)
    began = time.process_time()
    ax = plots.timeline(run)
    assert time.process_time() - began < 10
    assert len(bars(ax)) < 4_000
    assert "the height of a colour is its part" in ax.get_xlabel()  # 30 of 36 us
    assert max(right for _, _, right in bars(ax)) == pytest.approx(100.021, rel=0.01)


@pytest.mark.ranks
def test_a_stored_picture_is_small(trained: Run) -> None:
    picture = io.BytesIO()
    figure_of(plots.timeline(trained)).savefig(picture, format="png", dpi=110)
    assert 5_000 < len(picture.getvalue()) < 80_000


def test_thousands_of_short_calls_do_not_look_like_one_long_call() -> None:
    """Each call lasts a tenth of the time: so much of the row's height is its colour."""
    calls = [
        Span(0, "main", "comm", "all_reduce", at, at + 1_000, None, "all_reduce", "world", n)
        for n, at in enumerate(range(1_020_000_000, 1_080_000_000, 10_000))
    ]
    ax = plots.timeline(made_up(1, calls))
    assert "the height of a colour is its part of" in ax.get_xlabel()
    (area,) = [c for c in ax.collections if c.get_hatch() == "////"]
    path = area.get_paths()[0]
    heights = [
        path.clip_to_bbox(Bbox([[x, -1], [x + 1, 1]])).get_extents().height for x in (40, 60)
    ]
    assert heights == pytest.approx([0.07, 0.07], rel=0.1)  # of 0.7
    box = path.get_extents()
    assert (box.x0, box.x1) == pytest.approx((20, 80), abs=1)


def test_thousands_of_calls_without_a_pause_are_drawn_as_bars() -> None:
    calls = [
        Span(0, "main", "comm", "all_reduce", at, at + 10_000, None, "all_reduce", "world", n)
        for n, at in enumerate(range(1_020_000_000, 1_080_000_000, 10_000))
    ]
    assert "are one bar" in plots.timeline(made_up(1, calls)).get_xlabel()
