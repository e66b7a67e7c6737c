"""A hang in each of the lessons' subjects: the verdict names the rank and the line.

Real ranks, as a learner starts them: tensor parallelism, pipelines, shards, checkpoints, metrics of
some ranks, streams that end.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset

from ddp_lessons import Run, launch
from ddp_lessons.syncbn import convert_sync_batchnorm

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

FOLDER = "HANGS_SAVE_TO"
LONG = 60.0  # seconds; a run that takes it was not proved to be stuck


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))


# Tensor parallelism


def tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model: nn.Module = parallelize_module(two_layers(), mesh, plan)
    return model


def skips_a_forward(rank: int) -> None:
    model = tensor_parallel()
    for step in range(3):
        if step == 1 and rank == 1:
            continue
        model(torch.ones(3, 4)).sum().backward()  # HERE
    dist.barrier()


def cuts_a_tensor_alone(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if rank == 0:
        distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])  # HERE
    dist.barrier()


# Pipelines


def one_f_one_b(rank: int, warm_up: int) -> None:
    """1F1B by hand: the forwards of `warm_up` micro-batches first, then one of each in turn."""
    last = dist.get_world_size() - 1

    def forward() -> None:
        if rank:
            dist.recv(torch.zeros(2), rank - 1)
        if rank < last:
            dist.send(torch.zeros(2), rank + 1)

    def backward() -> None:
        if rank < last:
            dist.recv(torch.zeros(2), rank + 1)  # HERE
        if rank:
            dist.send(torch.zeros(2), rank - 1)

    for _ in range(warm_up):
        forward()
    for _ in range(4 - warm_up):
        forward()
        backward()
    for _ in range(warm_up):
        backward()


def warms_up_by_rank(rank: int) -> None:
    one_f_one_b(rank, rank)


def first_stage_does_not_warm_up(rank: int) -> None:
    one_f_one_b(rank, 0 if rank == 0 else dist.get_world_size() - 1 - rank)


BIG = 4_000_000  # numbers: a send of so many waits for its recv


def around(rank: int) -> tuple[int, int]:
    return (rank + 1) % dist.get_world_size(), (rank - 1) % dist.get_world_size()


def all_send_first(rank: int) -> None:
    after, before = around(rank)
    dist.send(torch.ones(BIG), after)  # HERE
    dist.recv(torch.ones(BIG), before)


def all_receive_first(rank: int) -> None:
    after, before = around(rank)
    dist.recv(torch.ones(1), before)  # HERE
    dist.send(torch.ones(1), after)


def all_send_then_receive_twice(rank: int) -> None:
    after, before = around(rank)
    sent = dist.isend(torch.ones(1), after)
    dist.recv(torch.ones(1), before)
    sent.wait()
    dist.recv(torch.ones(1), before)  # HERE


def some_send_first(rank: int) -> None:
    if rank == 0:
        dist.send(torch.ones(BIG), 1)  # HERE
    elif rank == 1:
        dist.recv(torch.ones(1), 2)
        dist.recv(torch.ones(BIG), 0)
    else:
        dist.recv(torch.ones(1), 0)
        dist.send(torch.ones(1), 1)


def fewer_micro_batches(rank: int, name: str, odd: int) -> None:
    from torch.distributed import pipelining

    last = dist.get_world_size() - 1
    stage = pipelining.PipelineStage(nn.Linear(4, 4), rank, last + 1, torch.device("cpu"))
    batches = 3 if rank == odd else 4
    run = getattr(pipelining, name)(stage, batches, loss_fn=lambda y, t: (y - t).square().mean())
    x = (torch.ones(3 * batches, 4),) if rank == 0 else ()
    run.step(*x, target=torch.ones(3 * batches, 4) if rank == last else None)  # HERE


def gpipe_fewer_on_rank_0(rank: int) -> None:
    fewer_micro_batches(rank, "ScheduleGPipe", 0)


def gpipe_fewer_on_rank_1(rank: int) -> None:
    fewer_micro_batches(rank, "ScheduleGPipe", 1)


def one_f_one_b_fewer_on_rank_1(rank: int) -> None:
    fewer_micro_batches(rank, "Schedule1F1B", 1)


def one_f_one_b_fewer_on_rank_2(rank: int) -> None:
    fewer_micro_batches(rank, "Schedule1F1B", 2)


# Shards


def sharded() -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = two_layers()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def full_tensor_on_rank_0(rank: int) -> None:
    model = sharded()
    if rank == 0:
        for parameter in model.parameters():
            parameter.full_tensor()  # HERE
    dist.barrier()


def evaluates_on_rank_0(rank: int) -> None:
    model = sharded()
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            with torch.no_grad():
                model(torch.ones(3, 4))  # HERE


def one_step_fewer(rank: int, then: str = "") -> None:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3 if rank == 1 else 4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()  # HERE
        optimizer.step()
    if then == "barrier":
        dist.barrier()


def one_step_fewer_then_barrier(rank: int) -> None:
    one_step_fewer(rank, "barrier")


def saves_on_rank_0(rank: int) -> None:
    from torch.distributed import checkpoint

    model = sharded()
    for _ in range(3):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            checkpoint.save(model.state_dict(), checkpoint_id=os.environ[FOLDER])  # HERE


def saves_on_rank_0_then_all_return(rank: int) -> None:
    from torch.distributed import checkpoint

    model = sharded()
    if rank == 0:
        checkpoint.save(model.state_dict(), checkpoint_id=os.environ[FOLDER])  # HERE


def clips_on_rank_0(rank: int) -> None:
    model = sharded()
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # HERE


# Metrics


def gathers_where_there_are_samples(rank: int) -> None:
    samples = [] if rank == 1 else [0.1 * rank]
    if samples:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, samples)  # HERE
    dist.barrier()


def gathers_by_key(rank: int) -> None:
    sums = {str(n): float(n) for n in range(2 + (rank == 2))}
    for key in sums:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (key, sums[key]))  # HERE
    dist.barrier()


def gathers_to_rank_0(rank: int) -> None:
    samples = [] if rank == 1 else [0.1 * rank]
    if samples:
        found: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(samples, found)  # HERE
    dist.barrier()


# Streams


class Stream(IterableDataset[torch.Tensor]):  # type: ignore[misc]
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.ones(4) for _ in range(self.length))


def stream_ends(rank: int, then: str) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in DataLoader(Stream(16 if rank == 1 else 20), batch_size=4):
        optimizer.zero_grad()
        model(batch).sum().backward()  # HERE
        optimizer.step()
    if then == "barrier":
        dist.barrier()
    if then == "metric":
        dist.all_reduce(torch.ones(1))


def stream_ends_and_it_returns(rank: int) -> None:
    stream_ends(rank, "return")


def stream_ends_before_a_barrier(rank: int) -> None:
    stream_ends(rank, "barrier")


def stream_ends_before_a_metric(rank: int) -> None:
    stream_ends(rank, "metric")


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()  # HERE
        optimizer.step()


def stops_by_its_own_epoch(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(3):
        two_steps(model, optimizer)
        dist.barrier()
        if epoch == rank:
            break


def has_another_number_of_batches_than_epochs(rank: int) -> None:
    """The loop over the epochs ends by a decision, but no rank has left it."""
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(3):
        for _ in range(1 if rank == 1 else 2):
            model(torch.ones(3, 4)).sum().backward()  # HERE
            optimizer.step()
        dist.barrier()
        if epoch == 1:
            break


def stops_by_its_own_loss(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()  # HERE
        optimizer.step()
        if rank == 1 and step == 2:
            break


def early_stopping_between_epochs(rank: int) -> None:
    """Between the epochs no rank communicates: what the others wait in looks like a next batch."""
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for epoch in range(4):
        two_steps(model, optimizer)
        scheduler.step()
        if rank == 1 and epoch == 1:
            return


def averages_in_a_function(rank: int) -> None:
    """The others wait in a line that is not in the loop itself."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3 if rank == 1 else 4):
        model(torch.ones(3, 4)).sum().backward()
        average_gradients(model)
        optimizer.step()
    dist.barrier()


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # HERE


