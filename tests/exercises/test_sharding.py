"""Checks of lesson 15: right answers pass, wrong ones get the right explanation."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from ddp_lessons.exercises.sharding import check_bytes, check_stage_2
from tests.support import answers

pytestmark = pytest.mark.ranks
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as functions from a cell are
cloudpickle.register_pickle_by_value(answers)


def as_flat(p: Any) -> Any:
    flat = pad(p.data.flatten(), (0, -p.numel() % dist.get_world_size()))
    p.data = flat[: p.numel()].view_as(p)
    return flat


def cut(flat: Any) -> Any:
    return list(flat.chunk(dist.get_world_size()))


def own_sum(grad: Any) -> Any:
    flat = pad(grad.flatten(), (0, -grad.numel() % dist.get_world_size()))
    own = torch.empty_like(cut(flat)[0])
    dist.reduce_scatter(own, cut(flat))
    return own


def own_mean(grad: Any) -> Any:
    return own_sum(grad) / dist.get_world_size()


def own_alone(grad: Any) -> Any:
    flat = pad(grad.flatten(), (0, -grad.numel() % dist.get_world_size()))
    return cut(flat)[dist.get_rank()].clone()


def own_mean_of_all(grad: Any) -> Any:
    """From an all_reduce of the whole."""
    dist.all_reduce(grad)
    return own_alone(grad) / dist.get_world_size()


def adds(shard: Any, own: Any) -> Any:
    return own if shard.grad is None else shard.grad + own


def sharded(
    model: Any,
    make_optimizer: Any,
    *,
    own: Any = own_mean,
    put: Any = adds,
    gathers: bool = True,
    frozen_too: bool = False,
    drops: bool = True,
) -> Any:
    """Stage 2, with parts that can be replaced."""
    params = [p for p in model.parameters() if frozen_too or p.requires_grad]
    flats = {p: as_flat(p) for p in params}
    shards = {p: nn.Parameter(cut(flat)[dist.get_rank()]) for p, flat in flats.items()}
    optimizer = make_optimizer(shards.values())

    def scatter(p: Any) -> None:
        shards[p].grad = put(shards[p], own(p.grad))
        if drops:
            p.grad = None

    def gather(*_: Any) -> None:
        for p, shard in shards.items():
            dist.all_gather(cut(flats[p]), shard.data)

    for p in shards:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(scatter)
    if gathers:
        optimizer.register_step_post_hook(gather)
    return optimizer


class Wrapped:
    """An optimizer of its own: `step` and `zero_grad` around the given one."""

    def __init__(self, model: Any, make_optimizer: Any) -> None:
        self.model = model
        self.shards = [nn.Parameter(own_alone(p.data)) for p in model.parameters()]
        self.inner = make_optimizer(self.shards)
        for p, shard in zip(model.parameters(), self.shards, strict=True):
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(partial(self.keep, shard))

    def keep(self, shard: Any, p: Any) -> None:
        if shard.grad is None:
            shard.grad = torch.zeros_like(shard)
        shard.grad += own_mean(p.grad)
        p.grad = None

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()
        for p, shard in zip(self.model.parameters(), self.shards, strict=True):
            whole = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
            dist.all_gather(whole, shard.data)
            p.data.copy_(torch.cat(whole)[: p.numel()].view_as(p))


def in_one_tensor(model: Any, make_optimizer: Any) -> Any:
    """All trained parameters in one flat tensor; gradients go into the rank's part of it."""
    params = [p for p in model.parameters() if p.requires_grad]
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.cat([p.data.flatten() for p in params])
    whole = pad(whole, (0, -len(whole) % ranks))
    shard = nn.Parameter(cut(whole)[rank].clone())
    optimizer = make_optimizer([shard])
    first = rank * len(shard)
    at = 0
    for p in params:

        def reduce(p: Any, at: int = at) -> None:
            flat = p.grad.flatten() / ranks
            dist.all_reduce(flat)
            shard.grad = torch.zeros_like(shard) if shard.grad is None else shard.grad
            low, high = max(at, first), min(at + p.numel(), first + len(shard))
            if low < high:
                shard.grad[low - first : high - first] += flat[low - at : high - at]
            p.grad = None

        p.register_post_accumulate_grad_hook(reduce)
        at += p.numel()

    def gather(*_: Any) -> None:
        dist.all_gather(cut(whole), shard.data)
        sizes = [p.numel() for p in params]
        for p, new in zip(params, whole[: sum(sizes)].split(sizes), strict=True):
            p.data.copy_(new.view_as(p))

    optimizer.register_step_post_hook(gather)
    return optimizer


def overwrites(model: Any, make_optimizer: Any) -> Any:
    return sharded(model, make_optimizer, put=lambda shard, own: own)


def adds_elsewhere(model: Any, make_optimizer: Any) -> Any:
    """The sums are where `zero_grad` finds nothing."""
    sums: dict[Any, Any] = {}

    def put(shard: Any, own: Any) -> Any:
        sums[shard] = sums.get(shard, 0) + own
        return sums[shard].clone()

    return sharded(model, make_optimizer, put=put)


