"""Collectives, sends and receives: every one by dtype, every operation, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from tests.parity.features import attempt, joined

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]
SIZE = 2


def data(rank: int, dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    """Numbers that differ by rank and place, and that every dtype can hold."""
    shape = shape or (3,)
    numbers = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    return (numbers + rank).to(torch.float32).to(dtype)


def by_dtype(call: Any) -> dict[str, Any]:
    """What a call makes of each dtype: a tensor, or how it is refused."""
    return {str(dtype): attempt(call, dtype) for dtype in DTYPES}


@joined(sample=True)
def all_reduce_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> torch.Tensor:
        tensor = data(rank, dtype)
        dist.all_reduce(tensor)
        return tensor

    return by_dtype(call)


@joined()
def all_reduce_by_operation(rank: int) -> Any:
    def call(op: Any, dtype: torch.dtype) -> torch.Tensor:
        tensor = data(rank, dtype)
        dist.all_reduce(tensor, op=op)
        return tensor

    names = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "AVG", "PREMUL_SUM"]
    wanted = {
        f"{name} {dtype}": attempt(call, getattr(dist.ReduceOp, name), dtype)
        for name in names
        for dtype in (torch.float32, torch.int64, torch.uint8, torch.bfloat16)
    }
    factor = attempt(lambda: call(dist._make_nccl_premul_sum(2.0), torch.float32))
    return wanted, factor, attempt(call, "sum", torch.float32)


@joined()
def broadcast_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> torch.Tensor:
        tensor = data(rank, dtype)
        dist.broadcast(tensor, src=1)
        return tensor

    return by_dtype(call)


@joined()
def reduce_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> torch.Tensor:
        tensor = data(rank, dtype)
        dist.reduce(tensor, dst=1, op=dist.ReduceOp.MAX)
        return tensor if rank == 1 else torch.zeros(1)  # what the others keep is not promised

    return by_dtype(call)


@joined()
def all_gather_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [torch.zeros(3).to(dtype) for _ in range(SIZE)]
        dist.all_gather(tensors, data(rank, dtype))
        return tensors

    return by_dtype(call)


@joined()
def all_gather_into_tensor_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> list[torch.Tensor]:
        flat, stacked = torch.zeros(6).to(dtype), torch.zeros(2, 3).to(dtype)
        dist.all_gather_into_tensor(flat, data(rank, dtype))
        dist.all_gather_into_tensor(stacked, data(rank, dtype))
        return [flat, stacked]

    return by_dtype(call)


@joined()
def gather_and_scatter_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> list[torch.Tensor]:
        mine = data(rank, dtype)
        gathered = [torch.zeros(3).to(dtype) for _ in range(SIZE)] if rank == 0 else None
        dist.gather(mine, gathered, dst=0)
        pieces = [data(5 + place, dtype) for place in range(SIZE)] if rank == 1 else None
        dist.scatter(mine, pieces, src=1)
        return [*(gathered or ()), mine]

    return by_dtype(call)


@joined()
def reduce_scatter_by_dtype(rank: int) -> Any:
    def call(dtype: torch.dtype) -> list[torch.Tensor]:
        one, flat = torch.zeros(3).to(dtype), torch.zeros(3).to(dtype)
        dist.reduce_scatter(one, [data(rank, dtype), data(2 + rank, dtype)])
        dist.reduce_scatter_tensor(flat, data(rank, dtype, 6), op=dist.ReduceOp.MAX)
        return [one, flat]

    return by_dtype(call)


@joined(ranks=3)
def all_to_all_with_uneven_splits(rank: int) -> Any:
    def call(dtype: torch.dtype) -> torch.Tensor:
        sent = [rank + 1] * 3
        received = [1, 2, 3]
        out = torch.zeros(6).to(dtype)
        dist.all_to_all_single(out, data(rank, dtype, sum(sent)), received, sent)
        return out

    return by_dtype(call)


@joined()
def all_to_all_of_lists(rank: int) -> Any:
    out = [torch.zeros(2), torch.zeros(2)]
    return attempt(dist.all_to_all, out, [data(rank), data(rank)]), out


@joined()
def send_and_recv(rank: int) -> Any:
    seen: list[Any] = []
    for dtype in DTYPES:
        tensor = data(rank, dtype)
        if rank == 0:
            seen.append(attempt(dist.send, tensor, 1, tag=3))
        else:
            seen.append(attempt(dist.recv, tensor, 0, tag=3))
        seen.append(tensor.view(torch.uint8))  # not every dtype can be pickled
    if rank == 0:
        dist.send(data(7), dst=1)
    else:
        into = torch.zeros(3)
        seen += [dist.recv(into), into]  # from any rank: it returns which
    return seen


@joined()
def isend_and_irecv(rank: int) -> Any:
    into = torch.zeros(3)
    other = 1 - rank
    works = [dist.isend(data(rank), other), dist.irecv(into, other)]
    waited = [work.wait() for work in works]
    return into, waited, [work.is_completed() for work in works], works[1]._source_rank()


@joined(ranks=3)
def batch_isend_irecv(rank: int) -> Any:
    into = torch.zeros(3)
    ops = [
        dist.P2POp(dist.isend, data(rank), (rank + 1) % 3),
        dist.P2POp(dist.irecv, into, (rank - 1) % 3),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return into, attempt(dist.batch_isend_irecv, []), attempt(dist.batch_isend_irecv, ["send"])


@joined()
def async_op(rank: int) -> Any:
    tensors = [data(rank), data(rank, torch.int64), torch.zeros(6)]
    works = [
        dist.all_reduce(tensors[0], async_op=True),
        dist.broadcast(tensors[1], 0, async_op=True),
        dist.all_gather_into_tensor(tensors[2], data(rank), async_op=True),
        dist.barrier(async_op=True),
    ]
    waited = [work.wait() for work in works]
    ended = [(work.is_completed(), work.is_success(), work.exception()) for work in works]
    return tensors, waited, ended, type(works[0]).__name__


@joined(sample=True)
def futures_in_a_chain(rank: int) -> Any:
    tensor = data(rank)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    result: list[Any] = [doubled.wait(), doubled.done()]
    both = torch.futures.collect_all([future, doubled])
    return [*result, len(both.wait()), type(future).__name__]


@joined()
def result_of_a_work(rank: int) -> Any:
    work = dist.all_reduce(data(rank), async_op=True)
    work.wait()
    return attempt(work.result), attempt(work.get_future().value), attempt(work.synchronize)


@joined(ranks=3)
def collectives_of_objects(rank: int) -> Any:
    everything: list[Any] = [None] * 3
    dist.all_gather_object(everything, {"rank": rank, "tensor": data(rank)})
    gathered: list[Any] | None = [None] * 3 if rank == 2 else None
    dist.gather_object((rank, "x" * rank), gathered, dst=2)
    sent: list[Any] = [rank, {"of": rank}, None]
    dist.broadcast_object_list(sent, src=1)
    piece: list[Any] = [None]
    dist.scatter_object_list(piece, [["a"], "b", 3] if rank == 0 else None, src=0)
    unpicklable = attempt(dist.all_gather_object, [None] * 3, lambda: rank)
    return everything, gathered, sent, piece, unpicklable


@joined()
def objects_from_rank_to_rank(rank: int) -> Any:
    box: list[Any] = [rank, {"of": rank}]
    if rank == 0:
        return dist.send_object_list(box, dst=1), box
    return dist.recv_object_list(box, src=0), box


@joined(sample=True)
def refused_arguments(rank: int) -> Any:
    tensor = data(rank)
    return [
        attempt(dist.all_reduce, [tensor]),
        attempt(dist.all_reduce),
        attempt(dist.all_reduce, tensor, nonsense=1),
        attempt(dist.broadcast, tensor),
        attempt(dist.broadcast, tensor, src=9),
        attempt(dist.broadcast, tensor, src=0, group_src=0),
        attempt(dist.send, tensor, dst=rank),
        attempt(dist.all_gather, tensor, tensor),
        attempt(dist.all_gather, [tensor], tensor),
        attempt(dist.all_gather, [torch.zeros(3, dtype=torch.int64)] * 2, tensor),
        attempt(dist.gather, tensor, None, dst=rank),
        attempt(dist.scatter, tensor, None, src=rank),
        attempt(dist.all_to_all_single, torch.zeros(3), tensor, [1, 1], [1, 2]),
        attempt(dist.barrier, group="world"),
        attempt(dist.barrier, device_ids="0"),
        attempt(dist.P2POp, dist.all_reduce, tensor, 0),
    ]


@joined()
def odd_tensors(rank: int) -> Any:
    """Empty ones, one of no dimension, strided, sparse, on meta, and one that needs a gradient."""
    empty, scalar = torch.zeros(0), torch.tensor(float(rank))
    strided = data(rank, torch.float32, 4, 3).t()
    leaf = data(rank).requires_grad_()
    sparse = torch.eye(3).to_sparse() * (rank + 1)
    calls = [
        attempt(dist.all_reduce, tensor)
        for tensor in (empty, scalar, strided, leaf, sparse, torch.zeros(3, device="meta"))
    ]
    with torch.inference_mode():
        inference = data(rank)
        dist.all_reduce(inference)
    return calls, empty, scalar, strided, leaf, sparse.to_dense(), inference.clone().tolist()


@joined()
def coalesced(rank: int) -> Any:
    tensors = [data(rank), data(rank, torch.float32, 2, 2)]
    reduced = attempt(dist.all_reduce_coalesced, tensors)
    gathered = [[torch.zeros(3)], [torch.zeros(3)]]
    collected = attempt(dist.all_gather_coalesced, gathered, [data(rank)])

    def manager() -> None:
        with dist._coalescing_manager():
            dist.all_reduce(tensors[0])

    return reduced, tensors, collected, gathered, attempt(manager), tensors


@joined()
def functional_collectives(rank: int) -> Any:
    tensor = data(rank, torch.float32, 4)
    world = dist.group.WORLD
    made = [
        functional.all_reduce(tensor, "sum", world),
        functional.all_gather_tensor(tensor, 0, world),
        functional.reduce_scatter_tensor(tensor, "max", 0, world),
        functional.broadcast(tensor, 1, world),
        functional.all_to_all_single(tensor, [2, 2], [2, 2], world),
    ]
    kinds = [type(one).__name__ for one in made]
    return (
        kinds,
        [one.clone() + 0 for one in made],
        attempt(functional.all_reduce, tensor, "no", world),
    )


@joined()
def autograd_through_collectives(rank: int) -> Any:
    from torch.distributed.nn import functional as with_gradients

    leaf = data(rank).requires_grad_()
    total = with_gradients.all_reduce(leaf, group=dist.group.WORLD)
    parts = with_gradients.all_gather(leaf, group=dist.group.WORLD)
    (total.square().sum() + torch.stack(parts).prod()).backward()
    return total, parts, leaf.grad


@joined()
def names_and_signatures(rank: int) -> Any:
    """The functions are called what torch calls them, and say what torch says."""
    import inspect

    calls = [
        dist.all_reduce,
        dist.broadcast,
        dist.send,
        dist.irecv,
        dist.barrier,
        dist.all_gather_object,
        dist.new_group,
        dist.init_process_group,
        dist.destroy_process_group,
        dist.batch_isend_irecv,
        dist.distributed_c10d.all_reduce,
    ]
    return [
        (call.__name__, call.__module__, str(inspect.signature(call)), call.__doc__)
        for call in calls
    ]


@joined()
def from_a_thread(rank: int) -> Any:
    """Collectives that another thread calls, and that two pool threads call in turn."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        tensor = data(rank)
        returned = pool.submit(dist.all_reduce, tensor).result()
        refused = attempt(pool.submit(dist.broadcast, tensor, 7).result)
    return returned, tensor, refused


@joined()
def replaced_by_the_learner(rank: int) -> Any:
    """A learner's own wrapper, put in torch's place and taken away again."""
    seen: list[str] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append("all_reduce")
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    tensor = data(rank)
    dist.all_reduce(tensor)
    dist.all_reduce = original
    dist.all_reduce(tensor)
    return seen, tensor
