"""Lesson 05: which rank sees which sample, by the sampler's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, run_ranks, switch, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run


def explore(see: Callable[..., list[list[int]]]) -> Explorer:
    """Controls for a sampler, above the samples of every rank and epoch.

    Parameters
    ----------
    see : callable
        ``see(rank, total, shuffle, drop_last, set_epoch, epoch)`` returns the samples that the rank
        sees, a list for each epoch from `epoch` on.
    """
    controls = {
        "total": whole("samples", 10, 1, 24),
        "nprocs": whole("ranks", 3, 1, 4),
        "shuffle": switch("shuffle", True),
        "drop_last": switch("drop_last", False),
        "set_epoch": switch("set_epoch", True),
        "epoch": whole("first epoch", 0, 0, 9),
    }

    def start(nprocs: int, **options: int) -> Run:
        return run_ranks(see, tuple(options.values()), nprocs)

    return Explorer(controls, start, _draw)


def _draw(run: Run, total: int, nprocs: int, epoch: int, **options: bool) -> Axes:
    chosen = [name for name, on in options.items() if on]
    title = f"{total} samples on {nprocs} ranks: {', '.join(chosen) or 'in order'}"
    return plots.shards(run.values, total, first=epoch, title=title)
