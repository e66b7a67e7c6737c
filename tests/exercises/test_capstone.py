"""The checks of lesson 20: repairs pass, usual and unusual; mistakes and half repairs do not.

The mistakes are those of the stored notebook, the usual repairs those of its solution.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler, Subset

from ddp_lessons import launch
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
from ddp_lessons.exercises.framework import Feedback
from ddp_lessons.syncbn import convert_sync_batchnorm
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


def pieces(notebook: str) -> dict[str, Any]:
    """What a notebook's cells of imports, pieces and `train` define."""
    cells = json.loads((ROOT / "notebooks" / notebook).read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found: dict[str, Any] = {"__name__": notebook}
    starts = "|".join(
        ["import contextlib", *(rf"def {name}\(" for name in (*PIECES, "train", "note"))]
    )
    for source in filter(re.compile(starts).match, code):
        exec(source, found)
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


def random_seed(dataset: Any, epoch: int, batch_size: int) -> Any:
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"))
    dist.broadcast(seed, 0)
    sampler = DistributedSampler(dataset, seed=int(seed))
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


# Statistics


def synchronised(model: nn.Module) -> Any:
    return DistributedDataParallel(convert_sync_batchnorm(model))


def averaged(model: nn.Module) -> Any:
    """Buffers are left alone in training; the mean of all ranks' is taken for evaluation."""
    wrapped = BROKEN["wrap"](model)

    def share(module: nn.Module, _: Any) -> None:
        for buffer in module.buffers():
            if not module.training and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()

    wrapped.register_forward_pre_hook(share)
    return wrapped


def group_norm(model: Any) -> Any:
    for name, layer in model.features.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            setattr(model.features, name, nn.GroupNorm(4, layer.num_features))
    return DistributedDataParallel(model)


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


def only_means(model: nn.Module) -> Any:
    names = [name for name, _ in model.named_buffers() if not name.endswith("running_mean")]
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


def of_rank_0(rate: float, ranks: int) -> float:
    return rate if dist.get_rank() == 0 else rate * ranks


# Gradients


def epoch_of(backward: Callable[..., Any], after: Callable[..., Any] = lambda *_: None) -> Any:
    """`train_epoch` with another way to accumulate a group's gradient."""

    def train_epoch(model: Any, optimizer: Any, batches: Any, k: int) -> float:
        losses = []
        for first in range(0, len(batches), k):
            group = batches[first : first + k]
            losses.append(backward(model, group, k))
            after(model)
            optimizer.step()
            optimizer.zero_grad()
        return float(sum(losses) / len(losses))

    return train_epoch


def always_averaged(model: Any, group: Any, k: int) -> float:
    for images, labels in group:
        loss = cross_entropy(model(images), labels) / len(group)
        loss.backward()
    return float(loss)


def one_backward(model: Any, group: Any, k: int) -> float:
    images, labels = map(torch.cat, zip(*group, strict=True))
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return float(loss)


def never_averaged(model: Any, group: Any, k: int) -> float:
    with model.no_sync():
        return always_averaged(model, group, k)


def outside(model: Any, group: Any, k: int) -> float:
    return always_averaged(model.module, group, k)


def average(model: Any) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def forward_outside(model: Any, group: Any, k: int) -> float:
    """The forward is not under `no_sync`, so its backward averages: each time."""
    for images, labels in group:
        loss = cross_entropy(model(images), labels) / len(group)
        with model.no_sync():
            loss.backward()
    return float(loss)


def divided_by_k(model: Any, group: Any, k: int) -> float:
    return always_averaged(model, group, k) if len(group) == k else one_k(model, group, k)


def one_k(model: Any, group: Any, k: int) -> float:
    for images, labels in group:
        loss = cross_entropy(model(images), labels) / k
        loss.backward()
    return float(loss)


def not_divided(model: Any, group: Any, k: int) -> float:
    return one_k(model, group, 1)


def without_the_rest(model: Any, optimizer: Any, batches: Any, k: int) -> float:
    return float(repaired.train_epoch(model, optimizer, batches[: len(batches) // k * k], k))


def weights_averaged(model: Any, optimizer: Any, batches: Any, k: int) -> float:
    loss = BROKEN["train_epoch"](model, optimizer, batches, k)
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    return float(loss)


def returns_nothing(model: Any, optimizer: Any, batches: Any, k: int) -> None:
    repaired.train_epoch(model, optimizer, batches, k)


# Uneven work


def mine(dataset: Any) -> Any:
    return Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))


def hits(model: nn.Module, dataset: Any) -> list[bool]:
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


def divides_by_none(model: nn.Module, dataset: Any) -> float:
    mean = torch.tensor(own_part(model, dataset) / len(mine(dataset)))
    dist.all_reduce(mean)
    return float(mean)


# Hangs


def by_rank_0(loss: float, target: float) -> Any:
    decision = [loss < target]
    dist.broadcast_object_list(decision, 0)
    return decision[0]


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


def reduced_loss(loss: float, target: float) -> bool:
    mean = torch.tensor(loss)
    dist.reduce(mean, 0)
    return bool(float(mean) / dist.get_world_size() < target)


# Rank 0


def replaced(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)
    dist.all_reduce(torch.zeros(1))


def by_the_last(path: str, state: Any) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        with open(path, "wb") as file:
            torch.save(state, file)
    dist.barrier()


def told_by_rank_0(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.broadcast_object_list([path], 0)


def nobody_waits(path: str, state: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(state, path)


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


def must_exist(path: str, model: Any, optimizer: Any) -> int:
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


def new_optimizer(path: str, model: Any, optimizer: Any) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return repaired.resume(path, model, optimizer)


RIGHT: list[tuple[Any, Any]] = [
    *((check, SOLVED[name]) for name, check in PIECES.items()),
    *((check, getattr(repaired, name)) for name, check in PIECES.items()),
    (check_data, answers.mixed(another_seed_each_epoch, own_sampler, order_of_rank_0)),
    (check_data, answers.mixed(own_sampler, order_of_rank_0, another_seed_each_epoch)),
    (check_statistics, answers.mixed(synchronised, averaged, group_norm)),
    (check_statistics, answers.mixed(averaged, group_norm, synchronised)),
    (check_rate, answers.mixed(by_groups, set_later, by_hand)),
    (check_rate, answers.mixed(by_hand, by_groups, set_later)),
    (check_gradients, epoch_of(always_averaged)),
    (check_gradients, answers.mixed(epoch_of(outside, average), epoch_of(one_backward))),
    (check_evaluation, answers.mixed(gathered, weighted, on_rank_0)),
    (check_evaluation, answers.mixed(weighted, on_rank_0, gathered)),
    (check_stop, answers.mixed(by_rank_0, if_any, if_all)),
    (check_stop, answers.mixed(if_any, if_all, by_rank_0)),
    (check_save, answers.mixed(replaced, by_the_last, told_by_rank_0)),
    (check_save, answers.mixed(by_the_last, told_by_rank_0, replaced)),
    (check_resume, answers.mixed(sent_by_rank_0, into_ddp)),
    (check_resume, answers.mixed(into_ddp, sent_by_rank_0)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_data, BROKEN["batches"], "of 24 samples, 7 were seen more than once.*Family: data"),
    (check_data, no_epoch, "two epochs have the same batches in the same order"),
    (check_data, not_shuffled, "two epochs have the same batches in the same order"),
    (check_data, everything_everywhere, "samples, .* were seen more than once and"),
    (check_data, of_global_size, "for a global batch of 6 the ranks have batches of .6, 6. and"),
    (check_data, random_seed, "epoch 1 has another order when it is asked for again"),
    (check_statistics, BROKEN["wrap"], "weights are equal, but in eval mode .*Family: statistics"),
    (check_statistics, only_means, "in eval mode the scores of the same images differ"),
    (check_statistics, frozen_statistics, "a running mean is still zero"),
    (check_statistics, batch_statistics, "depend on the other images of its batch"),
    (check_statistics, Bare, "after 8 steps their weights differ"),
    (check_statistics, no_ddp, "2 ranks: .*NotImplementedError"),
    (check_rate, BROKEN["make_optimizer"], "first step is 2 times as long.*Family: batch size"),
    (check_rate, sgd(lambda rate, ranks: rate / ranks), "first step is 0.5 times as long"),
    (check_rate, sgd(lambda rate, ranks: rate * ranks**0.5), "first step is 1.41 times"),
    (check_rate, sgd(of_rank_0), "first step is 2 times"),
    (check_rate, sgd(lambda rate, _: rate, momentum=0), "first step is right, but after 4 steps"),
    (check_rate, sgd(lambda rate, ranks: rate * (ranks - 1)), "3 ranks, .*first step is 2 times"),
    (check_gradients, BROKEN["train_epoch"], "ranks' weights differ by up to .*Family: gradients"),
    (check_gradients, epoch_of(never_averaged), "4 batches.*ranks' weights differ"),
    (check_gradients, epoch_of(outside), "ranks' weights differ"),
    (check_gradients, epoch_of(one_k), "7 batches, a step for every 3: the ranks have equal"),
    (check_gradients, epoch_of(not_divided), "4 batches, .* equal weights, off by"),
    (check_gradients, without_the_rest, "7 batches, a step for every 3: the ranks have equal"),
    (check_gradients, weights_averaged, "equal weights, off by"),
    (check_gradients, returns_nothing, "returned None, not a loss"),
    (check_evaluation, BROKEN["evaluate"], "2 ranks: .*waited in all_reduce.*Family: uneven work"),
    (check_evaluation, mean_of_means, "65 samples on 2 ranks: the accuracy is 0.6769, and"),
    (check_evaluation, padded, "65 samples on 2 ranks: the accuracy is"),
    (check_evaluation, own_part, "on 2 ranks: the accuracy is .*, and the ranks returned"),
    (check_evaluation, reduced_to_0, "70 samples on 2 ranks: the accuracy is 0.6714"),
    (check_evaluation, divides_by_none, "Family: uneven work"),
    (check_stop, BROKEN["should_stop"], "losses 0.3 and 0.6, target 0.5.*stop and go on.*hangs"),
    (check_stop, only_rank_0, "2 ranks: .*broadcast"),
    (check_stop, rank_0_alone, "losses 0.1 and 0.2, target 0.5: they decide: stop and go on"),
    (check_stop, asks_when_below, "2 ranks: .*barrier"),
    (check_stop, sum_of_losses, "losses 0.1, 0.2 and 0.4, target 0.5: .*go on, go on and go on"),
    (check_stop, never, "losses 0.1 and 0.2, target 0.5: they decide: go on and go on"),
    (check_stop, reduced_loss, "they decide: "),
    (check_save, BROKEN["save"], "ranks 0 and 1 wrote to the same file, last.pt.*Family: rank 0"),
    (check_save, nobody_waits, "epoch 0: when `save` returned on rank 1, the file was not there"),
    (check_save, waits_too_early, "when `save` returned on rank 1, the file was not there"),
    (check_save, all_write, "ranks 0 and 1 wrote to the same file, last.pt"),
    (check_save, one_after_the_other, "ranks 0 and 1 wrote to the same file, last.pt"),
    (check_save, same_temporary, "ranks 0 and 1 wrote to the same file, last.pt.new"),
    (check_save, barrier_of_one, "Family: rank 0"),
    (check_save, if_missing, "epoch 1: when `save` returned on rank 0, the file was that of epoch"),
    (check_save, only_the_model, "when `save` returned on rank 0, the file was not what was saved"),
    (check_resume, BROKEN["resume"], "2 epochs later they are off by .*Family: resuming"),
    (check_resume, only_rank_0_loads, "rank 1: right after `resume`, its weights are off"),
    (check_resume, momentum_of_rank_0, "2 epochs later they are off by up to"),
    (check_resume, same_epoch_again, "after epoch 1 was saved, `resume` returned 1"),
    (check_resume, from_the_beginning, "after epoch 1 was saved, `resume` returned 0"),
    (check_resume, not_strict, "right after `resume`, its weights are off"),
    (check_resume, must_exist, "FileNotFoundError"),
    (check_resume, new_optimizer, "2 epochs later they are off by up to"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


def test_on_one_rank_two_mistakes_show(tmp_path: Path) -> None:
    """The notebook claims it: of each mistake on its own, in a training that is resumed."""

    def trained(change: dict[str, Any]) -> tuple[bytes, float]:
        code = pieces("solutions/20_capstone.ipynb")
        code.update(change)  # the globals of its `train`
        folder = str(tmp_path / "-".join(["trained", *change]))
        os.mkdir(folder)
        launch(code["train"], args=(folder, 1, 0.0), nprocs=1)
        weights = launch(code["train"], args=(folder, 2, 0.0), nprocs=1).values[0]
        return weights.numpy().tobytes(), torch.load(f"{folder}/rank 0, epoch 1.pt")["said"]

    wanted = trained({})
    shown = [name for name in PIECES if trained({name: BROKEN[name]}) != wanted]
    assert shown == ["evaluate", "resume"]


def test_no_verdict_says_how_to_repair() -> None:
    for name, check in PIECES.items():
        told = repr(check(BROKEN[name])).partition("For a hint")[0]
        assert not re.search(r"Call |Make |Let |must|set_epoch|broadcast|no_sync|barrier", told), (
            told
        )


def test_a_report_counts_what_is_repaired() -> None:
    """It shows what was seen of each piece."""
    states = {"check_data": True, "check_save": False, "check_stop": None}
    found = [Feedback(name, passed, f"`{name}` ran", "", ()) for name, passed in states.items()]
    assert repr(report(*found)).splitlines() == [
        "○ 1 of 3 repaired",
        "data        ✓ repaired   `check_data` ran",
        "save        ✗ broken     `check_save` ran",
        "stop        ○ not tried",
    ]
    assert "<td>✗ broken</td><td><code>check_save</code> ran</td>" in report(*found)._repr_html_()
    assert repr(report(found[0])).startswith("✓ 1 of 1 repaired\n")
