"""The checks of lesson 20: repairs pass, usual and unusual; mistakes and half repairs do not.

The mistakes are those of the stored notebook, the usual repairs those of its solution.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler, Subset

from ddp_lessons import launch
from ddp_lessons.exercises import capstone, framework
from ddp_lessons.exercises import capstone_pieces as repaired
from ddp_lessons.exercises.capstone import (
    check_data,
    check_evaluation,
    check_gradients,
    check_rate,
    check_resume,
    check_save,
    check_statistics,
    check_stop,
    report,
)
from ddp_lessons.exercises.capstone_dashboard import dashboard
from ddp_lessons.exercises.framework import Feedback
from ddp_lessons.syncbn import SyncBatchNorm, convert_sync_batchnorm
from tests.support import answers
from tests.support.checkout import ROOT

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PIECES = {
    "batches": check_data,
    "wrap": check_statistics,
    "make_optimizer": check_rate,
    "train_epoch": check_gradients,
    "evaluate": check_evaluation,
    "should_stop": check_stop,
    "save": check_save,
    "resume": check_resume,
}


def pieces(notebook: str, file: Path | None = None) -> dict[str, Any]:
    """What a notebook's cells of imports, pieces and `train` define; as a file's, if one is given.

    Of code in a file, explanations can read the lines.
    """
    cells = json.loads((ROOT / "notebooks" / notebook).read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found: dict[str, Any] = {"__name__": notebook}
    starts = "|".join(
        ["import contextlib", *(rf"def {name}\(" for name in (*PIECES, "train", "seen", "note"))]
    )
    source = "\n\n".join(filter(re.compile(starts).match, code))
    if file is not None:
        file.write_text(source)
    exec(compile(source, str(file or "<string>"), "exec"), found)
    return found


BROKEN, SOLVED = pieces("20_capstone.ipynb"), pieces("solutions/20_capstone.ipynb")


# Data


class EveryNth(Sampler[int]):  # type: ignore[misc]
    """A sampler of its own."""

    def __init__(self, size: int, epoch: int) -> None:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(size, generator=generator)
        self.mine = order[dist.get_rank() :: dist.get_world_size()].tolist()

    def __iter__(self) -> Any:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


def own_sampler(dataset: Any, epoch: int, batch_size: int) -> Any:
    sampler = EveryNth(len(dataset), epoch)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def order_of_rank_0(dataset: Any, epoch: int, batch_size: int) -> Any:
    """A list of batches, in an order that rank 0 sends to all."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(7 + epoch))
    dist.broadcast(order, 0)
    steps = order.view(-1, batch_size)
    return [dataset[step.chunk(dist.get_world_size())[dist.get_rank()]] for step in steps]


def another_seed_each_epoch(dataset: Any, epoch: int, batch_size: int) -> Any:
    sampler = DistributedSampler(dataset, seed=1000 * epoch)
    loader = DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)
    yield from loader


def two_orders(dataset: Any, epoch: int, batch_size: int) -> Any:
    """An order for the even epochs and one for the odd ones."""
    sampler = DistributedSampler(dataset, seed=epoch % 2)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def in_blocks(dataset: Any, epoch: int, batch_size: int) -> Any:
    """Each rank has a block of the order, so on two ranks a batch is not that of one rank."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch))
    mine = order.chunk(dist.get_world_size())[dist.get_rank()]
    return DataLoader(Subset(dataset, mine.tolist()), batch_size // dist.get_world_size())


def no_epoch(dataset: Any, epoch: int, batch_size: int) -> Any:
    sampler = DistributedSampler(dataset)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def not_shuffled(dataset: Any, epoch: int, batch_size: int) -> Any:
    sampler = DistributedSampler(dataset, shuffle=False)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def everything_everywhere(dataset: Any, epoch: int, batch_size: int) -> Any:
    return DataLoader(dataset, batch_size // dist.get_world_size(), shuffle=True)


def of_global_size(dataset: Any, epoch: int, batch_size: int) -> Any:
    return DataLoader(dataset, batch_size, sampler=EveryNth(len(dataset), epoch))


def minus_rank(dataset: Any, epoch: int, batch_size: int) -> Any:
    """Right only where a rank's seed is its rank."""
    sampler = DistributedSampler(dataset, seed=torch.initial_seed() - dist.get_rank())
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def seeds_all_alike(dataset: Any, epoch: int, batch_size: int) -> Any:
    torch.manual_seed(0)
    return BROKEN["batches"](dataset, epoch, batch_size)


def seeds_by_rank(dataset: Any, epoch: int, batch_size: int) -> Any:
    loader = repaired.batches(dataset, epoch, batch_size)
    torch.manual_seed(dist.get_rank())
    return [*loader]


def random_seed(dataset: Any, epoch: int, batch_size: int) -> Any:
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"))
    dist.broadcast(seed, 0)
    sampler = DistributedSampler(dataset, seed=int(seed))
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


# Statistics


def synchronised(model: nn.Module) -> Any:
    return DistributedDataParallel(convert_sync_batchnorm(model))


def each_layer(model: Any, change: Callable[[int, nn.Module], nn.Module]) -> Any:
    """In DDP, with other layers in place of the batch norms."""
    layers = [
        pair for pair in model.features.named_children() if isinstance(pair[1], nn.BatchNorm2d)
    ]
    for number, (name, layer) in enumerate(layers):
        setattr(model.features, name, change(number, layer))
    return DistributedDataParallel(model)


def shared_at_first(model: nn.Module) -> Any:
    return DistributedDataParallel(convert_sync_batchnorm(model), broadcast_buffers=False)


def not_shared_at_first(model: nn.Module) -> Any:
    return DistributedDataParallel(convert_sync_batchnorm(model), init_sync=False)


def instance_norm(model: Any) -> Any:
    return each_layer(model, lambda _, layer: nn.InstanceNorm2d(layer.num_features, affine=True))


