"""`watch_ddp`: the same training, with every gradient bucket recorded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, WorkerFailed, launch, span, watch_ddp
from ddp_lessons.wire.records import Span
from tests.support.scheduling import about_to_wait, until_it_waits

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers)


def train(
    rank: int,
    watched: bool = True,
    hook: Any = None,
    late: float | Path = 0.0,
    steps: int = 20,
    **options: Any,
) -> torch.Tensor:
    """Train and return the weights; in each step rank 1 sleeps `late` seconds.

    If it is a folder, rank 1 is late until rank 0 waits for its buckets.
    """
    dist.init_process_group("gloo")
    model = DistributedDataParallel(network(), bucket_cap_mb=0.03, **options)
    if watched:
        watch_ddp(model, hook)
    elif hook:
        model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank)
    for step in range(steps):
        if isinstance(late, Path):
            (until_it_waits if rank else about_to_wait)(late / f"step {step}")
        elif rank == 1:
            time.sleep(late)
        optimizer.zero_grad()
        with span("backward"):
            model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    dist.destroy_process_group()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def of(run: Run, rank: int, lane: str) -> list[Span]:
    return [s for s in run.ranks[rank].spans if s.lane == lane]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("hook", [None, default_hooks.fp16_compress_hook], ids=["plain", "fp16"])
def test_the_weights_are_the_same_to_the_last_bit(ranks: int, hook: Any) -> None:
    plain = launch(train, (False, hook), nprocs=ranks).values
    watched = launch(train, (True, hook), nprocs=ranks).values
    for ours, theirs in zip(watched, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(watched[0], watched[1])


PLAIN = """
import gc, sys, torch, torch._dynamo, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn

def train(rank, port, folder):
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", where, rank=rank, world_size=3)
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(weights, f"{folder}/{rank}.pt")
    del model, optimizer, weights  # freed after the group is left, DDP may abort the process
    gc.collect()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(train, args=tuple(sys.argv[1:]), nprocs=3, start_method="fork")
"""


@pytest.mark.slow
def test_the_weights_are_those_of_plain_torch(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, str(script), str(port), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=250)
    plain = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    ours = launch(train, nprocs=3).values
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def as_views(rank: int, watched: bool) -> torch.Tensor:
    return train(rank, watched, gradient_as_bucket_view=True)


def with_static_graph(rank: int, watched: bool) -> torch.Tensor:
    return train(rank, watched, static_graph=True)


def with_unused(rank: int, watched: bool) -> torch.Tensor:
    return train(rank, watched, find_unused_parameters=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [as_views, with_static_graph, with_unused])
def test_the_weights_are_the_same_with_options_of_ddp(how: Any) -> None:
    plain, watched = (launch(how, (is_watched,), nprocs=3).values for is_watched in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


def test_every_bucket_of_every_step_is_there() -> None:
    run = launch(train, (True, None, 0.0, 5))
    by_step = [[s for s in of(run, 0, "buckets") if s.step == step] for step in range(5)]
    later = {len(buckets) for buckets in by_step[2:]}
    assert len(later) == 1
    assert later.pop() > 1
    for buckets in by_step:
        assert [s.bucket for s in buckets] == list(range(len(buckets)))
        assert sum(s.nbytes or 0 for s in buckets) == 4 * 4 * (64 * 64 + 64)
        assert {(s.kind, s.op, s.group) for s in buckets} == {("comm", "all_reduce", "world")}
    numbers = [[s.seq for s in of(run, rank, "buckets")] for rank in (0, 1)]
    assert numbers[0] == numbers[1] == sorted(set(numbers[0]), key=lambda n: n or 0)


def test_buckets_lie_within_backward_and_so_does_the_wait_for_them(tmp_path: Path) -> None:
    run = launch(train, (True, None, tmp_path, 5))
    backwards = [s for s in of(run, 0, "main") if s.kind == "compute"]
    waits = [s for s in of(run, 0, "main") if s.name == "wait for buckets"]
    assert len(waits) == len(backwards) == 5
    for backward, wait in zip(backwards, waits, strict=True):
        buckets = [s for s in of(run, 0, "buckets") if s.step == backward.step]
        ends = [s.t1_ns for s in buckets if s.t1_ns]
        assert backward.t0_ns <= min(s.t0_ns for s in buckets)
        assert wait.t1_ns is not None
        assert backward.t1_ns is not None
        assert wait.t0_ns < max(ends) <= wait.t1_ns <= backward.t1_ns


@pytest.mark.alone
@pytest.mark.parametrize("hook", [None, default_hooks.allreduce_hook], ids=["plain", "own hook"])
def test_the_late_rank_is_named_and_the_wait_found(hook: Any) -> None:
    run = launch(train, (True, hook, 0.03, 12), nprocs=4)
    verdict = run.straggler()
    assert (verdict.kind, verdict.rank) == ("chronic", 1)
    assert list(verdict.late_by_step) == list(range(2, 12))
    assert sum(rank == 1 for rank in verdict.late_by_step.values()) >= 9
    waited = {total.rank: total.wait_ns for total in run.totals()}
    assert waited[1] < 0.2 * min(waited[rank] for rank in (0, 2, 3))


def test_no_sync_has_no_buckets() -> None:
    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        model = watch_ddp(DistributedDataParallel(network()))
        with model.no_sync():
            model(torch.ones(1, 64)).sum().backward()
        model(torch.ones(1, 64)).sum().backward()
        dist.destroy_process_group()
        return rank

    run = launch(work)
    assert len(of(run, 0, "buckets")) == 1


def test_ranks_with_fewer_batches_can_join() -> None:
    def work(rank: int) -> float:
        dist.init_process_group("gloo")
        model = watch_ddp(DistributedDataParallel(network()))
        with model.join():
            for _ in range(2 + rank):
                model(torch.ones(1, 64)).sum().backward()
        dist.destroy_process_group()
        return float(next(model.parameters()).grad.sum())

    run = launch(work)
    assert [len(of(run, rank, "buckets")) for rank in (0, 1)] == [3, 3]


def test_an_error_in_the_learners_hook_is_theirs() -> None:
    def broken(state: Any, bucket: Any) -> Any:
        raise KeyError("no such layer")

    with pytest.raises(WorkerFailed, match="no such layer"):
        launch(train, (True, broken))


def test_what_is_no_ddp_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got Sequential.*Wrap it first"):
        watch_ddp(network())


def test_a_second_hook_is_refused() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(network())
        model.register_comm_hook(None, default_hooks.allreduce_hook)
        watch_ddp(model)

    with pytest.raises(WorkerFailed, match=r"Pass yours to watch_ddp\(model, hook, state\)"):
        launch(work)


OUTSIDE = """
import os, torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from ddp_lessons import watch_ddp
from ddp_lessons.simulated import SimulatedLink
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
DDP = torch.nn.parallel.DistributedDataParallel
model = watch_ddp(DDP(torch.nn.Linear(2, 2)))
print(len(model._comm_hooks))
model = watch_ddp(DDP(torch.nn.Linear(2, 2)), default_hooks.allreduce_hook)
print(model._comm_hooks[0][0].__name__)
model = watch_ddp(DDP(torch.nn.Linear(2, 2)), SimulatedLink(100))
model(torch.ones(3, 2)).sum().backward()
print(*model.module.bias.grad.tolist())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_outside_a_worker_only_the_learners_hook_is_registered(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout.split() == ["0", "allreduce_hook", "3.0", "3.0"], done.stderr
