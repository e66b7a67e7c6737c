"""Lesson 19: a predicted step with its parts apart, by GPUs, network and model. No rank is needed.

Runs in the parent. The prediction is the lesson's own function; this module draws it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ddp_lessons.launcher.api import launch
from ddp_lessons.plots import style
from ddp_lessons.widgets.explorer import Explorer, one_of, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

Parts = Mapping[str, float]  # seconds by part; "arithmetic" is one of them

ARITHMETIC = "arithmetic"
FILLS = (style.BLUE, style.ORANGE, style.PURPLE)
GPUS = (8, 64, 512, 1_000, 4_000, 10_000)
MOST = 4.0  # times the arithmetic, at which the x axis ends


def draw_parts(rows: Mapping[str, Parts | None], *, title: str) -> Axes:
    """Draw predicted steps, each as a bar of its parts, in multiples of its own arithmetic.

    Parameters
    ----------
    rows : mapping of str to mapping or None
        By label, the seconds of each part, "arithmetic" among them; None for what does not fit.
    title : str
        The title.
    """
    from matplotlib.patches import Patch

    ax = style.new_axes(len(rows), 0.9)
    names = next((list(parts) for parts in rows.values() if parts), [ARITHMETIC])
    fills = dict(zip(names, FILLS, strict=False))
    for row, parts in enumerate(rows.values()):
        if parts is None:
            ax.text(0.05, row, "does not fit into 80 GB", va="center", fontsize=8.5)
            continue
        times = [parts[name] / parts[ARITHMETIC] for name in names]
        starts = [0.0, *itertools.accumulate(times)]
        for name, start, time in zip(names, starts, times, strict=False):
            ax.barh(row, time, left=start, height=0.6, color=fills[name], hatch="..", ec="white")
        ax.text(
            min(starts[-1], MOST) + 0.04,
            row,
            f"{starts[-1]:,.2f} x" if starts[-1] < 10 else f"{starts[-1]:,.0f} x",
            va="center",
            fontsize=8.5,
            color=style.INK,
        )
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlim=(0, MOST + 0.5), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xlabel("predicted step, in multiples of its arithmetic (longer bars are cut)")
    style.bare(ax)
    ax.axvline(1, color=style.INK, linewidth=0.8, linestyle=":")
    ax.axvspan(MOST, MOST + 0.5, color="white", zorder=2)
    for text in ax.texts:
        text.set_zorder(3)
    handles = [Patch(fc=fills[name], hatch="..", ec="white", label=name) for name in names]
    style.head(ax, title, handles)
    return ax


def explore(
    predict: Callable[[str, str, int, float], Parts | None],
    sizes: Collection[str],
    ways: Collection[str],
) -> Explorer:
    """Choices of model and GPUs and a slider for the network, above the steps predicted by way.

    Parameters
    ----------
    predict : callable
        ``predict(size, way, gpus, gigabytes)`` returns the seconds of each part of a step;
        `gigabytes` is the bandwidth of each GPU's network, per second. None if it does not fit.
    sizes, ways : collection of str
        The models, and the ways to share out the work.
    """
    controls = {
        "size": one_of("model", list(sizes), next(iter(sizes))),
        "gpus": one_of("GPUs", GPUS, 1_000),
        "gigabytes": whole("network, GB/s", 50, 5, 100, 5),
    }

    def start(size: str, gpus: int, gigabytes: int) -> Run:
        def steps(_: int) -> dict[str, Parts | None]:
            return {way: predict(size, way, gpus, gigabytes) for way in ways}

        return launch(steps, nprocs=1, in_process=True)

    def draw(run: Run, size: str, gpus: int, gigabytes: int) -> Axes:
        title = f"{size} on {gpus:,} GPUs, {gigabytes} GB/s each"
        return draw_parts(run.values[0], title=title)

    return Explorer(controls, start, draw)
