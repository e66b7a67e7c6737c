"""`plots.machines`: which rank runs on which machine. Runs in the parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 0.9, 0.72  # of a rank's box
MOST_MACHINES, MOST_RANKS = 16, 16  # drawn; ranks on a machine
COLOURS = (style.BLUE, style.GREEN, style.ORANGE, "#F0CFE0")  # one a local rank, dark to light


@documented
def machines(
    places: Sequence[tuple[int, int]], *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw one row for each machine and one box for each rank, with its global and local rank.

    Boxes of one colour have the same local rank.

    Parameters
    ----------
    places : sequence of (int, int)
        `(world_size,)`: for each global rank its GROUP_RANK (the machine) and LOCAL_RANK. At most
        16 machines with 16 ranks each.
    {title}.
    {ax}

    {raises}
        If there is no rank, two ranks share a place, or there are too many to draw.
    """
    rows, columns = _size(places)
    ax = ax or style.new_axes(rows, stretch=1.6)
    for rank, (machine, local_rank) in enumerate(places):
        _draw(ax, rank, machine, local_rank)
    ax.set_yticks(range(rows), [f"machine {row}" for row in range(rows)])
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_xlim(0, max(columns, 4))
    ax.set_xticks([])
    style.bare(ax)
    ax.spines["bottom"].set_visible(False)
    style.head(ax, title or f"{len(places)} ranks on {rows} machine{'s' * (rows > 1)}", [])
    return ax


def _size(places: Sequence[tuple[int, int]]) -> tuple[int, int]:
    if not places or len({tuple(place) for place in places}) < len(places):
        raise ValueError(f"every rank needs a place of its own, got {list(places)}")
    rows, columns = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    if rows > MOST_MACHINES or columns > MOST_RANKS:
        raise ValueError(
            f"{rows} machines with up to {columns} ranks are too many to draw: at most "
            f"{MOST_MACHINES} machines with {MOST_RANKS} ranks"
        )
    return rows, columns


def _draw(ax: Axes, rank: int, machine: int, local_rank: int) -> None:
    colour = COLOURS[local_rank % len(COLOURS)]
    left, top = local_rank + (1 - WIDTH) / 2, machine - HEIGHT / 2
    ax.add_patch(Rectangle((left, top), WIDTH, HEIGHT, facecolor=colour, edgecolor=style.EDGE))
    ink = style.ink_on(colour)
    for text, y, size in ((f"rank {rank}", -0.1, 10), (f"local rank {local_rank}", 0.18, 8)):
        ax.text(
            local_rank + 0.5, machine + y, text, color=ink, fontsize=size, ha="center", va="center"
        )
