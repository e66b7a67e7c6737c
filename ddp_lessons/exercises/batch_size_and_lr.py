"""The checks of lesson 08: the one-process setup, the loss for the log, warm-up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.framework import (
    Wrong,
    call,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
)
from ddp_lessons.exercises.numeric_answers import is_number, near, number, number_or_text, plain
from ddp_lessons.exercises.small_training import SAMPLES, descend, flat, new_layer, samples, share
from ddp_lessons.text import agree, ranks_text

Setup = tuple[int, int, float, str]  # ranks, batch_size, lr, reduction

SETUPS = ((3, 4, 0.1, "mean"), (2, 6, 0.01, "sum"), (4, 2, 0.2, "mean"), (1, 8, 0.01, "sum"))
BATCHES = ((6, 2), (3, 4, 1), (2, 2), (5,))  # samples of each rank
WARM_UPS = ((0.1, 4, 10), (0.5, 2, 3), (0.1, 8, 0), (0.3, 1, 5))  # base_lr, world_size, warmup


def _train(model: nn.Module, lr: float, reduction: str, batches: Sequence[slice]) -> Tensor:
    """The weights after one SGD step for each batch."""
    inputs, labels = samples()
    for batch in batches:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch], reduction=reduction)
        loss.backward()
        descend(model, lr)
    return flat(model.parameters())


@in_group
def _trained(rank: int, batch_size: int, lr: float, reduction: str) -> Tensor:
    ranks = dist.get_world_size()
    together = ranks * batch_size
    batches = [slice(i + rank, i + together, ranks) for i in range(0, SAMPLES, together)]
    return _train(DistributedDataParallel(new_layer()), lr, reduction, batches)


@functools.cache
def _of_ranks(setup: Setup) -> Tensor:
    """The weights that real ranks get, which are trained once."""
    weights: Tensor = run_ranks(_trained, setup[1:], nprocs=setup[0]).values[0]
    return weights


@exercise(
    "In one step all ranks together take `world_size * batch_size` samples.",
    "DDP takes the mean over ranks. The mean of means is the mean; but the mean of sums is the sum "
    "over all samples divided by `world_size`.",
    '`world_size * batch_size`, and for "sum" `lr / world_size`; for "mean" `lr` stays.',
)
def check_one_process(one_process: Callable[..., Any]) -> str:
    """Check `one_process(world_size, batch_size, lr, reduction)` by training both."""
    because = "It takes two whole numbers, a rate and a reduction."
    for setup in SETUPS:
        _judge_setup(setup, call(one_process, *setup, because=because))
    return "trained both: the same weights on 3, 2, 4 and 1 ranks, with means and with sums."


def _judge_setup(setup: Setup, answer: Any) -> None:
    ranks, batch_size, lr, reduction = setup
    asked = f"{ranks} ranks, batch_size={batch_size}, lr={lr:g}, {reduction}"
    found = _setup(answer)
    if found is None:
        raise Wrong(
            f"{asked}: you returned {answer!r}.",
            "Return two numbers, `batch_size, lr`: a whole one from 1 on, and a positive one.",
        )
    size, rate = found
    if size == ranks * batch_size and near(rate, lr / ranks if reduction == "sum" else lr):
        batches = [slice(start, start + size) for start in range(0, SAMPLES, size)]
        if torch.allclose(
            _train(new_layer(), rate, reduction, batches), _of_ranks(setup), atol=1e-9
        ):
            return
    is_for_one_rank = size == batch_size and ranks > 1
    sees = f"In a step the {ranks} ranks together see {ranks * batch_size} samples."
    mistakes = {
        f"{sees} One process must take as many: batch sizes count for one rank.": is_for_one_rank,
        sees: size != ranks * batch_size,
        "With means the learning rate stays: the mean of the ranks' means is the mean of all. (The "
        "linear rule is for another "
        "question: what to do when the batch grows.)": reduction == "mean",
        "One process adds up all losses, and DDP divides that sum by the number of ranks. Its step "
        f"would be {ranks} times as long: divide the learning rate by {ranks}.": near(rate, lr),
        f"The step is {rate * ranks / lr:g} times as long as that of the ranks. DDP divides the "
        "sum over all samples by the number of ranks, once.": True,
    }
    judge(
        f"{asked}: with batch_size={size} and lr={rate:g}, one process gets different weights.",
        mistakes,
    )


def _setup(answer: Any) -> tuple[int, float] | None:
    """The batch size and learning rate of an answer, if it has them."""
    match plain(answer):
        case [size, rate]:
            size, rate = number(size), number(rate)
            if is_number(size) and is_number(rate) and size == int(size) > 0 < rate:
                return int(size), float(rate)
    return None


@in_group
def _logged(
    rank: int, global_loss: Callable[[Tensor, int], Any], counts: Sequence[int]
) -> tuple[Any, float, bool, bool]:
    """The answer, the rank's own loss, whether that was changed, and whether it is still of use."""
    inputs, labels = share(rank, counts)
    loss = nn.functional.cross_entropy(new_layer()(inputs), labels)
    before = loss.item()
    result = number_or_text(global_loss(loss, counts[rank]))
    changed = loss.item() != before
    try:
        loss.backward()  # `loss` must still be usable for training
    except RuntimeError:
        return result, before, changed, False
    return result, before, changed, True


