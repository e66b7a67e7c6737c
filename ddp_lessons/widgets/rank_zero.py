"""Lesson 12: how a run ends that is killed and resumes, by what it loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

RANKS = 2
EVERY = 5  # steps between checkpoints
EVERYTHING = frozenset({"model", "optimizer", "scheduler", "rng", "step"})
LOADED = {
    "everything": EVERYTHING,
    "all but rng": EVERYTHING - {"rng"},
    "all but scheduler": EVERYTHING - {"scheduler"},
    "all but optimizer": EVERYTHING - {"optimizer"},
    "all but step": EVERYTHING - {"step"},
    "only model and step": frozenset({"model", "step"}),
}


def explore(train: Callable[..., tuple[list[float], torch.Tensor]], steps: int = 30) -> Explorer:
    """Controls for the step of the kill and the loaded state, above the losses.

    Parameters
    ----------
    train : callable
        ``train(rank, path, kill_at, keys)`` resumes from `path` if it exists, else it begins, and
        saves there every 5 steps. Rank 1 is killed in step `kill_at`, unless that is None. `keys`
        names what to load. It returns the loss after each step from the first on, and the weights.
    steps : int
        How many steps the training has.
    """
    straight: list[Any] = []  # losses and weights of an uninterrupted training

    controls = {
        "kill_at": whole("killed in step", 17, 0, steps - 1),
        "loaded": one_of("loaded", list(LOADED), "everything"),
    }

    def start(kill_at: int, loaded: str) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            if not straight:
                straight.extend(_train(train, os.path.join(folder, "straight"), None).values[0])
            path = os.path.join(folder, "crash")
            _train(train, path, kill_at)
            return _train(train, path, None, LOADED[loaded])

    def draw(run: Run, kill_at: int, loaded: str) -> Axes:
        losses, weights = run.values[0]
        curves = {"undisturbed": straight[0], "resumed": losses}
        end = _compared(weights, straight[1])
        title = f"Killed in step {kill_at}, resumed with {loaded}: {end}"
        saved = kill_at // EVERY * EVERY
        marks = {"saved": saved} if saved else {}
        look: dict[str, Any] = {"labels": False, "title": title}
        ax = plots.losses(curves, marks={**marks, "killed": kill_at}, **look)
        ax.legend(frameon=False, loc="lower left")  # the curves' ends may lie on each other
        ax.set_xlabel("finished steps")
        return ax

    return Explorer(controls, start, draw)


def _train(
    train: Callable[..., tuple[list[float], torch.Tensor]],
    path: str,
    kill_at: int | None,
    keys: frozenset[str] = EVERYTHING,
) -> Run:
    run = run_ranks(train, (path, kill_at, keys), RANKS)
    if kill_at is None:
        run.raise_for_failure()
    return run


def _compared(weights: torch.Tensor, others: torch.Tensor) -> str:
    if torch.equal(weights, others):
        return "the same weights"
    return f"weights off by {(weights - others).abs().max():.2f}"
