"""The checks of lesson 09: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.sync_batchnorm import check_normalise, check_prepare, check_running_mean
from ddp_lessons.syncbn import convert_sync_batchnorm
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def normalise(x: Any, eps: float, way: str = "right") -> Any:
    count = torch.full((x.size(1),), len(x), dtype=x.dtype)
    sums = torch.stack([count, x.sum(0), x.square().sum(0)])
    if way in ("variances", "means"):
        if way == "means":
            sums = torch.stack([torch.ones_like(count), x.mean(0), x.square().mean(0)])
        own = torch.stack([x.var(0, correction=0), torch.ones_like(count)])
        if not len(x):
            own, sums = torch.zeros_like(own), torch.zeros_like(sums)
        dist.all_reduce(own)
    if way != "local":
        dist.all_reduce(sums)
    mean = sums[1] / sums[0]
    var = sums[2] / sums[0] - mean**2
    if way in ("variances", "means"):
        var = own[0] / own[1]
    if way == "unbiased":
        var = var * sums[0] / (sums[0] - 1)
    if way == "no eps":
        eps = 0.0
    return (x - mean) / (var + eps).sqrt()


def by(way: str) -> Any:
    return lambda x, eps: normalise(x, eps, way)


def skips_empty(x: Any, eps: float) -> Any:
    return normalise(x, eps) if len(x) else x


def mean_of_outputs(x: Any, eps: float) -> Any:
    y = (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()
    dist.all_reduce(y)
    return y / dist.get_world_size()


def predict(means: Any, rank: int, kind: str, way: str = "right") -> float:
    old = value = 0.0
    for step in means:
        together = sum(step) / len(step)
        new = together if kind == "sync" else step[rank]
        of_rank_0 = together if kind == "sync" else step[0]
        value = 0.9 * old + 0.1 * new
        old = value if way == "own" else 0.9 * old + 0.1 * of_rank_0
    return {"right": value, "own": value, "rank 0": old}[way]


def predict_by(way: str) -> Any:
    return lambda means, rank, kind: predict(means, rank, kind, way)


def always_together(means: Any, rank: int, kind: str) -> float:
    return predict(means, rank, "sync")


def last(means: Any, rank: int, kind: str) -> float:
    return float(means[-1][rank])


def never_together(means: Any, rank: int, kind: str) -> float:
    return predict(means, rank, "plain", "own" if kind == "sync" else "right")


def backwards(means: Any, rank: int, kind: str) -> float:
    return predict(means[::-1], rank, kind)


def prepare(model: Any) -> Any:
    return DistributedDataParallel(convert_sync_batchnorm(model))


def ignores_the_result(model: Any) -> Any:
    convert_sync_batchnorm(nn.Sequential(*[nn.BatchNorm1d(4)]))
    return DistributedDataParallel(model)


def stock(model: Any) -> Any:
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def stock_after(model: Any) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(DistributedDataParallel(model))


RIGHT: list[tuple[Any, Any]] = [
    (check_normalise, normalise),
    (check_running_mean, predict),
    (check_prepare, prepare),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_normalise, by("local"), "4, 4 samples.*statistics of its own batch"),
    (check_normalise, by("variances"), "mean of the ranks' variances.*lie apart"),
    (check_normalise, by("means"), "mean of the ranks' variances|means over ranks"),
    (check_normalise, by("unbiased"), r"divided by count - 1.*biased"),
    (check_normalise, by("no eps"), "must be those of all samples"),
    (check_normalise, mean_of_outputs, "must be those of all samples"),
    (check_normalise, skips_empty, "3, 0, 4 samples.*same calls as the others"),
    (check_normalise, lambda x, eps: x.mean(), r"rank 0 returned \(\) for an x of shape \(4, 3\)"),
    (check_normalise, lambda x, eps: None if eps else x, "rank 0 returned None"),
    (check_normalise, lambda x: x, "failed on real ranks.*TypeError"),
    (check_running_mean, predict_by("own"), "rank 1 .*the rank's own history.*broadcasts rank 0's"),
    (check_running_mean, predict_by("rank 0"), "rank 1 .*what rank 0 has"),
    (check_running_mean, always_together, "plain.*knows only its own rank's batch"),
    (check_running_mean, last, "last batch's mean.*a tenth"),
    (check_running_mean, never_together, "sync.*that over all ranks"),
    (check_running_mean, backwards, "plain.*Before each step|sync.*Each step takes"),
    (check_running_mean, lambda means, rank, kind: None if rank else 0.1, "predicted None"),
    (check_running_mean, lambda means: 0.1, "raised TypeError"),
    (check_prepare, DistributedDataParallel, "running means differ"),
    (check_prepare, ignores_the_result, "running means differ"),
    (check_prepare, convert_sync_batchnorm, "you returned a Sequential.*gradients stay"),
    (check_prepare, lambda m: convert_sync_batchnorm(DistributedDataParallel(m)), "Convert first"),
    (check_prepare, stock, "refused to run on CPU"),
    (check_prepare, stock_after, "refused to run on CPU"),
    (check_prepare, lambda model: model.nothing, "failed on real ranks.*AttributeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
