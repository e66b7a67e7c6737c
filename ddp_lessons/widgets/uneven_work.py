"""Lesson 11: the steps of two ranks with unequal batches, with and without join."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, run_ranks, switch, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

BATCHES = 3  # of rank 0


def explore(train: Callable[[int, tuple[int, int], bool], Any]) -> Explorer:
    """A slider for rank 1's extra batches and a switch for join, above the ranks' steps.

    Parameters
    ----------
    train : callable
        ``train(rank, counts, join)`` trains on `counts[rank]` batches, with or without join. Runs
        that fail are drawn, too, and explained.
    """
    controls = {
        "extra": whole("extra batches", 2, 0, 9),
        "join": switch("with model.join()", True),
    }

    def start(extra: int, join: bool) -> Run:
        return run_ranks(train, ((BATCHES, BATCHES + extra), join), 2)

    return Explorer(controls, start, _draw, draws_failures=True)


def _draw(run: Run, extra: int, join: bool) -> Axes:
    way = "with join" if join else "without join"
    return plots.steps(run, title=f"{BATCHES} and {BATCHES + extra} batches, {way}")