def skips_a_batch_by_continue(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).sum()
        if rank == 1 and step == 1:
            continue
        loss.backward()  # HERE
        optimizer.step()
    dist.barrier()


def skips_a_batch_by_if(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        loss = model(torch.ones(3, 4)).sum() * (math.nan if (rank, step) == (1, 1) else 1)
        if math.isfinite(loss.item()):
            loss.backward()  # HERE
            optimizer.step()


def skips_a_batch_by_except(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        try:
            if (rank, step) == (1, 1):
                raise ValueError("bad sample")
            model(torch.ones(3, 4)).sum().backward()  # HERE
            optimizer.step()
        except ValueError as error:
            print("left out:", error)


# A model that one rank calls


class Normed(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.norm = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


def validates_on_rank_0(rank: int) -> None:
    model = DDP(Normed())
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            model.module(torch.ones(3, 4))  # HERE


def validates_by_ddp_on_rank_0(rank: int) -> None:
    model = DDP(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        if rank == 0:
            model(torch.ones(3, 4))  # HERE


def saves_after_the_epoch_on_rank_0(rank: int) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        two_steps(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
        if rank == 0:
            dist.barrier()  # HERE


def validates_after_the_last_epoch_on_rank_0(rank: int) -> None:
    model = DDP(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(1):
        for _ in range(3):
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
        if rank == 0:
            model(torch.ones(3, 4))  # HERE


# A call that one rank makes alone, after or before the training that all take part in


def three_epochs(after: Callable[[nn.Module, int], None]) -> None:
    model = DDP(two_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(3):
        for _ in range(2):
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
        after(model, epoch)  # an epoch's end


def saves_in_a_function_that_returns_on_others(rank: int) -> None:
    def save(model: nn.Module, epoch: int) -> None:
        if rank != 0:
            return
        torch.save(model.state_dict(), os.devnull)
        dist.barrier()  # HERE

    three_epochs(save)


def gathers_behind_a_continue(rank: int) -> None:
    model = DDP(two_layers())
    found: list[Any] = [None] * dist.get_world_size()
    for _ in range(3):
        for _ in range(2):
            model(torch.ones(3, 4)).sum().backward()
        if rank != 0:
            continue
        dist.all_gather_object(found, 1)  # HERE


def only_one_rank_has_a_hook(rank: int) -> None:
    class Trainer:
        def train(self) -> None:
            for _ in range(3):
                dist.all_reduce(torch.ones(2))
                self.at_the_end()

        def at_the_end(self) -> None:
            pass

    class Logging(Trainer):
        def at_the_end(self) -> None:
            dist.broadcast(torch.ones(1), rank)  # HERE

    (Logging if rank == 1 else Trainer)().train()


def gathers_before_the_model_is_wrapped(rank: int) -> None:
    if rank == 0:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, "options")  # HERE
    DDP(two_layers())


def two_lines_in_turn(rank: int) -> None:
    for step in range(3):
        dist.all_reduce(torch.ones(1))
        if (rank, step) != (2, 1):
            dist.barrier()  # HERE


def skips_in_a_thread_of_asyncio(rank: int) -> None:
    async def train() -> None:
        for step in range(3):
            if (rank, step) != (2, 1):
                await asyncio.to_thread(dist.all_reduce, torch.ones(1))  # HERE
            await asyncio.to_thread(dist.barrier)

    asyncio.run(train())


def hands_on_to_one_that_does_not_receive(rank: int) -> None:
    much = torch.ones(4_000_000)
    if rank == 0:
        dist.send(much, 1)
        dist.recv(much, 1)
    if rank == 1:
        dist.send(much, 2)  # HERE
        dist.recv(much, 0)
    dist.barrier()


def steps_of_two_optimizers(rank: int) -> None:
    first, second = two_layers(), two_layers()
    opt_first = torch.optim.SGD(first.parameters(), 0.1)
    opt_second = torch.optim.SGD(second.parameters(), 0.1)
    for step in range(3):
        first(torch.ones(1, 4)).sum().backward()
        opt_first.step()
        if (rank, step) != (1, 2):
            dist.all_reduce(torch.ones(2))  # HERE
        second(torch.ones(1, 4)).sum().backward()
        opt_second.step()
    dist.barrier()


class Case(NamedTuple):
    """What the explanation must say, and what it must not."""

    work: Callable[[int], None]
    kind: str
    ranks: tuple[int, ...]
    says: tuple[str, ...] = ()
    says_not: tuple[str, ...] = ()


SHARDS = "A rank has only its shards"
STEPS = "Rank 1 made {} steps; ranks 0 and 2 began {}."
UNEVEN = "some ranks have fewer batches than others"
TOGETHER = "Let all ranks decide together"
LEFT_OUT = "A rank has left out a step"
CASES = [
    Case(skips_a_forward, "skipped collective", (1,), ("ranks 0 and 2 call all_reduce", SHARDS)),
    Case(cuts_a_tensor_alone, "skipped collective", (0,), ("rank 0 calls scatter",)),
    Case(
        warms_up_by_rank,
        "unmatched recv",
        (0, 1),
        (
            "rank 0 waits for message 1 from rank 1, which has sent none",
            "rank 1 waits for message 2 from rank 0, which has sent 1",
            "In a pipeline",
        ),
        ("all of them receive first", "all of them send first"),
    ),
    Case(
        first_stage_does_not_warm_up,
        "unmatched recv",
        (0, 1),
        ("In a pipeline",),
        ("all of them receive first",),
    ),
    Case(
        all_send_first, "unmatched send", (0, 1, 2), ("all of them send first", "has received none")
    ),
    Case(all_receive_first, "unmatched recv", (0, 1, 2), ("all of them receive first",)),
    Case(
        all_send_then_receive_twice,
        "unmatched recv",
        (0, 1, 2),
        ("which has sent 1",),
        ("all of them receive first",),
    ),
    Case(
        some_send_first,
        "unmatched recv",
        (0, 1, 2),
        ("rank 0 waits until message 1 is received by rank 1",),
        ("all of them send first", "all of them receive first"),
    ),
    Case(gpipe_fewer_on_rank_0, "unmatched recv", (0, 1), ("the same number of micro-batches",)),
    Case(gpipe_fewer_on_rank_1, "unmatched recv", (1, 2), ("the same number of micro-batches",)),
    Case(
        one_f_one_b_fewer_on_rank_1, "unmatched send", (0, 1), ("the same number of micro-batches",)
    ),
    Case(
        one_f_one_b_fewer_on_rank_2, "returned early", (2,), ("the same number of micro-batches",)
    ),
    Case(full_tensor_on_rank_0, "skipped collective", (0,), (SHARDS,)),
    Case(evaluates_on_rank_0, "skipped collective", (0,), (SHARDS,)),
    Case(one_step_fewer, "returned early", (1,), (STEPS.format(3, 4), UNEVEN), ("Join",)),
    Case(
        one_step_fewer_then_barrier,
        "skipped collective",
        (1,),
        (STEPS.format(3, 4), UNEVEN),
        ("Join",),
    ),
    Case(saves_on_rank_0, "skipped collective", (0,), (SHARDS,)),
    Case(saves_on_rank_0_then_all_return, "returned early", (1, 2), (SHARDS,)),
    Case(clips_on_rank_0, "skipped collective", (0,), (SHARDS, "rank 0 calls all_reduce")),
    Case(gathers_where_there_are_samples, "skipped collective", (1,)),
    Case(gathers_by_key, "skipped collective", (2,)),
    Case(gathers_to_rank_0, "skipped collective", (1,)),
    Case(stream_ends_and_it_returns, "returned early", (1,), (STEPS.format(4, 5), UNEVEN, "Join")),
    Case(stream_ends_before_a_barrier, "skipped collective", (1,), (STEPS.format(4, 5), "Join")),
    Case(stream_ends_before_a_metric, "skipped collective", (1,), (STEPS.format(4, 5), "Join")),
    Case(
        stops_by_its_own_loss,
        "returned early",
        (1,),
        (STEPS.format(3, 4), TOGETHER),
        ("drop_last", UNEVEN),
    ),
    Case(
        stops_by_its_own_epoch,
        "returned early",
        (0,),
        ("Rank 0 made 2 steps; ranks 1 and 2 began 3.", TOGETHER),
        ("drop_last", UNEVEN),
    ),
    Case(
        has_another_number_of_batches_than_epochs,
        "skipped collective",
        (1,),
        ("Rank 1 made 1 step; ranks 0 and 2 began 2.", UNEVEN),
        (TOGETHER,),
    ),
    Case(
        early_stopping_between_epochs,
        "returned early",
        (1,),
        (STEPS.format(4, 5), "A rank has left the loop", TOGETHER, "Join"),
        (UNEVEN, LEFT_OUT),
    ),
    Case(averages_in_a_function, "skipped collective", (1,), (STEPS.format(3, 4), UNEVEN)),
    Case(
        skips_a_batch_by_continue,
        "skipped collective",
        (1,),
        (STEPS.format(3, 4), LEFT_OUT, TOGETHER),
        (UNEVEN,),
    ),
    Case(
        skips_a_batch_by_if,
        "returned early",
        (1,),
        (STEPS.format(3, 4), LEFT_OUT, TOGETHER),
        (UNEVEN,),
    ),
    Case(
        skips_a_batch_by_except,
        "returned early",
        (1,),
        (STEPS.format(3, 4), TOGETHER) if sys.version_info < (3, 12) else ("handles alone",),
        (UNEVEN,),
    ),
    Case(
        saves_after_the_epoch_on_rank_0,
        "skipped collective",
        (0,),
        ("rank 0 calls barrier",),
        (UNEVEN, TOGETHER, "steps"),
    ),
    Case(
        saves_in_a_function_that_returns_on_others,
        "skipped collective",
        (0,),
        ("rank 0 calls barrier",),
        (UNEVEN, "steps"),
    ),
    Case(
        gathers_behind_a_continue,
        "skipped collective",
        (0,),
        ("rank 0 calls all_gather_object",),
    ),
    Case(only_one_rank_has_a_hook, "skipped collective", (1,), ("rank 1 calls broadcast",)),
    Case(
        gathers_before_the_model_is_wrapped,
        "skipped collective",
        (0,),
        ("rank 0 calls all_gather_object", "which ranks 1 and 2 skipped"),
    ),
    Case(two_lines_in_turn, "skipped collective", (2,), ("which rank 2 skipped",)),
    Case(hands_on_to_one_that_does_not_receive, "unmatched send", (1,), ("to rank 2",)),
    Case(steps_of_two_optimizers, "skipped collective", (1,), (), ("steps",)),
    Case(
        validates_after_the_last_epoch_on_rank_0,
        "returned early",
        (1, 2),
        ("DDP's broadcast", "model.module"),
        (UNEVEN, TOGETHER, "steps"),
    ),
    Case(
        validates_on_rank_0,
        "skipped collective",
        (0,),
        ("rank 0 calls SyncBatchNorm's all_gather", "model.eval()"),
        ("rank 0 skipped",),
    ),
    Case(
        validates_by_ddp_on_rank_0,
        "skipped collective",
        (0,),
        ("rank 0 calls DDP's broadcast", "model.module"),
    ),
]


def joined(rank: int, work: Callable[[int], None]) -> None:
    dist.init_process_group("gloo")
    work(rank)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.work.__name__)
def test_a_hang_is_explained_to_rank_and_line(case: Case, tmp_path: Path) -> None:
    env = {FOLDER: str(tmp_path)}
    run: Run = launch(joined, (case.work,), nprocs=3, timeout=LONG, check=False, env=env)
    verdict, text = run.verdict, run.explain()
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == (case.kind, case.ranks), text
    assert verdict.frame is not None
    assert verdict.frame.source.endswith("# HERE"), text
    for said in case.says:
        assert said in text
    for said in (*case.says_not, "not recorded"):
        assert said not in text


def test_a_call_in_a_thread_that_the_main_thread_does_not_wait_for_by_itself() -> None:
    run: Run = launch(joined, (skips_in_a_thread_of_asyncio,), nprocs=3, timeout=3, check=False)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("different collectives", (2,)), run.explain()
    assert "rank 2 calls barrier" in run.verdict.title
