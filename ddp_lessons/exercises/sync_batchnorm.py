"""The checks of lesson 09: SyncBatchNorm by hand, running means, converting a model."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.framework import (
    Watched,
    Wrong,
    call,
    exercise,
    in_group,
    judge,
    run_ranks,
)
from ddp_lessons.exercises.numeric_answers import is_number, near, number
from ddp_lessons.syncbn import SyncBatchNorm, convert_sync_batchnorm
from ddp_lessons.text import ranks_text

EPS, CHANNELS, MOMENTUM = 1e-3, 3, 0.1
COUNTS = ((4, 4), (5, 2), (3, 0, 4), (6,), (2, 3, 1, 4))  # samples of each rank
OTHER = "the model in DistributedDataParallel is not the one that was given"
ASLEEP = "the model, or a part of it, is in eval mode"
Means = list[list[float]]  # the ranks' batch means, [step][rank]
MEANS: tuple[Means, ...] = (
    [[1.0, 5.0]],
    [[1.0, 5.0], [2.0, 8.0], [0.0, -4.0]],
    [[1.0, 2.0, 6.0], [3.0, 3.0, 9.0]],
)


def _batches(counts: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(n, CHANNELS, generator=generator, dtype=torch.double) + 3 * rank
        for rank, n in enumerate(counts)
    ]


@in_group
def _normalised(
    rank: int, normalise: Callable[[Tensor, float], Any], counts: tuple[int, ...]
) -> tuple[Any, bool]:
    """What it returned, and whether a layer of SyncBatchNorm did the work."""
    layers = [Watched(layer) for layer in (nn.SyncBatchNorm, SyncBatchNorm)]
    output = normalise(_batches(counts)[rank].clone(), EPS)
    output = torch.from_numpy(output) if isinstance(output, np.ndarray) else output
    return output, any(layer.was_made for layer in layers)


def _by(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / (var + EPS).sqrt()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each channel."""
    return x.mean(0), x.var(0, correction=0)


@exercise(
    "Means and variances do not add up over ranks. Counts, sums and sums of squares do.",
    "Put count, sum and sum of squares of each channel into one tensor and `all_reduce` it.",
    "mean = sum / count; variance = squares / count - mean ** 2; then "
    "`(x - mean) / (variance + eps).sqrt()`.",
)
def check_normalise(normalise: Callable[[Tensor, float], Tensor]) -> str:
    """Check `normalise(x, eps)` on each rank against batch norm over all samples."""
    for counts in COUNTS:
        seen = f"ranks with {', '.join(map(str, counts))} samples: "
        run = run_ranks(_normalised, (normalise, counts), nprocs=len(counts), check=False)
        if 0 in counts and run.verdict is not None:
            raise Wrong(
                f"{seen}{run.verdict.title}.",
                "A rank without samples must make the same calls as the others, with zeros. Its "
                "own mean, 0 / 0, must not be needed.",
            )
        run.raise_for_failure()
        batches = _batches(counts)
        outputs, by_layers = zip(*run.values, strict=True)
        if any(by_layers):
            raise Wrong(
                "it calls SyncBatchNorm itself.",
                "The exercise is to do by hand what that layer does: add up counts, sums and sums "
                "of squares over the ranks.",
            )
        _judge_shapes(batches, outputs)
        _judge_normalised(seen, batches, [output.double() for output in outputs])
    return "as one process would, for 4 and 4, 5 and 2, 2, 3, 1 and 4 samples, and with none."


def _judge_shapes(batches: list[Tensor], outputs: Sequence[Any]) -> None:
    for rank, (x, output) in enumerate(zip(batches, outputs, strict=True)):
        if not isinstance(output, Tensor) or output.shape != x.shape:
            is_tensor = isinstance(output, Tensor)
            got = f"a tensor of shape {tuple(output.shape)}" if is_tensor else reprlib.repr(output)
            raise Wrong(
                f"rank {rank} returned {got} for an x of shape {tuple(x.shape)}.",
                "Return a tensor: this rank's own samples, normalised, in the shape of `x`.",
            )


