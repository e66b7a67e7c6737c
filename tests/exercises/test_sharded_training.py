"""Checks of lesson 15b: right answers pass, wrong ones get the right explanation."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ddp_lessons.exercises.sharded_training import check_clip, check_load
from tests.support import answers

pytestmark = pytest.mark.ranks
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as functions from a cell are
cloudpickle.register_pickle_by_value(answers)


def files(folder: str) -> list[Any]:
    number = len(list(Path(folder).iterdir()))
    return [torch.load(f"{folder}/rank_{rank}.pt") for rank in range(number)]


def own(flat: Any, rank: int, world_size: int) -> Any:
    return pad(flat, (0, -len(flat) % world_size)).chunk(world_size)[rank].clone()


def size_of(shape: Any) -> int:
    return math.prod(shape)


def load(folder: str, rank: int, world_size: int) -> Any:
    of_ranks = files(folder)
    return {
        name: own(
            torch.cat([one["pieces"][name] for one in of_ranks])[: size_of(shape)],
            rank,
            world_size,
        )
        for name, shape in of_ranks[0]["shapes"].items()
    }


def by_element(folder: str, rank: int, world_size: int) -> Any:
    """Looks up each element where it lies."""
    of_ranks, found = files(folder), {}
    for name, shape in of_ranks[0]["shapes"].items():
        total, old = size_of(shape), len(of_ranks[0]["pieces"][name])
        new = -(-total // world_size)
        found[name] = torch.zeros(new)
        for place in range(new):
            at = rank * new + place
            if at < total:
                found[name][place] = of_ranks[at // old]["pieces"][name][at % old]
    return found


def in_numpy(folder: str, rank: int, world_size: int) -> Any:
    of_ranks, found = files(folder), {}
    for name, shape in of_ranks[0]["shapes"].items():
        whole = np.concatenate([one["pieces"][name].numpy() for one in of_ranks])[: size_of(shape)]
        whole = np.append(whole, np.zeros(-len(whole) % world_size, dtype=whole.dtype))
        found[name] = torch.tensor(whole.reshape(world_size, -1)[rank])
    return found


def into_its_own(folder: str, rank: int, world_size: int) -> Any:
    """One file after the other, of which it copies what it needs."""
    pieces: dict[str, Any] = {}
    for number, one in enumerate(files(folder)):
        for name, piece in one["pieces"].items():
            total = size_of(one["shapes"][name])
            new = -(-total // world_size)
            target = pieces.setdefault(name, piece.new_zeros(new))
            at = number * len(piece)
            low, high = max(at, rank * new), min(at + len(piece), (rank + 1) * new, total)
            if low < high:
                target[low - rank * new : high - rank * new] = piece[low - at : high - at]
    return pieces


class Ordered(dict[str, Any]):
    pass


def as_parameters(*given: Any) -> Any:
    return Ordered({name: torch.nn.Parameter(p) for name, p in load(*given).items()})


def edited(edit: Any) -> Any:
    """`load` with what `edit(piece, name, rank, world_size)` makes of each piece."""

    def answer(folder: str, rank: int, world_size: int) -> Any:
        pieces = load(folder, rank, world_size)
        return {name: edit(piece, name, rank, world_size) for name, piece in pieces.items()}

    return answer


def reads(choose: Any = list, cuts: bool = True, own: Any = own) -> Any:
    """`load` from the files that `choose` takes of all, with or without the zeros in them."""

    def answer(folder: str, rank: int, world_size: int) -> Any:
        of_ranks = choose(files(folder))
        found = {}
        for name, shape in of_ranks[0]["shapes"].items():
            whole = torch.cat([one["pieces"][name] for one in of_ranks])
            found[name] = own(whole[: size_of(shape)] if cuts else whole, rank, world_size)
        return found

    return answer


def sorted_as_text(of_ranks: list[Any]) -> list[Any]:
    return [of_ranks[int(n)] for n in sorted(map(str, range(len(of_ranks))))]


def first_ranks(folder: str, rank: int, world_size: int) -> Any:
    return reads(lambda all_of: all_of[:world_size])(folder, rank, world_size)


def its_own_file(folder: str, rank: int, world_size: int) -> Any:
    return files(folder)[rank]["pieces"]


def as_a_view(flat: Any, rank: int, world_size: int) -> Any:
    return pad(flat, (0, -len(flat) % world_size)).chunk(world_size)[rank]


def unfilled(flat: Any, rank: int, world_size: int) -> Any:
    return flat.tensor_split(world_size)[rank].clone()


def waits_for_all(folder: str, rank: int, world_size: int) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    pieces = load(folder, rank, world_size)
    if rank == 0:
        dist.barrier()
    return pieces


def clip(sharded: Any, replicated: Any, max_norm: float) -> Any:
    total = squares(sharded)
    dist.all_reduce(total)
    norm = (total + squares(replicated)).sqrt()
    return scaled([*sharded, *replicated], norm, max_norm)


def squares(parameters: Any) -> Any:
    return sum(
        (p.grad.square().sum() for p in parameters if p.grad is not None), start=torch.zeros(())
    )


def scaled(parameters: Any, norm: Any, max_norm: float) -> Any:
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for p in parameters:
        if p.grad is not None:
            p.grad *= factor
    return norm


def shares_the_replicated(sharded: Any, replicated: Any, max_norm: float) -> float:
    """Each rank counts its share of what all have."""
    total = squares(sharded) + squares(replicated) / dist.get_world_size()
    dist.all_reduce(total)
    return float(scaled([*sharded, *replicated], total.sqrt(), max_norm))


def rank_0_counts_the_replicated(sharded: Any, replicated: Any, max_norm: float) -> Any:
    total = squares(sharded) + (squares(replicated) if dist.get_rank() == 0 else 0)
    each = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(each, total)
    norm = torch.stack(each).sum().sqrt()
    if norm > max_norm:
        scaled([*sharded, *replicated], norm, max_norm)
    return norm


def with_torch(sharded: Any, replicated: Any, max_norm: float) -> Any:
    """torch's function for what it can do: with a norm that is given."""
    norms = torch.zeros(dist.get_world_size())
    norms[dist.get_rank()] = squares(sharded).sqrt()
    dist.all_reduce(norms, op=dist.ReduceOp.MAX)
    norm = torch.cat([norms, squares(replicated).sqrt()[None]]).norm()
    torch.nn.utils.clip_grads_with_norm_([*sharded, *replicated], max_norm, norm)
    return norm.item()


