"""The checks of lesson 06: DDP by hand, unequal parts, different noise on each rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.framework import (
    Watched,
    Wrong,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import near
from ddp_lessons.exercises.small_training import descend, flat, gradients, new_layer, share

STEPS, RATE = 3, 0.1
COUNTS = ((6, 2), (3, 4, 1), (2, 2), (5,))  # samples of each rank


class _Network(nn.Module):  # type: ignore[misc]
    """A model with one layer that is never used, and one that only rank 0 uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.of_rank_0 = (nn.Linear(4, 3).double() for _ in range(3))

    def forward(self, inputs: Tensor, rank: int) -> Tensor:
        return self.used(inputs) + (self.of_rank_0(inputs) if rank == 0 else 0)


def _loss(model: nn.Module, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.double)
    return nn.functional.cross_entropy(model(inputs, rank), torch.arange(5) % 3)


@in_group
def _trained(rank: int, my_ddp: Callable[[], Any]) -> dict[str, Any]:
    torch.manual_seed(rank)
    model, ddp = _Network(), my_ddp()
    own = flat(model.parameters())
    torchs_own = Watched(DistributedDataParallel)
    ddp.start(model)
    started = flat(model.parameters())
    steps = []
    for _ in range(STEPS):
        model.zero_grad()
        _loss(model, rank).backward()
        ddp.average_gradients(model)
        steps.append(gradients(model))
        descend(model, RATE)
    done = {"own": own, "started": started, "gradients": steps}
    return {**done, "wrapped": torchs_own.was_made}


def _expected(world_size: int) -> list[Tensor]:
    """Each step's mean gradient, from rank 0's weights."""
    torch.manual_seed(0)
    model, steps = _Network(), []
    for _ in range(STEPS):
        model.zero_grad()
        for rank in range(world_size):
            (_loss(model, rank) / world_size).backward()
        steps.append(gradients(model))
        descend(model, RATE)
    return steps


@exercise(
    "Which collective brings rank 0's weights to all ranks, and which one sums gradients? "
    "`dist.broadcast(parameter.data, src=0)` for each parameter is all of `start`.",
    "Every rank must make the same calls in the same order. Give a parameter without gradient one "
    "of zeros: `torch.zeros_like(parameter)`.",
    "In `average_gradients`, for each parameter: if `grad` is None, set it to zeros; then "
    "`dist.all_reduce(parameter.grad)` and `parameter.grad /= dist.get_world_size()`.",
)
def check_my_ddp(my_ddp: Callable[[], Any]) -> str:
    """Check a class with `start(model)` and `average_gradients(model)` against one process."""
    for ranks in (2, 3, 1):
        with torch.random.fork_rng(devices=[]):
            expected = _expected(ranks)
        run = run_ranks(_trained, (my_ddp,), nprocs=ranks, check=False)
        if stuck(run):
            raise Wrong(
                f"on {ranks} ranks, one was left alone in a call that needs the others: "
                f"{run.explain().splitlines()[0]}",
                "All ranks must make the same calls. One layer is used by rank 0 only, so its "
                "gradient is None on the others: if they skip it, the ranks call `all_reduce` for "
                "different parameters.",
            )
        run.raise_for_failure()
        _judge_training(ranks, run.values, expected)
    return f"on 2, 3 and 1 ranks, {STEPS} steps, the weights are those of one process."