def layer_by_layer(model: Any) -> Any:
    return each_layer(model, lambda _, layer: SyncBatchNorm(layer.num_features))


def group_norm(model: Any) -> Any:
    return each_layer(model, lambda _, layer: nn.GroupNorm(4, layer.num_features))


def no_norm(model: Any) -> Any:
    return each_layer(model, lambda *_: nn.Identity())


def only_the_first(model: Any) -> Any:
    return each_layer(model, lambda n, layer: layer if n else convert_sync_batchnorm(layer))


def of_torch(model: nn.Module) -> Any:
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def converted_too_late(model: nn.Module) -> Any:
    return convert_sync_batchnorm(DistributedDataParallel(model))


def shared_in_eval(model: nn.Module, share: Callable[[Any], None]) -> Any:
    """Buffers are the rank's own in training, and shared when an evaluation begins."""

    def hook(module: nn.Module, _: Any) -> None:
        for buffer in module.buffers():
            if not module.training and buffer.is_floating_point():
                share(buffer)

    model.register_forward_pre_hook(hook)
    return DistributedDataParallel(model)


def sent_in_eval(model: nn.Module) -> Any:
    return shared_in_eval(model, lambda buffer: dist.broadcast(buffer, 0))


def averaged_in_eval(model: nn.Module) -> Any:
    def average(buffer: Any) -> None:
        dist.all_reduce(buffer)
        buffer /= dist.get_world_size()

    return shared_in_eval(model, average)


def each_batch_norm(model: nn.Module, **changes: object) -> Any:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            vars(layer).update(changes)
    return BROKEN["wrap"](model)


def frozen_statistics(model: nn.Module) -> Any:
    return each_batch_norm(model, momentum=0.0)


def batch_statistics(model: nn.Module) -> Any:
    return each_batch_norm(model, running_mean=None, running_var=None, track_running_stats=False)


def no_ddp(model: nn.Module) -> Any:
    return nn.ModuleDict({"module": model})


class Bare(nn.Module):  # type: ignore[misc]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, images: Any) -> Any:
        return self.module(images)


def ignored_buffers(model: nn.Module) -> Any:
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


# Learning rate


def by_groups(model: nn.Module, rate: float) -> Any:
    groups = [{"params": [parameter], "lr": rate} for parameter in model.parameters()]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def set_later(model: nn.Module, rate: float) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


class ByHand(torch.optim.Optimizer):  # type: ignore[misc]
    """SGD whose momentum is in the parameters' own state."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                velocity = self.state[parameter].setdefault("v", torch.zeros_like(parameter))
                velocity.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * velocity)


def by_hand(model: nn.Module, rate: float) -> Any:
    return ByHand(model.module.parameters(), {"lr": rate})


def sgd(change: Callable[[float, int], float], momentum: float = 0.9) -> Any:
    def make_optimizer(model: nn.Module, rate: float) -> Any:
        rate = change(rate, dist.get_world_size())
        return torch.optim.SGD(model.parameters(), rate, momentum=momentum)

    return make_optimizer


def decays(decay: float) -> Any:
    def make_optimizer(model: nn.Module, rate: float) -> Any:
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)

    return make_optimizer


def uphill(model: nn.Module, rate: float) -> Any:
    """The first step is as long, in the other direction."""
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, maximize=True)


def of_rank_0(rate: float, ranks: int) -> float:
    return rate if dist.get_rank() == 0 else rate * ranks


# Gradients


def epoch_of(
    backward: Callable[..., list[float]],
    after: Callable[..., Any] = lambda *_: None,
    result: Callable[[list[float]], float] = lambda losses: sum(losses) / len(losses),
) -> Any:
    """`train_epoch` with another way to accumulate a group's gradient, or to average the loss."""

    def train_epoch(model: Any, optimizer: Any, batches: Any, k: int) -> float:
        model.train()
        losses = []
        for first in range(0, len(batches), k):
            losses += backward(model, batches[first : first + k], k)
            after(model)
            optimizer.step()
            optimizer.zero_grad()
        return result(losses)

    return train_epoch


def one_by_one(model: Any, group: Any, divisor: int) -> list[float]:
    losses = []
    for images, labels in group:
        loss = cross_entropy(model(images), labels)
        (loss / divisor).backward()
        losses.append(loss.item())
    return losses


def always_averaged(model: Any, group: Any, k: int) -> list[float]:
    return one_by_one(model, group, len(group))


def one_backward(model: Any, group: Any, k: int) -> list[float]:
    images, labels = map(torch.cat, zip(*group, strict=True))
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return [loss.item()] * len(group)


def never_averaged(model: Any, group: Any, k: int) -> list[float]:
    with model.no_sync():
        return always_averaged(model, group, k)


def first_averaged(model: Any, group: Any, k: int) -> list[float]:
    """The first batch's backward averages, and what is added later stays on the rank."""
    losses = one_by_one(model, group[:1], len(group))
    with model.no_sync():
        return losses + one_by_one(model, group[1:], len(group))


def outside(model: Any, group: Any, k: int) -> list[float]:
    return always_averaged(model.module, group, k)


def average(model: Any) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def forward_outside(model: Any, group: Any, k: int) -> list[float]:
    """The forward is not under `no_sync`, so its backward averages: each time."""
    losses = []
    for images, labels in group:
        loss = cross_entropy(model(images), labels)
        with model.no_sync():
            (loss / len(group)).backward()
        losses.append(loss.item())
    return losses


def divided_by_k(model: Any, group: Any, k: int) -> list[float]:
    return one_by_one(model, group, k)


def not_divided(model: Any, group: Any, k: int) -> list[float]:
    return one_by_one(model, group, 1)


def mean_of_all_ranks(losses: list[float]) -> float:
    mean = torch.tensor(sum(losses) / len(losses))
    dist.all_reduce(mean)
    return float(mean / dist.get_world_size())


def last_one(losses: list[float]) -> float:
    return losses[-1]