@exercise(
    "`loss * n` is the sum over this rank's samples. Which other number must travel with it?",
    "Put `loss.detach() * n` and `n` into one tensor, `all_reduce` it, and divide.",
)
def check_global_loss(global_loss: Callable[[Tensor, int], float]) -> str:
    """Check `global_loss(loss, n)`: the mean loss over all ranks' samples, on every rank."""
    for counts in BATCHES:
        _judge_loss(counts, run_ranks(_logged, (global_loss, counts), nprocs=len(counts)).values)
    return "the mean over all samples, on every rank, for 6 and 2, 3, 4 and 1, 2 and 2, and 5."


def _judge_loss(counts: Sequence[int], values: list[tuple[Any, float, bool, bool]]) -> None:
    results, local, changed, usable = zip(*values, strict=True)
    total = sum(counts)
    truth = sum(n * loss for n, loss in zip(counts, local, strict=True)) / total
    right = [rank for rank, result in enumerate(results) if near(result, truth)]
    if len(right) == len(counts) and not any(changed) and all(usable):
        return
    are_local = len(counts) > 1 and all(map(near, results, local))
    is_sum = near(results[0], sum(local)) or near(results[0], truth * total)
    right_ones = f"{ranks_text(right)} {agree(right, 'is', 'are')}" if right else ""
    mistakes = {
        "The rank's own loss was overwritten, and backward still needs it. Collectives work in "
        "place: give them a tensor of your own.": any(changed),
        "After that the training could not call `loss.backward()`. It still needs the loss and its "
        "graph: compute with `loss.detach()`, and leave backward to it.": not all(usable),
        f"Only {right_ones} right. Every rank needs the result, "
        "and `all_reduce` gives it to every rank.": right,
        "Return one number. Is `return` missing?": not is_number(results[0]),
        "These are the ranks' own losses. Nothing was put together.": are_local,
        "This is the mean of the ranks' means: a sample of a short batch counts more than the "
        "others. Weigh by the numbers of samples.": near(results[0], sum(local) / len(local)),
        "`all_reduce` adds up. A mean still needs a division, by all samples.": is_sum,
        "The sum over all samples was divided by the number of ranks. Divide it by the number of "
        "all samples.": near(results[0], truth * total / len(counts)),
        "Add up `loss * n` and `n` over the ranks, then divide one by the other.": True,
    }
    returned = ", ".join(f"{r:.4f}" if isinstance(r, float) else str(r) for r in results)
    judge(
        f"ranks with {', '.join(map(str, counts))} samples: the loss is {truth:.4f}, and the ranks "
        f"returned {returned}.",
        mistakes,
    )


def _rates(_: int, lr_at: Callable[..., float], base: float, ranks: int, warmup: int) -> list[Any]:
    return [number_or_text(lr_at(step, base, ranks, warmup)) for step in range(warmup + 4)]


@exercise(
    "The rate goes from `base_lr` to `base_lr * world_size`, so what grows is the factor: from 1 "
    "to `world_size`.",
    "`1 + (world_size - 1) * step / warmup` before step `warmup`, `world_size` from then on.",
)
def check_lr_at(lr_at: Callable[..., float]) -> str:
    """Check `lr_at(step, base_lr, world_size, warmup)`, which each rank computes by itself."""
    for base, ranks, warmup in WARM_UPS:
        run = run_ranks(_rates, (lr_at, base, ranks, warmup), check=False)
        divided = [e.summary for e in errors(run) if e.type_name == "ZeroDivisionError"]
        if divided and not warmup:
            raise Wrong(
                f"base_lr={base:g}, {ranks} ranks, warmup=0: your function raised {divided[0]}.",
                "Without warm-up steps there is nothing to divide: the scaled rate holds from step "
                "0 on.",
            )
        run.raise_for_failure()
        _judge_rates(base, ranks, warmup, run.values)
    return "from base_lr to the scaled rate, evenly, for 4 ranks, 2, 8 without warm-up, and 1."


