"""The checks of lesson 06: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import sys
import time
import types
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.data_parallel_by_hand import check_begin, check_my_ddp, check_weigh
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class MyDDP:
    def start(self, model: Any) -> None:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)

    def average_gradients(self, model: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.average(parameter.grad)

    def average(self, tensor: Any) -> None:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


class NoBroadcast(MyDDP):
    def start(self, model: Any) -> None:
        model.train()


class MeanOfWeights(MyDDP):
    def start(self, model: Any) -> None:
        for parameter in model.parameters():
            self.average(parameter.data)


class Sum(MyDDP):
    def average(self, tensor: Any) -> None:
        dist.all_reduce(tensor)


class OnlyRankZero(MyDDP):
    def average(self, tensor: Any) -> None:
        copy = tensor.clone()
        dist.reduce(copy, dst=0)
        if dist.get_rank() == 0:
            tensor.copy_(copy / dist.get_world_size())


class Local(MyDDP):
    def average(self, tensor: Any) -> None:
        tensor /= 1


class RankZeros(MyDDP):
    def average(self, tensor: Any) -> None:
        dist.broadcast(tensor, src=0)


class SkipsMissing(MyDDP):
    def average_gradients(self, model: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self.average(parameter.grad)


class ForgetsMissing(MyDDP):
    def average_gradients(self, model: Any) -> None:
        for parameter in model.parameters():
            self.average(parameter.grad)


class AveragesWeights(MyDDP):
    """Local steps, then averaged weights, expressed as gradients."""

    def average_gradients(self, model: Any) -> None:
        for parameter in model.parameters():
            self.average(parameter.data)


def weigh(loss: Any, n: int, way: str = "right") -> Any:
    total = torch.tensor(float(n))
    dist.all_reduce(total)
    world_size = dist.get_world_size()
    return {
        "right": lambda: loss * n * world_size / total,
        "mean": lambda: loss,
        "part": lambda: loss * n / total,
        "count": lambda: loss * n,
        "twice": lambda: loss * n * world_size**2 / total,
        "inverse": lambda: loss / n * total / world_size,
    }[way]()


def weigh_by(way: str) -> Any:
    return lambda loss, n: weigh(loss, n, way)


def begin(rank: int, seed: int, make_model: Any, of_model: Any = None, of_noise: Any = None) -> Any:
    torch.manual_seed(seed if of_model is None else of_model(rank, seed))
    model = make_model()
    if of_noise is not None:
        torch.manual_seed(of_noise(rank, seed))
    return model


def begin_with(of_noise: Any, of_model: Any = None) -> Any:
    return lambda rank, seed, make: begin(rank, seed, make, of_model, of_noise)


def plus(rank: int, seed: int) -> int:
    return rank + seed


class Bucketed(MyDDP):
    """All weights in one tensor, and all gradients in one."""

    def start(self, model: Any) -> None:
        flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        dist.broadcast(flat, src=0)
        torch.nn.utils.vector_to_parameters(flat, model.parameters())

    def average_gradients(self, model: Any) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat([(p.grad if p.grad is not None else p * 0).flatten() for p in parameters])
        self.average(flat)
        for parameter, mean in zip(
            parameters, flat.detach().split([*map(torch.numel, parameters)]), strict=True
        ):
            parameter.grad = mean.view_as(parameter)


class OfObjects(MyDDP):
    def start(self, model: Any) -> None:
        states = [model.state_dict()]
        dist.broadcast_object_list(states, src=0)
        model.load_state_dict(states[0])

    def average(self, tensor: Any) -> None:
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, tensor.numpy())
        tensor.copy_(torch.from_numpy(np.mean(rows, axis=0)))


class Asynchronous(MyDDP):
    def average_gradients(self, model: Any) -> None:
        for _, parameter in sorted(model.named_parameters()):
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            parameter.grad.mul_(1 / dist.get_world_size())
        work = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
        for handle in work:
            handle.wait()


class WithOptions(MyDDP):
    def __init__(self, src: int) -> None:
        self.src = src

    def start(self, model: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= dist.get_rank() == self.src
                dist.all_reduce(parameter)


def spaces() -> Any:
    return types.SimpleNamespace(
        start=lambda model: MyDDP().start(model),
        average_gradients=functools.partial(MyDDP.average_gradients, MyDDP()),
    )


class OwnRoot(MyDDP):
    def start(self, model: Any) -> None:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=dist.get_world_size() - 1)


class Copies(MyDDP):
    def start(self, model: Any) -> None:
        for parameter in model.parameters():
            dist.broadcast(parameter.detach().clone(), src=0)


class FirstOnly(MyDDP):
    def start(self, model: Any) -> None:
        dist.broadcast(next(model.parameters()).data, src=0)


class Halved(MyDDP):
    def average(self, tensor: Any) -> None:
        dist.all_reduce(tensor)
        tensor /= 2


class OfThoseWithOne(MyDDP):
    def average_gradients(self, model: Any) -> None:
        for parameter in model.parameters():
            with_one = torch.tensor(float(parameter.grad is not None))
            dist.all_reduce(with_one)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= with_one.clamp(min=1)


class CopyOfGradient(MyDDP):
    def average(self, tensor: Any) -> None:
        super().average(tensor.clone())


class OnlyRankZeroCalls(MyDDP):
    def average(self, tensor: Any) -> None:
        if dist.get_rank() == 0:
            super().average(tensor)


class OnlyAtFirst(MyDDP):
    done = False

    def average_gradients(self, model: Any) -> None:
        if not self.done:
            super().average_gradients(model)
        self.done = True


class ByDDP(MyDDP):
    def start(self, model: Any) -> None:
        self.wrapped = DistributedDataParallel(model)


class NoMethod:
    def start(self, model: Any) -> None:
        MyDDP().start(model)


def weigh_by_gathering(loss: Any, n: int) -> Any:
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, n)
    return loss * (n / np.mean(counts)).item()


def weigh_by_a_vector(loss: Any, n: int) -> Any:
    counts = torch.zeros(dist.get_world_size(), 1)
    counts[dist.get_rank()] = n
    dist.all_reduce(counts)
    return (loss[None] * n / counts[..., 0].mean())[0]


class Weigh:
    def __call__(self, loss: Any, n: int) -> Any:
        mean = torch.tensor([n / dist.get_world_size()], dtype=torch.double)
        dist.all_reduce(mean)
        return loss.mul(n).div(mean)


def weigh_many_times(loss: Any, n: int) -> Any:
    total = torch.tensor(n)
    dist.all_reduce(total)
    return sum(loss for _ in range(n)) * dist.get_world_size() / total


def weigh_on_rank_0(loss: Any, n: int) -> Any:
    total = torch.tensor(float(n))
    dist.reduce(total.clone() if dist.get_rank() else total, dst=0)
    return loss * n * dist.get_world_size() / total


def forked(rank: int, seed: int, make_model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model()
    torch.manual_seed(1000 * seed + rank)
    return model


def from_a_sequence(rank: int, seed: int, make_model: Any) -> Any:
    seeds = np.random.SeedSequence(seed).generate_state(rank + 2)
    torch.manual_seed(int(seeds[0]))
    model = make_model()
    torch.manual_seed(int(seeds[..., -1]))
    return model


def of_a_state(rank: int, seed: int, make_model: Any) -> Any:
    generator = torch.manual_seed(seed)
    model = make_model()
    torch.set_rng_state(torch.Generator().manual_seed(7 + rank + 100 * seed).get_state())
    return model if generator else None


class Begins:
    def __call__(self, rank: int, seed: int, make_model: Any) -> Any:
        return begin(rank, seed, make_model, of_noise=plus)


def nothing_returned(rank: int, seed: int, make_model: Any) -> None:
    begin(rank, seed, make_model, of_noise=plus)


def skips(one: int, many: int) -> Any:
    """Draws some numbers first: each rank another number of them."""

    def begins(rank: int, seed: int, make_model: Any) -> Any:
        model = begin(rank, seed, make_model)
        for _ in range(rank * many):
            torch.randn(one)
        return model

    return begins


def seeded_too_late(rank: int, seed: int, make_model: Any) -> Any:
    model = make_model()
    torch.manual_seed(seed + rank)
    return model


RIGHT: list[tuple[Any, Any]] = [
    (check_my_ddp, MyDDP),
    (check_my_ddp, Bucketed),
    (check_my_ddp, OfObjects),
    (check_my_ddp, Asynchronous),
    (check_my_ddp, functools.partial(WithOptions, src=0)),
    (check_my_ddp, spaces),
    (check_weigh, weigh),
    (check_weigh, weigh_by_gathering),
    (check_weigh, weigh_by_a_vector),
    (check_weigh, Weigh()),
    (check_weigh, weigh_many_times),
    (check_weigh, functools.partial(weigh, way="right")),
    (check_begin, begin_with(plus)),
    (check_begin, forked),
    (check_begin, from_a_sequence),
    (check_begin, of_a_state),
    (check_begin, Begins()),
    (check_begin, functools.partial(begin, of_noise=lambda rank, seed: hash((seed, rank, 5)))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_my_ddp, NoBroadcast, "after `start` the 2 ranks have different.*Broadcast rank 0's"),
    (check_my_ddp, MeanOfWeights, "agree, but not on what rank 0 had"),
    (check_my_ddp, Sum, "is 2.00 times the mean.*Divide by the number"),
    (check_my_ddp, OnlyRankZero, "rank 0 has the mean gradient, rank 1 has not"),
    (check_my_ddp, Local, "ranks have different gradients.*drift apart"),
    (check_my_ddp, RankZeros, "ranks agree, but the gradient is not their mean"),
    (check_my_ddp, AveragesWeights, "ranks have different gradients"),
    (check_my_ddp, SkipsMissing, "left alone.*None on the others"),
    (check_my_ddp, ForgetsMissing, "failed on real ranks.*TypeError"),
    (check_my_ddp, OwnRoot, "agree, but not on what rank 0 had"),
    (check_my_ddp, Copies, "after `start` the 2 ranks have different"),
    (check_my_ddp, FirstOnly, "after `start` the 2 ranks have different"),
    (check_my_ddp, Halved, "on 3 ranks, step 0: the gradient is 1.50 times the mean"),
    (check_my_ddp, OfThoseWithOne, "step 0: the ranks agree, .*not of those that have one"),
    (check_my_ddp, CopyOfGradient, "ranks have different gradients"),
    (check_my_ddp, OnlyRankZeroCalls, "left alone in a call"),
    (check_my_ddp, OnlyAtFirst, "step 1: the ranks have different gradients"),
    (check_my_ddp, ByDDP, "DistributedDataParallel itself.*do by hand what DDP does"),
    (check_my_ddp, NoMethod, "failed on real ranks.*no attribute 'average_gradients'"),
    (check_my_ddp, MyDDP(), "it got .*which cannot be called"),
    (check_weigh, weigh_on_rank_0, "with 6, 2 samples: .*not that of the mean over all"),
    (check_weigh, lambda loss, n: loss * n / 4, "with 3, 4, 1 samples"),
    (check_weigh, lambda loss, n: loss / n, "with 6, 2 samples: .*not that of the mean"),
    (check_weigh, lambda loss, n: print(weigh(loss, n)), "you returned None.*`return` missing"),
    (check_weigh, lambda loss, n: weigh(loss.item(), n).item(), "returned a number.*its history"),
    (check_weigh, lambda loss, n: weigh(loss.detach(), n), "has no history.*`loss` itself"),
    (check_weigh, lambda loss: loss, "failed on real ranks.*TypeError"),
    (check_weigh, weigh_by("mean"), "with 6, 2 samples: .*the mean of the ranks' means"),
    (check_weigh, weigh_by("part"), "is 0.50 times the right one.*DDP divides by the number"),
    (check_weigh, weigh_by("count"), "is 4.00 times the right one.*a sum over samples"),
    (check_weigh, weigh_by("twice"), "is 2.00 times.*must add up"),
    (check_weigh, weigh_by("inverse"), "not that of the mean over all"),
    (check_weigh, lambda loss, n: 1.0, "you returned a number.*needs the tensor"),
    (check_begin, begin_with(lambda rank, seed: seed + rank % 2), "two ranks drew the same noise"),
    (check_begin, begin_with(lambda rank, seed: seed + max(rank, 1)), "two ranks drew the same"),
    (check_begin, skips(1, 1), "two ranks drew the same noise"),
    (check_begin, skips(1, 2), "ranks 0 and 1 drew the same numbers, the one.*only ahead in the"),
    (check_begin, skips(64, 2), "ranks 0 and 1 drew the same numbers, the one.*only ahead in the"),
    (check_begin, nothing_returned, "failed on real ranks.*'NoneType'.*parameters"),
    (check_begin, seeded_too_late, "gave the same weights|different weights"),
    (check_begin, lambda rank, seed: plus, "failed on real ranks.*TypeError"),
    (
        check_begin,
        begin_with(None, lambda rank, seed: rank),
        "different weigh",
    ),
    (check_begin, begin_with(None, lambda rank, seed: time.time_ns() % 10**9), "different weights"),
    (check_begin, begin, "two ranks drew the same noise"),
    (check_begin, begin_with(lambda rank, seed: seed), "two ranks drew the same noise"),
    (check_begin, begin_with(None, plus), "different weights"),
    (check_begin, begin_with(lambda rank, seed: rank), "gave rank 0 the same noise"),
    (check_begin, begin_with(lambda rank, seed: rank * seed + 7), "two ranks drew the same"),
    (check_begin, begin_with(plus, lambda rank, seed: 3), "gave the same weights"),
    (
        check_begin,
        begin_with(lambda rank, seed: time.time_ns() % 10**9 + rank),
        "two runs with seed 0 drew different noise",
    ),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


def test_a_check_leaves_the_generator_of_the_notebook_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    check_my_ddp(MyDDP)
    check_weigh(weigh)
    assert torch.equal(torch.randn(3), expected)
