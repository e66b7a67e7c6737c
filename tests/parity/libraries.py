"""What torch builds on processes and compilers: torch.compile, RPC, loaders, profiler."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import (
    DataLoader,
    Dataset,
    get_worker_info,
)

from tests.parity.collectives import data
from tests.parity.ddp import small, train
from tests.parity.features import attempt, feature, joined


def counted(function: Any, *args: Any, **options: Any) -> Any:
    """What a compiled function gives, with how many graphs and what broke them."""
    torch._dynamo.reset()
    explained = torch._dynamo.explain(function)(*args)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", **options)
    return attempt(compiled, *args), explained.graph_count, explained.graph_break_count


@joined()
def compile_a_collective(rank: int) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    return counted(step, data(rank)), counted(step, data(rank), fullgraph=True)


@joined()
def compile_gathers(rank: int) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(6)
        dist.all_gather_into_tensor(flat, x)
        part = torch.empty(3)
        dist.reduce_scatter_tensor(part, flat * 2)
        return part.sin()

    return counted(step, data(rank)), counted(step, data(rank), fullgraph=True)


@joined()
def compile_a_broadcast_and_sends(rank: int) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, src=0)
        return x.cos()

    def sends(x: torch.Tensor) -> torch.Tensor:
        if rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(x, 0)
        return x + 1

    return counted(step, data(rank)), counted(sends, data(rank))


@joined()
def compile_functional(rank: int) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = functional.all_reduce(x * 2, "sum", [0, 1])
        return functional.all_gather_tensor(y, 0, [0, 1]) + 1

    return counted(step, data(rank), fullgraph=True)


@joined()
def compile_facts(rank: int) -> Any:
    """Rank and size are constants in a graph."""

    def step(x: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            x = x + dist.get_rank() + dist.get_world_size()
        return x

    return counted(step, data(rank), fullgraph=True)


@joined()
def compile_asynchronous(rank: int) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return x + 1

    return counted(step, data(rank))


@joined()
def compile_around_ddp(rank: int) -> Any:
    torch._dynamo.reset()
    inside = DDP(torch.compile(small(), backend="eager"))
    first = train(rank, inside)
    torch._dynamo.reset()
    around = torch.compile(DDP(small()), backend="eager")
    return first, train(rank, around)


@joined()
def compile_fsdp2(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    torch._dynamo.reset()
    model = torch.compile(fully_shard(small()), backend="eager")
    torch.manual_seed(1 + rank)
    out = model(torch.randn(4, 6))
    out.sum().backward()
    return out, [p.grad.full_tensor() for p in model.parameters()]


def added(a: torch.Tensor, b: int) -> torch.Tensor:
    return a + b


def failing() -> None:
    raise LookupError("there, not here")


class Squares(Dataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[int, int]:
        info = get_worker_info()
        return index**2, -1 if info is None else info.id


def loaded(method: str | None, dataset: Any = None, **options: Any) -> Any:
    loader = DataLoader(
        dataset or Squares(), batch_size=3, multiprocessing_context=method, **options
    )
    return [list(loader) for _ in range(2)]


@feature(sample=True)
def loader_with_forked_workers(rank: int) -> Any:
    return loaded("fork", num_workers=2, persistent_workers=True), loaded("fork", num_workers=1)
