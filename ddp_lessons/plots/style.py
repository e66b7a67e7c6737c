"""Colours, sizes, titles, legends and labels that all plots share. Runs in the parent."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from ddp_lessons.plots import alt_text
from ddp_lessons.text import exit_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.typing import ColorType

    from ddp_lessons.results import RankResult
    from ddp_lessons.run import Run

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, GREEN, PURPLE, ORANGE = "#0072B2", "#009E73", "#CC79A7", "#E69F00"
PALE, EDGE, INK = "#E8E8E8", "#999999", "#222222"
WORK = (BLUE, GREEN, "#E8A8D8")  # fills; in grey print the purple above looks like the green
USUAL = ("forward", "backward", "optimizer")  # work that always has these fills
# Waiting for another rank, or for communication, looks the same in every picture.
WAIT_LOOK: dict[str, Any] = {
    "facecolor": "#FDE8EC",
    "edgecolor": "#C0305A",
    "hatch": "////",
    "linewidth": 0.6,
}
WAIT_LABEL = {"facecolor": WAIT_LOOK["facecolor"], "edgecolor": "none", "pad": 1}

# Added to the look of a span that never ended.
OPEN_EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 1.1, "linestyle": "--"}

DPI = 110
WIDTH = 8.0  # inches
MOST_COLUMNS = 6  # of a legend
MOST_NAMED = 16  # most rows that are all labelled
POINTS = 72  # an inch
CHARACTER = 0.62  # mean width of a character, as a part of the font size


def new_axes(rows: int, stretch: float = 1.0) -> Axes:
    """New axes with one row a rank, each `stretch` times as high as usual."""
    height = 1.15 + rows * min(0.42 * stretch, 8.0 / rows)
    figure = plt.figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ax: Axes = figure.add_subplot()
    return ax


def fills(names: Iterable[str]) -> dict[str, str | None]:
    """By name of marked work, its fill; None where there are more names than fills.

    The parts of a training step look the same in every picture, whatever else is marked in it.
    """
    work = list(dict.fromkeys(names))
    found = dict(zip(USUAL, WORK, strict=True))
    free = [fill for usual, fill in found.items() if usual not in work]
    found.update(zip((name for name in work if name not in USUAL), free, strict=False))
    return {name: found.get(name) for name in work}


def name_rows(ax: Axes, ranks: int) -> None:
    """Label the rows `rank 0`, `rank 1` and so on, from the top; every eighth if there are many."""
    step = 1 if ranks <= MOST_NAMED else 8
    ax.set_yticks(range(0, ranks, step), [f"rank {rank}" for rank in range(0, ranks, step)])
    ax.set_ylim(ranks - 0.4, -0.6)
    bare(ax)


def name_ranks(ax: Axes, run: Run) -> None:
    """Label the rows with the ranks and, where there are several, their machines."""
    name_rows(ax, run.world_size)
    hosts = {rank.group_rank: rank.host for rank in run.ranks}
    if len(hosts) == 1:
        return
    named = len(set(hosts.values())) == len(hosts)
    if run.world_size <= MOST_NAMED:
        places = [f"{r.host if named else f'node {r.group_rank}'}" for r in run.ranks]
        ax.set_yticklabels([f"rank {rank}\n{place}" for rank, place in enumerate(places)])
    for rank, before in zip(run.ranks[1:], run.ranks, strict=False):
        if rank.group_rank != before.group_rank:
            ax.axhline(rank.rank - 0.5, color=EDGE, linewidth=0.8, linestyle=":")


def bare(ax: Axes) -> None:
    """Remove the frame except for the x axis."""
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def bytes_text(nbytes: float) -> str:
    """A readable size: 2.1 MB."""
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if size >= 999.5 else f"{size:.3g} {unit}"


def head(ax: Axes, title: str, handles: Sequence[Patch | Line2D]) -> None:
    """Write the title, and the legend below it in as few rows as possible."""
    alt_text.offer()
    columns = MOST_COLUMNS
    while handles and _legend_width(ax, handles, columns) > 1.0 and columns > 1:
        columns -= 1
    rows = -(-len(handles) // columns)
    if rows > 1:
        _legend_width(ax, handles, -(-len(handles) // rows))  # balances the rows
    text = ax.set_title(title, loc="left", fontsize=11, pad=10 + 14 * rows, parse_math=False)
    if (part := 0.96 * _room(ax) / max(text.get_window_extent().width, 1)) < 1:
        longest = max(map(len, title.split("\n")))
        fold = int(longest * part)
        text.set_text("\n".join(textwrap.fill(line, fold) for line in title.split("\n")))


def _room(ax: Axes) -> float:
    """The pixels from the left of the axes to the next axes on the right, or the figure's edge."""
    here = ax.get_window_extent()
    others = [other.get_window_extent() for other in ax.figure.axes if other is not ax]
    beside = [o.x0 for o in others if o.x0 >= here.x1 and o.y0 < here.y1 and o.y1 > here.y0]
    return float(min([*beside, ax.figure.bbox.x1]) - here.x0)


