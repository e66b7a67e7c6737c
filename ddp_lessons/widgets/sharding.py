"""Lesson 15: what each rank keeps, by stage, ranks and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.text import count
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

STAGES = ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3")
OPTIMIZERS = ("Adam", "SGD")


def explore(keep: Callable[[int, str, str], dict[str, int]], limit: float) -> Explorer:
    """Choices of the stage and optimizer and a slider for the ranks, above the bytes by rank.

    Parameters
    ----------
    keep : callable
        ``keep(rank, stage, optimizer)`` trains, and returns the bytes that the rank keeps by kind.
        `stage` is "DDP" or "ZeRO 1" to "ZeRO 3", `optimizer` is "Adam" or "SGD".
    limit : float
        The bytes at which the x axis ends, in all pictures.
    """
    controls = {
        "stage": one_of("stage", STAGES, "ZeRO 1"),
        "nprocs": whole("ranks", 4, 1, 6),
        "optimizer": one_of("optimizer", OPTIMIZERS, "Adam"),
    }

    def start(stage: str, nprocs: int, optimizer: str) -> Run:
        return run_ranks(keep, (stage, optimizer), nprocs)

    def draw(run: Run, stage: str, nprocs: int, optimizer: str) -> Axes:
        title = f"{stage} with {optimizer} on {count(nprocs, 'rank')}"
        return plots.memory({stage: run.values}, limit=limit, title=title)

    return Explorer(controls, start, draw)
