"""`plots.memory`: the bytes that each rank keeps, by kind. Runs in the parent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.8  # of a row
GAP = 0.9  # rows above each stage, for its name
MOST_ROWS = 64
FILLS = (*style.WORK, style.ORANGE)
FONT = 8.5

Kinds = Mapping[str, float]  # bytes by kind


@documented
def memory(
    values: Mapping[str, Sequence[Kinds]],
    *,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one bar for each stage and rank: the bytes that the rank keeps, stacked by kind.

    The sizes stand in the bars, where they fit and the rank above has others; the sum stands at the
    end of each bar.

    Parameters
    ----------
    values : mapping of str to sequence of mapping
        `[stage][rank][kind]`: bytes, 0 or more. `run.values` is the sequence of a stage if each
        rank returns a dict of its own bytes by kind. At most four kinds, and 64 rows in all.
    limit : float, optional
        The bytes at which the x axis ends, so that pictures can be compared; by default a little
        more than the longest bar.
    {title}.
    {ax}

    {raises}
        If there is nothing to draw, too much, or a number of bytes is negative or not finite.
    """
    kinds = _kinds(values)
    height = sum(len(ranks) + GAP for ranks in values.values())
    ax = ax or style.new_axes(round(height), stretch=0.65)
    longest = max(sum(of_rank.values()) for ranks in values.values() for of_rank in ranks)
    unit, name = _unit(max(longest, limit or 0.0))
    ax.set_xlim(0, (limit or longest * 1.1 or 1.0) / unit)
    rows: dict[float, str] = {}
    top = 0.0
    for stage, ranks in values.items():
        ax.text(0, top + GAP, stage, fontsize=FONT, va="bottom", weight="bold", parse_math=False)
        above: list[float] = []
        for rank, of_rank in enumerate(ranks):
            row = top + GAP + rank + 0.5
            rows[row] = f"rank {rank}"
            sizes = [of_rank.get(kind, 0.0) for kind in kinds]
            _draw(ax, row, sizes, above, unit)
            above = sizes
        top += len(ranks) + GAP
    ax.set_yticks(list(rows), list(rows.values()))
    ax.set_ylim(height, 0)
    style.bare(ax)
    ax.set_xlabel(f"{name} kept by a rank")
    legend = [Patch(facecolor=fill, label=k) for k, fill in zip(kinds, FILLS, strict=False)]
    style.head(ax, title or "what each rank keeps", legend)
    return ax


def _kinds(values: Mapping[str, Sequence[Kinds]]) -> list[str]:
    """The kinds in the order in which they first appear, checked with all that is drawn."""
    each = [of_rank for ranks in values.values() for of_rank in ranks]
    kinds = list(dict.fromkeys(kind for of_rank in each for kind in of_rank))
    if not kinds or not all(values.values()):
        raise ValueError("values[stage][rank] must have bytes by kind for at least one rank each")
    if len(kinds) > len(FILLS):
        raise ValueError(f"{kinds} are more than {len(FILLS)} kinds: add some of them up")
    if len(each) > MOST_ROWS:
        raise ValueError(f"{len(each)} rows are more than {MOST_ROWS}: draw fewer ranks or stages")
    strange = [n for of_rank in each for n in of_rank.values() if not 0 <= n < math.inf]
    if strange:
        raise ValueError(f"{strange[:5]} are no numbers of bytes")
    return kinds


def _unit(longest: float) -> tuple[float, str]:
    """How many bytes the axis' unit has, and its name."""
    *_, name = style.bytes_text(longest).split()
    return {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}[name], name


def _draw(
    ax: Axes, row: float, sizes: Sequence[float], above: Sequence[float], unit: float
) -> None:
    """Draw one bar; sizes that the bar above it has, too, are not written again."""
    left = 0.0
    for size, before, fill in zip(sizes, above or [math.nan] * len(sizes), FILLS, strict=False):
        if size:
            right = left + size / unit
            ax.barh(row, right - left, HEIGHT, left, color=fill, edgecolor="white", linewidth=0.5)
            if size != before:
                texts = [f"{size / unit:.{digits}g}" for digits in (3, 2)]
                style.write(ax, texts, (left, right), row, FONT, color=style.ink_on(fill))
            left = right
    total = style.bytes_text(left * unit)
    ax.text(left, row, f" {total}", fontsize=FONT, va="center", color=style.INK)
