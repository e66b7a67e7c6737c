"""`plots.shards`: which rank sees which sample in which epoch. Runs in the parent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = (0.05, 0.6)  # part of the colour map on which dark text is legible
MOST_NUMBERED = 30  # samples of a rank that are drawn as boxes with their numbers
MOST_NUMBERED_RANKS = 16
MOST_ROWS = 64
GAP = 1.0  # rows between epochs, for the line above each
MOST_NAMED = 4  # samples named in that line
FONT = 8.5

Shard = Sequence[int]


@documented
def shards(
    values: Sequence[Sequence[Shard]],
    total: int,
    *,
    first: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one row for each epoch and rank: the samples in the order in which the rank sees them.

    A darker box is a sample with a larger index, so equal epochs have equal patterns. Hatching
    marks samples that are seen more than once in an epoch; the line above the epoch names them and
    those that no rank sees. Up to 16 ranks with up to 30 samples each have their indices written.

    Parameters
    ----------
    values : sequence
        `[rank][epoch]`: a rank's sample indices in an epoch, as `run.values` has them if each rank
        returns its own list. At most 64 rows in all.
    total : int
        How many samples there are; indices go from 0 to `total - 1`.
    first : int
        The number of the first epoch in `values`.
    {title}.
    {ax}

    {raises}
        If ranks have different numbers of epochs, an index is out of range, or there are too many
        rows.
    """
    epochs = _epochs(values, total)
    world_size = len(values)
    height = len(epochs) * (world_size + GAP)
    ax = ax or style.new_axes(round(height), stretch=0.85)
    longest = max(1, *(len(shard) for epoch in epochs for shard in epoch))
    ticks = []
    for number, epoch in enumerate(epochs):
        top = number * (world_size + GAP) + GAP
        ticks += [top + rank for rank in range(world_size)]
        _draw_epoch(ax, epoch, top, total, longest)
        ax.text(
            0,
            top - 0.95,
            f"epoch {first + number}: {_seen(epoch, total)}",
            fontsize=FONT,
            va="center",
        )
    _name_rows(ax, ticks, world_size)
    ax.set_ylim(height - 0.4, -0.4)
    ax.set_xlim(0, longest)
    style.bare(ax)
    if longest <= MOST_NUMBERED:
        ax.set_xticks(
            [place + 0.5 for place in range(longest)], [str(n + 1) for n in range(longest)]
        )
    ax.set_xlabel("samples of a rank, in the order in which it sees them")
    twice = any(count > 1 for epoch in epochs for count in _counts(epoch).values())
    legend = [Patch(**_TWICE, label="seen more than once in the epoch")] if twice else []
    style.head(ax, title or "which rank sees which sample", legend)
    return ax


_TWICE: dict[str, Any] = {**style.WAIT_LOOK, "linewidth": 1.0}


def _epochs(values: Sequence[Sequence[Shard]], total: int) -> list[list[list[int]]]:
    """The checked indices, `[epoch][rank]`."""
    if not values or len({len(of_rank) for of_rank in values}) != 1 or not len(values[0]):
        raise ValueError(
            "values[rank][epoch] must have the same epochs, at least one, on each rank; the "
            f"{len(values)} ranks have {[len(of_rank) for of_rank in values]}"
        )
    if len(values) * len(values[0]) > MOST_ROWS:
        raise ValueError(
            f"{len(values)} ranks in {len(values[0])} epochs are more than {MOST_ROWS} rows: "
            "draw fewer epochs"
        )
    epochs = [[[int(i) for i in shard] for shard in epoch] for epoch in zip(*values, strict=True)]
    strange = {i for epoch in epochs for shard in epoch for i in shard if not 0 <= i < total}
    if strange:
        raise ValueError(f"{sorted(strange)[:5]} are no indices of {total} samples")
    return epochs


def _counts(epoch: list[list[int]]) -> Counter[int]:
    return Counter(index for shard in epoch for index in shard)


def _seen(epoch: list[list[int]], total: int) -> str:
    """The line above an epoch: `samples 3, 7 never`, or `every sample once`."""
    counts = _counts(epoch)
    never = [index for index in range(total) if not counts[index]]
    twice = sorted(index for index, count in counts.items() if count > 1)
    parts = [
        f"{_named(indices)} {what}"
        for indices, what in ((twice, "more than once"), (never, "never"))
        if indices
    ]
    return "; ".join(parts) or "every sample once"


def _named(indices: list[int]) -> str:
    if len(indices) > MOST_NAMED:
        return f"{len(indices)} samples"
    names = ", ".join(map(str, indices))
    return f"sample{'s' * (len(indices) > 1)} {names}"


def _draw_epoch(ax: Axes, epoch: list[list[int]], top: float, total: int, longest: int) -> None:
    counts = _counts(epoch)
    if longest > MOST_NUMBERED or len(epoch) > MOST_NUMBERED_RANKS:
        _draw_image(ax, epoch, counts, top, total)
        return
    size = min(FONT, 0.62 * 560 / longest / (len(str(total)) * style.CHARACTER + 0.4))
    for rank, shard in enumerate(epoch):
        for place, index in enumerate(shard):
            look = _TWICE if counts[index] > 1 else {"facecolor": _shade(index, total)}
            box = {"edgecolor": "white", **look}
            ax.add_patch(Rectangle((place + 0.04, top + rank - 0.4), 0.92, 0.8, **box))
            back = {"bbox": style.WAIT_LABEL} if counts[index] > 1 else {}
            ax.text(
                place + 0.5, top + rank, str(index), fontsize=size, ha="center", va="center", **back
            )


def _draw_image(
    ax: Axes, epoch: list[list[int]], counts: Counter[int], top: float, total: int
) -> None:
    """Draw each rank as a strip of colours, where there are too many samples for boxes."""
    for rank, shard in enumerate(epoch):
        if shard:
            strip = _shade(np.array([shard]), total)
            extent = (0, len(shard), top + rank + 0.4, top + rank - 0.4)
            ax.imshow(strip, extent=extent, aspect="auto", interpolation="nearest")
        place = 0
        for is_repeated, run in groupby(counts[index] > 1 for index in shard):
            length = len(list(run))
            if is_repeated:
                ax.add_patch(Rectangle((place, top + rank - 0.4), length, 0.8, **_TWICE))
            place += length


def _shade(index: Any, total: int) -> Any:
    """The colour of a sample; of an array of samples, the colours (RGBA, on one more axis)."""
    low, high = SHADES
    return plt.get_cmap("Blues")(low + (high - low) * index / max(1, total - 1))


def _name_rows(ax: Axes, ticks: list[float], world_size: int) -> None:
    step = 1 if world_size <= 16 else 8
    named = [(tick, i % world_size) for i, tick in enumerate(ticks) if i % world_size % step == 0]
    ax.set_yticks([tick for tick, _ in named], [f"rank {rank}" for _, rank in named])
