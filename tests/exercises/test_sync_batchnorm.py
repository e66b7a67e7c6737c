"""The checks of lesson 09: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

import cloudpickle
import numpy as np
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


def gathered(x: Any) -> Any:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def of_all(x: Any, eps: float) -> Any:
    whole = gathered(x)
    return (x - whole.mean(0)) / (whole.var(0, correction=0) + eps).sqrt()


def in_two_passes(x: Any, eps: float) -> Any:
    count, total = torch.tensor(len(x), dtype=x.dtype), x.sum(0)
    dist.all_reduce(count)
    dist.all_reduce(total)
    squares = (x - total / count).square().sum(0)
    dist.all_reduce(squares)
    return (x - total / count) * torch.rsqrt(squares / count + eps)


def in_place(x: Any, eps: float) -> Any:
    return x.copy_(of_all(x, eps))


def channel_by_channel(x: Any, eps: float) -> Any:
    """An index with `...` is no gap."""
    outputs = [in_two_passes(x[..., c : c + 1], eps)[..., 0] for c in range(x.shape[-1])]
    return torch.stack(outputs, -1)


def by_torch(x: Any, eps: float) -> Any:
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, len(x))
    whole = nn.functional.batch_norm(gathered(x), None, None, training=True, eps=eps)
    return whole.split(sizes)[dist.get_rank()]


def by_the_layer(x: Any, eps: float) -> Any:
    layer = nn.BatchNorm1d(x.size(1), eps=eps, affine=False, dtype=x.dtype)
    return convert_sync_batchnorm(layer)(x)


def counts_own_for_all(x: Any, eps: float) -> Any:
    """Right where all ranks have as many samples."""
    sums = torch.stack([x.sum(0), x.square().sum(0)]) / len(x) / dist.get_world_size()
    dist.all_reduce(sums)
    return (x - sums[0]) / (sums[1] - sums[0] ** 2 + eps).sqrt()


def other_on_rank_1(x: Any, eps: float) -> Any:
    return of_all(x, eps) + (dist.get_rank() == 1)


def on_rank_0(x: Any, eps: float) -> Any:
    return of_all(x, eps) if dist.get_rank() == 0 else x


def from_all(x: Any, eps: float) -> Any:
    """Of `x` and all ranks' samples."""
    return lambda change: change(x, gathered(x).mean(0), gathered(x).var(0, correction=0))


def by_layers(means: Any, rank: int, kind: str) -> Any:
    """Asks real layers, one of this rank's and one of rank 0."""
    mine, first = nn.BatchNorm1d(1).double(), nn.BatchNorm1d(1).double()
    for step in means:
        each = [sum(step) / len(step)] * len(step) if kind == "sync" else step
        mine.load_state_dict(first.state_dict())
        for layer, mean in ((mine, each[rank]), (first, each[0])):
            layer(torch.tensor([[mean - 1], [mean + 1]]).double())
    return mine.running_mean


def in_numpy(means: Any, rank: int, kind: str) -> Any:
    table = np.array(means)
    weights = 0.1 * 0.9 ** np.arange(len(table))[::-1]
    seen = table.mean(1) if kind == "sync" else np.append(table[:-1, 0], table[-1, rank])
    return np.float32(weights @ seen)


def empties_means(means: Any, rank: int, kind: str) -> float:
    value = 0.0
    while means:
        step = means.pop(0)
        new = sum(step) / len(step) if kind == "sync" else step[0 if means else rank]
        value = 0.9 * value + 0.1 * new
    return value


def exactly(means: Any, rank: int, kind: str) -> Any:
    *early, last = [list(map(Fraction, step)) for step in means]
    old = exactly(early, 0, kind) if early else Fraction(0)
    return old * 9 / 10 + (sum(last) / len(last) if kind == "sync" else last[rank]) / 10


def for_two(means: Any, rank: int, kind: str) -> float:
    return predict([step[:2] for step in means], min(rank, 1), kind)


def other_kind(means: Any, rank: int, kind: str) -> float:
    return predict(means, rank, "plain" if kind == "sync" else "sync")


class ByHand(nn.BatchNorm1d):  # type: ignore[misc]
    """A batch norm of one's own that averages over ranks; right for batches of equal size."""

    def forward(self, x: Any) -> Any:
        mean = x.detach().mean(0)
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
        return (x - mean) * self.weight + self.bias


def layer_by_layer(model: Any) -> Any:
    for name, layer in model.named_children():
        setattr(model, name, convert_sync_batchnorm(layer))
    return DistributedDataParallel(model, broadcast_buffers=False)


def built_by_hand(model: Any) -> Any:
    layer = ByHand(4)
    layer.load_state_dict(model[1].state_dict())
    return DistributedDataParallel(nn.Sequential(model[0], layer, model[2]))


class OurDDP(DistributedDataParallel):  # type: ignore[misc]
    pass


def asleep(model: Any) -> Any:
    return prepare(model).eval()


def without_norm(model: Any) -> Any:
    return DistributedDataParallel(nn.Sequential(model[0], nn.Identity(), model[2]))


def new_model(model: Any) -> Any:
    return prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def wrapped_on_rank_0(model: Any) -> Any:
    return prepare(model) if dist.get_rank() == 0 else model


def converted_on_rank_0(model: Any) -> Any:
    return prepare(model) if dist.get_rank() == 0 else DistributedDataParallel(model)


