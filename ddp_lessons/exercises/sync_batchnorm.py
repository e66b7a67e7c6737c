"""The checks of lesson 09: SyncBatchNorm by hand, what is saved, a model made ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.results import Run
from ddp_lessons.syncbn import SyncBatchNorm, convert_sync_batchnorm

EPS, CHANNELS, MOMENTUM = 1e-3, 3, 0.1
COUNTS = ((4, 4), (5, 2), (3, 0, 4), (6,), (2, 3, 1, 4))  # samples of each rank
# The means of the ranks' batches, `[step][rank]`.
MEANS = (
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


def _normalised(rank: int, normalise: Callable[..., Any], counts: tuple[int, ...]) -> Any:
    dist.init_process_group("gloo")
    result = normalise(_batches(counts)[rank].clone(), EPS)
    dist.destroy_process_group()
    return result


def _by(batches: list[Tensor], mean: Tensor, var: Tensor) -> list[Tensor]:
    return [(x - mean) / (var + EPS).sqrt() for x in batches]


@exercise(
    "Put count, sum and sum of squares of each channel into one tensor and `all_reduce` it.",
    "mean = sum / count; variance = squares / count - mean ** 2.",
)
def check_normalise(normalise: Callable[[Tensor, float], Tensor]) -> str:
    """Check `normalise(x, eps)` on each rank against batch norm over all samples."""
    for counts in COUNTS:
        run = run_quietly(_normalised, (normalise, counts), nprocs=len(counts))
        if 0 in counts and not run.ok:
            _judge_empty(run, counts)
        run.raise_for_failure()
        _judge_normalised(counts, run.values)
    return "as one process would, for 4 and 4, 5 and 2, 2, 3, 1 and 4 samples, and with none."


def _judge_empty(run: Run, counts: tuple[int, ...]) -> None:
    raise Wrong(
        f"ranks with {_list(counts)} samples: {run.explain().splitlines()[0]}",
        "A rank without samples must make the same calls as the others, with zeros. Its own mean, "
        "0 / 0, must not be needed.",
    )


def _judge_normalised(counts: tuple[int, ...], outputs: list[Any]) -> None:
    batches = _batches(counts)
    for rank, output in enumerate(outputs):
        if not isinstance(output, Tensor) or output.shape != batches[rank].shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else repr(output)
            raise Wrong(
                f"rank {rank} returned {got} for an x of shape {tuple(batches[rank].shape)}.",
                "Return this rank's own samples, normalised, in the shape of `x`.",
            )
    for candidate, because in _explanations(batches):
        if all(torch.allclose(a, b, atol=1e-8) for a, b in zip(outputs, candidate, strict=True)):
            if because:
                raise Wrong(_seen(counts, outputs), because)
            return
    raise Wrong(
        _seen(counts, outputs),
        "The mean and variance must be those of all samples: sums over ranks, divided by the "
        "number of all samples.",
    )


def _explanations(batches: list[Tensor]) -> list[tuple[list[Tensor], str]]:
    """What comes of the right way, first, and of wrong ones, with what to say of each."""
    whole, parts = torch.cat(batches), [x for x in batches if len(x)]
    mean, var = whole.mean(0), whole.var(0, correction=0)
    means = torch.stack([x.mean(0) for x in parts])
    variances = torch.stack([x.var(0, correction=0) for x in parts])
    found = [
        (_by(batches, mean, var), ""),
        (
            _by(batches, mean, variances.mean(0)),
            "The variance is the mean of the ranks' variances. It forgets how far the ranks' means "
            "lie apart: sums of squares do not.",
        ),
        (
            _by(batches, means.mean(0), variances.mean(0)),
            "Mean and variance are means over ranks. Ranks with few samples count too much, and "
            "the variance forgets how far the ranks' means lie apart.",
        ),
        (
            _by(batches, means.mean(0), (whole - means.mean(0)).square().mean(0)),
            "The mean is the mean of the ranks' means: ranks with few samples count too much. "
            "Divide the sum over ranks by the number of all samples.",
        ),
        (
            [_by([x], x.mean(0), x.var(0, correction=0))[0] if len(x) else x for x in batches],
            "Each rank used the statistics of its own batch. Nothing was put together.",
        ),
    ]
    if len(whole) > 1:
        found.append(
            (
                _by(batches, mean, whole.var(0)),
                "The variance is divided by count - 1. Batch norm normalises with the biased one, "
                "and keeps count - 1 for the running variance.",
            )
        )
    return found


def _seen(counts: tuple[int, ...], outputs: list[Tensor]) -> str:
    whole = torch.cat(outputs)
    mean, var = whole.mean(0)[0].item(), whole.var(0, correction=0)[0].item()
    return (
        f"ranks with {_list(counts)} samples: of all outputs together, channel 0 has the mean "
        f"{mean:.3f} and the variance {var:.3f}, where batch norm gives 0 and about 1; sample by "
        "sample they are not those of one process."
    )


def _list(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))


def _saved(rank: int, means: list[list[float]], kind: str) -> float:
    dist.init_process_group("gloo")
    layer = nn.BatchNorm1d(1, momentum=MOMENTUM).double()
    if kind == "sync":
        layer = convert_sync_batchnorm(layer)
    model = DistributedDataParallel(layer)
    for step in means:
        model(torch.tensor([[-1.0], [1.0]]).double() + step[rank])
    dist.destroy_process_group()
    return float(layer.running_mean)


@exercise(
    "Plain: before each forward pass every rank gets rank 0's old value.",
    "`new = 0.9 * old_of_rank_0 + 0.1 * mean`; for sync, the mean over ranks of the step's means.",
)
def check_running_mean(predict: Callable[..., float]) -> str:
    """Check `predict(means, rank, kind)` against real layers under DDP on real ranks."""
    for means in MEANS:
        for kind in ("plain", "sync"):
            ranks = len(means[0])
            run = run_quietly(_saved, (means, kind), nprocs=ranks)
            run.raise_for_failure()
            answers = [
                call(predict, means, rank, kind, because="It takes means, a rank and a kind.")
                for rank in range(ranks)
            ]
            _judge_saved(means, kind, answers, run.values)
    return "right for plain and sync, on 2 and 3 ranks, after 1 to 3 steps."


def _judge_saved(
    means: list[list[float]], kind: str, answers: list[Any], real: list[float]
) -> None:
    wrong = [rank for rank, answer in enumerate(answers) if not _near(answer, real[rank])]
    if not wrong:
        return
    rank = wrong[0]
    seen = (
        f"{kind}, means {means}: on rank {rank} running_mean is {real[rank]:.4f}, and you "
        f"predicted {answers[rank]!r}."
    )
    raise Wrong(seen, _why_not(means, rank, kind, answers[rank]))


def _why_not(means: list[list[float]], rank: int, kind: str, answer: Any) -> str:
    own = _running([step[rank] for step in means])
    together = _running([sum(step) / len(step) for step in means])
    if _near(answer, sum(means[-1]) / len(means[-1])) or _near(answer, means[-1][rank]):
        return "That is the last batch's mean. A running mean takes a tenth of each new one."
    if kind == "sync":
        if _near(answer, own):
            return "With SyncBatchNorm each step's mean is that over all ranks."
        return "Each step takes 0.9 of the old value and 0.1 of the mean over all ranks."
    if _near(answer, together):
        return "Plain batch norm knows only its own rank's batch."
    if _near(answer, own):
        return (
            "That would be the rank's own history. DDP broadcasts rank 0's buffers before each "
            "forward pass, so what rank 0 has is what the next step begins with."
        )
    if _near(answer, _running([step[0] for step in means])):
        return (
            "That is what rank 0 has. The broadcast comes before the forward pass; then each rank "
            "adds its own batch, once."
        )
    return "Before each step the old value is rank 0's; then the rank's own batch counts a tenth."


def _running(means: list[float]) -> float:
    value = 0.0
    for mean in means:
        value = (1 - MOMENTUM) * value + MOMENTUM * mean
    return value


def _near(value: Any, target: float) -> bool:
    return isinstance(value, int | float) and abs(value - target) < 1e-6


def _prepared(rank: int, prepare: Callable[[nn.Module], Any]) -> dict[str, Any]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    wrapped = isinstance(model, DistributedDataParallel)
    layers = list(model.modules()) if isinstance(model, nn.Module) else []
    facts = {
        "kind": type(model).__name__,
        "wrapped": wrapped,
        "synchronised": any(isinstance(layer, SyncBatchNorm) for layer in layers),
    }
    if wrapped:
        torch.manual_seed(rank)
        model(torch.randn(3, 4) + rank).sum().backward()
        facts["running"] = model.module[1].running_mean.tolist()
    dist.destroy_process_group()
    return facts


@exercise(
    "`convert_sync_batchnorm` from `ddp_lessons.syncbn` works without a GPU.",
    "Convert first, then wrap what it returns in DistributedDataParallel, and return that.",
)
def check_prepare(prepare: Callable[[nn.Module], Any]) -> str:
    """Check `prepare(model)`: synchronised, wrapped, and running on two real ranks."""
    run = run_quietly(_prepared, (prepare,), nprocs=2)
    if not run.ok:
        _explain_order(run)
    run.raise_for_failure()
    facts = run.values[0]
    if not facts["wrapped"]:
        raise Wrong(
            f"you returned a {facts['kind']}.",
            "Return the model in DistributedDataParallel: without it gradients stay on their rank.",
        )
    if not facts["synchronised"] or facts["running"] != run.values[1]["running"]:
        raise Wrong(
            f"after a step the ranks' running means differ: {facts['running'][0]:.3f} and "
            f"{run.values[1]['running'][0]:.3f} in channel 0.",
            "The batch norm layer still knows its own rank only. The converter returns the model "
            "to use: convert, and wrap what comes back.",
        )
    return "synchronised and wrapped; after a step both ranks have the same running statistics."


def _explain_order(run: Run) -> None:
    text = run.explain()
    if "Convert first, then wrap" in text:
        raise Wrong(
            "converting failed: the model was wrapped already.",
            "DDP looks at the layers when it wraps. Convert first.",
        )
    if "SyncBatchNorm layers only work with GPU" in text or "to be on GPU" in text:
        raise Wrong(
            "PyTorch's SyncBatchNorm refused to run on CPU tensors.",
            "Its arithmetic is a CUDA kernel. `ddp_lessons.syncbn` has a converter that works "
            "here, and takes PyTorch's own on a GPU.",
        )
