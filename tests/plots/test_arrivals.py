"""`plots.arrivals` and `plots.bandwidth`, of real and made-up runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, launch, plots
from tests.plots.test_timeline import figure_of, made_up, rows
from tests.plots.test_waits import call, texts

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def calls(ranks: int, number: int, late: Any) -> Run:
    """All_reduces to which rank `late(n)` comes 2 ms after the others."""
    width = 80 / number
    spans = [
        call(rank, start + width * 0.5 * (rank == late(n)), start + width * 0.9, n)
        for n in range(number)
        for start in [10 + n * width]
        for rank in range(ranks)
    ]
    return made_up(ranks, spans)


def drawn(ax: Any) -> Any:
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def dots(ax: Any) -> list[tuple[int, int]]:
    """(column, rank) of the marks."""
    return [(round(x - 0.1), round(y)) for x, y in ax.lines[0].get_xydata()]


def test_each_rank_and_collective_has_its_lateness() -> None:
    ax = plots.arrivals(calls(3, 4, lambda n: n % 3))
    expected = [[10, 0, 0, 10], [0, 10, 0, 0], [0, 0, 10, 0]]
    assert drawn(ax) == pytest.approx(np.array(expected, dtype=float))
    assert dots(ax) == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert rows(ax) == ["rank 0", "rank 1", "rank 2"]
    assert texts(ax).count("10") == 4
    assert "collective" in ax.get_xlabel()


def test_who_takes_no_part_is_left_white() -> None:
    spans = [call(0, 20, 30, group="ranks 0 1"), call(1, 25, 30, group="ranks 0 1")]
    values = drawn(plots.arrivals(made_up(3, spans)))
    assert values[:2, 0] == pytest.approx([0, 5])
    assert np.isnan(values[2, 0])


def test_thousands_of_collectives_become_means_on_a_scale() -> None:
    run = calls(8, 1200, lambda n: n // 150)
    ax = plots.arrivals(run)
    assert drawn(ax).shape == (8, 120)
    assert "each column is the mean of 10" in ax.get_xlabel()
    assert len(figure_of(ax).axes) == 2
    assert drawn(ax).argmax(axis=0).tolist() == [column // 15 for column in range(120)]


def test_64_ranks() -> None:
    ax = plots.arrivals(calls(64, 5, lambda n: n))
    assert drawn(ax).shape == (64, 5)
    assert rows(ax) == [f"rank {rank}" for rank in range(0, 64, 8)]


def test_without_a_collective_there_is_no_map() -> None:
    with pytest.raises(ValueError, match="no collective was recorded"):
        plots.arrivals(made_up(2))


def sizes(rank: int) -> None:
    dist.init_process_group("gloo")
    for size in (100, 10_000, 4_000_000):
        for _ in range(5):
            dist.all_reduce(torch.ones(size))
            dist.broadcast(torch.ones(size), src=0)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured() -> Run:
    return launch(sizes)


@pytest.mark.ranks
def test_the_fit_is_that_of_the_run_and_goes_through_the_sizes(measured: Run) -> None:
    ax = plots.bandwidth(measured)
    fits = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    links = measured.bandwidth()
    assert [link.op for link in links] == ["all_reduce", "broadcast"]
    assert len(links[0].points) == 3
    for line, link in zip(fits, links, strict=True):
        assert str(line.get_label()).startswith(f"{link.op}: ")
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        assert (x[0], x[-1]) == pytest.approx((400, 16_000_000))
        expected = (link.latency_ns + x / link.bytes_per_second * 1e9) / 1e6
        assert y == pytest.approx(expected)
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.ranks
def test_large_messages_take_longer_than_small_ones(measured: Run) -> None:
    for link in measured.bandwidth():
        times = [time_ns for _, time_ns in link.points]
        assert times[-1] > times[0]


@pytest.mark.ranks
def test_sizes_are_written_as_people_do(measured: Run) -> None:
    ax = plots.bandwidth(measured)
    figure_of(ax).canvas.draw()
    assert {"1 kB", "1 MB"} <= {label.get_text() for label in ax.get_xticklabels()}


def test_one_size_is_not_enough_for_a_fit() -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        plots.bandwidth(calls(2, 3, lambda n: 0))


def test_where_a_rank_never_came_nobody_is_last() -> None:
    spans = [call(rank, 20 + rank, 30, 0) for rank in range(3)]
    spans += [call(rank, 40, None, 1) for rank in (0, 2)]
    ax = plots.arrivals(made_up(3, spans))
    assert dots(ax) == [(0, 2)]
    assert "white: took no part" in ax.get_xlabel()
    alone = plots.arrivals(made_up(1, [call(0, 20, 30, 0)]))
    assert dots(alone) == []
    assert "white" not in alone.get_xlabel()


def by_size(*times: tuple[int, float]) -> Run:
    """An all_reduce for each (bytes, ms after the last arrival)."""
    spans = [
        call(rank, 15 + 10 * n, 15 + 10 * n + ms, n)._replace(nbytes=nbytes)
        for n, (nbytes, ms) in enumerate(times)
        for rank in range(2)
    ]
    return made_up(2, spans)


def test_where_the_time_does_not_grow_no_bandwidth_is_claimed() -> None:
    ax = plots.bandwidth(by_size((1000, 2.0), (2000, 1.9), (3000, 1.8)))
    assert ax.get_title(loc="left") == "all_reduce: the time does not grow with the size"
    figure_of(ax).canvas.draw()
    ticks = [
        t.get_text()
        for t, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)
        if 1000 <= at <= 3000
    ]
    assert len([text for text in ticks if text]) >= 2


def test_each_operation_has_its_mark_in_the_legend(measured: Run) -> None:
    legend: Any = plots.bandwidth(measured).get_legend()
    handles = legend.legend_handles
    assert len({handle.get_marker() for handle in handles}) == len(handles) == 2
