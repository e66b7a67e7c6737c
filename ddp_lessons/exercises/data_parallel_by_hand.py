"""The checks of lesson 06: DDP by hand, unequal parts, noise of its own for each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.checking import Wrong, exercise, run_quietly
from ddp_lessons.results import Run

STEPS, RATE = 3, 0.1
COUNTS = ((6, 2), (3, 4, 1), (2, 2), (5,))  # samples of each rank
SEEDS = (0, 1)


class _Network(nn.Module):  # type: ignore[misc]
    """A model of which one layer is never used, and one by rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.of_rank_0 = (nn.Linear(4, 3).double() for _ in range(3))

    def forward(self, inputs: Tensor, rank: int) -> Tensor:
        return self.used(inputs) + (self.of_rank_0(inputs) if rank == 0 else 0)


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.double)
    return inputs, torch.arange(5) % 3


def _loss(model: nn.Module, rank: int) -> Tensor:
    inputs, labels = _batch(rank)
    return nn.functional.cross_entropy(model(inputs, rank), labels)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def _descend(model: nn.Module) -> None:
    """A step of SGD."""
    for parameter, gradient in zip(model.parameters(), _gradients(model), strict=True):
        parameter.data -= RATE * gradient


def _trained(rank: int, my_ddp: Callable[[], Any]) -> dict[str, Any]:
    dist.init_process_group("gloo")
    torch.manual_seed(rank)
    model, ddp = _Network(), my_ddp()
    own = _flat(model.parameters())
    ddp.start(model)
    started = _flat(model.parameters())
    gradients = []
    for _ in range(STEPS):
        model.zero_grad()
        _loss(model, rank).backward()
        ddp.average_gradients(model)
        gradients.append(_flat(_gradients(model)))
        _descend(model)
    dist.destroy_process_group()
    weights = _flat(model.parameters())
    return {"own": own, "started": started, "gradients": gradients, "weights": weights}


def _expected(world_size: int) -> list[Tensor]:
    """Each step's mean gradient, from rank 0's weights."""
    torch.manual_seed(0)
    model, gradients = _Network(), []
    for _ in range(STEPS):
        model.zero_grad()
        for rank in range(world_size):
            (_loss(model, rank) / world_size).backward()
        gradients.append(_flat(_gradients(model)))
        _descend(model)
    return gradients


@exercise(
    "`dist.broadcast(tensor, src=0)` for each parameter; `dist.all_reduce(parameter.grad)` and a "
    "division for each gradient.",
    "Every rank must make the same calls in the same order. Give a parameter without gradient one "
    "of zeros: `torch.zeros_like(parameter)`.",
)
def check_my_ddp(my_ddp: Callable[[], Any]) -> str:
    """Check a class with `start(model)` and `average_gradients(model)` against one process."""
    for ranks in (2, 3, 1):
        with torch.random.fork_rng(devices=[]):
            expected = _expected(ranks)
        run = run_quietly(_trained, (my_ddp,), nprocs=ranks)
        if run.verdict is not None and run.verdict.kind not in ("raised", "unsendable"):
            raise Wrong(
                f"on {ranks} ranks, one was left alone in a call that needs the others.",
                "One layer is used by rank 0 only, so its gradient is None on the others. If they "
                "skip it, the ranks call `all_reduce` for different parameters.",
            )
        run.raise_for_failure()
        _judge_start(ranks, run)
        _judge_gradients(ranks, run, expected)
    return f"on 2, 3 and 1 ranks, {STEPS} steps, the weights are those of one process."


def _judge_start(ranks: int, run: Run) -> None:
    started = [value["started"] for value in run.values]
    if any(not torch.equal(started[0], other) for other in started[1:]):
        raise Wrong(
            f"after `start` the {ranks} ranks have different weights.",
            "Equal steps from different places never meet. Broadcast rank 0's weights into the "
            "model of every rank.",
        )
    if not torch.equal(started[0], run.values[0]["own"]):
        raise Wrong(
            f"after `start` the {ranks} ranks agree, but not on what rank 0 had.",
            "DDP takes rank 0's weights. A mean of random weights is smaller than any of them.",
        )


def _judge_gradients(ranks: int, run: Run, expected: list[Tensor]) -> None:
    for step, truth in enumerate(expected):
        found = [value["gradients"][step] for value in run.values]
        if all(torch.allclose(gradient, truth, atol=1e-10) for gradient in found):
            continue
        ratio = float((found[0] @ truth) / (truth @ truth))
        seen = f"on {ranks} ranks, step {step}: "
        if torch.allclose(found[0], truth, atol=1e-10):
            raise Wrong(
                f"{seen}rank 0 has the mean gradient, rank 1 has not.",
                "`reduce` gives the result to one rank. All ranks take the step: `all_reduce`.",
            )
        if torch.allclose(found[0], truth * ranks, atol=1e-10):
            raise Wrong(
                f"{seen}the gradient is {ratio:.2f} times the mean.",
                "`all_reduce` adds up. Divide by the number of ranks, else the learning rate grows "
                "with every rank.",
            )
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise Wrong(
                f"{seen}the ranks have different gradients.",
                "They will take different steps, and their models drift apart. Average the "
                "gradients themselves, all of them, on all ranks.",
            )
        raise Wrong(
            f"{seen}the ranks agree, but the gradient is not their mean.",
            "Add up the gradients of all ranks, missing ones as zeros, and divide by the number of "
            "ranks: not of those that have one.",
        )