def in_objects(sharded: Any, replicated: Any, max_norm: float) -> Any:
    gradients = [p.grad.tolist() for p in sharded if p.grad is not None]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, gradients)
    flat = [g for of_rank in everybody for of_one in of_rank for g in of_one]
    flat += [g for p in replicated if p.grad is not None for g in p.grad.tolist()]
    norm = np.float64(math.hypot(*flat))
    return scaled([*sharded, *replicated], norm, max_norm)


def clips(total: Any) -> Any:
    """Clips by the norm that `total(sharded, replicated)` gives."""
    return lambda sharded, replicated, max_norm: scaled(
        [*sharded, *replicated], total(sharded, replicated), max_norm
    )


def reduced(value: Any, op: Any = dist.ReduceOp.SUM) -> Any:
    value = torch.as_tensor(value).clone()
    dist.all_reduce(value, op=op)
    return value


def only_sharded(sharded: Any, replicated: Any, max_norm: float) -> Any:
    norm = (reduced(squares(sharded)) + squares(replicated)).sqrt()
    return scaled(sharded, norm, max_norm)


def always_to_the_limit(sharded: Any, replicated: Any, max_norm: float) -> Any:
    norm = (reduced(squares(sharded)) + squares(replicated)).sqrt()
    for p in [*sharded, *replicated]:
        if p.grad is not None:
            p.grad *= max_norm / (norm + 1e-6)
    return norm


def divides_by_zero(sharded: Any, replicated: Any, max_norm: float) -> Any:
    norm = (reduced(squares(sharded)) + squares(replicated)).sqrt()
    for p in [*sharded, *replicated]:
        if p.grad is not None:
            p.grad *= torch.clamp(max_norm / norm, max=1.0) if norm else norm / norm
    return norm


def leaves_early(sharded: Any, replicated: Any, max_norm: float) -> Any:
    if not sharded:
        return 5.0
    return clip(sharded, replicated, max_norm)


def calls_only_above(sharded: Any, replicated: Any, max_norm: float) -> Any:
    norm = (squares(sharded) + squares(replicated)).sqrt()
    if norm > max_norm:
        return clip(sharded, replicated, max_norm)
    return norm


def replaces(sharded: Any, replicated: Any, max_norm: float) -> Any:
    """Leaves the gradients as they are, and changes copies."""
    norm = (reduced(squares(sharded)) + squares(replicated)).sqrt()
    [p.grad * max_norm / norm for p in [*sharded, *replicated] if p.grad is not None]
    return norm