def _judge_training(ranks: int, values: list[dict[str, Any]], expected: list[Tensor]) -> None:
    started = [value["started"] for value in values]
    if any(value["wrapped"] for value in values):
        raise Wrong(
            "it wraps the model in DistributedDataParallel itself.",
            "The exercise is to do by hand what DDP does: broadcast rank 0's weights, and average "
            "the gradients with `all_reduce`.",
        )
    mistakes: dict[str, object] = {
        "have different weights.\n"
        "Equal steps from different weights end at different weights. Broadcast rank 0's weights "
        "into the model of every rank.": not _are_equal(started),
        "agree, but not on what rank 0 had.\n"
        "DDP takes rank 0's weights: `src=0`, on every rank. A mean of random weights would be "
        "smaller than any of them.": not torch.equal(started[0], values[0]["own"]),
    }
    judge(f"after `start` the {ranks} ranks ", mistakes)
    for step, truth in enumerate(expected):
        found = [value["gradients"][step] for value in values]
        if all(_near(gradient, truth) for gradient in found):
            continue
        ratio = _ratio(found[0], truth)
        mistakes = {
            "rank 0 has the mean gradient, rank 1 has not.\n"
            "`reduce` gives the result to one rank. All "
            "ranks take the step: `all_reduce`.": _near(found[0], truth),
            f"the gradient is {ratio:.2f} times the mean.\n"
            "`all_reduce` adds up. Divide by the number of ranks, once, else the learning rate "
            "changes with it.": ratio > 0.01 and all(_near(f, truth * ratio) for f in found),
            "the ranks have different gradients.\n"
            "They will take different steps, and their models drift apart. Average the gradients "
            "themselves, all of them, on all ranks.": not _are_equal(found),
            "the ranks agree, but the gradient is not their mean.\n"
            "Add up the gradients of all ranks, missing ones as zeros, and divide by the number of "
            "ranks: not of those that have one.": True,
        }
        judge(f"on {ranks} ranks, step {step}: ", mistakes)


def _are_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def _near(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, atol=1e-10))


def _ratio(found: Tensor, truth: Tensor) -> float:
    return float((found @ truth) / (truth @ truth))


@in_group
def _weighed(rank: int, weigh: Callable[[Tensor, int], Tensor], counts: tuple[int, ...]) -> Tensor:
    model = DistributedDataParallel(new_layer())
    inputs, labels = share(rank, counts)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    weigh(loss, len(labels)).backward()
    return gradients(model)


@exercise(
    "`dist.all_reduce` of a tensor with `n` gives the number of samples of all ranks.",
    "A rank's part of the mean over all samples is `loss * n / total`. DDP then divides by the "
    "number of ranks: make up for it.",
    "`total = torch.tensor(float(n))`, all_reduce it, and return "
    "`loss * n * dist.get_world_size() / total`.",
)
def check_weigh(weigh: Callable[[Tensor, int], Tensor]) -> str:
    """Check `weigh(loss, n)`: DDP's gradient equals that of the mean over all samples."""
    for counts in COUNTS:
        run = run_ranks(_weighed, (weigh, counts), nprocs=len(counts), check=False)
        _judge_loss(counts, " ".join(error.summary for error in errors(run)))
        run.raise_for_failure()
        _judge_weighed(counts, run.values[0])
    return "the gradient of the mean over all samples for 6 and 2, for 3, 4 and 1, for 2 and 2."


def _judge_loss(counts: tuple[int, ...], raised: str) -> None:
    mistakes = {
        "you returned None.\nIs `return` missing?": "'NoneType' object has no attr" in raised
        and "backward" in raised,
        "you returned a number.\n"
        "`backward()` needs the tensor with its history: calculate with `loss` itself; `.item()` "
        "takes only its value.": "no attribute 'backward'" in raised,
        "the loss that you returned has no history.\n"
        "`backward()` follows what was calculated from the weights. Multiply `loss` itself: "
        "`detach()`, `torch.tensor(loss)` and an all_reduce of the loss lose "
        "that.": "does not require grad" in raised,
    }
    judge(_of(counts), mistakes)


def _of(counts: tuple[int, ...]) -> str:
    return f"{'ranks' if counts[1:] else 'a rank'} with {', '.join(map(str, counts))} samples: "