def all_in_step(model: Any, make_optimizer: Any) -> Any:
    """Stage 1."""
    params = [p for p in model.parameters() if p.requires_grad]
    flats = {p: as_flat(p) for p in params}
    shards = {p: nn.Parameter(cut(flat)[dist.get_rank()]) for p, flat in flats.items()}
    optimizer = make_optimizer(shards.values())

    def scatter(*_: Any) -> None:
        for p, shard in shards.items():
            shard.grad = own_mean(p.grad)
            p.grad = None

    def gather(*_: Any) -> None:
        for p, shard in shards.items():
            dist.all_gather(cut(flats[p]), shard.data)

    optimizer.register_step_pre_hook(scatter)
    optimizer.register_step_post_hook(gather)
    return optimizer


def whole_state(model: Any, make_optimizer: Any) -> Any:
    """Every rank updates everything, from gradients that travelled whole."""
    params = list(model.parameters())
    copies = {p: nn.Parameter(p.data) for p in params}
    optimizer = make_optimizer(copies.values())

    def reduce(p: Any) -> None:
        dist.all_reduce(p.grad)
        copies[p].grad = adds(copies[p], p.grad / dist.get_world_size())
        p.grad = None

    for p in params:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(reduce)
    return optimizer


def only_rank_0_scatters(model: Any, make_optimizer: Any) -> Any:
    def own(grad: Any) -> Any:
        return own_mean(grad) if dist.get_rank() == 0 else own_alone(grad)

    return sharded(model, make_optimizer, own=own)


