"""A hang in each of the lessons' subjects: the verdict names the rank and the line.

Real ranks, as a learner starts them: tensor parallelism, pipelines, shards, checkpoints, metrics of
some ranks, streams that end.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset

from ddp_lessons import Run, launch

pytestmark = pytest.mark.ranks

LONG = 60.0  # seconds; a run that takes it was not proved to be stuck


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))


# Tensor parallelism


def tensor_parallel(shape: tuple[int, ...]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", shape)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model: nn.Module = parallelize_module(two_layers(), mesh, plan)
    return model


def skips_a_forward(rank: int) -> None:
    model = tensor_parallel((dist.get_world_size(),))
    for step in range(3):
        if step == 1 and rank == 1:
            continue
        model(torch.ones(3, 4)).sum().backward()  # HERE
    dist.barrier()


def forward_on_rank_0_only(rank: int) -> None:
    model = tensor_parallel((dist.get_world_size(),))
    if rank == 0:
        print(model(torch.ones(3, 4)).sum().item())  # HERE
    dist.barrier()


def parallelized_on_rank_0_only(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if rank == 0:
        distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])  # HERE
    dist.barrier()


def mesh_on_some(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    if rank != 2:
        init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
        init_device_mesh("cpu", (3,1), mesh_dim_names=("tp","dp"))  # HERE
    dist.barrier()


# Pipelines


def schedule(rank: int, warmup: int) -> None:
    """1F1B by hand, with a warm-up of `warmup` micro-batches."""
    last = dist.get_world_size() - 1

    def forward() -> None:
        x = torch.zeros(2)
        if rank:
            dist.recv(x, rank - 1)
        if rank < last:
            dist.send(x, rank + 1)

    def backward() -> None:
        grad = torch.zeros(2)
        if rank < last:
            dist.recv(grad, rank + 1)
        if rank:
            dist.send(grad, rank - 1)

    for _ in range(warmup):
        forward()
    for _ in range(4 - warmup):
        forward()
        backward()
    for _ in range(warmup):
        backward()


def warms_up_by_rank(rank: int) -> None:
    schedule(rank, rank)


def one_stage_warms_up_less(rank: int) -> None:
    schedule(rank, 0 if rank == 0 else dist.get_world_size() - 1 - rank)


BIG = 4_000_000


def all_send_first(rank: int) -> None:
    after, before = (rank + 1) % dist.get_world_size(), (rank - 1) % dist.get_world_size()
    dist.send(torch.ones(BIG), after)
    dist.recv(torch.ones(BIG), before)


def all_receive_first(rank: int) -> None:
    after, before = (rank + 1) % dist.get_world_size(), (rank - 1) % dist.get_world_size()
    dist.recv(torch.ones(1), before)
    dist.send(torch.ones(1), after)


def all_receive_in_the_second_round(rank: int) -> None:
    after, before = (rank + 1) % dist.get_world_size(), (rank - 1) % dist.get_world_size()
    work = dist.isend(torch.ones(1), after)
    dist.recv(torch.ones(1), before)
    work.wait()
    dist.recv(torch.ones(1), before)
    dist.send(torch.ones(1), after)


def mixed_circle(rank: int) -> None:
    if rank == 0:
        dist.send(torch.ones(BIG), 1)
    elif rank == 1:
        dist.recv(torch.ones(1), 2)
        dist.recv(torch.ones(BIG), 0)
    else:
        dist.recv(torch.ones(1), 0)
        dist.send(torch.ones(1), 1)


def pipelined(rank: int, name: str, odd: int) -> None:
    from torch.distributed import pipelining

    stage = pipelining.PipelineStage(
        nn.Linear(4, 4), rank, dist.get_world_size(), torch.device("cpu")
    )
    kind = getattr(pipelining, name)
    micro = 4 if rank != odd else 3
    run = kind(stage, micro, loss_fn=lambda y, t: (y - t).square().mean())
    if rank == 0:
        run.step(torch.ones(12, 4))
    elif rank == dist.get_world_size() - 1:
        run.step(target=torch.ones(12, 4))
    else:
        run.step()
    dist.barrier()


def gpipe0(rank: int) -> None:
    pipelined(rank, "ScheduleGPipe", 0)


def gpipe1(rank: int) -> None:
    pipelined(rank, "ScheduleGPipe", 1)


def gpipe2(rank: int) -> None:
    pipelined(rank, "ScheduleGPipe", 2)


def f1b0(rank: int) -> None:
    pipelined(rank, "Schedule1F1B", 0)


def f1b1(rank: int) -> None:
    pipelined(rank, "Schedule1F1B", 1)


def f1b2(rank: int) -> None:
    pipelined(rank, "Schedule1F1B", 2)


# Shards


def sharded() -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    model = two_layers()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def full_tensor_on_rank_0(rank: int) -> None:
    model = sharded()
    if rank == 0:
        whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # HERE
        print(len(whole))
    dist.barrier()


def full_tensor_then_return(rank: int) -> None:
    model = sharded()
    if rank == 0:
        whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # HERE
        print(len(whole))


def evaluates_on_rank_0(rank: int) -> None:
    model = sharded()
    model(torch.ones(3, 4)).sum().backward()
    if rank == 0:
        with torch.no_grad():
            model(torch.ones(3, 4))  # HERE
    dist.barrier()


def one_step_fewer(rank: int) -> None:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3 if rank == 1 else 4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()  # HERE
        optimizer.step()


def one_step_fewer_then_barrier(rank: int) -> None:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3 if rank == 1 else 4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()  # HERE
        optimizer.step()
    dist.barrier()


def saves_on_rank_0(rank: int) -> None:
    import tempfile
    from torch.distributed import checkpoint

    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            checkpoint.save(model.state_dict(), checkpoint_id=folder)  # HERE
        dist.barrier()


def saves_then_return(rank: int) -> None:
    import tempfile
    from torch.distributed import checkpoint

    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            checkpoint.save(model.state_dict(), checkpoint_id=folder)  # HERE


def saves_then_trains(rank: int) -> None:
    import tempfile
    from torch.distributed import checkpoint

    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        for step in range(3):
            model(torch.ones(3, 4)).sum().backward()
            if rank == 0 and step == 1:
                checkpoint.save(model.state_dict(), checkpoint_id=folder)  # HERE


def full_state_on_rank_0(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = sharded()
    if rank == 0:
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # HERE
    dist.barrier()


def clips_on_rank_0(rank: int) -> None:
    model = sharded()
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # HERE


def clips_on_rank_1_then_barrier(rank: int) -> None:
    model = sharded()
    model(torch.ones(3, 4)).sum().backward()
    if rank == 1:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # HERE
    dist.barrier()


# Metrics


def gathers_where_there_are_samples(rank: int) -> None:
    samples: list[float] = [] if rank == 1 else [0.1 * rank]
    if samples:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, samples)  # HERE
    dist.barrier()


def gathers_then_returns(rank: int) -> None:
    samples: list[float] = [] if rank == 1 else [0.1 * rank]
    if samples:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, samples)  # HERE


def gathers_by_key(rank: int) -> None:
    sums = {str(n): float(n) for n in range(2 + (rank == 2))}
    for key in sums:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (key, sums[key]))  # HERE
    dist.barrier()


def gathers_to_0(rank: int) -> None:
    samples: list[float] = [] if rank == 1 else [0.1 * rank]
    if samples:
        found: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(samples, found)  # HERE
    dist.barrier()


# Streams


class Stream(IterableDataset[torch.Tensor]):  # type: ignore[misc]
    def __init__(self, rank: int) -> None:
        self.length = 20 - 4 * (rank == 1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.ones(4) for _ in range(self.length))


def stream_ends_early(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in DataLoader(Stream(rank), batch_size=4):
        optimizer.zero_grad()
        model(batch).sum().backward()  # HERE
        optimizer.step()


def stream_ends_early_then_barrier(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in DataLoader(Stream(rank), batch_size=4):
        optimizer.zero_grad()
        model(batch).sum().backward()  # HERE
        optimizer.step()
    dist.barrier()


def stream_ends_early_then_metric(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in DataLoader(Stream(rank), batch_size=4):
        optimizer.zero_grad()
        model(batch).sum().backward()  # HERE
        optimizer.step()
    dist.all_reduce(torch.ones(1))


# SyncBatchNorm


def sync_model(ddp: bool) -> nn.Module:
    from ddp_lessons.syncbn import convert_sync_batchnorm
    model: nn.Module = convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    return DDP(model) if ddp else model


def sync_on_rank_0(rank: int) -> None:
    model = sync_model(True)
    model(torch.ones(3, 4)).sum().backward()
    if rank == 0:
        model.module(torch.ones(3, 4))  # HERE
    model(torch.ones(3, 4)).sum().backward()


def sync_ddp_on_rank_0(rank: int) -> None:
    model = sync_model(True)
    model(torch.ones(3, 4)).sum().backward()
    if rank == 0:
        model(torch.ones(3, 4))  # HERE
    model(torch.ones(3, 4)).sum().backward()


def sync_on_rank_0_then_barrier(rank: int) -> None:
    model = sync_model(True)
    for step in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            model.module(torch.ones(3, 4))  # HERE
    dist.barrier()


def sync_not_on_rank_1(rank: int) -> None:
    model = sync_model(True)
    for step in range(3):
        if rank == 1 and step == 1:
            continue
        model(torch.ones(3, 4)).sum().backward()  # HERE


def ddp_on_rank_0(rank: int) -> None:
    model = DDP(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    for step in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            model(torch.ones(3, 4))  # HERE


def joined(rank: int, work: Callable[[int], None]) -> None:
    dist.init_process_group("gloo")
    work(rank)


if __name__ == "__main__":
    import sys

    for name, work in list(globals().items()):
        if callable(work) and getattr(work, "__code__", None) and work.__code__.co_varnames[:1] == ("rank",) and work.__code__.co_argcount == 1 and (len(sys.argv) < 2 or any(a in name for a in sys.argv[1:])):
            began = time.monotonic()
            run = launch(joined, (work,), nprocs=3, timeout=8, check=False, output="none") if 0 else launch(joined, (work,), nprocs=3, timeout=8, check=False)
            print(f"######## {name} {time.monotonic() - began:.1f} s")
            print(run.verdict and (run.verdict.kind, run.verdict.ranks, run.verdict.frame and run.verdict.frame.source))
            print(run.explain())
            print()