def _judge_normalised(seen: str, batches: list[Tensor], outputs: list[Tensor]) -> None:
    def has_used(mean: Tensor, var: Tensor) -> bool:
        return is_near(result, _by(whole, mean, var))

    def is_near(one: Tensor, other: Tensor) -> bool:
        return bool(torch.allclose(one, other, atol=1e-5))  # float32 will do

    whole, parts, result = torch.cat(batches), [x for x in batches if len(x)], torch.cat(outputs)
    mean, var = _moments(whole)
    if has_used(mean, var):
        return
    wrong = [
        rank
        for rank, (x, output) in enumerate(zip(batches, outputs, strict=True))
        if not is_near(output, _by(x, mean, var))
    ]
    means, variances = map(torch.stack, zip(*map(_moments, parts), strict=True))
    mean_of_means = means.mean(0)
    around_it = (whole - mean_of_means).square().mean(0)
    own = torch.cat([_by(x, *_moments(x)) for x in parts])
    deviation = var.sqrt()
    mistakes = {
        f"Only on {ranks_text(wrong or [0])} the outputs are different. Every rank must compute "
        "with the same mean and variance.": len(wrong) < len(parts),
        "`eps` belongs to the variance, under the root: `(var + eps).sqrt()`.": (
            is_near(result, (whole - mean) / (deviation + EPS))
        ),
        f"`eps` is missing: this check gives {EPS:g}.": any(
            is_near(result, (whole - mean) / (var + eps).sqrt()) for eps in (0, 1e-5)
        ),
        "That is divided by the variance. Batch norm divides by its root.": (
            is_near(result, (whole - mean) / (var + EPS))
        ),
        "Only the mean was taken away. Divide by the root of the variance, too.": (
            is_near(result, whole - mean)
        ),
        "Each channel has a mean and a variance of its own: sum over the samples only, "
        "`x.sum(0)`.": has_used(whole.mean(), whole.var(correction=0)),
        "The variance is the mean of the ranks' variances. It forgets how far the ranks' means lie "
        "apart: sums of squares do not.": has_used(mean, variances.mean(0)),
        "Mean and variance are means over ranks. Ranks with few samples count too much, and the "
        "variance forgets how far the ranks' "
        "means lie apart.": has_used(mean_of_means, variances.mean(0)),
        "The mean is the mean of the ranks' means: ranks with few samples count too much. Divide "
        "the sum over ranks by the number of all samples.": has_used(mean_of_means, around_it),
        "Each rank used the statistics of its own batch. Nothing was put together.": (
            is_near(result, own)
        ),
        "The variance is divided by count - 1. Batch norm normalises with the biased one, and "
        "keeps count - 1 for the running variance.": has_used(mean, whole.var(0)),
        "The mean and variance must be those of all samples: sums over ranks, divided by the "
        "number of all samples.": True,
    }
    channel_mean, channel_var = (round(float(m[0]), 3) + 0.0 for m in _moments(result))
    judge(
        f"{seen}of all outputs together, channel 0 has the mean {channel_mean:.3f} and the "
        f"variance {channel_var:.3f}, where batch norm gives 0 and about 1; sample by sample they "
        "are not those of one process.",
        mistakes,
    )


@in_group
def _saved(rank: int, means: Sequence[Sequence[float]], kind: str) -> float:
    layer = nn.BatchNorm1d(1, momentum=MOMENTUM).double()
    if kind == "sync":
        layer = convert_sync_batchnorm(layer)
    model = DistributedDataParallel(layer)
    for step in means:
        model(torch.tensor([[-1.0], [1.0]]).double() + step[rank])
    return float(layer.running_mean)


@functools.cache
def _real_means(means: tuple[tuple[float, ...], ...], kind: str) -> list[float]:
    """What real layers have on each rank, from a run that is made once."""
    return run_ranks(_saved, (means, kind), nprocs=len(means[0])).values


@exercise(
    "Plain: before each forward pass every rank gets rank 0's old value.",
    "`new = 0.9 * old_of_rank_0 + 0.1 * mean`; for sync, the mean over ranks of the step's means.",
)
def check_running_mean(predict: Callable[..., float]) -> str:
    """Check `predict(means, rank, kind)` against real layers under DDP on real ranks."""
    because = "It takes means, a rank and a kind."
    for means in MEANS:
        for kind in ("plain", "sync"):
            for rank, real in enumerate(_real_means(tuple(map(tuple, means)), kind)):
                answer = call(predict, means, rank, kind, because=because)
                if not near(answer, real):
                    _explain_running_mean(means, rank, kind, real, answer)
    return "right for plain and sync, on 2 and 3 ranks, after 1 to 3 steps."


