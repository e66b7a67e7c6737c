"""`plots.buckets`, of real DDP runs and made-up ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch, plots, span, watch_ddp
from ddp_lessons.wire.records import Span
from tests.plots.test_timeline import bars, figure_of, legend, made_up, rows

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MS = 1_000_000
BEGAN = 1_020 * MS


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def train(rank: int, cap: float) -> None:
    dist.init_process_group("gloo")
    layers = [torch.nn.Linear(256, 256) for _ in range(6)]
    model = watch_ddp(DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=cap))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        with span("forward"):
            loss = model(torch.randn(32, 256)).square().mean()
        with span("backward"):
            loss.backward()
        optimizer.step()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained() -> Run:
    return launch(train, args=(0.5,))


def step_of(*spans: tuple[str, str, str, int, int]) -> Run:
    """A run with one step on rank 0, and spans of (lane, kind, name, begin ms, end ms)."""
    made = [
        Span(0, lane, kind, name, BEGAN + begin * MS, BEGAN + end * MS, 0, nbytes=2_100_000)
        for lane, kind, name, begin, end in spans
    ]
    return made_up(1, made)


EXPOSED = step_of(
    ("steps", "mark", "step 0", 0, 60),
    ("main", "compute", "forward", 5, 20),
    ("main", "compute", "backward", 20, 55),
    ("buckets", "comm", "bucket 0", 25, 50),
    ("buckets", "comm", "bucket 1", 30, 52),
    ("main", "wait", "wait for buckets", 40, 52),
)


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.ranks
def test_a_real_step_shows_its_buckets_under_backward(trained: Run) -> None:
    ax = plots.buckets(trained, step=3)
    assert rows(ax) == ["rank 0", "rank 1", "buckets", "buckets"]
    begin = min(s.t0_ns for s in trained.spans() if s.step == 3)
    drawn = [(left, right) for _, left, right in bars(ax)]
    seen = [s for s in trained.spans() if s.step == 3 and s.lane == "buckets"]
    assert len(seen) > 4
    for s in seen:
        assert s.t1_ns is not None
        expected = pytest.approx(((s.t0_ns - begin) / MS, (s.t1_ns - begin) / MS))
        assert any(bar == expected for bar in drawn)
    assert {"forward", "backward", "bucket in flight"} <= set(legend(ax))
    assert ax.get_xlabel() == "ms since step 3 began; the dotted line is its end"


def test_buckets_that_overlap_lie_below_one_another() -> None:
    where = {(left, right): row for row, left, right in bars(plots.buckets(EXPOSED))}
    assert where[(20, 55)] < where[(25, 50)] < where[(30, 52)]


def test_what_is_exposed_is_hatched_and_said() -> None:
    ax = plots.buckets(EXPOSED)
    (hatched,) = [c for c in ax.collections if c.get_hatch()]
    box = hatched.get_paths()[0].get_extents()
    assert (box.x0, box.x1) == (40, 52)
    assert {"exposed 12 ms", "bucket 0  2.1 MB", "forward", "backward"} <= set(texts(ax))
    assert "unmarked" in legend(ax)  # 10 of the 60 ms
    title = ax.get_title(loc="left")
    assert title == "2 buckets in step 0: 12 of 27 ms of communication exposed on rank 0"


def test_the_name_of_work_keeps_clear_of_the_waiting() -> None:
    (backward,) = [t for t in plots.buckets(EXPOSED).texts if t.get_text() == "backward"]
    assert backward.get_position()[0] == 30  # the middle of the part without waiting


@pytest.mark.parametrize(
    ("lengths", "step"),
    [([90], 0), ([5, 50, 90], 1), ([5, 6, 50, 90], 1), ([90, 6, 5, 50, 70], 3)],
)
def test_a_typical_step_is_chosen(lengths: list[int], step: int) -> None:
    """Of more than four steps none of the first two, which are no typical ones."""
    spans = []
    for number, length in enumerate(lengths):
        begin = BEGAN + 100 * number * MS
        spans.append(Span(0, "steps", "mark", "step", begin, begin + length * MS, number))
        spans.append(Span(0, "buckets", "comm", "all_reduce", begin, begin + MS, number))
    label = plots.buckets(made_up(1, spans)).get_xlabel()
    assert label.partition(";")[0] == f"ms since step {step} began"


@pytest.mark.ranks
def test_ranks_and_axes_can_be_chosen(trained: Run) -> None:
    figure, (upper, lower) = plt.subplots(2, sharex=True)
    assert plots.buckets(trained, ax=upper, ranks=[1], title="one rank") is upper
    plots.buckets(trained, ax=lower)
    assert rows(upper) == ["rank 1", "buckets"]
    assert "1 of 2 ranks" in upper.get_xlabel()
    assert upper.get_title(loc="left") == "one rank"
    assert plt.get_fignums() == [figure.number]


def test_of_many_ranks_the_first_are_shown() -> None:
    spans = [
        Span(rank, "buckets", "comm", "bucket 0", BEGAN, BEGAN + 10 * MS, 0) for rank in range(64)
    ]
    ax = plots.buckets(made_up(64, spans))
    assert rows(ax)[:8] == [f"rank {rank}" for rank in range(8)]
    assert "8 of 64 ranks" in ax.get_xlabel()


def test_a_bucket_has_as_much_of_its_name_as_it_has_room() -> None:
    ends = [(0, 600), (620, 720), (740, 765), (780, 781)]
    spans = [("buckets", "comm", f"bucket {n}", *end) for n, end in enumerate(ends)]
    found = texts(plots.buckets(step_of(("main", "compute", "backward", 0, 800), *spans)))
    assert {"bucket 0  2.1 MB", "bucket 1", "2"} < set(found)
    assert "3" not in found


def test_hundreds_of_buckets_stay_a_picture() -> None:
    spans = [("buckets", "comm", f"bucket {n}", n // 10, n // 10 + 30) for n in range(300)]
    began = time.process_time()
    ax = plots.buckets(step_of(*spans))
    assert time.process_time() - began < 5
    assert figure_of(ax).get_size_inches()[1] < 12


def test_a_bucket_that_never_ended_says_so() -> None:
    spans = [Span(0, "buckets", "comm", "bucket 0", BEGAN, None, 0, nbytes=2_000_000)]
    assert "bucket 0  2 MB, never ended" in texts(plots.buckets(made_up(1, spans)))


@pytest.mark.ranks
def test_without_buckets_the_error_says_what_to_do(trained: Run) -> None:
    with pytest.raises(ValueError, match="watch_ddp"):
        plots.buckets(made_up(2))
    with pytest.raises(ValueError, match="no rank has a step 99"):
        plots.buckets(trained, step=99)
    with pytest.raises(ValueError, match="there is no rank 5: the last one is 1"):
        plots.buckets(trained, ranks=[0, 5])


def test_the_learners_own_waits_are_not_for_buckets() -> None:
    run = step_of(
        ("steps", "mark", "step 0", 0, 60),
        ("buckets", "comm", "bucket 0", 25, 50),
        ("main", "wait", "wait for buckets", 40, 50),
        ("main", "wait", "all_gather", 50, 58),
    )
    assert "10 of 25 ms of communication exposed" in plots.buckets(run).get_title(loc="left")


def test_buckets_without_steps_are_not_denied() -> None:
    spans = [Span(0, "buckets", "comm", "bucket 0", BEGAN, BEGAN + MS, None, nbytes=2_000_000)]
    with pytest.raises(ValueError, match="buckets were recorded, but no training steps"):
        plots.buckets(made_up(1, spans))