RIGHT: list[tuple[Any, Any]] = [
    (check_normalise, normalise),
    (check_normalise, channel_by_channel),
    (check_normalise, answers.mixed(of_all, in_two_passes, by_torch)),
    (
        check_normalise,
        answers.mixed(
            answers.Called(of_all),
            in_place,
            lambda x, eps: of_all(x, eps).numpy(),
            lambda x, eps: of_all(x.float(), eps),
        ),
    ),
    (check_running_mean, predict),
    (check_running_mean, by_layers),
    (check_running_mean, in_numpy),
    (check_running_mean, empties_means),
    (check_running_mean, exactly),
    (check_running_mean, lambda *args: torch.tensor(predict(*args))),
    (check_prepare, prepare),
    (check_prepare, layer_by_layer),
    (check_prepare, built_by_hand),
    (check_prepare, lambda model: OurDDP(module=convert_sync_batchnorm(model).train())),
    (check_prepare, answers.decorated(prepare)),
    (
        check_prepare,
        lambda model: [convert_sync_batchnorm(model), DistributedDataParallel(model)][1],
    ),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_normalise, by("local"), "4, 4 samples.*statistics of its own batch"),
    (check_normalise, by("variances"), "mean of the ranks' variances.*lie apart"),
    (check_normalise, by("means"), "mean of the ranks' variances|means over ranks"),
    (check_normalise, by("unbiased"), r"divided by count - 1.*biased"),
    (check_normalise, by("no eps"), "`eps` is missing"),
    (check_normalise, mean_of_outputs, "must be those of all samples"),
    (check_normalise, skips_empty, "3, 0, 4 samples.*same calls as the others"),
    (
        check_normalise,
        lambda x, eps: x.mean(),
        r"a tensor of shape \(\) for an x of shape \(4, 3\)",
    ),
    (check_normalise, lambda x, eps: None if eps else x, "rank 0 returned None"),
    (
        check_normalise,
        lambda x, eps: from_all(x, eps)(lambda x, mean, var: (x - mean) / (var.sqrt() + eps)),
        "under the root",
    ),
    (
        check_normalise,
        lambda x, eps: from_all(x, eps)(lambda x, mean, var: (x - mean) / (var + eps)),
        "Batch norm divides by its root",
    ),
    (
        check_normalise,
        lambda x, eps: from_all(x, eps)(lambda x, mean, var: x - mean),
        "Only the mean was taken away",
    ),
    (
        check_normalise,
        lambda x, eps: from_all(x, eps)(
            lambda x, mean, var: (
                (x - gathered(x).mean()) / (gathered(x).var(correction=0) + eps).sqrt()
            )
        ),
        "Each channel has a mean and a variance of its own",
    ),
    (check_normalise, by_the_layer, "calls SyncBatchNorm itself.*by hand what that layer does"),
    (check_normalise, counts_own_for_all, "5, 2 samples.*must be those of all"),
    (check_normalise, other_on_rank_1, "Only on rank 1 the outputs are different"),
    (check_normalise, on_rank_0, "rank 1 has returned before all_gather_object"),
    (check_normalise, answers.prints(of_all), "rank 0 returned None"),
    (check_normalise, lambda x, eps: of_all(x, eps).T, r"a tensor of shape \(3, 4\) for an x of"),
    (check_normalise, lambda x, eps: of_all(gathered(x), eps), r"of shape \(8, 3\) for an x of"),
    (check_normalise, lambda x: x, "failed on real ranks.*TypeError"),
    (check_running_mean, predict_by("own"), "rank 1 .*the rank's own history.*broadcasts rank 0's"),
    (check_running_mean, predict_by("rank 0"), "rank 1 .*what rank 0 has"),
    (check_running_mean, always_together, "plain.*knows only its own rank's batch"),
    (check_running_mean, last, "last batch's mean.*a tenth"),
    (check_running_mean, never_together, "sync.*that over all ranks"),
    (check_running_mean, backwards, "plain.*Before each step|sync.*Each step takes"),
    (check_running_mean, lambda means, rank, kind: None if rank else 0.1, "predicted None"),
    (check_running_mean, answers.prints(predict), "predicted None.*one number.*`return`"),
    (check_running_mean, lambda *args: str(predict(*args)), "predicted '0.1.*one number"),
    (check_running_mean, for_two, r"\[1.0, 2.0, 6.0\].*Each step takes|rank 2"),
    (check_running_mean, other_kind, "plain.*knows only its own rank's batch"),
    (check_running_mean, lambda means, *args: predict(means[:1], *args), "plain.*Before each step"),
    (check_running_mean, lambda *args: np.array([1, 2]), "one number"),
    (check_running_mean, answers.recurses, "raised RecursionError"),
    (check_running_mean, lambda means: 0.1, "raised TypeError"),
    (check_prepare, DistributedDataParallel, "running means differ"),
    (check_prepare, ignores_the_result, "running means differ"),
    (check_prepare, convert_sync_batchnorm, "you returned a Sequential.*gradients stay"),
    (check_prepare, lambda m: convert_sync_batchnorm(DistributedDataParallel(m)), "Convert first"),
    (check_prepare, asleep, "in eval mode.*learns no mean"),
    (check_prepare, without_norm, "not the one that was given.*all its layers"),
    (check_prepare, new_model, "not the one that was given.*weights"),
    (check_prepare, answers.prints(prepare), "you returned None.*gradients stay"),
    (check_prepare, lambda m: (prepare(m),), "you returned a tuple"),
    (check_prepare, lambda m: prepare(m).module, "you returned a Sequential"),
    (check_prepare, wrapped_on_rank_0, "rank 1 has returned before DistributedDataParallel"),
    (check_prepare, converted_on_rank_0, "is not the same on all ranks"),
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
