"""Lesson 07: how bucket size, a late rank and a slow link change the overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons import plots
from ddp_lessons.simulated import SimulatedLink
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

BUCKETS_MB = (0.5, 1, 2, 4, 25)
LINKS = {"as it is": 0, "simulated: 300 MB/s": 300, "simulated: 100 MB/s": 100}  # MB/s


def explore(train: Callable[..., Any]) -> Explorer:
    """Controls for bucket size, lateness of rank 1 and the link, above two ranks' buckets.

    Parameters
    ----------
    train : callable
        ``train(rank, bucket_cap_mb, link, late_ms)`` trains for a few steps; rank 1 comes `late_ms`
        late to each. `link` is None or a communication hook.
    """
    controls = {
        "bucket_cap_mb": one_of("bucket_cap_mb", BUCKETS_MB, 2),
        "late_ms": whole("rank 1 late, ms", 0, 0, 30, 5),
        "megabytes": one_of("link", LINKS, 0),
    }

    def start(bucket_cap_mb: float, late_ms: int, megabytes: int) -> Run:
        link = SimulatedLink(megabytes_per_second=megabytes) if megabytes else None
        return run_ranks(train, (bucket_cap_mb, link, late_ms), 2)

    return Explorer(controls, start, _draw)


def _draw(run: Run, bucket_cap_mb: float, late_ms: int, megabytes: int) -> Axes:
    link = f"simulated link of {megabytes} MB/s" if megabytes else "link as it is"
    title = f"bucket_cap_mb={bucket_cap_mb:g}, rank 1 late by {late_ms} ms, {link}"
    return plots.buckets(run, title=title)
