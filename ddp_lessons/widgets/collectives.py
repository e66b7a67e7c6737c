"""Lesson 03: tensors before and after any collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run


def explore(collective: Callable[[int, str, int], Any], ops: list[str]) -> Explorer:
    """Controls for collective, ranks and size, above the tensors before and after.

    Parameters
    ----------
    collective : callable
        ``collective(rank, op, size)`` calls the collective `op` with a tensor of `size` numbers a
        rank, and returns the tensors before and after it.
    ops : list of str
        The names that `collective` knows.
    """
    controls = {
        "op": one_of("collective", ops, ops[0]),
        "nprocs": whole("ranks", 3, 1, 4),
        "size": whole("numbers each", 3, 1, 6),
    }

    def start(op: str, nprocs: int, size: int) -> Run:
        return run_ranks(collective, (op, size), nprocs)

    return Explorer(controls, start, _draw)


def _draw(run: Run, op: str, nprocs: int, size: int) -> Axes:
    before, after = zip(*run.values, strict=True)
    count = f"{nprocs} rank{'s' * (nprocs > 1)}"
    return plots.tensors(before, after, title=f"{op} on {count}, {size} numbers each")
