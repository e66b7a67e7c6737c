"""Sharded and split models: FSDP, DTensor, tensor parallel, pipelines, and their checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import pipelining
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor import parallel as tp

from tests.parity.ddp import small, train
from tests.parity.features import attempt, joined


def full(tensors: Any) -> list[torch.Tensor]:
    """Whole tensors of those that are sharded."""
    return [
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for tensor in tensors
    ]


def steps(rank: int, model: nn.Module, optimizer: Any = None) -> list[torch.Tensor]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    losses = []
    for _ in range(3):
        loss = model(torch.randn(4, 6)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@joined(sample=True)
def fsdp2(rank: int) -> Any:
    model = small()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    shard = model[0].weight.to_local()
    return shard.detach().clone(), steps(rank, model), full(model.parameters()), repr(model)


@joined()
def fsdp2_mixed_precision_and_offload(rank: int) -> Any:
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = fully_shard(small(), mp_policy=halves)
    kept = fully_shard(small(), reshard_after_forward=False)
    offloaded = attempt(
        lambda: steps(rank, fully_shard(small(), offload_policy=CPUOffloadPolicy()))
    )
    return steps(rank, half), full(half.parameters()), steps(rank, kept), offloaded


@joined()
def fsdp2_accumulates(rank: int) -> Any:
    model = fully_shard(small())
    torch.manual_seed(1 + rank)
    model.set_requires_gradient_sync(False)
    model(torch.randn(4, 6)).sum().backward()
    model.set_requires_gradient_sync(True)
    model(torch.randn(4, 6)).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return full([norm]), full([p.grad for p in model.parameters()])


@joined(ranks=4)
def fsdp2_on_two_dimensions(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(small(), mesh=mesh)
    return steps(rank, model), full(model.parameters())


@joined()
def fsdp1(rank: int) -> Any:
    def whole() -> Any:
        model = FSDP1(small(), device_id=torch.device("cpu"))
        return train(rank, model)[0], repr(model)

    return attempt(whole)


@joined()
def composable_replicate(rank: int) -> Any:
    model = replicate(small())
    return train(rank, model)


@joined()
def tensor_parallel(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    model = tp.parallelize_module(
        small(), mesh, {"0": tp.ColwiseParallel(), "2": tp.RowwiseParallel()}
    )
    torch.manual_seed(1)
    out = model(torch.randn(4, 6))
    out.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    return out, full(gradients), [gradient.placements for gradient in gradients]


@joined()
def tensor_parallel_with_sequences(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    plan = {
        "0": tp.SequenceParallel(),
        "1": tp.ColwiseParallel(input_layouts=Shard(1)),
        "3": tp.RowwiseParallel(output_layouts=Shard(1)),
    }
    model = tp.parallelize_module(net, mesh, plan)
    torch.manual_seed(1 + rank)
    out = model(torch.randn(2, 2, 6))
    with tp.loss_parallel():
        loss = out.square().sum()
    loss.backward()
    return out, full([p.grad for p in model.parameters()])


@joined()
def dtensor_redistribute(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(10.0).reshape(5, 2)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    columns = rows.redistribute(placements=[Shard(1)])
    parts = DTensor.from_local(torch.full((2, 2), 1.0 + rank), mesh, [Partial()])
    summed = parts.redistribute(placements=[Replicate()])
    return (
        [one.to_local() for one in (rows, columns, summed)],
        rows.full_tensor(),
        (rows @ columns.t()).full_tensor(),
        repr(columns.placements),
        str(rows),
        attempt(rows.redistribute, placements=[Shard(7)]),
        attempt(lambda: rows + whole),
        (rows.sum(), rows.mean(0).full_tensor())[1],
    )


@joined()
def distribute_a_module(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))

    def shard(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(placed))

    model = distribute_module(small(), mesh, shard)
    x = distribute_tensor(torch.ones(2, 6), mesh, [Replicate()])
    return model(x).full_tensor(), [p.to_local().detach().clone() for p in model.parameters()]


@joined()
def pipeline(rank: int) -> Any:
    """GPipe and 1F1B, two stages: losses and gradients."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    x, target = torch.randn(8, 6), torch.randn(8, 6)
    seen: list[Any] = []
    for kind in (pipelining.ScheduleGPipe, pipelining.Schedule1F1B):
        layers[rank].zero_grad()
        stage = pipelining.PipelineStage(layers[rank], rank, 2, torch.device("cpu"))
        schedule = kind(stage, 4, loss_fn=nn.functional.mse_loss)
        losses: list[torch.Tensor] = []
        given = {"target": target, "losses": losses} if rank == 1 else {}
        out = schedule.step(*[x] * (rank == 0), **given)
        seen += [out, [loss.detach() for loss in losses], layers[rank].weight.grad.clone()]
    return seen


@joined()
def pipeline_interleaved(rank: int) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    x, target = torch.randn(8, 6), torch.randn(8, 6)
    stages = [
        pipelining.PipelineStage(layers[place], place, 4, torch.device("cpu"))
        for place in (rank, rank + 2)
    ]
    schedule = pipelining.ScheduleInterleaved1F1B(stages, 4, loss_fn=nn.functional.mse_loss)
    losses: list[torch.Tensor] = []
    args = (x,) if rank == 0 else ()
    out = schedule.step(*args, target=target, losses=losses)
    return (
        out,
        [loss.detach() for loss in losses],
        [layers[p].weight.grad for p in (rank, rank + 2)],
    )
