"""Lesson 02: which ranks wait in `init_process_group` for a late one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

RANKS = 4


def explore(arrive: Callable[[int, int, float], Any]) -> Explorer:
    """Sliders for the late rank and its delay, above the timeline of four ranks.

    Parameters
    ----------
    arrive : callable
        ``arrive(rank, late, delay)`` joins and leaves a group; rank `late` comes `delay` seconds
        after the others.
    """
    controls = {
        "late": whole("the late rank", 0, 0, RANKS - 1),
        "delay_ms": whole("late by, ms", 150, 0, 250, 25),
    }

    def start(late: int, delay_ms: int) -> Run:
        return run_ranks(arrive, (late, delay_ms / 1000), RANKS)

    return Explorer(controls, start, _draw)


def _draw(run: Run, late: int, delay_ms: int) -> Axes:
    waiting = f"All wait in init_process_group for rank {late}"
    return plots.timeline(run, title=waiting if delay_ms else "Nobody is late")
