"""What the panel of a run shows: curves of what was reported, and the call in which a rank is."""

from __future__ import annotations

import math
import re
import time
from types import SimpleNamespace
from typing import Any

from ddp_lessons.launcher import live_curves, live_panel
from ddp_lessons.wire.messages import Told
from ddp_lessons.wire.records import Report


def worker(rank: int, *reports: dict[str, float], **more: Any) -> Any:
    told = Told(reports=[Report(n, values) for n, values in enumerate(reports)])
    return SimpleNamespace(rank=rank, told=told, **more)


def curves(text: str) -> list[list[tuple[float, float]]]:
    """The points of each line drawn, in pixels."""
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]
        for points in re.findall(r"points='([^']*)'", text)
    ]


def test_a_line_a_rank_within_the_picture() -> None:
    falling = [{"step": n, "loss": 10.0 - n} for n in range(10)]
    rising = [{"step": n, "loss": float(n)} for n in range(10)]
    text = live_curves.html_of([worker(0, *falling), worker(1, *rising)])
    first, second = curves(text)
    assert [y for _, y in first] == sorted(y for _, y in first)  # down the screen
    assert [y for _, y in second] == sorted((y for _, y in second), reverse=True)
    assert all(0 < x < live_curves.WIDTH and 0 < y < live_curves.HEIGHT for x, y in first + second)
    assert "aria-label='loss 1'" in text


def test_nothing_reported_draws_nothing() -> None:
    assert live_curves.html_of([worker(0), worker(1)]) == ""
    assert live_curves.html_of([worker(0, {"step": 3.0})]) == ""


def test_numbers_that_are_reported_in_turn_all_have_their_curves() -> None:
    losses = [{"step": n, "loss": 10.0 - n} for n in range(5)]
    accuracy = {"epoch": 0.0, "accuracy": 0.5}
    for reports in ([*losses, accuracy], [*losses, accuracy, *losses]):
        text = live_curves.html_of([worker(0, *reports)])
        assert re.findall(r"aria-label='(\w+)", text) == ["loss", "accuracy"]


def test_one_value_constant_values_and_values_that_are_none() -> None:
    for values in ([1.0], [1.0] * 3, [math.nan], [math.inf]):
        text = live_curves.html_of([worker(0, *({"loss": value} for value in values))])
        assert "<svg" in text
        assert "nan," not in text
    gap = [{"loss": 1.0}, {"loss": math.nan}, {"loss": 2.0}]
    assert len(curves(live_curves.html_of([worker(0, *gap)]))) == 2


def test_many_points_are_thinned_and_names_escaped() -> None:
    many = [{"step": float(n), "<b>": float(n)} for n in range(10_000)]
    text = live_curves.html_of([worker(0, *many)])
    (line,) = curves(text)
    assert len(line) <= 2 * live_curves.MOST_POINTS
    assert "<b>" not in text
    assert "&lt;b&gt; 9999" in text


def test_a_rank_that_has_been_in_a_call_for_a_while_is_shown_there() -> None:
    began = time.perf_counter_ns() - 3_200_000_000
    state = {"failed": False, "outcome": None, "started_ns": 1, "alive": True}
    waits = worker(0, calls_now=lambda: [("all_reduce", 5), ("barrier", began)], **state)
    assert live_panel._state(waits) == "in barrier for 3 s"
    works = worker(0, calls_now=list, **state)
    assert live_panel._state(works) == "running"
    soon = worker(0, calls_now=lambda: [("barrier", time.perf_counter_ns())], **state)
    assert live_panel._state(soon) == "running"
