"""`plots.tensors`: each rank's tensor before and after a collective. Runs in the parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch, Rectangle

from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

# One colour a rank, dark to light so that they differ in grey print; hatched from the fifth on.
COLOURS = (style.BLUE, style.GREEN, style.ORANGE, "#F0CFE0")
HATCHES = ("", "////", "....", "xxxx")
MIXED: dict[str, Any] = {"facecolor": "white", "edgecolor": style.EDGE, "hatch": "////"}
MOST_CELLS = 24  # of a tensor
ARROW = 1.6  # cells between before and after
WIDTH, HEIGHT = 0.92, 0.78  # of a cell
FONT = 9

Tensors = Sequence["torch.Tensor | Sequence[torch.Tensor | float] | float | None"]
Look = dict[str, Any]


@documented
def tensors(
    before: Tensors, after: Tensors, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw each rank's tensor before a collective, on the left, and after it, on the right.

    On the right each number has the colour of the rank that had it before. Numbers that no single
    rank had, such as sums, are white and hatched. So give all ranks different numbers.

    Parameters
    ----------
    before, after : sequence
        `(world_size,)`: for each rank a tensor, a list of tensors, a number, or None where a rank
        has nothing, or nothing that counts. At most 24 numbers a rank.
    {title}.
    {ax}

    {raises}
        If `before` and `after` are not of the same number of ranks, or a tensor is too long.
    """
    left, right = [_numbers(t) for t in before], [_numbers(t) for t in after]
    _check(left, right)
    owners = _owners(left)
    ax = ax or style.new_axes(len(left))
    widths = [max(1, *map(len, side)) for side in (left, right)]
    start = widths[0] + ARROW
    for rank, (old, new) in enumerate(zip(left, right, strict=True)):
        _draw(ax, rank, 0, old, [_look(rank)] * len(old))
        _draw(ax, rank, start, new, [_look(owners.get(number)) for number in new])
        _draw_arrow(ax, rank, widths[0])
    style.name_rows(ax, len(left))
    ax.set_xlim(-0.1, start + max(widths) + 0.1)
    ax.spines["bottom"].set_visible(False)
    ax.set_xticks([widths[0] / 2, start + widths[1] / 2], ["before", "after"])
    ax.tick_params(axis="x", length=0)
    mixed = any(number not in owners for row in right for number in row)
    legend = [Patch(**MIXED, label="put together from several ranks")] if mixed else []
    style.head(ax, title or "before and after", legend)
    return ax


def _check(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> None:
    if len(left) != len(right) or not left:
        raise ValueError(f"before has {len(left)} ranks and after {len(right)}: one row each")
    longest = max(map(len, [*left, *right]))
    if longest > MOST_CELLS:
        raise ValueError(f"a tensor has {longest} numbers; {MOST_CELLS} are legible")


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
    """The rank of each number that only one rank has."""
    having: dict[float, set[int]] = {}
    for rank, row in enumerate(rows):
        for number in row:
            having.setdefault(number, set()).add(rank)
    return {number: min(ranks) for number, ranks in having.items() if len(ranks) == 1}


def _look(owner: int | None) -> Look:
    if owner is None:
        return MIXED
    hatch = HATCHES[owner // len(COLOURS) % len(HATCHES)]
    return {"facecolor": COLOURS[owner % len(COLOURS)], "edgecolor": style.INK, "hatch": hatch}


def _draw(ax: Axes, rank: int, left: float, row: Sequence[float], looks: Sequence[Look]) -> None:
    if not row:
        ax.text(left + 0.5, rank, "–", ha="center", va="center", fontsize=12, color=style.EDGE)
    for place, (number, look) in enumerate(zip(row, looks, strict=True), start=1):
        corner = left + place - (1 + WIDTH) / 2, rank - HEIGHT / 2
        ax.add_patch(Rectangle(corner, WIDTH, HEIGHT, linewidth=0.7, **look))
        style.write(
            ax,
            _texts(number),
            (left + place - 1, left + place),
            rank,
            FONT,
            color=style.ink_on(look["facecolor"]),
            bbox={**look, "edgecolor": "none", "hatch": "", "pad": 2} if look["hatch"] else None,
        )


def _texts(number: float) -> list[str]:
    """The number, and shorter texts for narrow cells."""
    whole = [f"{number:.0f}"] if abs(number) >= 100 else []
    return [f"{number:g}", f"{number:.4g}", *whole, f"{number:.3g}", f"{number:.2g}", "…"]


def _draw_arrow(ax: Axes, rank: int, begin: float) -> None:
    arrow = {"arrowstyle": "->", "color": style.EDGE}
    ends = (begin + ARROW - 0.35, rank), (begin + 0.35, rank)
    ax.annotate("", *ends, arrowprops=arrow)
