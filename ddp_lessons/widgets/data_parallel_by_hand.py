"""Lesson 06: unequal samples on two ranks, and the error of a plain mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

SAMPLES = 240
ROUNDING = 1e-5


def explore(train: Callable[[int, int], dict[str, list[float]]]) -> Explorer:
    """A slider for rank 0's part of 240 samples, above the errors of the gradient.

    Parameters
    ----------
    train : callable
        ``train(rank, first)`` trains on two ranks, of which rank 0 has the first `first` samples,
        and returns by label the distance of each step's gradient from that of all samples.
    """
    controls = {"first": whole("images, rank 0", 200, 20, SAMPLES - 20, 10)}

    def start(first: int) -> Run:
        return run_ranks(train, (first,), 2)

    return Explorer(controls, start, _draw)


def _draw(run: Run, first: int) -> Axes:
    title = f"{first} images on rank 0, {SAMPLES - first} on rank 1: distance from the truth"
    ax = plots.differences(run.values[0], rounding=ROUNDING, title=title)
    ax.set_ylabel("distance, 1 = the gradient's length")
    return ax
