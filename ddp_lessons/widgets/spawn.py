"""Lesson 01: machines, ranks on each, and the numbers of every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.text import count
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run


def explore(place: Callable[[int], Sequence[str]]) -> Explorer:
    """Sliders for machines and ranks on each, above the plot of where each rank runs.

    Parameters
    ----------
    place : callable
        ``place(rank)`` returns GROUP_RANK and LOCAL_RANK; more values may follow.
    """
    controls = {
        "nnodes": whole("machines", 2, 1, 4),
        "nprocs": whole("ranks on each", 3, 1, 4),
    }

    def start(nnodes: int, nprocs: int) -> Run:
        return run_ranks(place, (), nprocs, nnodes)

    return Explorer(controls, start, _draw)


def _draw(run: Run, nnodes: int, nprocs: int) -> Axes:
    places = [(int(group_rank), int(local_rank)) for group_rank, local_rank, *_ in run.values]
    title = f"{count(nnodes, 'machine')}, {count(nprocs, 'rank')} on each"
    return plots.machines(places, title=title)