def _judge_rates(base: float, ranks: int, warmup: int, by_rank: list[list[Any]]) -> None:
    rates, full = by_rank[0], base * ranks
    asked = f"base_lr={base:g}, {ranks} ranks, warmup={warmup}"
    for step, rate in enumerate(rates):
        if not is_number(rate):
            raise Wrong(
                f"{asked}: in step {step} you returned {rate}.",
                "Return one number: a learning rate.",
            )
    factors = [min(1, step / warmup if warmup else 1) for step in range(len(rates))]
    right = [base + (full - base) * factor for factor in factors]
    differ = by_rank[0] != by_rank[1]
    if all(map(near, rates, right)) and not differ:
        return
    last, scaled = rates[-1], ranks > 1
    scaled_twice = near(last, full * ranks) and scaled
    too_low, too_high = last < full - 1e-9, last > full + 1e-9
    wrong_at_0 = warmup and not near(rates[0], base)
    mistakes = {
        "Another rank got different rates. Then their models would drift apart.": differ,
        f"The rate never grows. The batch is {ranks} times as large, so the linear rule says "
        f"{full:g}.": near(last, base) and scaled,
        f"Scaled twice: {ranks} ranks mean {ranks} times the rate, {full:g}.": scaled_twice,
        f"The rate grows beyond {full:g}: from step {warmup} on it stays there.": too_high,
        f"The rate never reaches {full:g}, which it should have from step {warmup} on.": too_low,
        "With a rate of 0, the first step moves nothing. Begin with `base_lr`, which was right for "
        "one rank.": warmup and near(rates[0], 0),
        f"Step 0 has {rates[0]:g}. Begin with `base_lr`, which was right for one rank.": wrong_at_0,
        f"Step {warmup} should have {full:g} already.": not warmup or not near(rates[warmup], full),
        f"Between step 0 and step {warmup} the rate should grow by the same amount each "
        "time.": True,
    }
    shown = by_rank if differ else by_rank[:1]
    each = [", ".join(f"{float(r):g}" if is_number(r) else repr(r) for r in own) for own in shown]
    judge(f"{asked}: the rates are {'; on rank 1 '.join(each)}.", mistakes)


def _drops(step: int) -> float:
    return 0.1 if step < 12 else 0.01


def _falls(step: int) -> float:
    return 0.4 * max(0.0, 1 - step / 40)


Schedule = Callable[[int], float]
SCHEDULED_STEPS = 12
SCHEDULES: tuple[tuple[str, Schedule, int, int], ...] = (  # what, schedule, world_size, warmup
    ("0.1, from step 12 on 0.01", _drops, 4, 0),
    ("0.4, falling evenly to 0 in step 40", _falls, 3, 5),
    ("0.1, from step 12 on 0.01", _drops, 2, 8),
    ("0.4, falling evenly to 0 in step 40", _falls, 1, 3),
)


def _scheduled(
    _: int, lr_at: Callable[..., float], schedule: Schedule, ranks: int, warmup: int
) -> list[Any]:
    return [number_or_text(lr_at(step, schedule, ranks, warmup)) for step in range(SCHEDULED_STEPS)]


@exercise(
    "After `step` steps of all ranks, which step would one rank be in? It has seen as many "
    "samples then.",
    "`schedule(step * world_size)`, times a factor that grows from 1 to `world_size` in the first "
    "`warmup` steps and stays there.",
)
def check_schedule(scaled: Callable[..., float]) -> str:
    """Check `scaled(step, schedule, world_size, warmup)`, which each rank computes by itself."""
    for what, schedule, ranks, warmup in SCHEDULES:
        run = run_ranks(_scheduled, (scaled, schedule, ranks, warmup))
        asked = f"one rank has {what}; {ranks} ranks, warmup={warmup}"
        for rates in run.values:
            _judge_scheduled(asked, schedule, ranks, warmup, rates)
    return "both schedules in time with the samples, scaled and warmed up, for 4, 3, 2 and 1 ranks."


def _judge_scheduled(
    asked: str, schedule: Schedule, ranks: int, warmup: int, rates: list[Any]
) -> None:
    if odd := [rate for rate in rates if not is_number(rate)]:
        raise Wrong(f"{asked}: you returned {odd[0]}.", "Return one number: a learning rate.")
    steps = range(SCHEDULED_STEPS)
    grown = [min(1, step / warmup) if warmup else 1 for step in steps]
    factors = [1 + (ranks - 1) * part for part in grown]
    of_one = [schedule(step * ranks) for step in steps]

    def are(expected: Sequence[float]) -> bool:
        return all(map(near, rates, expected))

    def times(some: Sequence[float], others: Sequence[float]) -> list[float]:
        return [one * other for one, other in zip(some, others, strict=True)]

    if are(times(of_one, factors)):
        return
    early = [schedule(step) for step in steps]
    is_early = any(are(times(early, f)) for f in (factors, [1] * len(early), [ranks] * len(early)))
    mistakes = {
        f"The schedule comes too late. A step of {ranks} ranks sees {ranks} batches, so in step 3 "
        f"one rank would be in step {3 * ranks} already.": is_early,
        "The schedule is in time. But the batch is "
        f"{ranks} times as large: where is the linear rule?": are(of_one),
        f"Where is the warm-up? In step 0 the factor is 1, and only in step {warmup} {ranks}.": are(
            times(of_one, [ranks] * len(steps))
        ),
        "With a rate of 0, the first step moves nothing. The factor grows from 1, not from "
        "0.": warmup and near(rates[0], 0),
        "Warm-up counts the steps that the ranks take, and the schedule those of one rank. "
        "Multiply the two.": True,
    }
    shown = ", ".join(f"{float(rate):.3g}" for rate in rates)
    judge(f"{asked}: the rates are {shown}.", mistakes)