def _explain_running_mean(means: Means, rank: int, kind: str, real: float, answer: Any) -> None:
    over_ranks = [sum(step) / len(step) for step in means]
    is_own = near(answer, _running([step[rank] for step in means]))
    is_sync = kind == "sync"
    is_last = near(answer, over_ranks[-1]) or near(answer, means[-1][rank])
    mistakes = {
        "Return one number. Is `return` missing?": not is_number(number(answer)),
        "That is the last batch's mean. A running mean takes a tenth of each new one.": is_last,
        "With SyncBatchNorm each step's mean is that over all ranks.": is_sync and is_own,
        "Each step takes 0.9 of the old value and 0.1 of the mean over all ranks.": is_sync,
        "Plain batch norm knows only its own rank's batch.": near(answer, _running(over_ranks)),
        "That would be the rank's own history. DDP broadcasts rank 0's buffers before each forward "
        "pass, so what rank 0 has is what the next step begins with.": is_own,
        "That is what rank 0 has. The broadcast comes before the forward pass; then each rank adds "
        "its own batch, once.": near(answer, _running([step[0] for step in means])),
        "Before each step the old value is rank 0's; then the rank's own batch counts a "
        "tenth.": True,
    }
    judge(
        f"{kind}, means {means}: on rank {rank} running_mean is {real:.4f}, and you predicted "
        f"{answer!r}.",
        mistakes,
    )


def _running(means: list[float]) -> float:
    value = 0.0
    for mean in means:
        value = (1 - MOMENTUM) * value + MOMENTUM * mean
    return value


@in_group
def _prepared(rank: int, prepare: Callable[[nn.Module], Any]) -> tuple[str, list[float]]:
    """What is wrong with the model, or its running means after a step."""
    torch.manual_seed(0)
    given = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in given.state_dict().items()}
    model = prepare(given)
    if not isinstance(model, DistributedDataParallel):
        return f"you returned {'None' if model is None else f'a {type(model).__name__}'}", []
    found = model.module.state_dict()
    if found.keys() != before.keys() or any(not found[k].equal(before[k]) for k in before):
        return OTHER, []
    if not all(layer.training for layer in model.modules()):
        return ASLEEP, []
    torch.manual_seed(rank)
    model(torch.randn(3, 4) + rank).sum().backward()
    return "", model.module.state_dict()["1.running_mean"].tolist()


@exercise(
    "`convert_sync_batchnorm` from `ddp_lessons.syncbn` works without a GPU.",
    "Convert first, then wrap what it returns in DistributedDataParallel, and return that.",
)
def check_prepare(prepare: Callable[[nn.Module], Any]) -> str:
    """Check `prepare(model)`: converted, wrapped, and running on two real ranks."""
    run = run_ranks(_prepared, (prepare,), check=False)
    text = "" if run.ok else run.explain()
    mistakes: dict[str, object] = {
        "converting failed: the model was wrapped already.\n"
        "DDP looks at the layers when it wraps. Convert first.": "Convert first, then wrap" in text,
        "PyTorch's SyncBatchNorm refused to run on CPU tensors.\n"
        "Its arithmetic is a CUDA kernel. `ddp_lessons.syncbn` has a converter that works here, "
        "and takes PyTorch's own on a "
        "GPU.": "SyncBatchNorm layers only work with GPU" in text or "to be on GPU" in text,
    }
    judge("", mistakes)
    run.raise_for_failure()
    (problem, running), (on_1, other) = run.values
    problem = problem or on_1
    if problem:
        mistakes = {
            "Return it with all its layers and weights: in the converted model only the batch norm "
            "layers are different.": problem == OTHER,
            "In eval mode batch norm looks at no batch and learns no mean. Training needs "
            "`train()`, as the model came.": problem == ASLEEP,
            "Return the model in DistributedDataParallel: without it gradients stay on their "
            "rank.": True,
        }
        judge(f"{problem}.", mistakes)
    if running != other:
        raise Wrong(
            f"after a step the ranks' running means differ: {running[0]:.3f} and {other[0]:.3f} in "
            "channel 0.",
            "The batch norm layer still knows its own rank only. The converter returns the model "
            "to use: convert, and wrap what comes back.",
        )
    return "synchronised and wrapped; after a step both ranks have the same running statistics."
