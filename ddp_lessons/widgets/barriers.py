"""Lesson 04: each rank's work before a barrier, and who then waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.text import at_head, ranks_text
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

RANKS = 4
MILLISECONDS = (0, 60, 120, 180)  # initial work, by rank


def explore(arrive: Callable[[int, list[float]], Any]) -> Explorer:
    """Sliders for four ranks' delays, above the plot of waiting.

    Parameters
    ----------
    arrive : callable
        ``arrive(rank, delays)`` works for `delays[rank]` seconds and calls a barrier.
    """
    controls = {
        f"rank{rank}": whole(f"rank {rank}, ms", MILLISECONDS[rank], 0, 200, 20)
        for rank in range(RANKS)
    }

    def start(**milliseconds: int) -> Run:
        delays = [value / 1000 for value in milliseconds.values()]
        return run_ranks(arrive, (delays,), RANKS)

    return Explorer(controls, start, _draw)


def _draw(run: Run, **milliseconds: int) -> Axes:
    slowest = max(milliseconds.values())
    late = [rank for rank, value in enumerate(milliseconds.values()) if value == slowest]
    if len(late) == 1:
        title = f"Rank {late[0]} comes last; the others wait for it"
    elif len(late) < RANKS:  # by chance one of them comes last; the plot says which
        title = f"{at_head(ranks_text(late))} work longest; the others wait for them"
    else:
        title = "All ranks work equally long"
    return plots.waits(run, title=title)
