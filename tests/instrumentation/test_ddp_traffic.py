"""All that DDP itself sends is recorded, and the weights stay the same to the last bit."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch
from ddp_lessons.instrumentation import recording
from ddp_lessons.instrumentation.backward import Turns
from ddp_lessons.wire.records import Span

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Branches(nn.Module):  # type: ignore[misc]
    """Layers with buffers, and one that not every step uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
        self.last, self.other = nn.Linear(64, 9), nn.Linear(64, 9)

    def forward(self, x: torch.Tensor, use_other: bool = False) -> torch.Tensor:
        x = self.first(x)
        return self.other(x) if use_other else self.last(x)


def train(rank: int, seen: bool, options: dict[str, Any], how: str = "") -> list[torch.Tensor]:
    """The weights and buffers after some steps; without `seen`, as without this package."""
    if not seen:
        recording.use(None)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Branches(), bucket_cap_mb=0.02, **options)
    if how == "fp16 in C++":
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    if how == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank)
    steps = 6 - rank % 2 if how.startswith("join") else 6
    with model.join(enable=how.startswith("join")):
        for step in range(steps):
            optimizer.zero_grad(set_to_none=how != "views kept")
            for _ in range(2 if how == "no_sync" else 1):
                with model.no_sync() if how == "no_sync" else torch.enable_grad():
                    x = torch.randn(8, 64)
                    model(x, step % 3 == rank).square().mean().backward()
            if how == "no_sync":
                model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
    weights = [weight.detach().clone() for weight in (*model.parameters(), *model.buffers())]
    del model, optimizer  # plain DDP that is freed after the group is left may hang
    gc.collect()
    dist.destroy_process_group()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "plain"),
        ({"gradient_as_bucket_view": True}, "views kept"),
        ({"broadcast_buffers": False}, "plain"),
        ({"gradient_as_bucket_view": True}, "join"),
        ({}, "no_sync"),
        ({}, "fp16"),
        ({}, "fp16 in C++"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_weights_are_those_of_plain_ddp(options: dict[str, Any], how: str) -> None:
    options = {**options, "find_unused_parameters": True}  # one of two layers gets no gradient
    plain = launch(train, (False, options, how), nprocs=3)
    seen = launch(train, (True, options, how), nprocs=3)
    assert not any(s.op == "all_reduce" for s in plain.spans())
    for ours, theirs in zip(seen.values, plain.values, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert numbered(seen, 0) == numbered(seen, 1) == numbered(seen, 2)
    assert seen.warnings == []


def numbered(run: Run, rank: int) -> list[tuple[int | None, str | None, int | None]]:
    """The calls of a rank that the others must make, too."""
    kinds = [s for s in run.ranks[rank].spans if s.kind == "comm" and s.seq is not None]
    return sorted({(s.seq, s.op, s.nbytes) for s in kinds}, key=lambda call: call[0] or 0)


def work(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model = DistributedDataParallel(net, bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()
    dist.destroy_process_group()


def calls(run: Run, step: int | None) -> list[tuple[str, str | None, int | None]]:
    spans = [s for s in run.ranks[1].spans if s.kind == "comm" and s.seq is not None]
    return [(s.name, s.op, s.bucket) for s in spans if s.step == step]


def test_an_ordinary_training_loop_is_on_the_record() -> None:
    run = launch(work)
    buffers, *buckets = (
        ("DDP's broadcast", "broadcast", None),
        *((f"bucket {n}", "all_reduce", n) for n in range(2)),
    )
    check = ("DistributedDataParallel", "DistributedDataParallel", None)
    order = ("order of buckets", "broadcast", None)
    # The first backward has one bucket; DDP arranges the buckets after it.
    assert calls(run, 0) == [check, buffers, buffers, buckets[0]]
    assert calls(run, 1) == [order, order, buffers, *buckets]
    assert calls(run, 2) == [buffers, *buckets]
    assert all(s.t1_ns is not None for s in run.spans())
    sites = {s.site for s in run.spans() if s.name.startswith(("bucket", "DDP's"))}
    lines = {int(str(site).rpartition(":")[2]) - work.__code__.co_firstlineno for site in sites}
    assert lines == {4, 8}  # where the model is made, and the step


def test_a_model_in_a_group_of_its_own() -> None:
    def halves(rank: int) -> None:
        dist.init_process_group("gloo")
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = DistributedDataParallel(nn.Linear(3, 3), process_group=pairs[rank % 2])
        model(torch.ones(1, 3)).sum().backward()
        dist.destroy_process_group()

    run = launch(halves, nprocs=4)
    names = [{s.group for s in r.spans if s.name == "bucket 0"} for r in run.ranks]
    assert names == [{"ranks 0 2"}, {"ranks 1 3"}] * 2


def test_buckets_are_numbered_anew_after_a_backward_that_was_broken_off() -> None:
    turns = Turns(10)
    whole = [(0, False), (1, False), (2, True)]
    assert [turns.next(n) for n in (3, 3, 4)] == whole
    assert turns.next(3) == (0, False)
    assert turns.next(3) == (1, False)
    assert turns.next(9) == (0, False)  # more than is left, so it belongs to another backward


def fails_in_forward(model: nn.Module) -> None:
    model(torch.ones(1, 3))


def fails_in_backward(model: nn.Module) -> None:
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("fails", [fails_in_forward, fails_in_backward])
def test_a_rank_that_is_lost_in_ddps_own_call(fails: Callable[[nn.Module], None]) -> None:
    def lost(rank: int) -> None:
        dist.init_process_group("gloo")
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        model = DistributedDataParallel(net)
        model(torch.ones(1, 3)).sum().backward()
        if rank == 1:
            raise ValueError("bad sample 17")
        fails(model)

    run = launch(lost, check=False)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", (1,))
    left_open: list[Span] = [s for s in run.ranks[0].spans if s.t1_ns is None]
    assert left_open == []
