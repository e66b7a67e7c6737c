"""The eight pieces of lesson 20's trainer, repaired: whoever wants to repair fewer imports some.

They run in workers, called by the notebook's `train`; each needs a process group. The notebook has
the same functions with a mistake in each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from ddp_lessons.syncbn import convert_sync_batchnorm

State = dict[str, Any]
Batch = tuple[Tensor, Tensor]


def batches(dataset: Dataset[Any], epoch: int, batch_size: int) -> DataLoader[Any]:
    """The rank's part of an epoch's batches, shuffled; `batch_size` is that of all ranks."""
    sampler = DistributedSampler(dataset)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size // dist.get_world_size(), sampler=sampler)


def wrap(model: nn.Module) -> DistributedDataParallel:
    """The model in DDP, its batch norms synchronised."""
    return DistributedDataParallel(convert_sync_batchnorm(model, quiet=True))


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum; `rate` is for batches of 24."""
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def train_epoch(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    k: int,
) -> float:
    """Train for an epoch, with a step for every `k` batches; return the mean loss."""
    model.train()
    losses: list[float] = []
    for first in range(0, len(batches), k):
        group = batches[first : first + k]
        for n, (images, labels) in enumerate(group, start=1):
            with contextlib.nullcontext() if n == len(group) else model.no_sync():
                loss = cross_entropy(model(images), labels)
                (loss / len(group)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses) / len(losses)


def evaluate(model: nn.Module, dataset: Dataset[Any]) -> float:
    """The accuracy on the dataset, of which each rank takes a part."""
    model.eval()
    size = len(dataset)
    mine = Subset(dataset, range(dist.get_rank(), size, dist.get_world_size()))
    hits = torch.zeros(())
    with torch.no_grad():
        for images, labels in DataLoader(mine, 32):
            hits += (model(images).argmax(dim=1) == labels).sum()
    dist.all_reduce(hits)
    return float(hits) / size


def should_stop(loss: float, target: float) -> bool:
    """Whether the ranks' mean loss is below `target`."""
    mean = torch.tensor(loss, dtype=torch.double)
    dist.all_reduce(mean)
    return bool(mean / dist.get_world_size() < target)


def save(path: str, state: State) -> None:
    """Write the checkpoint."""
    if dist.get_rank() == 0:
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)
    dist.barrier()


def resume(path: str, model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint if there is one; return the epoch to go on with."""
    if not os.path.exists(path):
        return 0
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1