def _legend_width(ax: Axes, handles: Sequence[Patch | Line2D], columns: int) -> float:
    """Draw the legend and return its width, as a fraction of the room right of the axes' left."""
    legend = ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a span's name may have dollar signs
    legend.set_in_layout(False)  # it may overlap neighbouring axes
    room = ax.figure.bbox.x1 - ax.get_window_extent().x0
    return float(legend.get_window_extent().width / room)


def mark_failure(ax: Axes, rank: RankResult, at: float) -> None:
    """Write how a rank failed, if it did, at the end of its bar, or at the edge if that is beyond.

    The layout makes room for a text wherever it is, and of axes too small nothing would be left.
    """
    left, right = ax.get_xlim()
    if text := failure(rank):
        ax.text(min(max(at, left), right), rank.rank, text, va="center", fontsize=8.5, color=INK)


def failure(rank: RankResult) -> str:
    """How a rank failed, as ` ✗ ValueError`; "" if it returned or was only stopped."""
    if rank.status in ("returned", "stopped"):
        return ""
    what = rank.error.type_name if rank.error is not None else exit_name(rank.exitcode)
    return f" ✗ {what}"


def losses(run: Run) -> list[str]:
    """A line that counts the dropped spans by rank, and one that says what is not recorded."""
    lost = [f"rank {rank.rank}: {rank.dropped:,}" for rank in run.ranks if rank.dropped]
    lines = [f"spans that could not be kept: {', '.join(lost)}"] if lost else []
    return [*lines, f"not recorded: {', '.join(run.unseen)}"] if run.unseen else lines


def points_per_unit(ax: Axes) -> float:
    """The width of one unit of the x axis, in points."""
    left, right = ax.get_xlim()
    return float(ax.get_window_extent().width / ax.figure.dpi * POINTS / (right - left))


def fitting(texts: Sequence[str], points: float, size: float) -> str:
    """The first text that fits into so many points; "" if none does."""
    fits = (t for t in texts if max(map(len, t.split("\n"))) * CHARACTER * size + 4 <= points)
    return next(fits, "")


def ink_on(fill: ColorType) -> str:
    """White or dark, whichever has more contrast on a colour (WCAG 2.2, contrast ratio)."""
    light = luminance(fill)
    return "white" if 1.05 / (light + 0.05) > (light + 0.05) / (luminance(INK) + 0.05) else INK


def luminance(colour: ColorType) -> float:
    """The relative luminance of a colour, from 0 to 1 (WCAG 2.2)."""
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def write(
    ax: Axes,
    texts: Sequence[str],
    interval: tuple[float, float],
    y: float,
    size: float,
    **look: Any,
) -> None:
    """Write the first text that fits into an interval of x; nothing if none does."""
    ax.add_artist(FittingText(ax, texts, interval, y, size, **look))


class FittingText(Text):
    """A text in the middle of an interval of x, chosen anew at each drawing.

    By then axes that share x may have changed the scale, or the figure was resized.
    """

    def __init__(
        self,
        ax: Axes,
        texts: Sequence[str],
        interval: tuple[float, float],
        y: float,
        size: float,
        **look: Any,
    ) -> None:
        left, right = interval
        middle = (left + right) / 2
        look = {"ha": "center", "va": "center", "clip_on": True, "parse_math": False, **look}
        super().__init__(middle, y, "", fontsize=size, **look)
        self._texts, self._width, self._size, self._in = texts, right - left, size, ax
        self._choose()

    def _choose(self) -> None:
        points = self._width * points_per_unit(self._in)
        self.set_text(fitting(self._texts, points, self._size))

    def draw(self, renderer: RendererBase) -> None:
        self._choose()
        super().draw(renderer)
