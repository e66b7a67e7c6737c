"""Lesson 09: how far the ranks' means differ, by images on each and shift between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

RANKS = 4


def explore(
    measure: Callable[[int, int, float], tuple[Sequence[float], Sequence[float]]],
) -> Explorer:
    """Sliders for images and shift, above the channels' means on each rank and over all.

    Parameters
    ----------
    measure : callable
        ``measure(rank, n, shift)`` returns the means, `(channels,)`, of this rank's `n` images,
        which are brighter by `shift * rank`, and the means over all ranks.
    """
    controls = {
        "n": whole("images, each rank", 4, 1, 64),
        "percent": whole("shift, %", 10, 0, 100, 5),
    }

    def start(n: int, percent: int) -> Run:
        return run_ranks(measure, (n, percent / 100), RANKS)

    return Explorer(controls, start, _draw)


def _draw(run: Run, n: int, percent: int) -> Axes:
    own = [of_rank for of_rank, _ in run.values]
    title = f"{n} images on each rank, shift {percent / 100:g}"
    return plots.statistics(own, run.values[0][1], title=title)
