"""Lesson 08: ranks, learning-rate rule and optimizer, compared with one rank's training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

BATCH = 16  # samples of a rank
RATES = {"SGD": 0.1, "Adam": 0.003}
RULES: dict[str, Callable[[int], float]] = {
    "fixed": lambda _: 1.0,
    "linear": float,
    "square root": math.sqrt,
}


def explore(train: Callable[[int, float, str], list[float]]) -> Explorer:
    """Controls for ranks, rule and optimizer, above the losses of one rank and of many.

    Parameters
    ----------
    train : callable
        ``train(rank, lr, optimizer)`` trains with 16 samples a rank and step, and returns the loss
        after each step. `optimizer` is "SGD" or "Adam".
    """
    alone: dict[str, list[float]] = {}  # by optimizer, the losses of one rank

    controls = {
        "nprocs": whole("ranks", 4, 1, 4),
        "rule": one_of("learning rate", list(RULES), "linear"),
        "optimizer": one_of("optimizer", list(RATES), "Adam"),
    }

    def start(nprocs: int, rule: str, optimizer: str) -> Run:
        rate = RATES[optimizer]
        if optimizer not in alone:
            run = run_ranks(train, (rate, optimizer), 1)
            run.raise_for_failure()
            alone[optimizer] = run.values[0]
        return run_ranks(train, (rate * RULES[rule](nprocs), optimizer), nprocs)

    def draw(run: Run, nprocs: int, rule: str, optimizer: str) -> Axes:
        many = f"{nprocs} rank{'s' * (nprocs > 1)},\n{rule} lr"
        curves = {"1 rank": alone[optimizer], many: run.values[0]}
        title = f"{optimizer}, {BATCH} samples per rank, lr {rule}: one epoch"
        return plots.losses(curves, batch={"1 rank": BATCH, many: BATCH * nprocs}, title=title)

    return Explorer(controls, start, draw)
