"""The checks of lesson 09: SyncBatchNorm by hand, running means, converting a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks
from ddp_lessons.exercises.numeric_answers import near
from ddp_lessons.syncbn import SyncBatchNorm, convert_sync_batchnorm

EPS, CHANNELS, MOMENTUM = 1e-3, 3, 0.1
COUNTS = ((4, 4), (5, 2), (3, 0, 4), (6,), (2, 3, 1, 4))  # samples of each rank
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
) -> Any:
    return normalise(_batches(counts)[rank].clone(), EPS)


def _by(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / (var + EPS).sqrt()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each channel."""
    return x.mean(0), x.var(0, correction=0)


@exercise(
    "Put count, sum and sum of squares of each channel into one tensor and `all_reduce` it.",
    "mean = sum / count; variance = squares / count - mean ** 2.",
)
def check_normalise(normalise: Callable[[Tensor, float], Tensor]) -> str:
    """Check `normalise(x, eps)` on each rank against batch norm over all samples."""
    for counts in COUNTS:
        seen = f"ranks with {', '.join(map(str, counts))} samples: "
        run = run_ranks(_normalised, (normalise, counts), nprocs=len(counts), check=False)
        if 0 in counts and not run.ok:
            raise Wrong(
                f"{seen}{run.explain().splitlines()[0]}",
                "A rank without samples must make the same calls as the others, with zeros. Its "
                "own mean, 0 / 0, must not be needed.",
            )
        run.raise_for_failure()
        batches = _batches(counts)
        _judge_shapes(batches, run.values)
        _judge_normalised(seen, batches, torch.cat(run.values).double())
    return "as one process would, for 4 and 4, 5 and 2, 2, 3, 1 and 4 samples, and with none."


def _judge_shapes(batches: list[Tensor], outputs: list[Any]) -> None:
    for rank, (x, output) in enumerate(zip(batches, outputs, strict=True)):
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else repr(output)
            raise Wrong(
                f"rank {rank} returned {got} for an x of shape {tuple(x.shape)}.",
                "Return this rank's own samples, normalised, in the shape of `x`.",
            )


def _judge_normalised(seen: str, batches: list[Tensor], result: Tensor) -> None:
    def has_used(mean: Tensor, var: Tensor) -> bool:
        return bool(torch.allclose(result, _by(whole, mean, var), atol=1e-8))

    whole, parts = torch.cat(batches), [x for x in batches if len(x)]
    mean, var = _moments(whole)
    if has_used(mean, var):
        return
    means, variances = map(torch.stack, zip(*map(_moments, parts), strict=True))
    mean_of_means = means.mean(0)
    around_it = (whole - mean_of_means).square().mean(0)
    own = torch.cat([_by(x, *_moments(x)) for x in parts])
    mistakes = {
        "The variance is the mean of the ranks' variances. It forgets how far the ranks' means lie "
        "apart: sums of squares do not.": has_used(mean, variances.mean(0)),
        "Mean and variance are means over ranks. Ranks with few samples count too much, and the "
        "variance forgets how far the ranks' "
        "means lie apart.": has_used(mean_of_means, variances.mean(0)),
        "The mean is the mean of the ranks' means: ranks with few samples count too much. Divide "
        "the sum over ranks by the number of all samples.": has_used(mean_of_means, around_it),
        "Each rank used the statistics of its own batch. Nothing was put together.": (
            torch.allclose(result, own, atol=1e-8)
        ),
        "The variance is divided by count - 1. Batch norm normalises with the biased one, and "
        "keeps count - 1 for the running variance.": has_used(mean, whole.var(0)),
        "The mean and variance must be those of all samples: sums over ranks, divided by the "
        "number of all samples.": True,
    }
    channel_mean, channel_var = (float(moment[0]) for moment in _moments(result))
    judge(
        f"{seen}of all outputs together, channel 0 has the mean {channel_mean:.3f} and the "
        f"variance {channel_var:.3f}, where batch norm gives 0 and about 1; sample by sample they "
        "are not those of one process.",
        mistakes,
    )


@in_group
def _saved(rank: int, means: Means, kind: str) -> float:
    layer = nn.BatchNorm1d(1, momentum=MOMENTUM).double()
    if kind == "sync":
        layer = convert_sync_batchnorm(layer)
    model = DistributedDataParallel(layer)
    for step in means:
        model(torch.tensor([[-1.0], [1.0]]).double() + step[rank])
    return float(layer.running_mean)


@exercise(
    "Plain: before each forward pass every rank gets rank 0's old value.",
    "`new = 0.9 * old_of_rank_0 + 0.1 * mean`; for sync, the mean over ranks of the step's means.",
)
def check_running_mean(predict: Callable[..., float]) -> str:
    """Check `predict(means, rank, kind)` against real layers under DDP on real ranks."""
    because = "It takes means, a rank and a kind."
    for means in MEANS:
        for kind in ("plain", "sync"):
            run = run_ranks(_saved, (means, kind), nprocs=len(means[0]))
            for rank, real in enumerate(run.values):
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
def _prepared(
    rank: int, prepare: Callable[[nn.Module], Any]
) -> tuple[str, bool, list[float] | None]:
    """The model's type, whether its norm is synchronised, and DDP's running means after a step."""
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    if not isinstance(model, DistributedDataParallel):
        return type(model).__name__, False, None
    torch.manual_seed(rank)
    model(torch.randn(3, 4) + rank).sum().backward()
    synchronised = any(isinstance(layer, SyncBatchNorm) for layer in model.modules())
    return type(model).__name__, synchronised, model.module[1].running_mean.tolist()


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
    kind, synchronised, running = run.values[0]
    if running is None:
        raise Wrong(
            f"you returned a {kind}.",
            "Return the model in DistributedDataParallel: without it gradients stay on their rank.",
        )
    other = run.values[1][2]
    if not synchronised or running != other:
        raise Wrong(
            f"after a step the ranks' running means differ: {running[0]:.3f} and {other[0]:.3f} in "
            "channel 0.",
            "The batch norm layer still knows its own rank only. The converter returns the model "
            "to use: convert, and wrap what comes back.",
        )
    return "synchronised and wrapped; after a step both ranks have the same running statistics."
