"""Lesson 14: micro-batches on ranks, and how far each recipe's gradient is from one batch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ddp_lessons.plots import style
from ddp_lessons.text import count
from ddp_lessons.widgets.explorer import Explorer, run_ranks, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ddp_lessons.run import Run

FEWEST = 4  # tokens of the shortest micro-batch
ROUNDING = 1e-5
SMALLEST = 1e-9  # on the scale; an exact 0 is drawn there
FONT = 9


def explore(distances: Callable[[int, list[list[int]]], dict[str, float]]) -> Explorer:
    """Sliders for ranks, micro-batches and the longest of them, above each recipe's distance.

    Parameters
    ----------
    distances : callable
        ``distances(rank, counts)`` gets the tokens of each micro-batch, by rank, and returns for
        each recipe how far its gradient is from that of one batch, as a part of its length.
    """
    controls = {
        "ranks": whole("ranks", 2, 1, 4),
        "micro_batches": whole("micro-batches", 2, 1, 4),
        "longest": whole("tokens, longest", 40, FEWEST, 64, 4),
    }

    def start(ranks: int, micro_batches: int, longest: int) -> Run:
        return run_ranks(distances, (_counts(ranks, micro_batches, longest),), ranks)

    def draw(run: Run, ranks: int, micro_batches: int, longest: int) -> Axes:
        counts = _counts(ranks, micro_batches, longest)
        tokens = ", ".join(" + ".join(map(str, of_rank)) for of_rank in counts)
        return by_recipe(run.values[0], title=f"tokens of {count(ranks, 'rank')}: {tokens}")

    return Explorer(controls, start, draw)


def _counts(ranks: int, micro_batches: int, longest: int) -> list[list[int]]:
    """The tokens of each micro-batch, by rank: from the fewest to the longest, evenly."""
    last = max(1, ranks * micro_batches - 1)
    tokens = [FEWEST + (longest - FEWEST) * n // last for n in range(ranks * micro_batches)]
    return [tokens[first : first + micro_batches] for first in range(0, len(tokens), micro_batches)]


def by_recipe(
    distances: Mapping[str, float], *, rounding: float = ROUNDING, title: str | None = None
) -> Axes:
    """Draw one row for each recipe: how far its gradient is from the true one, on a log scale.

    Parameters
    ----------
    distances : mapping of str to float
        By recipe, the distance as a part of the true gradient's length; 0 or more.
    rounding : float
        The largest distance that rounding explains: the band up to it is shaded and labelled.
    title : str, optional
        The title.
    """
    ax = style.new_axes(len(distances) + 1, 0.9)
    ax.set_xscale("log")
    ax.axvspan(SMALLEST, rounding, facecolor=style.PALE)
    ax.axvline(1, color=style.EDGE, linewidth=0.8, linestyle=":")
    for row, distance in enumerate(distances.values()):
        colour = style.ORANGE if distance > rounding else style.BLUE
        at = max(distance, SMALLEST)
        ax.hlines(row, SMALLEST, at, color=colour, linewidth=2)
        ax.plot(at, row, "o", color=colour, markersize=8)
        text = f"{distance:.2g}" if distance > rounding else "rounding"
        ax.annotate(text, (at, row), (9, 0), textcoords="offset points", va="center", fontsize=FONT)
    ax.set_xlim(SMALLEST, 30)
    ax.set_ylim(len(distances) - 0.4, -0.6)
    ax.set_yticks(range(len(distances)), list(distances))
    ax.set_xlabel("distance from the gradient of one batch; 1 = its length")
    style.bare(ax)
    style.head(ax, title or "distance by recipe", [])
    return ax
