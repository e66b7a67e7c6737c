"""The checks of lesson 06: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
import time
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

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


RIGHT: list[tuple[Any, Any]] = [
    (check_my_ddp, MyDDP),
    (check_weigh, weigh),
    (check_begin, begin_with(plus)),
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
    (check_weigh, weigh_by("mean"), "with 6, 2 samples: .*the mean of the ranks' means"),
    (check_weigh, weigh_by("part"), "is 0.50 times the right one.*DDP divides by the number"),
    (check_weigh, weigh_by("count"), "is 4.00 times the right one.*a sum over samples"),
    (check_weigh, weigh_by("twice"), "is 2.00 times.*must add up"),
    (check_weigh, weigh_by("inverse"), "not that of the mean over all"),
    (check_weigh, lambda loss, n: 1.0, "failed on real ranks.*AttributeError"),
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
