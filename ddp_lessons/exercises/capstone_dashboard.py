"""The dashboard of lesson 20: one picture of what the ranks of a run noted, epoch by epoch.

Runs in the parent, called by the notebook, whose `note` keeps a file for each rank and epoch; only
`first_step` and `slow_disk` run in workers. A panel without anything to draw says so: a run that
failed may have noted only a part.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence, Sized
from itertools import chain
from typing import TYPE_CHECKING, Any
from unittest import mock

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ddp_lessons import Run
from ddp_lessons.plots import style
from ddp_lessons.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = dict[str, Any]  # what a rank noted in an epoch
Epochs = dict[int, list[Facts]]  # by epoch, of all ranks

LAYOUT = [["step"] * 3, ["samples", "weights", "buffers"], ["reference", "accuracy", "checkpoint"]]
SEEN = {"never": style.ORANGE, "once": style.PALE, "more often": style.INK}
# Ranks with equal values lie on top of each other: each is thinner than the one below it.
LOOKS: list[dict[str, Any]] = [
    {"color": colour, "linewidth": width, "markersize": size, "marker": "o"}
    for colour, width, size in zip(
        (style.BLUE, style.GREEN, style.PURPLE, style.ORANGE),
        (5, 3, 1.5, 0.8),
        (11, 7.5, 4.5, 2),
        strict=True,
    )
]
SAMPLES = 720  # that the lesson's trainer trains on
LEAST = 0.1  # top of an axis of distances, at the least: rounding shall look like zero


def first_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float
) -> list[float]:
    """A list that gets a number with the optimizer's first step: its length.

    In units of `rate` times the gradient's length: so long is SGD's first step.
    """
    lengths: list[float] = []
    before: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        before[:] = [_weights(model), torch.cat(gradients)]
        first.remove()

    def measure(*_: object) -> None:
        weights, gradient = before
        lengths.append(float((_weights(model) - weights).norm() / (rate * gradient.norm())))
        after.remove()

    first = optimizer.register_step_pre_hook(keep)
    after = optimizer.register_step_post_hook(measure)
    return lengths


@contextlib.contextmanager
def slow_disk(seconds: float = 0.1) -> Iterator[None]:
    """Have `torch.save` take so long, as with a network drive: whoever does not wait shows."""
    save = torch.save

    def save_slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        save(*args, **kwargs)

    with mock.patch.object(torch, "save", save_slowly):
        yield


def _weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def dashboard(run: Run, folder: str, reference: str | None = None) -> None:
    """Draw what `note` kept in the folder of a run, of up to four ranks.

    Parameters
    ----------
    run : Run
        The run, also if it failed.
    folder : str
        Has a file `rank R, epoch E.pt` for each rank and epoch, a dictionary with some of `seen`
        (numbers of samples), `step` (what `first_step` returned), `weights` and `buffers` (flat
        tensors), `own` (accuracy of the rank's model), `said` (that of `evaluate`) and `found` (the
        epoch of the checkpoint as `save` returned, -1 for none).
    reference : str, optional
        The folder of another run, mostly that on one rank: the weights' distance from it is drawn.

    Raises
    ------
    ValueError
        If there are more than four ranks.
    """
    if run.world_size > len(LOOKS):
        raise ValueError(f"the dashboard has colours for {len(LOOKS)} ranks, not {run.world_size}")
    figure = plt.figure(figsize=(8.6, 6.2), dpi=82, layout="constrained")
    axes = figure.subplot_mosaic(LAYOUT, height_ratios=[0.25 + 0.25 * run.world_size, 2, 2])
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=11)
    epochs = _noted(folder, run.world_size)
    _draw_step(axes["step"], run.world_size, epochs)
    _draw_samples(axes["samples"], epochs)
    for name in ("weights", "buffers"):
        _draw_distances(axes[name], f"{name.capitalize()}: distance from rank 0", epochs, name)
    _draw_reference(axes["reference"], epochs, _noted(reference, 1) if reference else {})
    _draw_accuracy(axes["accuracy"], epochs)
    _draw_checkpoint(axes["checkpoint"], epochs)
    ranks = [Line2D([], [], label=f"rank {rank}", **LOOKS[rank]) for rank in range(run.world_size)]
    figure.legend(handles=ranks, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)


def _title(run: Run) -> str:
    ranks = count(run.world_size, "rank")
    return f"{ranks}: {'returned' if run.ok else 'failed, see explain()'}"


def _noted(folder: str, ranks: int) -> Epochs:
    """By epoch, what all ranks noted; without epochs that a rank noted nothing of."""
    found: Epochs = {}
    for epoch in range(1 + max(map(_epoch, os.listdir(folder)), default=-1)):
        paths = [os.path.join(folder, f"rank {rank}, epoch {epoch}.pt") for rank in range(ranks)]
        ranks_noted = [*map(_load, paths)]
        if all(ranks_noted):
            found[epoch] = ranks_noted
    return found


def _load(path: str) -> Facts:
    """What a rank noted; nothing if it did not, or was stopped as it did."""
    try:
        facts: Facts = torch.load(path)
    except (OSError, RuntimeError, EOFError):
        return {}
    return facts


def _epoch(name: str) -> int:
    head, _, number = name.removesuffix(".pt").rpartition("epoch ")
    return int(number) if head and number.isdigit() else -1


def _draw_step(ax: Axes, ranks: int, epochs: Epochs) -> None:
    """A bar by rank; a line where they should end."""
    lengths = [length for facts in epochs.get(0, []) for length in facts.get("step", [])[:1]]
    style.head(ax, "First step: its length, in units of rate × gradient", [])
    ax.set_title(ax.get_title("left"), loc="left", fontsize=10, pad=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    ax.set_ylim(ranks - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    colours = [look["color"] for look in LOOKS]
    ax.barh(range(len(lengths)), lengths, height=0.6, color=colours)
    ax.axvline(1, color=style.INK, linestyle="--", linewidth=1.2)
    ax.set_xlim(0, max([3.2, *(1.1 * length for length in lengths if math.isfinite(length))]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _say_if_empty(ax, lengths)


def _draw_samples(ax: Axes, epochs: Epochs) -> None:
    _head(
        ax, "Samples seen by the ranks", epochs, [Patch(color=c, label=n) for n, c in SEEN.items()]
    )
    for epoch, ranks in epochs.items():
        times = torch.cat([rank["seen"] for rank in ranks]).bincount(minlength=SAMPLES)
        heights = [int((times == 0).sum()), int((times == 1).sum()), int((times > 1).sum())]
        bottom = 0
        for height, colour in zip(heights, SEEN.values(), strict=True):
            ax.bar(epoch, height, bottom=bottom, color=colour, width=0.7)
            bottom += height
    ax.set_ylim(0, SAMPLES)


def _draw_distances(ax: Axes, title: str, epochs: Epochs, name: str) -> None:
    far = {e: [_distance(of[name], ranks[0][name]) for of in ranks] for e, ranks in epochs.items()}
    _head(ax, title, far)
    _draw_ranks(ax, far)
    _from_zero(ax, far)


def _draw_reference(ax: Axes, epochs: Epochs, reference: Epochs) -> None:
    far = {
        epoch: [_distance(of["weights"], reference[epoch][0]["weights"]) for of in ranks]
        for epoch, ranks in epochs.items()
        if epoch in reference
    }
    _head(ax, "Weights: distance from the reference", far)
    _draw_ranks(ax, far)
    _from_zero(ax, far)


def _draw_accuracy(ax: Axes, epochs: Epochs) -> None:
    look: dict[str, Any] = {"color": style.INK, "linestyle": "--", "linewidth": 1.2}
    said = {e: ranks[0]["said"] for e, ranks in epochs.items() if all("said" in r for r in ranks)}
    answer = "what evaluate returned" if said else "evaluate has not returned"
    _head(ax, "Accuracy on all test images", epochs, [Line2D([], [], label=answer, **look)])
    _draw_ranks(ax, {epoch: [rank["own"] for rank in ranks] for epoch, ranks in epochs.items()})
    ax.plot([*said], [*said.values()], **look, marker="_", markersize=14)
    ax.margins(y=0.15)


def _draw_checkpoint(ax: Axes, epochs: Epochs) -> None:
    late = {
        epoch: [epoch - min(epoch, rank["found"]) for rank in ranks]
        for epoch, ranks in epochs.items()
        if all("found" in rank for rank in ranks)
    }
    _head(ax, "Checkpoint: epochs late", late)
    _draw_ranks(ax, late)
    top = max([1, *(max(ranks) for ranks in late.values())])
    ax.set_ylim(-0.15 * top, 1.15 * top)


def _distance(tensor: torch.Tensor, other: torch.Tensor) -> float:
    """How far a tensor is from another, as a part of that one's length; 0 if both are empty."""
    return float((tensor - other).norm() / other.norm()) if len(other) else 0.0


def _draw_ranks(ax: Axes, values: dict[int, list[float]]) -> None:
    for rank, of_rank in enumerate(zip(*values.values(), strict=True)):
        ax.plot([*values], of_rank, **LOOKS[rank])


def _from_zero(ax: Axes, values: dict[int, list[float]]) -> None:
    top = max([LEAST, *filter(math.isfinite, chain(*values.values()))])
    ax.set_ylim(-0.08 * top, 1.08 * top)


def _head(
    ax: Axes, title: str, epochs: dict[int, Any], handles: Sequence[Patch | Line2D] = ()
) -> None:
    style.head(ax, title, handles)
    ax.set_title(title, loc="left", fontsize=10, pad=8 + 14 * bool(handles))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("epoch")
    first, last = min(epochs, default=0), max(epochs, default=0)
    ax.set_xlim(first - 0.6, last + 0.6)
    ax.set_xticks(range(first, last + 1))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer="late" in title))
    _say_if_empty(ax, epochs)


def _say_if_empty(ax: Axes, values: Sized) -> None:
    if not values:
        ax.text(0.5, 0.5, "no rank came so far", transform=ax.transAxes, ha="center", va="center")
