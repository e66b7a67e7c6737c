"""Process groups and stores: how ranks meet, which groups they make, and what fails."""

from __future__ import annotations

import datetime
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from tests.parity.collectives import data
from tests.parity.features import attempt, feature, joined, text_of

OWN_TIMEOUT = datetime.timedelta(seconds=77)  # unlike torch's; nothing waits for it


def reduced(rank: int, group: Any = None) -> torch.Tensor:
    tensor = data(rank)
    dist.all_reduce(tensor, group=group)
    return tensor


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


@feature()
def init_by_env(rank: int) -> Any:
    dist.init_process_group("gloo", init_method="env://")
    facts = dist.get_rank(), dist.get_world_size(), dist.get_backend(), reduced(rank)
    leave()
    return facts, dist.is_initialized()


@feature()
def init_by_tcp(rank: int) -> Any:
    url = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    value = reduced(rank)
    leave()
    return value


@feature()
def init_by_file(rank: int) -> Any:
    path = os.path.join(tempfile.gettempdir(), f"meet-{os.environ['MASTER_PORT']}")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    value = reduced(rank)
    leave()
    return value


@feature(ranks=3)
def init_by_a_store(rank: int) -> Any:
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 3, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    store.set(f"key {rank}", str(rank))
    dist.barrier()
    values = [store.get(f"key {other}") for other in range(3)], reduced(rank)
    leave()
    return values


@feature()
def init_refused(rank: int) -> Any:
    # By a store of their own: rank 0's at the port would end while rank 1 still joins there.
    alone = {"store": dist.HashStore(), "rank": rank, "world_size": 2}
    refused = [
        attempt(dist.init_process_group, "nonsense", **alone),
        attempt(dist.init_process_group, "gloo", init_method="ftp://x", rank=0, world_size=1),
        attempt(dist.init_process_group, "gloo", timeout=5),
        attempt(dist.init_process_group, "gloo", store=dist.HashStore()),
        attempt(dist.init_process_group, "gloo", init_method="tcp://127.0.0.1"),
        attempt(dist.init_process_group, "mpi", **alone),
        attempt(dist.get_rank),
        attempt(dist.all_reduce, torch.zeros(1)),
        attempt(dist.destroy_process_group),
        attempt(dist.new_group, [0]),
        attempt(dist.barrier),
    ]
    dist.init_process_group("gloo")
    refused.append(attempt(dist.init_process_group, "gloo"))
    leave()
    return refused


@feature()
def variables_missing(rank: int) -> Any:
    said = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.pop(name)
        said.append(attempt(dist.init_process_group, "gloo"))
        os.environ[name] = value
    return said


@joined(ranks=4)
def subgroups_by_size(rank: int) -> Any:
    mine, groups = dist.new_subgroups(2)
    odd, _ = dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])
    return (
        dist.get_process_group_ranks(mine),
        len(groups),
        reduced(rank, mine),
        reduced(rank, odd),
        attempt(dist.new_subgroups, 3),
        attempt(dist.new_subgroups_by_enumeration, [[0, 1], [1, 2]]),
    )


@joined(ranks=4)
def splitting_a_group(rank: int) -> Any:
    made = attempt(dist.split_group, None, [[0, 1], [2, 3]])
    return made if isinstance(made, str) else reduced(rank, made)


@joined()
def groups_with_a_name(rank: int) -> Any:
    group = dist.new_group(group_desc="tensor parallel", timeout=OWN_TIMEOUT)
    return (
        group.group_desc,
        group.group_name,
        dist.group.WORLD.group_name,
        dist.group.WORLD.group_desc,
        group.rank(),
        group.size(),
        group.name(),
        dist.get_pg_count(),
        dist.get_backend_config(),
        repr(group._get_backend(torch.device("cpu")).options._timeout),
    )


@joined()
def methods_of_a_group(rank: int) -> Any:
    """The C++ object's own methods, beside torch.distributed's functions."""
    world = dist.group.WORLD
    tensor, gathered = data(rank), [torch.zeros(3), torch.zeros(3)]
    world.allreduce(tensor).wait()
    world.broadcast(tensor, 1).wait()
    world.allgather(gathered, tensor).wait()
    world.barrier().wait()
    return tensor, gathered


