"""Who gives what to whom: every rank's tensor before a collective and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from ddp_lessons.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour a rank; beyond four, hatched.
COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
DARK = (style.BLUE, style.GREEN)
HATCHES = ("", "////", "....", "xxxx")
MOST_CELLS = 24  # of a tensor
ARROW = 1.6  # cells between before and after
HEIGHT = 0.78
FONT = 9

Tensors = Sequence[Any]


def tensors(
    before: Tensors, after: Tensors, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw each rank's tensor before a collective, on the left, and after it, on the right.

    A number has the colour of the rank that had it before. What no single rank had, such as a sum,
    is white. So give each rank different numbers.

    Parameters
    ----------
    before, after : sequence
        `(world_size,)`: for each rank a tensor, a list of tensors, a number, or None where a rank
        has nothing or nothing that counts. At most 24 numbers a rank.
    title : str, optional
        The finding that the picture shows.
    ax : matplotlib Axes, optional
        Where to draw; by default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If `before` and `after` are not of the same number of ranks, or a tensor is too long.
    """
    left, right = [_numbers(t) for t in before], [_numbers(t) for t in after]
    if len(left) != len(right) or not left:
        raise ValueError(f"before has {len(left)} ranks and after {len(right)}: one row each")
    longest = [max(map(len, side)) for side in (left, right)]
    if max(longest) > MOST_CELLS:
        raise ValueError(f"a tensor has {max(longest)} numbers; {MOST_CELLS} are legible")
    ax = ax or style.new_axes(len(left))
    owners = _owners(left)
    start = max(longest[0], 1) + ARROW
    for rank, (old, new) in enumerate(zip(left, right, strict=True)):
        _draw(ax, rank, 0, old, owners)
        _draw(ax, rank, start, new, owners)
        ax.annotate(
            "",
            (start - 0.35, rank),
            (start - ARROW + 0.35, rank),
            arrowprops={"arrowstyle": "->", "color": style.EDGE},
        )
    style.name_rows(ax, len(left))
    ax.set_xlim(-0.1, start + max(*longest, 1) + 0.1)
    ax.spines["bottom"].set_visible(False)
    middles = [max(longest[0], 1) / 2, start + max(longest[1], 1) / 2]
    ax.set_xticks(middles, ["before", "after"])
    ax.tick_params(axis="x", length=0)
    style.head(ax, title or "before and after", [])
    return ax


def _numbers(tensor: Any) -> list[float]:
    """The numbers of a tensor or of a list of them, in order."""
    if tensor is None:
        return []
    if isinstance(tensor, list | tuple):
        return [number for part in tensor for number in _numbers(part)]
    if hasattr(tensor, "flatten"):
        return [float(number) for number in tensor.flatten().tolist()]
    return [float(tensor)]


def _owners(rows: Sequence[Sequence[float]]) -> dict[float, int]:
    """For each number that only one rank has, which one."""
    having: dict[float, set[int]] = {}
    for rank, row in enumerate(rows):
        for number in row:
            having.setdefault(number, set()).add(rank)
    return {number: min(ranks) for number, ranks in having.items() if len(ranks) == 1}


def _draw(ax: Axes, rank: int, left: float, row: Sequence[float], owners: dict[float, int]) -> None:
    for place, number in enumerate(row):
        owner = owners.get(number)
        colour = "white" if owner is None else COLOURS[owner % len(COLOURS)]
        hatch = "" if owner is None else HATCHES[owner // len(COLOURS) % len(HATCHES)]
        cell = Rectangle(
            (left + place + 0.04, rank - HEIGHT / 2),
            0.92,
            HEIGHT,
            facecolor=colour,
            edgecolor=style.INK,
            linewidth=0.7,
            hatch=hatch,
        )
        ax.add_patch(cell)
        ink = "white" if colour in DARK else style.INK
        bbox = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch else None
        where = (left + place + 0.5, rank)
        ax.text(
            *where, f"{number:g}", ha="center", va="center", fontsize=FONT, color=ink, bbox=bbox
        )