RIGHT: list[tuple[Any, Any]] = [
    (check_load, load),
    (check_load, by_element),
    (check_load, in_numpy),
    (check_load, into_its_own),
    (check_load, as_parameters),
    (check_load, answers.Called(answers.decorated(load))),
    (check_clip, clip),
    (check_clip, answers.mixed(shares_the_replicated, in_objects, with_torch)),
    (check_clip, answers.mixed(with_torch, rank_0_counts_the_replicated, in_objects)),
    (check_clip, rank_0_counts_the_replicated),
    (check_clip, partial(answers.decorated(shares_the_replicated))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_load, its_own_file, r"saved on 4 ranks, loaded on 2.*piece that rank 0 .* had saved"),
    (check_load, first_ranks, "is the piece that rank 0 of the 4 had saved"),
    (check_load, reads(lambda all_of: all_of[:-1]), "comes from some of the files only"),
    (check_load, reads(cuts=False), "has the zeros in it with which 4 ranks"),
    (check_load, reads(sorted_as_text), "saved on 12 ranks.*wrong order.*sorted as text"),
    (check_load, reads(lambda all_of: all_of[::-1]), "has different values than were saved"),
    (check_load, reads(own=lambda flat, rank, world_size: flat), "is the whole parameter"),
    (check_load, reads(own=unfilled), "fill up with zeros before you cut"),
    (check_load, reads(own=as_a_view), "keeps .* bytes in memory.*a view"),
    (check_load, edited(lambda p, *_: p.double()), "is of torch.float64.*Keep the dtype"),
    (check_load, edited(lambda p, *_: p[None]), r"has the shape \(1, .*A piece is flat"),
    (
        check_load,
        lambda f, rank, world_size: load(f, world_size - 1 - rank, world_size),
        "different values than were saved.*piece `rank` of these",
    ),
    (check_load, lambda *given: list(load(*given).values()), "rank 0 returned list.*a dict"),
    (check_load, answers.prints(load), "rank 0 returned NoneType.*a dict"),
    (check_load, lambda *given: {**load(*given), "bias": 1}, "rank 0 returned dict.*a dict"),
    (check_load, lambda *given: {"bias": load(*given)["bias"]}, "has no even, scale and weight"),
    (check_load, waits_for_all, "no rank needs to wait for another"),
    (check_load, lambda folder: 1, "failed on real ranks.*TypeError"),
    (check_load, answers.recurses, "RecursionError"),
    (
        check_clip,
        clips(lambda s, r: (squares(s) + squares(r)).sqrt()),
        "two shards on 2 ranks: the ranks found the norms 3 and 12.65.*Add up the squares",
    ),
    (
        check_clip,
        clips(lambda s, r: reduced(squares(s) + squares(r)).sqrt()),
        "the norm is 13, and you found 17.69.*counted 2 times",
    ),
    (check_clip, clips(lambda s, r: reduced(squares(s)).sqrt()), "found 5.*belong to the norm"),
    (
        check_clip,
        clips(lambda s, r: reduced(squares(s).sqrt()) + squares(r).sqrt()),
        "found 15.65.*Norms cannot be added",
    ),
    (
        check_clip,
        clips(lambda s, r: (reduced(squares(s)) / dist.get_world_size() + squares(r)).sqrt()),
        "A mean over the ranks",
    ),
    (
        check_clip,
        clips(lambda s, r: reduced((squares(s) + squares(r)).sqrt(), dist.ReduceOp.MAX)),
        "largest of the ranks' norms",
    ),
    (
        check_clip,
        clips(lambda s, r: reduced(squares(s)) + squares(r)),
        "found 169.*the norm is its root",
    ),
    (check_clip, only_sharded, "gradients of the replicated parameters were not clipped"),
    (check_clip, always_to_the_limit, "a norm below the limit.*a gradient grew"),
    (check_clip, divides_by_zero, "gradients that are all 0.*nan.*0 divided by 0"),
    (check_clip, leaves_early, "every rank calls, and then all decide"),
    (check_clip, calls_only_above, "every rank calls, and then all decide"),
    (check_clip, replaces, "multiplied by 1, not by 0.07692.*in place"),
    (check_clip, answers.prints(clip), "you returned None.*norm before clipping"),
    (
        check_clip,
        lambda s, r, most: min(float(clip(s, r, most)), most),
        "you returned 1.*norm before clipping",
    ),
    (check_clip, lambda sharded: 1, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
