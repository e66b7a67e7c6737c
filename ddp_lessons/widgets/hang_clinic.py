"""Lesson 10: the hang board of three ranks, one of which has a bug."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

RANKS = 3
BUGS = (
    "none",
    "one call more",
    "one call less",
    "another order",
    "another tensor",
    "returns early",
    "raises",
)


def explore(patient: Callable[[int, str, int], Any]) -> Explorer:
    """Controls for the bug and its rank, above the hang board.

    Parameters
    ----------
    patient : callable
        ``patient(rank, bug, odd)`` runs as one of three ranks, of which `odd` has the bug, one of
        `BUGS`. Runs that fail or hang are drawn, too, and explained.
    """
    controls = {
        "bug": one_of("bug", BUGS, "one call less"),
        "odd": one_of("on rank", list(range(RANKS)), 1),
    }

    def start(bug: str, odd: int) -> Run:
        return run_ranks(patient, (bug, odd), RANKS)

    def draw(run: Run, bug: str, odd: int) -> Axes:
        if bug == "none":
            return plots.hang_board(run)
        said = f": {run.verdict.title}" if run.verdict else ""
        return plots.hang_board(run, title=f"{bug} on rank {odd}{said}")

    return Explorer(controls, start, draw, draws_failures=True)
