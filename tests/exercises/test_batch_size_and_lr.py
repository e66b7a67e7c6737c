"""The checks of lesson 08: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.batch_size_and_lr import (
    check_global_loss,
    check_lr_at,
    check_one_process,
    check_schedule,
)
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def one_process(ranks: int, size: int, lr: float, reduction: str) -> tuple[int, float]:
    return ranks * size, lr / ranks if reduction == "sum" else lr


def global_loss(loss: Any, n: int, way: str = "right") -> Any:
    ranks, count = dist.get_world_size(), torch.tensor(float(n), dtype=loss.dtype)
    own = loss.detach() * n
    if way == "means":
        own, count = loss.detach().clone(), torch.ones((), dtype=loss.dtype)
    if way == "local":
        return loss.item()
    if way == "in place":
        dist.all_reduce(loss.data)
        return loss.item() / ranks
    total = torch.stack([own, count])
    if way == "rank 0":
        dist.reduce(total, dst=0)
        return (total[0] / total[1]).item() if dist.get_rank() == 0 else None
    dist.all_reduce(total)
    if way == "sum":
        return total[0].item()
    return (total[0] / total[1]).item()


def loss_by(way: str) -> Any:
    return lambda loss, n: global_loss(loss, n, way)


def lr_at(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * (1 + (ranks - 1) * (1 if step >= warmup else step / warmup))


def from_zero(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * ranks * (1 if step >= warmup else step / warmup)


def twice(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return lr_at(step, base_lr * ranks, ranks, warmup)


def never_there(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * (1 + (ranks - 1) * step / (warmup + 10))


def too_far(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * (1 + (ranks - 1) * step / max(1, warmup))


def jump(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * (ranks if step >= warmup else 1)


def late(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return lr_at(max(0, step - 1), base_lr, ranks, warmup)


def scaled(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return lr_at(step, schedule(step * ranks), ranks, warmup)


def too_late(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return lr_at(step, schedule(step), ranks, warmup)


def without_warmup(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return schedule(step * ranks) * ranks  # type: ignore[no-any-return]


def warmed_from_zero(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return from_zero(step, schedule(step * ranks), ranks, warmup)


def warmed_in_samples(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return lr_at(step * ranks, schedule(step * ranks), ranks, warmup)


RIGHT: list[tuple[Any, Any]] = [
    (check_one_process, one_process),
    (check_global_loss, global_loss),
    (check_lr_at, lr_at),
    (check_schedule, scaled),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_one_process, lambda r, b, lr, red: (b, lr), "3 ranks.*together see 12 samples.*as many"),
    (check_one_process, lambda r, b, lr, red: (b // r + 1, lr), "together see 12 samples"),
    (
        check_one_process,
        lambda r, b, lr, red: (r * b, lr),
        "sum: with.*divide the learning rate by",
    ),
    (check_one_process, lambda r, b, lr, red: (r * b, lr * r), "mean: .*the learning rate stays"),
    (check_one_process, lambda r, b, lr, red: (r * b, lr / r), "mean: .*the learning rate stays"),
    (
        check_one_process,
        lambda r, b, lr, red: (r * b, lr / r**2 if red == "sum" else lr),
        "is 0.5 times as long.*once",
    ),
    (check_one_process, lambda r, b, lr, red: r * b, "you returned 12.*two numbers"),
    (check_one_process, lambda r, b, lr: 1, "raised TypeError"),
    (check_global_loss, loss_by("local"), "own losses"),
    (check_global_loss, loss_by("means"), "with 6, 2 samples: .*mean of the ranks' means"),
    (check_global_loss, loss_by("in place"), "own loss was overwritten"),
    (check_global_loss, loss_by("rank 0"), "Only rank 0 is right"),
    (check_global_loss, loss_by("sum"), "still needs a division"),
    (check_global_loss, lambda loss, n: loss.nothing, "failed on real ranks.*AttributeError"),
    (check_lr_at, from_zero, "the rates are 0, 0.04.*moves nothing"),
    (check_lr_at, twice, "Scaled twice: 4 ranks mean 4 times the rate, 0.4"),
    (check_lr_at, lambda step, base, ranks, warmup: base, "never grows.*rule says 0.4"),
    (check_lr_at, never_there, "never reaches 0.4"),
    (check_lr_at, too_far, "grows beyond 0.4"),
    (check_lr_at, jump, "grow by the same amount"),
    (check_lr_at, late, "Step 10 should have 0.4"),
    (check_lr_at, lambda step, base, ranks, warmup: "0.1", "you returned '0.1'.*one number"),
    (check_lr_at, lambda step: 1, "failed on real ranks.*TypeError"),
    (check_schedule, too_late, "4 ranks, warmup=0.*comes too late.*in step 12 already"),
    (check_schedule, lambda step, schedule, r, w: schedule(step), "comes too late"),
    (check_schedule, lambda step, schedule, r, w: schedule(step * r), "where is the linear rule"),
    (check_schedule, without_warmup, "3 ranks, warmup=5.*Where is the warm-up.*step 5 3"),
    (check_schedule, warmed_from_zero, "3 ranks.*the rates are 0, .*grows from 1"),
    (check_schedule, warmed_in_samples, "3 ranks, .*Warm-up counts the steps"),
    (check_schedule, lambda step, schedule, r, w: "0.1", "you returned '0.1'.*one number"),
    (check_schedule, lambda step: 1, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
