"""`plots.items`: which rank and loader worker gets which item of a stream. Runs in the parent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch, Rectangle

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.plots.tensors import COLOURS, HATCHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ITEMS = 40
MOST_ROWS = 24
FONT = 8.5
# An item that comes more than once is outlined, so that it differs from the others in grey print.
TWICE: dict[str, Any] = {"edgecolor": "#C0305A", "linewidth": 1.6}

Items = Sequence[int]


@documented
def items(
    values: Sequence[Sequence[Items]],
    total: int,
    *,
    shards: Sequence[int] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a map: a row for each loader worker of each rank, a column for each item of the stream.

    A box marks an item that the worker gets, in the colour of its rank. A red edge marks items that
    come more than once; the line below counts how often each comes, over all ranks and workers.

    Parameters
    ----------
    values : sequence
        `[rank][worker]`: the items that a worker gets, as `run.values` has them if each rank
        returns the lists of its workers. At most 24 workers in all.
    total : int
        How many items the stream has, at most 40; they go from 0 to `total - 1`.
    shards : sequence of int
        How many items each shard (file) of the stream has; by default no shards are drawn.
    {title}.
    {ax}

    {raises}
        If an item is out of range, or there are too many items or workers.
    """
    rows = [
        (rank, worker, got) for rank, own in enumerate(values) for worker, got in enumerate(own)
    ]
    _check(rows, total)
    ax = ax or style.new_axes(len(rows) + 1 + bool(shards), stretch=0.85)
    times = Counter(int(item) for _, _, got in rows for item in got)
    for row, (rank, _, got) in enumerate(rows):
        for item in sorted({int(item) for item in got}):
            _box(ax, item, row, rank, is_double=times[item] > 1)
    for item in range(total):
        strange = times[item] != 1
        weight = "bold" if strange else "normal"
        _write(ax, item + 0.5, len(rows) + 0.1, str(times[item]), fontweight=weight)
    _draw_shards(ax, shards, len(rows))
    _name_rows(ax, rows)
    ax.set_xlim(0, total)
    ax.set_ylim(len(rows) + 0.6, -0.6 - bool(shards))
    ax.set_xticks([item + 0.5 for item in range(total)], [str(item) for item in range(total)])
    ax.tick_params(axis="x", length=0)
    style.bare(ax)
    ax.set_xlabel("item of the stream")
    handles = [Patch(facecolor="white", **TWICE, label="comes more than once")]
    style.head(ax, title or "which worker gets which item", handles * any(_doubles(times)))
    return ax


def _check(rows: Sequence[tuple[int, int, Items]], total: int) -> None:
    if not rows or len(rows) > MOST_ROWS or not 0 < total <= MOST_ITEMS:
        raise ValueError(
            f"{len(rows)} workers and {total} items: at least 1 of each, and at most {MOST_ROWS} "
            f"workers and {MOST_ITEMS} items can be drawn"
        )
    strange = sorted({int(i) for _, _, got in rows for i in got if not 0 <= i < total})
    if strange:
        raise ValueError(f"{strange[:5]} are no items of a stream of {total}")


def _doubles(times: Counter[int]) -> list[bool]:
    return [count > 1 for count in times.values()]


def _box(ax: Axes, item: int, row: int, rank: int, is_double: bool) -> None:
    look: dict[str, Any] = {
        "facecolor": COLOURS[rank % len(COLOURS)],
        "hatch": HATCHES[rank // len(COLOURS) % len(HATCHES)],
        "edgecolor": "white",
        "linewidth": 0.5,
    }
    inner = 0.1 if is_double else 0.06
    ax.add_patch(
        Rectangle(
            (item + inner, row - 0.42 + inner / 2),
            1 - 2 * inner,
            0.84 - inner,
            **{**look, **(TWICE if is_double else {})},
        )
    )


def _write(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    ax.text(x, y, text, fontsize=FONT, ha="center", va="center", color=style.INK, **look)


def _draw_shards(ax: Axes, shards: Sequence[int], rows: int) -> None:
    """A dotted line between shards, and their names above the rows."""
    ends = list(accumulate(shards))
    for number, (size, end) in enumerate(zip(shards, ends, strict=True)):
        style.write(
            ax, [f"shard {number}", str(number)], (end - size, end), -1.0, FONT, color=style.INK
        )
        if end != ends[-1]:
            ax.plot([end, end], [-1.3, rows - 0.5], color=style.INK, linewidth=0.9, linestyle=":")


def _name_rows(ax: Axes, rows: Sequence[tuple[int, int, Items]]) -> None:
    workers = Counter(rank for rank, _, _ in rows)
    names = [
        f"rank {rank}" + (f", worker {worker}" if workers[rank] > 1 else "")
        for rank, worker, _ in rows
    ]
    ax.set_yticks([*range(len(rows)), len(rows) + 0.1], [*names, "times in all"])
    for row, ((rank, _, _), (before, _, _)) in enumerate(zip(rows[1:], rows, strict=False)):
        if rank != before:
            ax.axhline(row + 0.5, color=style.EDGE, linewidth=0.8)
    ax.axhline(len(rows) - 0.45, color=style.INK, linewidth=0.8)