def _weighed(rank: int, weigh: Callable[[Tensor, int], Tensor], counts: tuple[int, ...]) -> Tensor:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(_one_layer())
    inputs, labels = _share(rank, counts)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    weigh(loss, len(labels)).backward()
    dist.destroy_process_group()
    return _flat(_gradients(model))


def _one_layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, 3).double()


def _share(rank: int, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    first = sum(counts[:rank])
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(sum(counts), 4, generator=generator, dtype=torch.double)
    part = slice(first, first + counts[rank])
    return inputs[part], (torch.arange(sum(counts)) % 3)[part]


@exercise(
    "`dist.all_reduce` of a tensor with `n` gives the number of samples of all ranks.",
    "A rank's part of the mean over all samples is `loss * n / total`. DDP then divides by the "
    "number of ranks: make up for it.",
)
def check_weigh(weigh: Callable[[Tensor, int], Tensor]) -> str:
    """Check `weigh(loss, n)`: DDP's gradient is that of the mean over all samples."""
    for counts in COUNTS:
        run = run_quietly(_weighed, (weigh, counts), nprocs=len(counts))
        run.raise_for_failure()
        with torch.random.fork_rng(devices=[]):
            _judge_weighed(counts, run.values[0])
    return "the gradient of the mean over all samples for 6 and 2, for 3, 4 and 1, for 2 and 2."


def _judge_weighed(counts: tuple[int, ...], found: Tensor) -> None:
    model, ranks, total = _one_layer(), len(counts), sum(counts)
    parts = []
    for rank in range(ranks):
        model.zero_grad()
        inputs, labels = _share(rank, counts)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        parts.append(_flat(_gradients(model)))
    truth = sum(n / total * part for n, part in zip(counts, parts, strict=True))
    if torch.allclose(found, truth, atol=1e-10):
        return
    ratio = float((found @ truth) / (truth @ truth))
    seen = f"ranks with {', '.join(map(str, counts))} samples: "
    if torch.allclose(found, sum(parts) / ranks, atol=1e-10):
        raise Wrong(
            f"{seen}the gradient is the mean of the ranks' means.",
            "A sample of a rank with few samples counts more than one of a rank with many. Weigh "
            "each rank by its number of samples.",
        )
    if torch.allclose(found, truth * ratio, atol=1e-10):
        if abs(ratio - 1 / ranks) < 1e-6:
            because = "DDP divides by the number of ranks, too. Multiply by it."
        elif abs(ratio - total / ranks) < 1e-6:
            because = "`loss * n` is a sum over samples: divide by the samples of all ranks."
        else:
            because = "The weights are in proportion, but they must add up to the number of ranks."
        raise Wrong(f"{seen}the gradient is {ratio:.2f} times the right one.", because)
    raise Wrong(
        f"{seen}the gradient is not that of the mean over all samples.",
        "Each rank's weight is its part of all samples, `n / total`. Only the ranks together know "
        "the total.",
    )


def _begun(rank: int, begin: Callable[..., Any], seed: int) -> tuple[list[float], list[float]]:
    model = begin(rank, seed, lambda: nn.Linear(4, 4))
    weights = _flat(model.parameters()).tolist()
    return weights, torch.randn(8).tolist()


@exercise(
    "`torch.manual_seed` before the model decides its weights, and another one after it what is "
    "drawn later.",
    "`seed` for the model; `seed + rank` for what comes after it.",
)
def check_begin(begin: Callable[..., Any]) -> str:
    """Check `begin(rank, seed, make_model)`: equal weights, noise of its own, reproducible."""
    runs = [run_quietly(_begun, (begin, seed), nprocs=3) for seed in (*SEEDS, *SEEDS)]
    for run in runs:
        run.raise_for_failure()
    weights = [[of_rank for of_rank, _ in run.values] for run in runs]
    noise = [[drawn for _, drawn in run.values] for run in runs]
    _judge_weights(weights)
    _judge_noise(noise)
    if weights[0][0] == weights[1][0]:
        raise Wrong(
            "seeds 0 and 1 gave the same weights.", "Seed the model's weights with `seed`, too."
        )
    return "on 3 ranks: the same weights, noise of its own on each, and the same again next time."


def _judge_weights(weights: list[list[list[float]]]) -> None:
    if any(of_rank != weights[0][0] for of_rank in weights[0]):
        raise Wrong(
            "with seed 0 the ranks made models with different weights.",
            "The seed in force when the model is made must be the same on all ranks. Add the rank "
            "only afterwards.",
        )
    if weights[0] != weights[2]:
        raise Wrong(
            "two runs with seed 0 made different weights.",
            "Nobody can repeat such a run. Seed with `seed` before the model is made.",
        )


def _judge_noise(noise: list[list[list[float]]]) -> None:
    first, other, again, _ = noise
    if first != again:
        raise Wrong(
            "two runs with seed 0 drew different noise.",
            "Nobody can repeat such a run. Take no time and nothing random for a seed.",
        )
    if first[0] == first[1] or first[1] == first[2]:
        raise Wrong(
            "with seed 0 two ranks drew the same noise after the model was made.",
            "They would augment and drop alike. Seed again, with the rank added, after the model.",
        )
    same = [rank for rank in range(3) if first[rank] == other[rank]]
    if same:
        raise Wrong(
            f"seeds 0 and 1 gave rank {same[0]} the same noise.",
            "The noise must depend on the seed on every rank: `seed + rank`, not a product.",
        )
