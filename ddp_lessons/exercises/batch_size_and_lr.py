"""The checks of lesson 08: the one-process setup, the loss for the log, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly

SAMPLES = 48
SETUPS = ((3, 4, 0.1, "mean"), (2, 6, 0.01, "sum"), (4, 2, 0.2, "mean"), (1, 8, 0.01, "sum"))
BATCHES = ((6, 2), (3, 4, 1), (2, 2), (5,))  # samples of each rank
WARM_UPS = ((0.1, 4, 10), (0.5, 2, 3), (0.1, 8, 0), (0.3, 1, 5))  # base_lr, world_size, warmup


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(4, 3).double()
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.double)
    return inputs, torch.randint(3, (SAMPLES,), generator=generator)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _descend(model: nn.Module, lr: float, reduction: str, batches: Sequence[slice]) -> Tensor:
    """The weights after a step of SGD for each batch."""
    inputs, labels = _data()
    for batch in batches:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch], reduction=reduction)
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= lr * parameter.grad
    return _flat(model)


def _trained(rank: int, batch_size: int, lr: float, reduction: str) -> Tensor:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    model = DistributedDataParallel(_model())
    batches = [
        slice(start + rank, start + ranks * batch_size, ranks)
        for start in range(0, SAMPLES, ranks * batch_size)
    ]
    weights = _descend(model, lr, reduction, batches)
    dist.destroy_process_group()
    return weights


@exercise(
    "In one step all ranks together take `world_size * batch_size` samples.",
    "DDP takes the mean over ranks. The mean of means is the mean; but the mean of sums is the sum "
    "over all samples divided by `world_size`.",
)
def check_one_process(one_process: Callable[..., Any]) -> str:
    """Check `one_process(world_size, batch_size, lr, reduction)` by training both."""
    for setup in SETUPS:
        answer = call(
            one_process, *setup, because="It takes two whole numbers, a rate and a reduction."
        )
        _judge_setup(setup, answer)
    return "trained both: the same weights on 3, 2, 4 and 1 ranks, with means and with sums."


def _judge_setup(setup: tuple[int, int, float, str], answer: Any) -> None:
    ranks, batch_size, lr, reduction = setup
    asked = f"{ranks} ranks, batch_size={batch_size}, lr={lr:g}, {reduction}"
    if not _is_setup(answer):
        raise Wrong(
            f"{asked}: you returned {answer!r}.",
            "Return two numbers, `batch_size, lr`: a whole one from 1 on, and a positive one.",
        )
    size, rate = answer
    right = lr / ranks if reduction == "sum" else lr
    if size == ranks * batch_size and abs(rate - right) < 1e-9:
        run = run_quietly(_trained, setup[1:], nprocs=ranks)
        run.raise_for_failure()
        batches = [slice(start, start + size) for start in range(0, SAMPLES, size)]
        if torch.allclose(_descend(_model(), rate, reduction, batches), run.values[0], atol=1e-9):
            return
    seen = f"{asked}: with batch_size={size} and lr={rate:g}, one process gets other weights."
    raise Wrong(seen, _why_not(setup, size, rate))


def _is_setup(answer: Any) -> bool:
    return (
        isinstance(answer, tuple | list)
        and len(answer) == 2
        and isinstance(answer[0], int)
        and isinstance(answer[1], int | float)
        and answer[0] > 0
        and answer[1] > 0
    )


def _why_not(setup: tuple[int, int, float, str], size: int, rate: float) -> str:
    ranks, batch_size, lr, reduction = setup
    if size == batch_size:
        return (
            f"In a step the {ranks} ranks together see {ranks * batch_size} samples. One process "
            "must take as many: batch sizes count for one rank."
        )
    if size != ranks * batch_size:
        return f"In a step the {ranks} ranks together see {ranks * batch_size} samples."
    if reduction == "mean":
        return (
            "With means the learning rate stays: the mean of the ranks' means is the mean of all. "
            "(The linear rule is for another question: what to do when the batch grows.)"
        )
    if abs(rate - lr) < 1e-9:
        return (
            "One process adds up all losses, and DDP divides that sum by the number of ranks. Its "
            f"step would be {ranks} times as long: divide the learning rate by {ranks}."
        )
    return (
        f"The step is {rate * ranks / lr:g} times as long as that of the ranks. DDP divides the "
        "sum over all samples by the number of ranks, once."
    )


def _logged(rank: int, global_loss: Callable[..., Any], counts: tuple[int, ...]) -> Any:
    dist.init_process_group("gloo")
    first = sum(counts[:rank])
    inputs, labels = (part[first : first + counts[rank]] for part in _data())
    model = _model()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    before = loss.item()
    result = global_loss(loss, counts[rank])
    changed = loss.item() != before
    loss.backward()  # training goes on with it
    dist.destroy_process_group()
    return (result.item() if hasattr(result, "item") else result), before, changed


@exercise(
    "`loss * n` is the sum over this rank's samples. Which other number must travel with it?",
    "Put `loss.detach() * n` and `n` into one tensor, `all_reduce` it, and divide.",
)
def check_global_loss(global_loss: Callable[[Tensor, int], float]) -> str:
    """Check `global_loss(loss, n)`: the mean over the samples of all ranks, on every rank."""
    for counts in BATCHES:
        run = run_quietly(_logged, (global_loss, counts), nprocs=len(counts))
        run.raise_for_failure()
        _judge_loss(counts, run.values)
    return "the mean over all samples, on every rank, for 6 and 2, 3, 4 and 1, 2 and 2, and 5."


def _judge_loss(counts: tuple[int, ...], values: list[tuple[Any, float, bool]]) -> None:
    results, local = [value[0] for value in values], [value[1] for value in values]
    total = sum(counts)
    truth = sum(n * loss for n, loss in zip(counts, local, strict=True)) / total
    seen = (
        f"ranks with {', '.join(map(str, counts))} samples: the loss is {truth:.4f}, and the ranks "
        f"returned {', '.join(f'{r:.4f}' if isinstance(r, float) else str(r) for r in results)}."
    )
    if any(changed for *_, changed in values):
        raise Wrong(
            seen,
            "The rank's own loss was overwritten, and backward still needs it. Collectives work in "
            "place: give them a tensor of your own.",
        )
    if all(_near(result, truth) for result in results):
        return
    if _near(results[0], truth):
        raise Wrong(seen, "Only rank 0 is right. `all_reduce` gives the result to every rank.")
    if len(counts) > 1 and all(map(_near, results, local)):
        raise Wrong(seen, "These are the ranks' own losses. Nothing was put together.")
    if _near(results[0], sum(local) / len(local)):
        raise Wrong(
            seen,
            "This is the mean of the ranks' means: a sample of a short batch counts more than the "
            "others. Weigh by the numbers of samples.",
        )
    if any(_near(results[0], wrong) for wrong in (sum(local), truth * total)):
        raise Wrong(seen, "`all_reduce` adds up. A mean still needs a division, by all samples.")
    raise Wrong(seen, "Add up `loss * n` and `n` over the ranks, then divide one by the other.")


def _near(value: Any, target: float) -> bool:
    return isinstance(value, int | float) and abs(value - target) < 1e-6


def _rates(_: int, lr_at: Callable[..., float], base: float, ranks: int, warmup: int) -> list[Any]:
    return [lr_at(step, base, ranks, warmup) for step in range(warmup + 4)]


@exercise(
    "The rate goes from `base_lr` to `base_lr * world_size`, so what grows is the factor: from 1 "
    "to `world_size`.",
    "`1 + (world_size - 1) * step / warmup` before step `warmup`, `world_size` from then on.",
)
def check_lr_at(lr_at: Callable[..., float]) -> str:
    """Check `lr_at(step, base_lr, world_size, warmup)`, as every rank works it out for itself."""
    for base, ranks, warmup in WARM_UPS:
        run = run_quietly(_rates, (lr_at, base, ranks, warmup), nprocs=2)
        run.raise_for_failure()
        _judge_rates(base, ranks, warmup, run.values)
    return "from base_lr to the scaled rate, evenly, for 4 ranks, 2, 8 without warm-up, and 1."


def _judge_rates(base: float, ranks: int, warmup: int, by_rank: list[list[Any]]) -> None:
    rates = by_rank[0]
    asked = f"base_lr={base:g}, {ranks} ranks, warmup={warmup}"
    if not all(isinstance(rate, int | float) for rate in rates):
        raise Wrong(f"{asked}: you returned {rates[0]!r}.", "Return one number: a learning rate.")
    seen = f"{asked}: the rates are {', '.join(f'{rate:g}' for rate in rates)}."
    if by_rank[0] != by_rank[1]:
        raise Wrong(seen, "Another rank got other rates. Then their models would drift apart.")
    right = [
        base * (1 + (ranks - 1) * min(1, s / warmup if warmup else 1)) for s in range(len(rates))
    ]
    if all(_near(rate, wanted) for rate, wanted in zip(rates, right, strict=True)):
        return
    raise Wrong(seen, _what_is_wrong_with(rates, base, ranks, warmup))


def _what_is_wrong_with(rates: list[float], base: float, ranks: int, warmup: int) -> str:
    last, full = rates[-1], base * ranks
    if _near(last, base) and ranks > 1:
        return (
            f"The rate never grows. The batch is {ranks} times as large, so the linear rule says "
            f"{full:g}."
        )
    if _near(last, full * ranks) and ranks > 1:
        return f"Scaled twice: {ranks} ranks mean {ranks} times the rate, {full:g}."
    if last > full + 1e-9:
        return f"The rate grows beyond {full:g}: from step {warmup} on it stays there."
    if last < full - 1e-9:
        return f"The rate never reaches {full:g}, which it should have from step {warmup} on."
    if warmup and _near(rates[0], 0):
        return (
            "With a rate of 0, the first step moves nothing. Begin with `base_lr`, which was right "
            "for one rank."
        )
    if warmup and not _near(rates[0], base):
        return f"Step 0 has {rates[0]:g}. Begin with `base_lr`, which was right for one rank."
    if not warmup or not _near(rates[warmup], full):
        return f"Step {warmup} should have {full:g} already."
    return f"Between step 0 and step {warmup} the rate should grow by the same amount each time."