@feature()
def monitored_barrier(rank: int) -> Any:
    """Rank 0 says who is missing; the connections are closed then."""
    dist.init_process_group("gloo")
    passed = attempt(dist.monitored_barrier)
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        late = attempt(dist.monitored_barrier, timeout=datetime.timedelta(seconds=0.3))
        store.set("said", "")
        return passed, late
    store.wait(["said"])
    return passed


@joined()
def waiting_in_vain(rank: int) -> Any:
    """A recv that nobody answers, with a timeout of its own."""
    group = dist.new_group(timeout=datetime.timedelta(milliseconds=300))
    tensor = data(rank)
    return attempt(dist.recv, tensor, src=1, group=group) if rank == 0 else None


@feature()
def other_stores(rank: int) -> Any:
    path = os.path.join(tempfile.gettempdir(), f"store-{os.environ['MASTER_PORT']}")
    store = dist.FileStore(path, 2)
    store.set(f"from {rank}", str(rank))
    part = dist.PrefixStore("part", store)
    part.set(str(rank), f"part {rank}")
    both = [store.get(f"from {1 - rank}"), part.get(str(1 - rank)), store.get("part/0")]
    alone = dist.HashStore()
    alone.set("key", "value")
    alone.set_timeout(datetime.timedelta(milliseconds=20))
    return [
        *both,
        alone.get("key"),
        alone.add("n", 4),
        attempt(alone.get, "never"),
        attempt(alone.wait, ["never"]),
        part.underlying_store == store,
        store.num_keys() >= 4,
        type(alone).__name__,
    ]


@joined()
def the_store_of_the_group(rank: int) -> Any:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"mine {rank}", "x")
    seen = store.get(f"mine {1 - rank}"), type(store).__name__
    dist.barrier()
    return seen


@feature(sample=True)
def facts_of_torch(rank: int) -> Any:
    facts = [
        dist.is_available(),
        dist.is_initialized(),
        dist.is_gloo_available(),
        dist.is_nccl_available(),
        dist.is_mpi_available(),
        dist.is_torchelastic_launched(),
        dist.get_debug_level(),
        dist.get_node_local_rank(),
        dist.get_default_backend_for_device("cpu"),
        dist.distributed_c10d.default_pg_timeout,
        dist.GroupMember.WORLD,
        torch.distributed.is_backend_available("gloo"),
    ]
    dist.init_process_group("gloo", timeout=OWN_TIMEOUT)
    facts += [
        dist.distributed_c10d._get_default_timeout("gloo"),
        dist.get_backend_config(),
        dist.get_pg_count(),
        dist.group.WORLD is dist.GroupMember.WORLD,
        dist.distributed_c10d._get_pg_default_device(),
        repr(dist.get_group_rank(dist.group.WORLD, rank)),
    ]
    leave()
    return facts


@feature(env={"TORCH_DISTRIBUTED_DEBUG": "INFO"})
def debug_info(rank: int) -> Any:
    dist.init_process_group("gloo")
    value = dist.get_debug_level(), reduced(rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    del model
    leave()
    return value


@feature()
def set_debug_level(rank: int) -> Any:
    dist.set_debug_level(dist.DebugLevel.INFO)
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    return level


@joined()
def a_device_mesh(rank: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    return (
        repr(mesh),
        mesh.get_coordinate(),
        mesh.get_local_rank("data"),
        mesh["data"].size(),
        reduced(rank, mesh.get_group("data")),
        dist.get_process_group_ranks(mesh.get_group("model")),
        attempt(init_device_mesh, "cpu", (3,)),
        attempt(lambda: mesh["nothing"]),
        DeviceMesh("cpu", [0, 1]) == mesh,
    )


@feature()
def a_rank_that_leaves(rank: int) -> Any:
    """What the others get when a rank has left: the type, for the text is a matter of chance."""
    dist.init_process_group("gloo", timeout=OWN_TIMEOUT)
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return None
    try:
        dist.all_reduce(torch.zeros(4))
    except Exception as error:
        return text_of(error).partition(":")[0]
    return "nothing"