def cuts_short(model: Any, make_optimizer: Any) -> Any:
    """Leaves out what does not divide."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    params = [p for p in model.parameters() if p.requires_grad]
    sizes = {p: p.numel() // ranks for p in params}
    shards = {
        p: nn.Parameter(p.data.flatten()[rank * n : (rank + 1) * n].clone())
        for p, n in sizes.items()
    }
    optimizer = make_optimizer(shards.values())

    def scatter(p: Any) -> None:
        n = sizes[p]
        own = torch.empty_like(shards[p])
        dist.reduce_scatter(
            own, list(p.grad.flatten()[: n * ranks].split(n) if n else [own] * ranks)
        )
        shards[p].grad = adds(shards[p], own / ranks)
        p.grad = None

    def gather(*_: Any) -> None:
        for p, shard in shards.items():
            whole = [torch.empty_like(shard) for _ in range(ranks)]
            dist.all_gather(whole, shard.data)
            p.data.view(-1)[: sizes[p] * ranks] = torch.cat(whole)

    for p in params:
        p.register_post_accumulate_grad_hook(scatter)
    optimizer.register_step_post_hook(gather)
    return optimizer


def broadcasts(model: Any, make_optimizer: Any) -> Any:
    optimizer = sharded(model, make_optimizer, gathers=False)
    optimizer.register_step_post_hook(
        lambda *_: [dist.broadcast(p.data, src=0) for p in model.parameters()]
    )
    return optimizer


def twice_the_rate(model: Any, make_optimizer: Any) -> Any:
    optimizer = sharded(model, make_optimizer)
    optimizer.param_groups[0]["lr"] *= 2.5
    return optimizer


def forgets_to_step(model: Any, make_optimizer: Any) -> Any:
    shards = [nn.Parameter(own_alone(p.data)) for p in model.parameters()]
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return make_optimizer(shards)


def piece(size: int, ranks: int) -> int:
    return -(-size // ranks)


def predict(stage: int, ranks: int, sizes: Any, optimizer: str) -> Any:
    pieces = sum(piece(size, ranks) for size in sizes)
    whole = sum(sizes)
    parameters = [whole, pieces * ranks, pieces * ranks, pieces][stage]
    gradients = [whole, whole + pieces, pieces, pieces][stage]
    moments = {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    return 4 * parameters, 4 * gradients, 4 * moments * (pieces if stage else whole)


def predict_slowly(stage: int, ranks: int, sizes: Any, optimizer: str) -> Any:
    total = [0, 0, 0]
    for size in sizes:
        filled = size
        while stage and filled % ranks:
            filled += 1
        part = filled // ranks if stage else size
        total[0] += 4 * (part if stage == 3 else filled)
        total[1] += 4 * (part if stage >= 2 else size + (part if stage == 1 else 0))
        total[2] += 4 * part * ["SGD", "momentum", "Adam"].index(optimizer)
    return total


def in_tensors(*given: Any) -> Any:
    return torch.tensor(predict(*given), dtype=torch.float64)


def in_numpy(*given: Any) -> Any:
    return tuple(np.int64(n) for n in predict(*given))


def one_by_one(*given: Any) -> Any:
    yield from predict(*given)


def edited(edit: Any) -> Any:
    """`predict` with what `edit(answer, stage, ranks, sizes, optimizer)` makes of its answer."""
    return lambda *given: edit(list(predict(*given)), *given)


def without_padding(stage: int, ranks: int, sizes: Any, optimizer: str) -> Any:
    whole = 4 * sum(sizes)
    part = whole / ranks
    moments = {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    return (
        part if stage == 3 else whole,
        [whole, whole + part, part, part][stage],
        moments * (part if stage else whole),
    )


def padded_together(stage: int, ranks: int, sizes: Any, optimizer: str) -> Any:
    return predict(stage, ranks, [sum(sizes)], optimizer)


def rounded_down(stage: int, ranks: int, sizes: Any, optimizer: str) -> Any:
    return predict(
        stage, ranks, [size - size % ranks for size in sizes] if stage else sizes, optimizer
    )


RIGHT: list[tuple[Any, Any]] = [
    (check_stage_2, sharded),
    (check_stage_2, answers.mixed(Wrapped, answers.Called(sharded), in_one_tensor)),
    (check_stage_2, answers.mixed(in_one_tensor, partial(sharded, own=own_mean_of_all), Wrapped)),
    (check_stage_2, answers.mixed(answers.Called(sharded), Wrapped, in_one_tensor)),
    (check_stage_2, answers.decorated(partial(sharded, own=own_mean_of_all, frozen_too=True))),
    (check_bytes, predict),
    (check_bytes, predict_slowly),
    (check_bytes, in_tensors),
    (check_bytes, in_numpy),
    (check_bytes, one_by_one),
    (check_bytes, answers.decorated(predict)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_stage_2, partial(sharded, own=own_sum), "2 times too large.*the mean"),
    (check_stage_2, overwrites, "3 backwards before each.*only the last backward"),
    (check_stage_2, adds_elsewhere, "gradients of earlier steps counted again.*zero_grad"),
    (check_stage_2, partial(sharded, gathers=False), "different weights.*all_gather"),
    (check_stage_2, partial(sharded, drops=False), "still has gradients of .*p.grad = None"),
    (check_stage_2, all_in_step, "after backward a rank still has gradients"),
    (check_stage_2, partial(sharded, own=own_alone), "with its own gradient.*reduce_scatter"),
    (check_stage_2, whole_state, "bytes of optimizer state.*this rank's pieces alone"),
    (check_stage_2, answers.prints(sharded), "it returned NoneType.*Return the optimizer"),
    (check_stage_2, only_rank_0_scatters, "2 ranks: .*same calls in the same order"),
    (check_stage_2, cuts_short, "3 ranks.*last elements of a parameter"),
    (check_stage_2, broadcasts, "only the elements of rank 0's pieces have moved.*all_gather"),
    (check_stage_2, twice_the_rate, "equal weights, but not with those of DDP"),
    (check_stage_2, forgets_to_step, "have not moved"),
    (check_stage_2, lambda model: 1, "failed on real ranks.*TypeError"),
    (check_stage_2, answers.recurses, "RecursionError"),
    (check_bytes, edited(lambda a, *_: [n / 4 for n in a]), "number of elements.*4 bytes"),
    (check_bytes, edited(lambda a, *_: sum(a)), "returned 64|you returned.*three numbers"),
    (check_bytes, edited(lambda a, *_: a[:2]), "you returned.*three numbers"),
    (check_bytes, answers.prints(predict), "you returned None.*three numbers"),
    (check_bytes, edited(lambda a, *_: map(str, a)), "you predicted '48'"),
    (check_bytes, lambda *given: [*predict(*given)[:2], 96], "SGD without momentum keeps nothing"),
    (
        check_bytes,
        lambda stage, ranks, sizes, name: predict(
            stage, ranks, sizes, "momentum" if name == "Adam" else name
        ),
        "Adam keeps two numbers",
    ),
    (
        check_bytes,
        lambda stage, ranks, sizes, name: predict(0, ranks, sizes, name),
        "stage 1 on 2 ranks.*in stage 1 backward leaves|stage 1.*In stage 1",
    ),
    (
        check_bytes,
        lambda stage, ranks, sizes, name: predict(stage and 3, ranks, sizes, name),
        "stage 1 on 2 ranks.*every rank still has the whole",
    ),
    (
        check_bytes,
        lambda stage, ranks, sizes, name: predict(min(stage, 2), ranks, sizes, name),
        "stage 3 on 2 ranks.*That is the whole",
    ),
    (
        check_bytes,
        edited(lambda a, stage, ranks, sizes, name: [*a[:2], a[2] * (ranks if stage else 1)]),
        "optimizer state.*That is the whole",
    ),
    (
        check_bytes,
        edited(
            lambda a, stage, ranks, sizes, n: [a[0], 4 * sum(sizes) if stage == 1 else a[1], a[2]]
        ),
        "stage 1.*pieces of the mean come on top",
    ),
    (check_bytes, without_padding, r"3 ranks, sizes \[10, 7, 1\].*filled up"),
    (check_bytes, padded_together, r"3 ranks, sizes \[10, 7, 1\]"),
    (check_bytes, rounded_down, r"3 ranks, sizes \[10, 7, 1\]"),
    (
        check_bytes,
        lambda stage, ranks, sizes, name: predict(
            stage, ranks, sizes if stage else [piece(n, ranks) * ranks for n in sizes], name
        ),
        "stage 0.*DDP fills nothing up",
    ),
    (check_bytes, answers.recurses, "raised RecursionError"),
    (check_bytes, lambda stage: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
