"""Functional collectives: their spans, whose line they are on, and who is to blame for a hang."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch
from ddp_lessons.wire.records import Kind, Span

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

N = 2
HERE = os.path.basename(__file__)


def _calls(run: Run, rank: int, kind: Kind = Kind.ISSUE) -> list[Span]:
    return [s for s in run.ranks[rank].spans if s.kind == kind and s.op != "init_process_group"]


def call_each(rank: int) -> list[Any]:
    import torch.distributed._functional_collectives as funcol

    dist.init_process_group("gloo")
    world = dist.group.WORLD
    x = torch.arange(4.0) + rank
    found = [
        funcol.all_reduce(x, "sum", world),
        funcol.all_gather_single(x, 0, world),
        funcol.reduce_scatter_single(x, "sum", 0, world),
        funcol.all_to_all_single(x, None, None, world),
        funcol.broadcast(x, 1, world),
        *funcol.all_reduce_coalesced([x, x], "sum", world),
    ]
    return [tensor.tolist() for tensor in found]


SINGLE = hasattr(torch.ops._c10d_functional, "all_reduce_") and hasattr(dist, "all_gather_single")


@pytest.mark.skipif(not SINGLE, reason="torch before 2.13 has other names for them")
def test_each_call_has_its_number_bytes_and_line() -> None:
    run = launch(call_each, nprocs=N)
    assert run.values[0][:2] == [[1.0, 3.0, 5.0, 7.0], [0.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0]]
    assert run.values[1][2:5] == [[5.0, 7.0], [2.0, 3.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    assert run.values[1][5:] == [[1.0, 3.0, 5.0, 7.0]] * 2
    for rank in range(N):
        calls = _calls(run, rank)
        assert [(s.op, s.seq, s.nbytes, s.peer) for s in calls] == [
            ("all_reduce", 0, 16, None),
            ("all_gather_into_tensor", 1, 16, None),
            ("reduce_scatter_tensor", 2, 8, None),
            ("all_to_all_single", 3, 16, None),
            ("broadcast", 4, 16, 1),
            ("all_reduce_coalesced", 5, 32, None),
        ]
        first = call_each.__code__.co_firstlineno
        assert [s.site for s in calls] == [f"{__file__}:{first + n}" for n in (7, 8, 9, 10, 11, 12)]
        waits = _calls(run, rank, Kind.WAIT)
        assert [s.op for s in waits] == [s.op for s in calls] + ["all_reduce_coalesced"]
        assert all(s.site == f"{__file__}:{first + 14}" for s in waits)
        work = [s for s in _calls(run, rank, Kind.COMM) if s.lane == "comm"]
        assert all(s.t1_ns is not None for s in work)


def tensor_parallel(rank: int, late: float = 0.0) -> tuple[float, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    if rank >= 0:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(model, mesh, plan)
    total = 0.0
    for _ in range(4):
        if rank == 1:
            time.sleep(late)
        y = model(torch.ones(3, 4))
        y.sum().backward()
        total += y.sum().item()
    grad = model[0].weight.grad
    whole = grad.full_tensor() if rank >= 0 else grad
    return total, whole.abs().sum().item()


def joined_tensor_parallel(rank: int, late: float) -> tuple[float, float]:
    dist.init_process_group("gloo")
    return tensor_parallel(rank, late)


def test_the_rank_that_is_late_for_a_tensor_parallel_forward_is_the_straggler() -> None:
    run = launch(joined_tensor_parallel, (0.1,), nprocs=N)
    assert run.values[0] == pytest.approx(tensor_parallel(-1), rel=1e-6)
    straggler = run.straggler()
    assert (straggler.kind, straggler.rank) == ("chronic", 1)
    assert {s.op for s in _calls(run, 0)} == {"all_reduce", "all_gather_into_tensor"}
    assert all(HERE in str(s.site) for s in _calls(run, 0))


def skips_tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model, mesh["tp"], plan)
    if rank != 3:
        model(torch.ones(3, 4)).sum().item()
    dist.barrier()


def skips(rank: int) -> None:
    dist.init_process_group("gloo")

    @torch.compile(backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    if rank == 0:
        double(torch.ones(2))
    dist.barrier()


def skips_functional(rank: int) -> None:
    import torch.distributed._functional_collectives as funcol

    dist.init_process_group("gloo")
    if rank == 0:
        funcol.all_reduce(torch.ones(2), "sum", dist.group.WORLD).sum().item()
    dist.barrier()


@pytest.mark.parametrize("fn", [skips, skips_functional])
def test_a_rank_that_skips_a_functional_collective_is_told_in_words_that_learners_know(
    fn: Callable[[int], None], compiles: None
) -> None:
    run = launch(fn, nprocs=N, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "skipped collective"
    text = run.explain()
    assert "rank 0 calls all_reduce at" in text
    assert "which rank 1 skipped" in text
    assert "rank 0 waits in all_reduce" in text
    assert "__torch_dispatch__" not in text
    assert "waits in wait" not in text
    assert HERE in text
    assert "torchinductor" not in text


def test_a_tensor_parallel_forward_that_one_rank_of_a_mesh_skips_is_blamed_on_that_rank() -> None:
    verdict = launch(skips_tensor_parallel, nprocs=4, check=False).verdict
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("skipped collective", (3,))
    assert verdict.frame is not None
    assert "model(torch.ones(3, 4))" in verdict.frame.source
    assert "and rank 3 does not" in verdict.title


def sizes_differ(rank: int) -> None:
    import torch.distributed._functional_collectives as funcol

    dist.init_process_group("gloo")
    funcol.all_reduce(torch.ones(2 + rank), "sum", dist.group.WORLD).sum().item()


def test_sizes_that_differ_are_a_mismatch() -> None:
    run = launch(sizes_differ, nprocs=N, check=False)
    assert "tensors that do not match" in run.explain()


def one_dies(rank: int) -> None:
    dist.init_process_group("gloo")

    @torch.compile(backend="aot_eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    double(torch.ones(2))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    double(torch.ones(2))


@pytest.mark.slow
def test_a_rank_whose_partner_dies_in_compiled_code_is_not_blamed(compiles: None) -> None:
    run = launch(one_dies, nprocs=N, check=False)
    assert run.verdict is not None
    assert run.verdict.ranks == (1,)
    line = f"{__file__}:{one_dies.__code__.co_firstlineno + 3}"  # of its decorator
    assert {str(s.site) for s in _calls(run, 0)} == {line}


def mixed(rank: int) -> list[float]:
    """One rank calls the public function, and the other its functional twin."""
    import torch.distributed._functional_collectives as funcol

    dist.init_process_group("gloo")
    x = torch.ones(2)
    if rank == 0:
        dist.all_reduce(x)
    else:
        x = funcol.all_reduce(x, "sum", dist.group.WORLD)
    found: list[float] = x.tolist()
    return found


def test_a_functional_collective_meets_its_public_twin() -> None:
    run = launch(mixed, nprocs=N)
    assert run.values == [[2.0, 2.0]] * N
    assert run.verdict is None


def breaks_the_graph(rank: int) -> list[float]:
    """torch.compile cannot put these calls into its graph: Python makes them."""
    dist.init_process_group("gloo")
    model = torch.compile(DistributedDataParallel(nn.Linear(2, 1)), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")

    @torch.compile(backend="eager")
    def shared(x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, src=1)
        dist.all_reduce(x, async_op=True).wait()
        return x + 1

    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        step()
    found: list[float] = shared(torch.ones(1) * rank).tolist()
    return found


@pytest.mark.slow
def test_calls_that_break_a_graph_are_recorded(compiles: None) -> None:
    run = launch(breaks_the_graph, nprocs=N)
    assert run.values == [[3.0]] * N
    for rank in range(N):
        made = [s for s in run.ranks[rank].spans if s.kind in (Kind.COMM, Kind.ISSUE)]
        assert [s.op for s in made][-3:] == ["broadcast", "all_reduce", "all_reduce"]
        assert sum(s.bucket is not None for s in made) == 2


def only_traced(rank: int) -> str:
    """What is traced with fake tensors sends nothing."""
    import torch.distributed._functional_collectives as funcol
    from torch._subclasses.fake_tensor import FakeTensorMode

    dist.init_process_group("gloo")
    if rank == 0:
        with FakeTensorMode():
            funcol.all_reduce(torch.ones(2), "sum", dist.group.WORLD) + 1
    return str(funcol.all_reduce(torch.ones(2), "sum", dist.group.WORLD).tolist())


def test_a_call_that_is_only_traced_has_no_number() -> None:
    run = launch(only_traced, nprocs=N)
    assert run.values == ["[2.0, 2.0]"] * N
    assert [[s.seq for s in _calls(run, rank)] for rank in range(N)] == [[0], [0]]


def refused(rank: int) -> str:
    """What torch refuses has no number; the same call, mended, is that of the other rank."""
    import torch.distributed._functional_collectives as funcol

    dist.init_process_group("gloo")
    told = ""
    if rank == 0:
        try:
            torch.ops._c10d_functional.all_reduce(torch.ones(2), "no such op", "0")
        except (RuntimeError, ValueError) as error:
            told = type(error).__name__
    funcol.all_reduce(torch.ones(2), "sum", dist.group.WORLD).tolist()
    return told


def test_a_call_that_torch_refuses_has_no_number() -> None:
    run = launch(refused, nprocs=N)
    assert run.values[0] in ("RuntimeError", "ValueError")
    assert run.verdict is None
    assert _calls(run, 0)[-1].seq == _calls(run, 1)[-1].seq == 0
