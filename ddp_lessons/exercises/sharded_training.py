"""The checks of lesson 15b: pieces for a different number of ranks, and clipping with shards."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddp_lessons import Run
from ddp_lessons.exercises.framework import Wrong, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.exercises.numeric_answers import near, number_or_text
from ddp_lessons.exercises.sharding import kept_bytes, pieces_of
from ddp_lessons.text import count, listed, ranks_text

SHAPES: dict[str, tuple[int, ...]] = {"weight": (3, 5), "bias": (7,), "scale": (1,), "even": (4, 3)}
LOADS: dict[int, tuple[int, ...]] = {2: (4, 3, 12, 2), 1: (4,), 3: (2,)}  # loading: saving ranks

Pieces = dict[str, Tensor]


def _values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(shape, generator=generator) + 1 for name, shape in SHAPES.items()}


def _save(folder: Path, ranks: int) -> None:
    """Write the files of so many ranks: their pieces, and the shapes of the whole."""
    for rank in range(ranks):
        pieces = {name: pieces_of(value, ranks)[rank].clone() for name, value in _values().items()}
        torch.save({"shapes": SHAPES, "pieces": pieces}, folder / f"rank_{rank}.pt")


def _load_each(rank: int, load: Any, folders: Sequence[str]) -> list[Any]:
    """What `load` returned, and the bytes that it keeps, for each folder."""
    found: list[Any] = []
    for folder in folders:
        pieces = load(folder, rank, int(os.environ["WORLD_SIZE"]))
        if isinstance(pieces, Mapping) and all(isinstance(p, Tensor) for p in pieces.values()):
            kept = {str(name): kept_bytes([piece]) for name, piece in pieces.items()}
            found.append(({str(n): p.detach().clone() for n, p in pieces.items()}, kept))
        else:
            found.append((type(pieces).__name__, {}))
    return found


@exercise(
    "Put each parameter together first: `torch.cat` of the pieces of all files, in the order of "
    "the ranks, up to the number of elements that its shape has.",
    "`len(os.listdir(folder))` is how many ranks saved; `torch.Size(shape).numel()` how many "
    "elements there are.",
    "Then cut it anew: fill up with zeros to a multiple of `world_size`, "
    "`.chunk(world_size)[rank].clone()`.",
)
def check_load(load: Callable[[str, int, int], Any]) -> str:
    """Check `load(folder, rank, world_size)` with files of more and fewer ranks than load."""
    for ranks, saved in LOADS.items():
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(savers) for savers in saved]
            for path, savers in zip(folders, saved, strict=True):
                path.mkdir()
                _save(path, savers)
            names = [str(path) for path in folders]
            run = run_ranks(_load_each, (load, names), nprocs=ranks, check=False)
            if stuck(run):
                raise Wrong(
                    run.explain(),
                    "Every rank can read all files by itself: no rank needs to wait for another.",
                )
            run.raise_for_failure()
        for savers, of_ranks in zip(saved, zip(*run.values, strict=True), strict=True):
            for rank, (pieces, kept) in enumerate(of_ranks):
                _judge_loaded(savers, ranks, rank, pieces, kept)
    return "saved on 4, 3, 12 and 2 ranks, loaded on 2; on 4, loaded on 1; on 2, loaded on 3."


def _judge_loaded(saved: int, ranks: int, rank: int, pieces: Any, kept: dict[str, int]) -> None:
    told = f"saved on {count(saved, 'rank')}, loaded on {ranks}: "
    if isinstance(pieces, str):
        raise Wrong(
            f"{told}rank {rank} returned {pieces}.",
            "Return a dict: this rank's piece of every parameter, by name.",
        )
    if missing := sorted(SHAPES.keys() - pieces.keys()):
        raise Wrong(
            f"{told}rank {rank} has no {listed(missing)}.",
            "Return this rank's piece of every parameter, under its name.",
        )
    for name, value in _values().items():
        right, piece = pieces_of(value, ranks)[rank], pieces[name]
        same = piece.shape == right.shape and piece.dtype == right.dtype
        if not same or not torch.equal(piece, right):
            _explain_piece(f"{told}{name} {tuple(value.shape)} on rank {rank} ", value, piece,
                           right, saved, ranks, rank)  # fmt: skip
    for name, value in _values().items():
        least = kept_bytes([pieces_of(value, ranks)[rank].clone()])
        if kept[name] > least:
            raise Wrong(
                f"{told}rank {rank}'s piece of {name} keeps {kept[name]} bytes in memory, and it "
                f"has {least}.",
                "It is a view of something larger, which stays with it. A `clone()` of the piece "
                "lets go of the rest.",
            )


def _explain_piece(
    told: str, value: Tensor, piece: Tensor, right: Tensor, saved: int, ranks: int, rank: int
) -> None:
    old = pieces_of(value, saved)
    by_text = [old[int(n)] for n in sorted(map(str, range(saved)))]
    joined = torch.cat(old)
    sliced = value.flatten().tensor_split(ranks)[rank]

    def is_piece_of(whole: Tensor) -> bool:
        found = [pieces_of(whole, ranks)[rank], whole.flatten().tensor_split(ranks)[rank]]
        return any(piece.shape == one.shape and torch.equal(piece, one) for one in found)

    shape, asked = tuple(piece.shape), tuple(right.shape)
    mistakes = {
        f"is of {piece.dtype}.\nKeep the dtype that was saved.": piece.dtype != right.dtype,
        f"is the piece that rank {rank} of the {saved} had saved.\n"
        "With a different number of ranks the cuts lie elsewhere. Put each parameter together, "
        "then cut it anew.": piece.shape == old[min(rank, saved - 1)].shape
        and torch.equal(piece, old[min(rank, saved - 1)])
        and old[0].shape != right.shape,
        "is the whole parameter.\nA rank keeps its piece only: that is why it is in shards.": ranks
        > 1
        and torch.equal(piece.flatten(), value.flatten()),
        "comes from pieces in the wrong order.\n"
        "`rank_10.pt` stands before `rank_2.pt` in a list sorted as text. Go by the "
        "numbers.": saved > 10 and is_piece_of(torch.cat(by_text)[: value.numel()]),
        f"has the zeros in it with which {saved} ranks had filled up.\n"
        "Leave out what is beyond the number of elements that the shape has, then fill up "
        "anew.": len(joined) > value.numel() and is_piece_of(joined),
        f"has the shape {shape}, not {asked}.\n"
        "All ranks have pieces of the same length, in one dimension: fill up with zeros before "
        "you cut.": piece.shape == sliced.shape != right.shape and torch.equal(piece, sliced),
        "comes from some of the files only.\n"
        "Each file has a part of every parameter, so every rank reads all "
        "of them.": any(is_piece_of(torch.cat(old[:n])) for n in range(1, saved)),
        f"has the shape {shape}, not {asked}.\n"
        "A piece is flat, and as long on each rank: the number of elements divided by the ranks, "
        "rounded up.": piece.shape != right.shape,
        "has different values than were saved.\n"
        "Whole again, flat, it must be what the ranks had cut: pieces in the order of the ranks, "
        "then cut for `world_size` ranks, and piece `rank` of these.": True,
    }
    judge(told, mistakes)


class Clipping(NamedTuple):
    """Gradients by rank: of shards, then those that all ranks have; and the largest norm allowed.

    None is a parameter without a gradient.
    """

    what: str
    sharded: tuple[tuple[float | None, ...], ...]
    replicated: tuple[float | None, ...]
    most: float

    @property
    def norm(self) -> float:
        each = [g for of_rank in self.sharded for g in of_rank] + list(self.replicated)
        return math.sqrt(sum(g**2 for g in each if g is not None))


CLIPPINGS: dict[int, tuple[Clipping, ...]] = {
    2: (
        Clipping("two shards", ((3.0, 0.0), (4.0, 12.0)), (), 1.0),
        Clipping("a norm below the limit", ((0.3,), (0.4,)), (), 1.0),
        Clipping("two shards, a replicated one", ((3.0,), (4.0,)), (12.0,), 1.0),
        Clipping("a rank without shards", ((), (3.0, 4.0)), (), 2.5),
        Clipping("gradients that are all 0", ((0.0,), (0.0,)), (0.0,), 1.0),
        Clipping("a parameter without a gradient", ((3.0, None), (None, 4.0)), (None,), 1.0),
        Clipping("one rank above the limit, one below", ((0.1,), (4.0,)), (), 1.0),
    ),
    3: (Clipping("three shards, a replicated one", ((2.0,), (3.0,), (6.0,)), (24.0,), 5.0),),
    1: (Clipping("one rank", ((3.0,),), (4.0,), 1.0),),
}
Clipped = tuple[Any, list[float | None], list[float | None]]


@in_group
def _clip_each(rank: int, clip: Any, clippings: Sequence[Clipping]) -> list[Clipped]:
    """What `clip` returned and left in the gradients, in each case."""
    found: list[Clipped] = []
    for clipping in clippings:
        sharded = [_with_gradient(g) for g in clipping.sharded[rank]]
        replicated = [_with_gradient(g) for g in clipping.replicated]
        returned = clip(sharded, replicated, clipping.most)
        left = [_gradient(p) for p in sharded], [_gradient(p) for p in replicated]
        found.append((number_or_text(returned), *left))
    return found


def _with_gradient(value: float | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(3))
    if value is not None:
        parameter.grad = torch.tensor([0.0, value, 0.0])
    return parameter


def _gradient(parameter: nn.Parameter) -> float | None:
    return None if parameter.grad is None else float(parameter.grad.sum())


@exercise(
    "Each rank adds up the squares of its shards' gradients; one `all_reduce` adds up those of all "
    "ranks, also of a rank that has none.",
    "The gradients of `replicated` are the same on all ranks: add their squares after the "
    "`all_reduce`, once.",
    "`norm = total.sqrt()`; multiply every gradient by `min(1, max_norm / (norm + 1e-6))`; "
    "`return norm`.",
)
def check_clip(clip: Callable[..., Any]) -> str:
    """Check `clip(sharded, replicated, max_norm)`: one norm over all shards, the same factor."""
    for ranks, clippings in CLIPPINGS.items():
        run = run_ranks(_clip_each, (clip, clippings), nprocs=ranks, check=False)
        if stuck(run):
            _explain_stuck(run)
        run.raise_for_failure()
        for clipping, of_ranks in zip(clippings, zip(*run.values, strict=True), strict=True):
            _judge_clipping(clipping, list(of_ranks))
    total = sum(map(len, CLIPPINGS.values()))
    return f"one norm and one factor on all ranks, in {total} cases on 2, 3 and 1 ranks."


def _explain_stuck(run: Run) -> None:
    raise Wrong(
        run.explain(),
        "Whether a rank has shards, and whether its own norm is small, must not decide whether it "
        "makes the call: every rank calls, and then all decide by the same number.",
    )


def _judge_clipping(clipping: Clipping, of_ranks: list[Clipped]) -> None:
    norm = clipping.norm
    factor = min(1.0, clipping.most / norm) if norm else 1.0
    ratios = [_ratios(clipping, rank, clipped) for rank, clipped in enumerate(of_ranks)]
    factors = [of_rank[0] if of_rank else None for of_rank in ratios]
    squares = [sum(g**2 for g in each if g is not None) for each in clipping.sharded]
    alone = [math.sqrt(s) for s in squares]
    own = sum(g**2 for g in clipping.replicated if g is not None)
    returned = [clipped[0] for clipped in of_ranks]
    ranks = len(of_ranks)

    def used(*norms: float) -> bool:
        """Whether the norm, or the factor that was used, comes from these, by rank."""
        norms = norms if len(norms) > 1 else norms * ranks
        told = all(near(said, n, 1e-3) for said, n in zip(returned, norms, strict=True))
        return told or _factors_from(clipping, factors, norms)

    told = _listed_numbers(returned)
    right_factor = all(near(ratio, factor, 1e-3) for of_rank in ratios for ratio in of_rank)
    right_norm = all(near(said, norm, 1e-3) for said in returned)
    wrong = not (right_factor and right_norm)
    untouched = _untouched(clipping, of_ranks)
    nan = [r for r, f in enumerate(factors) if f is not None and math.isnan(f)]
    mistakes = {
        f"the gradients of {ranks_text(nan or [0])} are nan.\n"
        "0 divided by 0: add a small number to the norm, as `clip_grad_norm_` does, or leave "
        "gradients alone that need no clipping.": bool(nan),
        f"the ranks found the norms {told}.\n"
        "Each rank has clipped by the norm of what it has itself, so the ranks used different "
        "factors. Add up the squares over the ranks first.": wrong
        and ranks > 1
        and len({round(s, 6) for s in squares}) > 1
        and (used(*(math.sqrt(s + own) for s in squares)) or used(*alone)),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        f"The replicated parameters were counted {ranks} times: every rank adds them to its part. "
        "They are the same gradients; add their squares once, after the "
        "`all_reduce`.": wrong
        and own
        and ranks > 1
        and used(math.sqrt(sum(squares) + ranks * own)),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        "The gradients of the replicated parameters belong to the norm, "
        "too.": wrong and own and used(math.sqrt(sum(squares))),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        "Norms cannot be added: their squares can. Square, add up over the ranks, and take the "
        "root at the end.": wrong and ranks > 1 and used(sum(alone) + math.sqrt(own)),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        "Shards are parts, so the squares are added up. A mean over the ranks makes the norm too "
        "small.": wrong and ranks > 1 and used(math.sqrt(sum(squares) / ranks + own)),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        "The largest of the ranks' norms is not the norm of all: add up the "
        "squares.": wrong and ranks > 1 and used(max(math.sqrt(s + own) for s in squares)),
        f"the norm is {norm:.4g}, and you found {told}.\n"
        "That is the sum of the squares: the norm is its root.": wrong and used(norm**2),
        "a gradient grew.\n"
        "A norm below the limit is left alone: the factor is never larger than "
        "1.": any(f is not None and f > 1.001 for f in factors),
        f"the gradients of {' and '.join(untouched)} were not clipped.\n"
        "One factor for all gradients, those of shards and the replicated ones, or the step has "
        "a different direction.": not right_factor and untouched,
        f"the norm is {norm:.4g}, and you returned {told}.\n"
        "Return the norm before clipping, on every rank.": right_factor and not right_norm,
        f"the norm is {norm:.4g} and the limit {clipping.most:g}, but the gradients were "
        f"multiplied by {_listed_numbers(factors)}, not by {factor:.4g}.\n"
        "Multiply every gradient in place by `max_norm / norm`, if that is below 1.": wrong,
    }
    judge(f"{clipping.what} on {count(ranks, 'rank')}: ", mistakes)


def _ratios(clipping: Clipping, rank: int, clipped: Clipped) -> list[float]:
    """By what a rank multiplied each gradient that is not 0; nan if any became so."""
    before = [*clipping.sharded[rank], *clipping.replicated]
    after = [*clipped[1], *clipped[2]]
    if any(g is not None and math.isnan(g) for g in after):
        return [math.nan]
    return [(b or 0.0) / a for a, b in zip(before, after, strict=True) if a]


def _factors_from(
    clipping: Clipping, factors: Sequence[float | None], norms: Sequence[float]
) -> bool:
    """Whether ranks that have gradients used these norms to clip."""
    pairs = [(f, n) for f, n in zip(factors, norms, strict=True) if f is not None and n > 0]
    if all(near(f, min(1.0, clipping.most / clipping.norm), 1e-3) for f, _ in pairs):
        return False
    return bool(pairs) and all(near(f, min(1.0, clipping.most / n), 1e-3) for f, n in pairs)


def _untouched(clipping: Clipping, of_ranks: list[Clipped]) -> list[str]:
    """The groups of parameters that are as they were although some were clipped."""
    before = (
        [g for each in clipping.sharded for g in each],
        list(clipping.replicated) * len(of_ranks),
    )
    after = ([g for c in of_ranks for g in c[1]], [g for c in of_ranks for g in c[2]])
    names = ("the shards", "the replicated parameters")
    same = [
        name
        for name, one, other in zip(names, before, after, strict=True)
        if any(one) and one == [g if g is None else round(g, 6) for g in other]
    ]
    return same if len(same) < sum(any(each) for each in before) else []


def _listed_numbers(values: Sequence[Any]) -> str:
    texts = [f"{v:.4g}" if isinstance(v, int | float) else str(v) for v in values]
    return texts[0] if len(set(texts)) == 1 else listed(texts)