def mean_of_the_last_steps(losses: list[float]) -> float:
    return sum(losses[len(losses) // 2 :]) / (len(losses) - len(losses) // 2)


def without_the_rest(model: Any, optimizer: Any, batches: Any, k: int) -> float:
    return float(repaired.train_epoch(model, optimizer, batches[: len(batches) // k * k], k))


def weights_averaged(model: Any, optimizer: Any, batches: Any, k: int) -> float:
    loss = BROKEN["train_epoch"](model, optimizer, batches, k)
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    return float(loss)


def left_in_eval_mode(model: Any, optimizer: Any, batches: Any, k: int) -> float:
    with mock.patch.object(type(model), "train", return_value=model):
        return repaired.train_epoch(model, optimizer, batches, k)


def returns_nothing(model: Any, optimizer: Any, batches: Any, k: int) -> None:
    repaired.train_epoch(model, optimizer, batches, k)


# Uneven work


def mine(dataset: Any) -> Any:
    return Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))


def hits(model: nn.Module, dataset: Any) -> list[bool]:
    model.eval()
    return [int(model(image).argmax()) == int(label) for image, label in dataset]


def gathered(model: nn.Module, dataset: Any) -> float:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, hits(model, mine(dataset)))
    return float(sum(map(sum, parts)) / len(dataset))


def weighted(model: nn.Module, dataset: Any) -> Any:
    """Sums and numbers in one tensor, and a tensor as the answer."""
    found = hits(model, mine(dataset))
    both = torch.tensor([sum(found), len(found)])
    dist.all_reduce(both)
    return both[0] / both[1]


def in_blocks_of_images(model: nn.Module, dataset: Any) -> float:
    """A rank's part is a block, and the last one may be smaller."""
    size, ranks = len(dataset), dist.get_world_size()
    block = range(size)[dist.get_rank() * -(-size // ranks) :][: -(-size // ranks)]
    total = torch.tensor(float(sum(hits(model, Subset(dataset, block)))))
    dist.all_reduce(total)
    return float(total) / size


def of_a_copy(model: nn.Module, dataset: Any) -> float:
    """The model that is asked does not count."""
    return gathered(copy.deepcopy(model), dataset)


def in_training_mode(model: nn.Module, dataset: Any) -> float:
    right = [int(model(image).argmax()) == int(label) for image, label in mine(dataset)]
    total = torch.tensor(float(sum(right)))
    dist.all_reduce(total)
    return float(total) / len(dataset)


def all_on_every_rank(model: nn.Module, dataset: Any) -> float:
    found = hits(model, dataset)
    return sum(found) / len(found)


def on_rank_0(model: nn.Module, dataset: Any) -> float:
    answer = torch.tensor(sum(hits(model, dataset)) / len(dataset) if dist.get_rank() == 0 else 0.0)
    dist.broadcast(answer, 0)
    return float(answer)


def mean_of_means(model: nn.Module, dataset: Any) -> float:
    found = hits(model, mine(dataset))
    mean = torch.tensor(sum(found) / max(len(found), 1))
    dist.all_reduce(mean)
    return float(float(mean) / dist.get_world_size())


def padded(model: nn.Module, dataset: Any) -> float:
    found = hits(model, Subset(dataset, list(DistributedSampler(dataset, shuffle=False))))
    total = torch.tensor([sum(found), len(found)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def own_part(model: nn.Module, dataset: Any) -> float:
    found = hits(model, mine(dataset))
    return sum(found) / max(len(found), 1)


def reduced_to_0(model: nn.Module, dataset: Any) -> float:
    total = torch.tensor(float(sum(hits(model, mine(dataset)))))
    dist.reduce(total, 0)
    return float(total) / len(dataset)


def in_batches(keep: Callable[[Any, Any], tuple[Any, Any]], inside: bool = False) -> Any:
    """`evaluate` over a rank's part in batches of 32, of which it may leave out some.

    `keep(part, dataset)` returns what `DataLoader` gets and how many of the batches are used.
    """

    def evaluate(model: nn.Module, dataset: Any) -> float:
        model.eval()
        (part, drop_last), number = keep(mine(dataset), dataset)
        total = torch.zeros(())
        for _, (images, labels) in zip(
            range(int(number)), DataLoader(part, 32, drop_last=drop_last), strict=False
        ):
            right = (model(images).argmax(dim=1) == labels).sum()
            if inside:
                dist.all_reduce(right)
            total += right
        if not inside:
            dist.all_reduce(total)
        return float(total) / len(dataset)

    return evaluate


def common_batches(part: Any, dataset: Any) -> Any:
    common = torch.tensor(-(-len(part) // 32))
    dist.all_reduce(common, dist.ReduceOp.MIN)
    return (part, False), common


def whole_batches(part: Any, dataset: Any) -> Any:
    return (part, True), len(part)


def whole_batches_if_any(part: Any, dataset: Any) -> Any:
    return (part, len(part) > 32), len(part)


def cut_to_the_same(part: Any, dataset: Any) -> Any:
    return (Subset(part, range(len(dataset) // dist.get_world_size())), False), len(part)


def without_the_first(part: Any, dataset: Any) -> Any:
    return (Subset(part, range(len(part))[1:]), False), len(part)


def counted_whole_batches(part: Any, dataset: Any) -> Any:
    return (part, False), max(1, len(dataset) // dist.get_world_size() // 32)


def divides_by_none(model: nn.Module, dataset: Any) -> float:
    mean = torch.tensor(own_part(model, dataset) / len(mine(dataset)))
    dist.all_reduce(mean)
    return float(mean)


# Hangs


def gathered_losses(loss: float, target: float) -> bool:
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    return bool(sum(losses) / len(losses) < target)


def sum_below(loss: float, target: float) -> Any:
    """The mean is below the target where the sum is below that of as many targets."""
    total = torch.tensor([loss - target], dtype=torch.double)
    dist.all_reduce(total)
    return total < 0


def told_by_the_root(loss: float, target: float) -> Any:
    """Rank 0 has the sum, decides, and tells the others."""
    total = torch.tensor(loss)
    dist.reduce(total, 0)
    decision = [bool(total / dist.get_world_size() < target)]
    dist.broadcast_object_list(decision, 0)
    return decision[0]


def own_loss(loss: float, target: float) -> bool:
    return loss < target


def by_rank_0(loss: float, target: float) -> Any:
    decision = [loss < target]
    dist.broadcast_object_list(decision, 0)
    return decision[0]


def not_above(loss: float, target: float) -> bool:
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    return bool(sum(losses) / len(losses) <= target)


def never_ends_on_rank_1(loss: float, target: float) -> bool:
    while dist.get_rank() == 1:
        pass
    return loss < target


def reduced_to_rank_0(loss: float, target: float) -> bool:
    mean = torch.tensor(loss)
    dist.reduce(mean, 0)
    return bool(mean / dist.get_world_size() < target)


def if_any(loss: float, target: float) -> Any:
    flag = torch.tensor(loss < target, dtype=torch.uint8)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def if_all(loss: float, target: float) -> bool:
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    return bool(max(losses) < target)


def sum_of_losses(loss: float, target: float) -> bool:
    total = torch.tensor(loss)
    dist.all_reduce(total)
    return float(total) < target


def only_rank_0(loss: float, target: float) -> bool:
    return dist.get_rank() == 0 and bool(by_rank_0(loss, target))


def rank_0_alone(loss: float, target: float) -> bool:
    return dist.get_rank() == 0 and loss < target


def asks_when_below(loss: float, target: float) -> bool:
    if loss < target:
        dist.barrier()
        return True
    return False


def never(loss: float, target: float) -> bool:
    return False


# Rank 0


def nobody_waits(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)


def replaced(path: str, state: Any) -> None:
    nobody_waits(path, state)
    dist.all_reduce(torch.zeros(1))


def plainly(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()


def bytes_plainly(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        Path(path).write_bytes(buffer.getvalue())
    dist.barrier()


def removed_first(path: str, state: Any) -> None:
    if dist.get_rank() == 0 and os.path.exists(path):
        os.remove(path)
    nobody_waits(path, state)
    dist.barrier()


def slept(seconds: float, sleep: Any = None) -> Any:
    """The other ranks sleep, and hope that the file is there."""

    def save(path: str, state: Any) -> None:
        nobody_waits(path, state)
        if dist.get_rank() != 0:
            (sleep or time.sleep)(seconds)

    return save


def polled(path: str, state: Any) -> None:
    """The other ranks look until the file is that of this epoch: ugly, but right."""
    nobody_waits(path, state)
    while not os.path.exists(path) or torch.load(path)["epoch"] != state["epoch"]:
        time.sleep(0.1)


def asynchronous(path: str, state: Any) -> None:
    nobody_waits(path, state)
    dist.barrier(async_op=True).wait()


def not_waited_for(path: str, state: Any) -> None:
    nobody_waits(path, state)
    path_taken.append(dist.all_reduce(torch.zeros(1), async_op=True))


path_taken: list[Any] = []


def met_before_the_name(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, f"{path}.new")
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(f"{path}.new", path)


def each_replaces(path: str, state: Any) -> None:
    """Each rank writes a file of its own and gives it the name: nothing is ever half written."""
    torch.save(state, f"{path}.{dist.get_rank()}")
    os.replace(f"{path}.{dist.get_rank()}", path)
    dist.barrier()


def all_write_bytes(path: str, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    Path(path).write_bytes(buffer.getvalue())
    dist.barrier()


def by_the_last(path: str, state: Any) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
        shutil.move(f"{path}.tmp", path)
    dist.barrier()


def told_by_rank_0(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, buffer := io.BytesIO())
        Path(f"{path}.part").write_bytes(buffer.getvalue())
        Path(f"{path}.part").rename(path)
    dist.broadcast_object_list([path], 0)


def waits_too_early(path: str, state: Any) -> None:
    dist.barrier()
    nobody_waits(path, state)


def all_write(path: str, state: Any) -> None:
    torch.save(state, path)
    dist.barrier()


def one_after_the_other(path: str, state: Any) -> None:
    for rank in range(dist.get_world_size()):
        if dist.get_rank() == rank:
            torch.save(state, path)
        dist.barrier()


def same_temporary(path: str, state: Any) -> None:
    torch.save(state, f"{path}.new")
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(f"{path}.new", path)
    dist.barrier()


def barrier_of_one(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, path)
        dist.barrier()


def if_missing(path: str, state: Any) -> None:
    if not os.path.exists(path):
        nobody_waits(path, state)
    dist.barrier()


def only_the_model(path: str, state: Any) -> None:
    repaired.save(path, {"model": state["model"], "epoch": state["epoch"]})


# Resuming


def sent_by_rank_0(path: str, model: Any, optimizer: Any) -> int:
    """Only rank 0 reads the file."""
    state: list[Any] = [None]
    if dist.get_rank() == 0 and os.path.exists(path):
        state = [torch.load(path)]
    dist.broadcast_object_list(state, 0)
    if state[0] is None:
        return 0
    model.module.load_state_dict(state[0]["model"])
    optimizer.load_state_dict(state[0]["optimizer"])
    return int(state[0]["epoch"] + 1)


def into_ddp(path: str, model: Any, optimizer: Any) -> Any:
    try:
        with open(path, "rb") as file:
            state = torch.load(file, weights_only=True)
    except FileNotFoundError:
        return torch.tensor(0)
    model.load_state_dict({f"module.{key}": value for key, value in state["model"].items()})
    optimizer.load_state_dict(pickle.loads(pickle.dumps(state["optimizer"])))
    return torch.tensor(state["epoch"] + 1)


def only_rank_0_loads(path: str, model: Any, optimizer: Any) -> int:
    if dist.get_rank() == 0:
        return repaired.resume(path, model, optimizer)
    return torch.load(path)["epoch"] + 1 if os.path.exists(path) else 0


def momentum_of_rank_0(path: str, model: Any, optimizer: Any) -> int:
    if dist.get_rank() == 0:
        return repaired.resume(path, model, optimizer)
    return int(BROKEN["resume"](path, model, optimizer))


def only_the_momentum(path: str, model: Any, optimizer: Any) -> int:
    rates = [group["lr"] for group in optimizer.param_groups]
    first = repaired.resume(path, model, optimizer)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return first


def same_epoch_again(path: str, model: Any, optimizer: Any) -> int:
    return max(repaired.resume(path, model, optimizer) - 1, 0)


def from_the_beginning(path: str, model: Any, optimizer: Any) -> int:
    repaired.resume(path, model, optimizer)
    return 0


def not_strict(path: str, model: Any, optimizer: Any) -> int:
    if not os.path.exists(path):
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


def no_buffers(path: str, model: Any, optimizer: Any) -> int:
    if not os.path.exists(path):
        return 0
    state = torch.load(path)
    own = dict(model.module.named_parameters())
    saved = {name: value for name, value in state["model"].items() if name in own}
    model.module.load_state_dict(saved, strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


def removes_it(path: str, model: Any, optimizer: Any) -> int:
    first = repaired.resume(path, model, optimizer)
    dist.barrier()
    if dist.get_rank() == 0 and first:
        os.remove(path)
    return first


def only_the_rates(path: str, model: Any, optimizer: Any) -> int:
    if not os.path.exists(path):
        return 0
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return int(state["epoch"]) + 1


def must_exist(path: str, model: Any, optimizer: Any) -> int:
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


def leaves_it(path: str, model: Any, optimizer: Any) -> int:
    """The optimizer stays as it is."""
    if not os.path.exists(path):
        return 0
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    return int(state["epoch"]) + 1


def mapped(rate: bool) -> Any:
    """Each saved momentum goes to its parameter, by hand."""

    def resume(path: str, model: Any, optimizer: Any) -> int:
        first = leaves_it(path, model, optimizer)
        if first:
            saved = torch.load(path)["optimizer"]
            for number, parameter in enumerate(model.parameters()):
                optimizer.state[parameter] = saved["state"][number]
            for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group["lr"] = old["lr"] if rate else group["lr"]
        return first

    return resume


def loads_and_updates(path: str, model: Any, optimizer: Any) -> int:
    """The numbers that stay as keys win over the parameters' momenta in the next checkpoint."""
    first = leaves_it(path, model, optimizer)
    if first:
        saved = torch.load(path)["optimizer"]
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.state.update(saved["state"])
    return first


def new_optimizer(path: str, model: Any, optimizer: Any) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return repaired.resume(path, model, optimizer)


RIGHT: list[tuple[Any, Any]] = [
    *((check, answers.mixed(SOLVED[n], getattr(repaired, n))) for n, check in PIECES.items()),
    (check_data, another_seed_each_epoch),
    (check_data, own_sampler),
    (check_data, order_of_rank_0),
    (check_statistics, answers.mixed(synchronised, layer_by_layer)),
    (check_statistics, answers.mixed(layer_by_layer, shared_at_first)),
    (check_statistics, answers.mixed(shared_at_first, synchronised)),
    (check_rate, answers.mixed(by_groups, set_later, by_hand)),
    (check_rate, answers.mixed(by_hand, by_groups, set_later)),
    (check_gradients, answers.mixed(epoch_of(always_averaged), epoch_of(forward_outside))),
    (check_gradients, answers.mixed(epoch_of(outside, average), epoch_of(one_backward))),
    (check_gradients, epoch_of(one_backward, result=mean_of_all_ranks)),
    (check_evaluation, answers.mixed(gathered, weighted, in_blocks_of_images)),
    (check_evaluation, answers.mixed(weighted, in_blocks_of_images, gathered)),
    (check_evaluation, of_a_copy),
    (check_stop, answers.mixed(gathered_losses, sum_below, told_by_the_root)),
    (check_stop, answers.mixed(sum_below, told_by_the_root, gathered_losses)),
    (check_save, answers.mixed(polled, by_the_last, told_by_rank_0)),
    (check_save, answers.mixed(by_the_last, asynchronous, replaced)),
    (check_resume, answers.mixed(sent_by_rank_0, into_ddp)),
    (check_resume, answers.mixed(into_ddp, sent_by_rank_0)),
    (check_resume, mapped(rate=True)),
]
PLANTED = {
    "batches": "of 24 samples, 6 were seen more than once.*Family: data",
    "wrap": "weights are equal, but in eval mode .*Family: statistics",
    "make_optimizer": "model, 0.07.` on 2 ranks.*first step is 2 times as long.*Family: batch size",
    "train_epoch": "7 batches, .* differ by up to .*Family: gradients",
    "evaluate": "2 ranks: .*waited in all_reduce.*Family: uneven work",
    "should_stop": "losses 0.9 and 0.6, target 0.5.*stop and stop. Their mean loss is 0.75.*hangs",
    "save": "epoch 0: when `save` returned on rank 1.*not there.*Family: rank",
    "resume": "weights are right after loading, but 2 epochs later .* off by .*Family: resuming",
}
WRONG: list[tuple[Any, Any, str]] = [
    (check_data, no_epoch, "epochs 0 and 1 have the same batches in the same order"),
    (check_data, not_shuffled, "epochs 0 and 1 have the same batches in the same order"),
    (check_data, two_orders, "epochs 0 and 2 have the same batches in the same order"),
    (
        check_data,
        in_blocks,
        "2 ranks: .*but batch 0 of epoch 0 has different samples than on one rank",
    ),
    (check_data, everything_everywhere, "samples, .* were seen more than once and"),
    (check_data, of_global_size, "for a global batch of 6 the ranks have batches of .6, 6. and"),
    (check_data, minus_rank, "samples, .* were seen more than once and"),
    (check_data, seeds_all_alike, "batches of epoch 0, ranks draw the same random numbers"),
    (check_data, seeds_by_rank, "rank 0 draws the same random numbers after the batches of each"),
    (check_data, random_seed, "epoch 1 has a different order when it is asked for again"),
    (check_statistics, ignored_buffers, "in eval mode the scores of the same images differ"),
    (check_statistics, sent_in_eval, "all ranks predict the same, but the weights are off by"),
    (check_statistics, averaged_in_eval, "predict the same, but the weights are off by"),
    (check_statistics, only_the_first, "in eval mode the scores of the same images differ"),
    (check_statistics, of_torch, "2 ranks: .*SyncBatchNorm layers only work with GPU modules"),
    (check_statistics, converted_too_late, "2 ranks: .*wrapped in DistributedDataParallel already"),
    (check_statistics, frozen_statistics, "1 rank: .*the scores are off .* the model as it was"),
    (check_statistics, group_norm, "1 rank: .*weights are off .* the model as it was before"),
    (check_statistics, instance_norm, "1 rank: .*weights are off .* the model as it was before"),
    (check_statistics, no_norm, "1 rank: 1874 weights, not 1922"),
    (check_statistics, not_shared_at_first, "2 ranks: after 8 steps their weights differ"),
    (check_statistics, batch_statistics, "depend on the other images of its batch"),
    (check_statistics, Bare, "after 8 steps their weights differ"),
    (check_statistics, no_ddp, "2 ranks: .*NotImplementedError"),
    (check_rate, sgd(lambda rate, ranks: rate / ranks), "first step is 0.5 times as long"),
    (check_rate, sgd(lambda rate, ranks: rate * ranks**0.5), "first step is 1.41 times"),
    (check_rate, sgd(of_rank_0), "first step is 2 times"),
    (check_rate, sgd(lambda *_: 0.05), "model, 0.07.`.*first step is 0.714 times as long"),
    (check_rate, sgd(lambda rate, _: rate, momentum=0), "first step is right, but after 4 steps"),
    (check_rate, decays(1e-4), "about as long as .* weights after it are off by up to"),
    (check_rate, uphill, "about as long as .* weights after it are off by up to"),
    (check_rate, sgd(lambda rate, ranks: rate * (ranks - 1)), "3 ranks, .*first step is 2 times"),
    (check_gradients, epoch_of(first_averaged), "4 batches, .*: the ranks' weights differ"),
    (check_gradients, epoch_of(one_backward, result=last_one), "weights are right, but rank 0 ret"),
    (check_gradients, epoch_of(one_backward, result=sum), "but rank 0 returned .* the mean of its"),
    (
        check_gradients,
        epoch_of(one_backward, result=mean_of_the_last_steps),
        "the mean of its losses is",
    ),
    (check_gradients, epoch_of(never_averaged), "4 batches.*ranks' weights differ"),
    (check_gradients, epoch_of(outside), "ranks' weights differ"),
    (
        check_gradients,
        epoch_of(divided_by_k),
        "7 batches, a step for every 3: the ranks have equal",
    ),
    (check_gradients, epoch_of(not_divided), "4 batches, .* equal weights, off by"),
    (check_gradients, without_the_rest, "7 batches, a step for every 3: the ranks have equal"),
    (check_gradients, weights_averaged, "equal weights, off by"),
    (check_gradients, left_in_eval_mode, "after an evaluation, 4 of a rank's batches went"),
    (check_gradients, returns_nothing, "returned None, not a loss"),
    (check_evaluation, mean_of_means, "65 samples on 2 ranks: the accuracy is 0.6769, and"),
    (check_evaluation, padded, "65 samples on 2 ranks: the accuracy is"),
    (check_evaluation, own_part, "on 2 ranks: the accuracy is .*, and the ranks returned"),
    (check_evaluation, reduced_to_0, "70 samples on 2 ranks: the accuracy is 0.6714"),
    (check_evaluation, in_training_mode, "which is that of the model in training mode"),
    (check_evaluation, all_on_every_rank, "rank 0 gave 70 of them to the model; its part is some"),
    (check_evaluation, on_rank_0, "but rank 0 gave 70 of them to the model; its part is some 35"),
    (check_evaluation, divides_by_none, "Family: uneven work"),
    (
        check_evaluation,
        in_batches(common_batches, inside=True),
        "65 samples on 2 ranks: .*returned 0.6615 and 0.6615; together they gave 64 of the samples",
    ),
    (check_evaluation, in_batches(whole_batches), "70 samples .* they gave 64 of the samples"),
    (check_evaluation, in_batches(whole_batches_if_any), "70 samples .* gave 64 of the samples"),
    (check_evaluation, in_batches(counted_whole_batches), "70 samples .* gave 64 of the samples"),
    (check_evaluation, in_batches(cut_to_the_same), "65 samples .* gave 64 of the samples"),
    (check_evaluation, in_batches(without_the_first), "70 samples .* gave 68 of the samples"),
    (check_stop, not_above, "losses 0.5 and 0.5, .*decide: stop and stop. Their mean loss is 0.5"),
    (check_stop, reduced_to_rank_0, "losses 0.9 and 0.6, target 0.5.*go on and stop"),
    (check_stop, own_loss, "losses 0.3 and 0.6, target 0.5: they decide: stop and go on"),
    (check_stop, by_rank_0, "losses 0.49 and 0.52, .* stop and stop. Their mean loss is 0.505"),
    (check_stop, if_any, "losses 0.9 and 0.4, .*decide: stop and stop. Their mean loss is 0.65"),
    (check_stop, if_all, "losses 0.3 and 0.6, .*decide: go on and go on. Their mean loss is 0.45"),
    (check_stop, only_rank_0, "2 ranks: .*broadcast"),
    (check_stop, rank_0_alone, "losses 0.1 and 0.2, target 0.5: they decide: stop and go on"),
    (check_stop, asks_when_below, "2 ranks: .*barrier"),
    (check_stop, sum_of_losses, "0.3 and 0.6, .*decide: go on and go on. Their mean loss is 0.45"),
    (check_stop, never, "losses 0.1 and 0.2, target 0.5: they decide: go on and go on"),
    (check_save, nobody_waits, "epoch 0: when `save` returned on rank 1, the file was not there"),
    (check_save, waits_too_early, "when `save` returned on rank 1, the file was not there"),
    (check_save, plainly, "epoch 0: while rank 0 wrote, last.pt itself was incomplete"),
    (check_save, bytes_plainly, "epoch 0: while rank 0 wrote, last.pt itself was incomplete"),
    (
        check_save,
        removed_first,
        "epoch 1: while rank 0 wrote, last.pt of the epoch before was gone",
    ),
    (check_save, slept(0.3), "when `save` returned on rank 1, the file was not there"),
    (check_save, slept(5), "when `save` returned on rank 1, the file was not there"),
    (check_save, slept(1, time.sleep), "when `save` returned on rank 1, the file was not there"),
    (check_save, not_waited_for, "when `save` returned on rank 1, the file was not there"),
    (check_save, met_before_the_name, "when `save` returned on rank 1, the file was not there"),
    (check_save, all_write, "ranks 0 and 1 wrote to last.pt"),
    (check_save, all_write_bytes, "ranks 0 and 1 wrote to last.pt"),
    (check_save, one_after_the_other, "ranks 0 and 1 wrote to last.pt"),
    (check_save, each_replaces, "ranks 0 and 1 wrote to last.pt, last.pt.0 and last.pt.1"),
    (check_save, same_temporary, "ranks 0 and 1 wrote to last.pt and last.pt.new"),
    (check_save, barrier_of_one, "Family: rank 0"),
    (check_save, if_missing, "epoch 1: when `save` returned on rank 0, the file was that of epoch"),
    (check_save, only_the_model, "when `save` returned on rank 0, the file was not what was saved"),
    (check_resume, leaves_it, "the weights are right after loading, but 2 epochs later the"),
    (check_resume, mapped(rate=False), "the weights are right after loading, but 2 epochs later"),
    (check_resume, loads_and_updates, "stopped and resumed a second time, the weights are off by"),
    (check_resume, only_the_momentum, "2 epochs later the weights are off by up to"),
    (check_resume, only_the_rates, "2 epochs later the weights are off by up to"),
    (check_resume, no_buffers, "right after `resume`, its buffers are off by up to"),
    (check_resume, removes_it, "2 ranks: after `resume`, the checkpoint was gone"),
    (check_resume, only_rank_0_loads, "rank 1: right after `resume`, its weights are off"),
    (check_resume, momentum_of_rank_0, "2 epochs later the ranks' weights differ by up to"),
    (check_resume, same_epoch_again, "after epoch 1 was saved, `resume` returned 1"),
    (check_resume, from_the_beginning, "after epoch 1 was saved, `resume` returned 0"),
    (check_resume, not_strict, "right after `resume`, its weights are off"),
    (check_resume, must_exist, "FileNotFoundError"),
    (check_resume, new_optimizer, "2 epochs later the weights are off by up to"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_seen_and_no_verdict_says_how_to_repair_it(name: str) -> None:
    verdict = PIECES[name](BROKEN[name])
    answers.is_explained(lambda _: verdict, None, PLANTED[name])
    told = repr(verdict).partition("For a hint")[0]
    assert not re.search(r"Call |Make |Let |must|set_epoch|broadcast|no_sync|barrier", told), told


def test_no_verdict_gives_another_cause_than_the_right_one() -> None:
    """The model is in eval mode, 0 is no loss of all, and a length of 1 is no fault."""
    no = {
        check_evaluation: (in_batches(common_batches, inside=True), "training mode"),
        check_rate: (decays(1e-4), "is 1 times"),
        check_resume: (leaves_it, "all was loaded"),
    }
    for check, (answer, text) in no.items():
        assert text not in check(answer).seen


def test_the_last_hint_is_the_way() -> None:
    """For the mistakes of the notebook."""
    assert "children()" in check_statistics(...).hints[-1]
    assert "mean.double()" in check_stop(...).hints[-1]
    first_hints = " ".join(check_stop(...).hints[:-1])
    assert not any(word in first_hints for word in ("copy", "double"))


@pytest.mark.slow
def test_on_one_rank_one_mistake_shows(tmp_path: Path) -> None:
    """The notebook claims it; of a training that is resumed."""

    def trained(*broken: str) -> tuple[bytes, float]:
        code = pieces("solutions/20_capstone.ipynb")
        code.update({name: BROKEN[name] for name in broken})  # the globals of its `train`
        folder = str(tmp_path / "-".join(["trained", *broken]))
        os.mkdir(folder)
        launch(code["train"], args=(folder, 1, 0.0), nprocs=1)
        weights = launch(code["train"], args=(folder, 2, 0.0), nprocs=1).values[0]
        return weights.numpy().tobytes(), torch.load(f"{folder}/rank 0, epoch 1.pt")["said"]

    wanted, show = trained(), ["resume"]
    assert trained(*[name for name in PIECES if name not in show]) == wanted
    assert all(trained(name) != wanted for name in show)


def test_a_report_counts_what_is_repaired() -> None:
    """It shows what was seen of each piece."""
    states = {"check_data": True, "check_save": False, "check_rate": None}
    found = [Feedback(name, passed, f"`{name}` ran", "", ()) for name, passed in states.items()]
    assert repr(report(*found, check_stop(...))).splitlines() == [
        "○ 1 of 4 repaired",
        "data        ✓ repaired    `check_data` ran",
        "save        ✗ broken      `check_save` ran",
        "rate        ○ not judged  `check_rate` ran",
        "stop        ○ not tried",
    ]
    assert "<td>✗ broken</td><td><code>check_save</code> ran</td>" in report(*found)._repr_html_()
    assert repr(report(found[0])).startswith("✓ 1 of 1 repaired\n")


def test_an_endless_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no other rank waits."""
    monkeypatch.setattr(framework, "TIMEOUT", 3.0)
    said = "2 ranks: .*rank 1 is in never_ends_on_rank_1, line"
    answers.is_explained(check_stop, never_ends_on_rank_1, said)


def test_the_notebook_says_what_its_checks_and_its_trainer_do() -> None:
    """A new order each epoch is asked for; a larger `epochs` goes on; no run of `look` stops."""
    text = (ROOT / "notebooks/20_capstone.ipynb").read_text()
    assert "see each sample once, in a new order" in text
    assert "called again with the same `epochs`, stays as it is" in text
    assert "look([(1, 8), (2, 8), (3, 8)], target=0.4)" in text
    assert "enough as long as they fail" not in text


def test_the_easier_start_has_four_repaired_pieces() -> None:
    cells = json.loads((ROOT / "notebooks/20_capstone.ipynb").read_text())["cells"]
    easier = next(cell["source"] for cell in cells if cell["source"][0].startswith("EASIER"))
    code = dict(BROKEN)
    exec("".join(easier).replace("False", "True"), code)
    assert sum(code[name] is getattr(repaired, name) for name in PIECES) == 4


def broken_package(*_: Any) -> None:
    raise ImportError("cannot import name 'ranks' from 'ddp_lessons'")


def test_a_fault_of_the_package_is_no_verdict_on_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capstone, "_decided", broken_package)
    verdict = check_stop(SOLVED["should_stop"])
    assert verdict.passed is None
    assert "On 2 ranks the course's own piece fails, too" in verdict.seen
    assert "ImportError: cannot import name 'ranks'" in verdict.seen


# The trainer


@pytest.mark.slow
def test_repaired_it_takes_the_same_steps_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Up to its target; called again it stays as it is."""
    ends = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        ends[ranks] = launch(SOLVED["train"], args=(str(folder), 8, 1.5), nprocs=ranks).values
        assert len([*folder.glob("rank 0, epoch *.pt")]) == 2
    for ranks, weights in ends.items():
        for of_rank in weights:
            assert torch.equal(of_rank, weights[0])
            assert (of_rank - ends[1][0]).norm() < 1e-5 * ends[1][0].norm(), ranks
    again = launch(SOLVED["train"], args=(str(tmp_path / "2"), 8, 1.5), nprocs=2).values[0]
    assert torch.equal(again, ends[2][0])
    assert len([*(tmp_path / "2").glob("rank 0, epoch *.pt")]) == 2


@pytest.mark.slow
def test_a_stop_that_hangs_no_rank_shows_in_the_number_of_epochs(tmp_path: Path) -> None:
    """With all else repaired, the mistake ends the training too early; the notebook says so."""
    code = pieces("solutions/20_capstone.ipynb")
    code["should_stop"] = BROKEN["should_stop"]
    epochs = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        assert launch(code["train"], args=(str(folder), 8, 0.4), nprocs=ranks).ok
        epochs[ranks] = len([*folder.glob("rank 0, epoch *.pt")])
    assert 8 > epochs[1] > epochs[2] > epochs[3]


@pytest.mark.slow
def test_where_one_rank_stops_alone_the_advice_is_to_decide_together(tmp_path: Path) -> None:
    """As stored: the loop of the steps is in `train_epoch`, and `train` has the `break`."""
    code = pieces("20_capstone.ipynb", tmp_path / "trainer.py")
    run = launch(code["train"], args=(str(tmp_path),), nprocs=2, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "returned early"
    assert "Let all ranks decide together" in run.explain()
    assert "fewer batches than others" not in run.explain()


@pytest.mark.slow
@pytest.mark.parametrize("repairs", [(), ("should_stop",), tuple({*PIECES} - {"evaluate"})])
def test_on_three_ranks_the_line_to_blame_is_named(tmp_path: Path, repairs: Any) -> None:
    """Whatever else is repaired, and in a training of many epochs."""
    code = pieces("20_capstone.ipynb")
    code.update({name: SOLVED[name] for name in repairs})
    run = launch(code["train"], args=(str(tmp_path),), nprocs=3, check=False)
    assert run.verdict is not None
    assert re.search("in evaluate, line .* which rank 2 skipped", run.verdict.title)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_dashboard_of_a_run_that_failed(tmp_path: Path) -> None:
    """Its panels show what was noted up to there, and one says that nothing was."""
    folders = [tmp_path / "1", tmp_path / "3"]
    for ranks, folder in zip((1, 3), folders, strict=True):
        folder.mkdir()
        run = launch(BROKEN["train"], args=(str(folder), 1), nprocs=ranks, check=False)
    dashboard(run, str(folders[1]), reference=str(folders[0]))
    figure = plt.gcf()
    drawn = {ax.get_title("left"): ax for ax in figure.axes}
    empty = [title for title, ax in drawn.items() if [t for t in ax.texts if "no rank" in str(t)]]
    plt.close(figure)
    assert empty == ["Checkpoint: epochs late"]
    bars = next(ax for title, ax in drawn.items() if title.startswith("First step")).patches
    assert [round(bar.get_width(), 3) for bar in bars] == [3.0, 3.0, 3.0]
    assert len(drawn) == 7
    assert [len(ax.lines) for title, ax in drawn.items() if "distance" in title] == [3, 3, 3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["rank 0", "rank 1", "rank 2"]


def test_a_dashboard_has_colours_for_four_ranks(tmp_path: Path) -> None:
    run = launch(lambda rank: None, nprocs=5)
    with pytest.raises(ValueError, match="4 ranks, not 5"):
        dashboard(run, str(tmp_path))