def _judge_weighed(counts: tuple[int, ...], found: Tensor) -> None:
    model, ranks, total = new_layer(), len(counts), sum(counts)
    parts = []
    for rank in range(ranks):
        model.zero_grad()
        inputs, labels = share(rank, counts)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        parts.append(gradients(model))
    truth = sum(n / total * part for n, part in zip(counts, parts, strict=True))
    if _near(found, truth):
        return
    ratio = _ratio(found, truth)
    times = f"the gradient is {ratio:.2f} times the right one.\n"
    is_multiple = _near(found, truth * ratio)
    is_mean, is_sum = near(ratio, 1 / ranks), near(ratio, total / ranks)
    mistakes = {
        "the gradient is the mean of the ranks' means.\n"
        "A sample of a rank with few samples counts more than one of a rank with many. Weigh each "
        "rank by its number of samples.": _near(found, sum(parts) / ranks),
        f"{times}DDP divides by the number of ranks, too. Multiply by it.": is_multiple and is_mean,
        f"{times}`loss * n` is a sum over samples: divide by the samples of all ranks.": is_multiple
        and is_sum,
        f"{times}The weights are in proportion, but they must add up to the number of ranks.": (
            is_multiple
        ),
        "the gradient is not that of the mean over all samples.\n"
        "Each rank's weight is its part of all samples, `n / total`. Only the ranks together know "
        "the total.": True,
    }
    judge(_of(counts), mistakes)


Begin = Callable[[int, int, Callable[[], nn.Module]], Any]


def _begun(rank: int, begin: Begin, seed: int) -> tuple[list[float], list[int]]:
    model = begin(rank, seed, lambda: nn.Linear(4, 4))
    # Each of these takes one number of the generator, so a stream that is shifted shows.
    return flat(model.parameters()).tolist(), torch.randint(2**31 - 1, (1000,)).tolist()


def _of_one_stream(noise: Sequence[list[int]]) -> tuple[int, int] | None:
    """Two ranks of which one draws numbers in a row that the other draws earlier or later."""
    pairs = [set(itertools.pairwise(of_rank)) for of_rank in noise]
    return next((p for p in itertools.combinations(range(3), 2) if pairs[p[0]] & pairs[p[1]]), None)


@exercise(
    "`torch.manual_seed` before the model decides its weights, and another one after it what is "
    "drawn later.",
    "`torch.manual_seed(seed)`, `model = make_model()`, `torch.manual_seed(seed + rank)`, and "
    "return the model.",
)
def check_begin(begin: Begin) -> str:
    """Check `begin(rank, seed, make_model)`: equal weights, different noise, reproducible."""
    runs = [run_ranks(_begun, (begin, seed), nprocs=3).values for seed in (0, 1, 0)]
    (weights, noise), (other_weights, other_noise), again = (
        tuple(zip(*by_rank, strict=True)) for by_rank in runs
    )
    shifted = _of_one_stream(noise) or (0, 0)
    same = next((rank for rank in range(3) if noise[rank] == other_noise[rank]), None)
    mistakes = {
        "with seed 0 the ranks made models with different weights.\n"
        "The seed in force when the model is made must be the same on all ranks. Add the rank only "
        "afterwards.": any(of_rank != weights[0] for of_rank in weights),
        "two runs with seed 0 made different weights.\n"
        "Nobody can repeat such a run. "
        "Seed with `seed` before the model is made.": weights != again[0],
        "two runs with seed 0 drew different noise.\n"
        "Nobody can repeat such a run. "
        "Take no time and nothing random for a seed.": noise != again[1],
        "with seed 0 two ranks drew the same noise after the model was made.\n"
        "They would augment and drop alike. Seed again, with the rank added, "
        "after the model.": len(set(map(tuple, noise))) < len(noise),
        f"with seed 0 ranks {shifted[0]} and {shifted[1]} drew the same numbers, the one a little "
        "later than the other.\n"
        "Whoever draws some numbers first is only ahead in the same sequence. Seed again, with the "
        "rank added, after the model.": any(shifted),
        f"seeds 0 and 1 gave rank {same} the same noise.\n"
        "The noise must depend on the seed "
        "on every rank: `seed + rank`, not a product.": same is not None,
        "seeds 0 and 1 gave the same weights.\nSeed the model's weights with `seed`, too.": (
            weights[0] == other_weights[0]
        ),
    }
    judge("", mistakes)
    return "on 3 ranks: the same weights, noise of its own on each, and the same again next time."
