"""Lesson 16b: when each stage of a pipeline works, by schedule, stages and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

SCHEDULES = ("GPipe", "1F1B")


def explore(train: Callable[[int, str, int], Any], step: int = 1) -> Explorer:
    """A choice of the schedule, and sliders for stages and micro-batches, above the ranks' work.

    Parameters
    ----------
    train : callable
        ``train(rank, schedule, micro_batches)`` trains one stage on each rank, with spans `forward`
        and `backward`. `schedule` is "GPipe" or "1F1B".
    step : int
        The training step that is drawn.
    """
    controls = {
        "schedule": one_of("schedule", SCHEDULES, "1F1B"),
        "stages": whole("stages", 3, 1, 5),
        "micro_batches": whole("micro-batches", 4, 1, 12),
    }

    def start(schedule: str, stages: int, micro_batches: int) -> Run:
        return run_ranks(train, (schedule, micro_batches), stages)

    def draw(run: Run, schedule: str, stages: int, micro_batches: int) -> Axes:
        share = (stages - 1) / (micro_batches + stages - 1)
        title = f"{schedule}, p = {stages}, m = {micro_batches}: (p-1)/(m+p-1) is {share:.0%}"
        return plots.pipeline(run, step=step, title=title)

    return Explorer(controls, start, draw)
