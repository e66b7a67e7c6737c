"""Lesson 17: which loader worker of which rank gets which item, by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.text import count
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

SIZE = 3  # items of a shard


def explore(
    read: Callable[..., list[list[int]]], rules: Mapping[str, Callable[..., Any]]
) -> Explorer:
    """Controls for shards, ranks, workers and the rule, above the map of items and workers.

    Parameters
    ----------
    read : callable
        ``read(rank, shards, rule, workers)`` returns the items that each worker of the rank gets;
        `shards` is a list of ranges of item numbers.
    rules : mapping of str to callable
        What `read` may get as `rule`, by the name in the list; the last one is chosen first.
    """
    controls = {
        "shards": whole("shards", 5, 1, 8),
        "nprocs": whole("ranks", 2, 1, 3),
        "workers": whole("loader workers", 2, 1, 2),
        "rule": one_of("who takes what", list(rules), list(rules)[-1]),
    }

    def start(shards: int, nprocs: int, workers: int, rule: str) -> Run:
        data = [range(SIZE * number, SIZE * (number + 1)) for number in range(shards)]
        return run_ranks(read, (data, rules[rule], workers), nprocs)

    return Explorer(controls, start, _draw)


def _draw(run: Run, shards: int, nprocs: int, workers: int, rule: str) -> Axes:
    title = (
        f"{count(shards, 'shard')}, {count(nprocs, 'rank')} with {count(workers, 'worker')}: {rule}"
    )
    return plots.items(run.values, SIZE * shards, shards=[SIZE] * shards, title=title)
