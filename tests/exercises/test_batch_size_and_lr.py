"""The checks of lesson 08: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from functools import partial
from typing import Any

import cloudpickle
import numpy as np
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


def of_all(loss: Any, n: int) -> Any:
    pairs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pairs, (loss.item(), n))
    return sum(own * count for own, count in pairs) / sum(count for _, count in pairs)


def from_rank_0(loss: Any, n: int) -> Any:
    total = torch.stack([loss.detach() * n, torch.tensor(float(n)).double()])
    dist.reduce(total, dst=0)
    dist.broadcast(total, src=0)
    return total[0] / total[1]


def sample_by_sample(loss: Any, n: int) -> Any:
    counts = [torch.zeros((), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(n))
    mine = loss.detach() * n / sum(counts)
    dist.all_reduce(mine)
    return mine.reshape(1)


def in_float32(loss: Any, n: int) -> Any:
    return np.float32(of_all(loss, n))


def keeps_the_graph(loss: Any, n: int) -> Any:
    return torch.tensor(of_all(loss, n)) + 0 * loss


def only_on_two(loss: Any, n: int) -> Any:
    return of_all(loss, n) if dist.get_world_size() == 2 else loss.item()


def other_on_rank_1(loss: Any, n: int) -> Any:
    return of_all(loss, n) * (2 if dist.get_rank() == 1 else 1)


def by_ranks(loss: Any, n: int) -> Any:
    total = loss.detach() * n
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def straight_in(loss: Any, n: int) -> Any:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def backward_too(loss: Any, n: int) -> Any:
    loss.backward()
    return of_all(loss, n)


def one_rank_asks(loss: Any, n: int) -> Any:
    return of_all(loss, n) if dist.get_rank() == 0 else loss.item()


def factor(step: int, warmup: int) -> Any:
    return np.interp(step, [0, warmup], [0, 1]) if warmup else 1.0


def in_numpy(step: int, base_lr: float, ranks: int, warmup: int) -> Any:
    return np.float32(base_lr + (base_lr * ranks - base_lr) * factor(step, warmup))


def exactly(step: int, base_lr: float, ranks: int, warmup: int) -> Any:
    part = min(Fraction(1), Fraction(step, warmup)) if warmup else Fraction(1)
    return Fraction(base_lr) * (1 + (ranks - 1) * part)


def by_linspace(step: int, base_lr: float, ranks: int, warmup: int) -> Any:
    rates = torch.linspace(base_lr, base_lr * ranks, warmup + 1, dtype=torch.double)
    rates[-1] = base_lr * ranks  # linspace of one number is the first
    return rates[..., min(step, warmup)]


def by_steps(step: int, base_lr: float, ranks: int, warmup: int) -> Any:
    if step == 0 and warmup:
        return base_lr
    if step >= warmup:
        return ranks * base_lr
    return by_steps(step - 1, base_lr, ranks, warmup) + base_lr * (ranks - 1) / warmup


def divides_by_nothing(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return base_lr * (1 + (ranks - 1) * min(1, step / warmup))


def stops_in_the_middle(step: int, base_lr: float, ranks: int, warmup: int) -> Any:
    return lr_at(step, base_lr, ranks, warmup) if step < warmup else None


def other_on_some_rank(step: int, base_lr: float, ranks: int, warmup: int) -> float:
    return lr_at(step, base_lr, ranks, warmup) + (os.environ["RANK"] == "1" and step == 3)


def scaled(step: int, schedule: Any, ranks: int, warmup: int) -> float:
    return lr_at(step, schedule(step * ranks), ranks, warmup)


def torch_scaled(step: int, schedule: Any, ranks: int, warmup: int) -> Any:
    factors = torch.cat([torch.linspace(1, ranks, warmup + 1)[:-1], torch.full((99,), ranks)])
    return factors.double()[..., step] * schedule(step * ranks)


def scaled_of_parts(step: int, schedule: Any, ranks: int, warmup: int) -> Any:
    part = Fraction(step, warmup) if step < warmup else 1
    return Fraction(schedule(step * ranks)) * ((1 - part) + ranks * part)


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
    (check_one_process, lambda *setup: list(one_process(*setup))),
    (check_one_process, lambda *setup: (np.int64(one_process(*setup)[0]), one_process(*setup)[1])),
    (check_one_process, lambda *setup: torch.tensor(one_process(*setup), dtype=torch.double)),
    (check_one_process, lambda *setup: tuple(map(torch.tensor, one_process(*setup)))),
    (check_one_process, lambda n, b, lr, red: (b * n, Fraction(lr) / (n if red == "sum" else 1))),
    (check_one_process, answers.Called(partial(one_process))),
    (check_global_loss, global_loss),
    (check_global_loss, answers.mixed(of_all, from_rank_0, sample_by_sample)),
    (check_global_loss, answers.mixed(keeps_the_graph, in_float32, answers.Called(of_all))),
    (check_lr_at, lr_at),
    (check_lr_at, in_numpy),
    (check_lr_at, exactly),
    (check_lr_at, by_linspace),
    (check_lr_at, by_steps),
    (check_lr_at, partial(answers.decorated(lr_at))),
    (check_schedule, scaled),
    (check_schedule, torch_scaled),
    (check_schedule, scaled_of_parts),
    (check_schedule, lambda *given, **more: np.float64(scaled(*given, **more))),
    (check_schedule, partial(answers.decorated(scaled))),
    (check_schedule, answers.Called(scaled)),
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
    (check_one_process, answers.prints(one_process), "you returned None.*two numbers"),
    (check_one_process, lambda *setup: one_process(*setup)[::-1], "two numbers.*whole one"),
    (check_one_process, lambda r, b, lr, red: (r * b, float("inf")), "you returned .12, inf.*two"),
    (check_one_process, lambda r, b, lr, red: (str(r * b), lr), "you returned .'12', 0.1"),
    (check_one_process, lambda r, b, lr, red: (np.array([1, 2]), lr), "two numbers"),
    (
        check_one_process,
        lambda r, b, lr, red: one_process(3, b, lr, red),
        "2 ranks.*see 12 samples",
    ),
    (
        check_one_process,
        lambda r, b, lr, red: (r * b, lr / (r * b) if red == "sum" else lr),
        "sum: .*is 0.166667 times as long",
    ),
    (check_global_loss, loss_by("local"), "own losses"),
    (check_global_loss, loss_by("means"), "with 6, 2 samples: .*mean of the ranks' means"),
    (check_global_loss, loss_by("in place"), "own loss was overwritten"),
    (check_global_loss, loss_by("rank 0"), "Only rank 0 is right"),
    (check_global_loss, loss_by("sum"), "still needs a division"),
    (check_global_loss, straight_in, "own loss was overwritten"),
    (check_global_loss, answers.prints(of_all), "returned None, None.*one number.*`return`"),
    (check_global_loss, lambda loss, n: [of_all(loss, n)], r"returned \[1.93.*one number"),
    (check_global_loss, lambda loss, n: (x for x in [loss]), "returned <generator.*one number"),
    (check_global_loss, lambda loss, n: float("nan"), "returned nan, nan.*one number"),
    (check_global_loss, lambda loss, n: 1.9346362, "3, 4, 1|2, 2|5 samples.*Add up"),
    (check_global_loss, only_on_two, "3, 4, 1 samples.*own losses"),
    (check_global_loss, other_on_rank_1, "Only rank 0 is right"),
    (check_global_loss, by_ranks, "divided by the number of ranks"),
    (check_global_loss, backward_too, r"could not call `loss.backward\(\)`"),
    (check_global_loss, one_rank_asks, "rank 1 has returned before all_gather_object"),
    (check_global_loss, answers.recurses, "failed on real ranks.*RecursionError"),
    (check_global_loss, lambda loss, n: loss.nothing, "failed on real ranks.*AttributeError"),
    (check_lr_at, from_zero, "the rates are 0, 0.04.*moves nothing"),
    (check_lr_at, twice, "Scaled twice: 4 ranks mean 4 times the rate, 0.4"),
    (check_lr_at, lambda step, base, ranks, warmup: base, "never grows.*rule says 0.4"),
    (check_lr_at, never_there, "never reaches 0.4"),
    (check_lr_at, too_far, "grows beyond 0.4"),
    (check_lr_at, jump, "grow by the same amount"),
    (check_lr_at, late, "Step 10 should have 0.4"),
    (check_lr_at, lambda step, base, ranks, warmup: "0.1", "you returned '0.1'.*one number"),
    (check_lr_at, divides_by_nothing, "warmup=0: your function raised Zero.*scaled rate holds"),
    (check_lr_at, stops_in_the_middle, "in step 10 you returned None"),
    (
        check_lr_at,
        other_on_some_rank,
        "0.4, 0.4; on rank 1 0.1, .*Another rank got different rates",
    ),
    (check_lr_at, lambda s, b, r, w: lr_at(s, b, 4, w), "2 ranks.*Scaled twice"),
    (check_lr_at, lambda s, b, r, w: lr_at(s + 1, b, r, w), "Step 0 has 0.13"),
    (check_lr_at, lambda s, b, r, w: [lr_at(s, b, r, w)], "one number"),
    (check_lr_at, lambda s, b, r, w: float("nan"), "step 0 you returned nan"),
    (check_lr_at, lambda step: 1, "failed on real ranks.*TypeError"),
    (check_schedule, too_late, "4 ranks, warmup=0.*comes too late.*in step 12 already"),
    (check_schedule, lambda step, schedule, r, w: schedule(step), "comes too late"),
    (check_schedule, lambda step, schedule, r, w: schedule(step * r), "where is the linear rule"),
    (check_schedule, without_warmup, "3 ranks, warmup=5.*Where is the warm-up.*step 5 3"),
    (check_schedule, warmed_from_zero, "3 ranks.*the rates are 0, .*grows from 1"),
    (check_schedule, warmed_in_samples, "3 ranks, .*Warm-up counts the steps"),
    (check_schedule, lambda step, schedule, r, w: "0.1", "you returned '0.1'.*one number"),
    (check_schedule, lambda *given: print(scaled(*given)), "you returned None.*one number"),
    (check_schedule, lambda *given: float("inf"), "you returned inf.*one number"),
    (check_schedule, lambda step, *rest: scaled(step + 1, *rest), "and the schedule those of one"),
    (check_schedule, lambda step, schedule, r, w: schedule(step) * r, "comes too late"),
    (check_schedule, lambda s, *rest: stops_in_the_middle(s, 0.1, *rest[1:]), "you returned None"),
    (check_schedule, lambda step, schedule, r, w: schedule[step], "ranks.*TypeError"),
    (check_schedule, lambda step: 1, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
