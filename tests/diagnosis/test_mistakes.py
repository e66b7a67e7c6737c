"""Mistakes that raise nothing are warned of, and no healthy program is."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Finding, launch, load_run
from ddp_lessons.instrumentation import torch_api
from tests.support import torchrun
from tests.support.kernels import ANSI, Kernel

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Body = Callable[[int], object]


def in_group(rank: int, body: Body) -> None:
    dist.init_process_group("gloo")
    body(rank)
    dist.barrier()
    dist.destroy_process_group()


def warnings_of(body: Body, nprocs: int = 3) -> list[Finding]:
    return launch(in_group, (body,), nprocs=nprocs).warnings


def source(finding: Finding) -> str:
    assert finding.frame is not None
    return finding.frame.source


# One tensor for the results of several ranks


def gathers(rank: int) -> None:
    out = [torch.zeros(1)] * 3
    dist.all_gather(out, torch.ones(1))


def gathers_asynchronously(rank: int) -> None:
    out = [torch.zeros(1)] * 3
    dist.all_gather(out, torch.ones(1), async_op=True).wait()


def gathers_into_views(rank: int) -> None:
    x = torch.zeros(2)
    dist.all_gather([x.view(2), x[:], x], torch.ones(2))


def gathers_two_of_three(rank: int) -> None:
    x = torch.zeros(2)
    dist.all_gather(group=None, tensor=torch.ones(2), tensor_list=[x, torch.zeros(2), x])


def gathers_on_the_root(rank: int) -> None:
    out = [torch.zeros(1)] * 3 if rank == 1 else None
    dist.gather(torch.ones(1), out, dst=1)


def gathers_several(rank: int) -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    dist.all_gather_coalesced([[x, y]] * 3, [torch.ones(1), torch.ones(1)])


def exchanges(rank: int) -> None:
    dist.all_to_all([torch.zeros(1)] * 3, [torch.ones(1) for _ in range(3)])


OVERLAPPING: dict[Body, tuple[int, ...]] = {
    gathers: (0, 1, 2),
    gathers_asynchronously: (0, 1, 2),
    gathers_into_views: (0, 1, 2),
    gathers_two_of_three: (0, 1, 2),
    gathers_on_the_root: (1,),
    gathers_several: (0, 1, 2),
}
if torch_api.release(torch.__version__) >= (2, 12):  # the first with gloo's all_to_all
    OVERLAPPING[exchanges] = (0, 1, 2)


@pytest.mark.parametrize("body", OVERLAPPING)
def test_one_tensor_for_the_results_of_several_ranks(body: Body) -> None:
    (found,) = warnings_of(body)
    assert (found.kind, found.ranks) == ("overlapping outputs", OVERLAPPING[body])
    assert source(found).startswith("dist.")


# Work that nobody waits for


def reduces(rank: int) -> None:
    for _ in range(3):
        x = torch.ones(1000)
        dist.all_reduce(x, async_op=True)


def waits_for_the_last(rank: int) -> None:
    works = []
    for _ in range(3):
        works.append(dist.all_reduce(torch.ones(1000), async_op=True))
    works[-1].wait()


def broadcasts(rank: int) -> None:
    dist.broadcast(torch.ones(1000), 1, async_op=True)


def reduces_to_the_root(rank: int) -> None:
    dist.reduce(torch.ones(1000), 1, async_op=True)


def receives(rank: int) -> None:
    x = torch.zeros(1)
    works = [dist.isend(torch.ones(1), (rank + 1) % 3)]
    works += [dist.irecv(x, (rank - 1) % 3)]
    works[0].wait()
    time.sleep(0.2)  # without the wait, the data may come or not


def sends(rank: int) -> None:
    if rank == 0:
        handles.append(dist.isend(torch.ones(1), 1))  # kept, so that torch does send it
    elif rank == 1:
        dist.recv(torch.zeros(1), 0)


def sends_and_receives(rank: int) -> None:
    if rank == 2:
        return
    ops = [
        dist.P2POp(dist.isend, torch.ones(1), 1 - rank),
        dist.P2POp(dist.irecv, torch.zeros(1), 1 - rank),
    ]
    works = dist.batch_isend_irecv(ops)
    handles.extend(works)
    works[1].wait()


def reduces_in_a_thread(rank: int) -> None:
    def run() -> None:
        dist.all_reduce(torch.ones(1000), async_op=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


handles: list[object] = []
NOT_AWAITED: dict[Body, tuple[int, ...]] = {
    reduces: (0, 1, 2),
    waits_for_the_last: (0, 1, 2),
    broadcasts: (0, 2),
    reduces_to_the_root: (1,),
    receives: (0, 1, 2),
    sends: (0,),
    sends_and_receives: (0, 1),
    reduces_in_a_thread: (0, 1, 2),
}


@pytest.mark.parametrize("body", NOT_AWAITED)
def test_work_that_nobody_waits_for(body: Body) -> None:
    (found,) = warnings_of(body)
    assert (found.kind, found.ranks) == ("never waited for", NOT_AWAITED[body])
    assert "dist." in source(found)


# A tensor that is changed before it was sent


def sends_one_buffer(rank: int) -> None:
    x, works = torch.zeros(1_000_000), []
    for number in range(3):
        if rank == 0:
            x.fill_(number)
            works.append(dist.isend(x, 1))
        elif rank == 1:
            dist.recv(x, 0)
    for work in works:
        work.wait()


def changes_before_it_receives(rank: int) -> None:
    x, y = torch.ones(10), torch.zeros(10)
    ops = [dist.P2POp(dist.isend, x, (rank + 1) % 3), dist.P2POp(dist.irecv, y, (rank - 1) % 3)]
    works = dist.batch_isend_irecv(ops)
    x.mul_(2)
    for work in works:
        work.wait()


def steps_before_it_waits(rank: int) -> None:
    x = nn.Parameter(torch.ones(10))
    work = dist.isend(x.detach(), 1) if rank == 0 else None
    with torch.no_grad():
        x -= 1
    if work is not None:
        work.wait()
    elif rank == 1:
        dist.recv(torch.zeros(10), 0)


CHANGED: dict[Body, tuple[int, ...]] = {
    sends_one_buffer: (0,),
    changes_before_it_receives: (0, 1, 2),
    steps_before_it_waits: (0,),
}


@pytest.mark.parametrize("body", CHANGED)
def test_a_tensor_that_is_changed_before_it_was_sent(body: Body) -> None:
    (found,) = warnings_of(body)
    assert (found.kind, found.ranks) == ("changed too early", CHANGED[body])
    assert "isend" in source(found)


def changes_in_time(rank: int) -> None:
    """A tensor may be changed after a wait, or when another rank has told that it came."""
    x, y = torch.ones(10), torch.zeros(10)
    if rank == 0:
        dist.isend(x, 1).wait()
        x += 1
        answered = dist.isend(x, 1)
        dist.recv(y, 1)
        x += 1
        answered.wait()
        met = dist.isend(x, 1)
    elif rank == 1:
        dist.recv(y, 0)
        dist.recv(y, 0)
        dist.send(y, 0)
        dist.recv(y, 0)
    dist.barrier()
    x += 1
    if rank == 0:
        met.wait()


def changes_the_inside_meanwhile(rank: int) -> None:
    """Ranks exchange the edges of their parts, and compute the inside meanwhile."""
    field, weight = torch.ones(8, 4), torch.ones(4)
    works = [dist.isend(field[-2], (rank + 1) % 3), dist.irecv(field[0], (rank - 1) % 3)]
    field[2:-2] += 1
    weight += 1
    for work in works:
        work.wait()


# A recv into a larger tensor


def receives_fewer(rank: int) -> None:
    x = torch.zeros(4)
    if rank == 0:
        dist.send(torch.ones(4), 1)
        dist.send(torch.ones(2), 1)
        dist.send(torch.ones(3), 1, tag=7)
    elif rank == 1:
        dist.recv(x, 0)
        for tag in (0, 7):
            dist.recv(x, 0, tag=tag)


def receives_fewer_in_a_batch(rank: int) -> None:
    mine = torch.ones(4 if rank else 2)
    ops = [
        dist.P2POp(dist.isend, mine, (rank + 1) % 3),
        dist.P2POp(dist.irecv, torch.zeros(4), (rank - 1) % 3),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def receives_fewer_from_anyone(rank: int) -> None:
    if rank == 0:
        dist.send(torch.ones(2), 1)
    elif rank == 1:
        dist.recv(torch.zeros(4))


@pytest.mark.parametrize(
    "body", [receives_fewer, receives_fewer_in_a_batch, receives_fewer_from_anyone]
)
def test_a_recv_into_a_larger_tensor(body: Body) -> None:
    (found,) = warnings_of(body)
    assert (found.kind, found.ranks) == ("partly filled", (1,))
    assert "rank 0 sends float32 (2,) to rank 1, whose" in found.text
    assert "expects float32 (4,), so the rest of that tensor keeps its old values" in found.text


def receives_all(rank: int) -> None:
    sizes = (4, 2, 3, 1)
    if rank == 0:
        works = [dist.isend(torch.ones(size), 1, tag=size % 2) for size in sizes]
        for work in works:
            work.wait()
        dist.send(torch.ones(2, 3), 1)
    elif rank == 1:
        rooms = {size: torch.zeros(size) for size in sizes}
        works = [dist.irecv(rooms[size], 0, tag=size % 2) for size in (3, 4, 1, 2)]
        for work in reversed(works):
            work.wait()
        dist.recv(torch.zeros(6), 0)


def receives_from_anyone(rank: int) -> None:
    """Works are waited for in another order than they began, so their numbers are not certain."""
    if rank == 0:
        dist.send(torch.ones(2), 1)
        dist.send(torch.ones(4), 1)
    elif rank == 1:
        works = [dist.irecv(torch.zeros(2)), dist.irecv(torch.zeros(4))]
        for work in reversed(works):
            work.wait()


def test_each_kind_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def several(rank: int) -> None:
        gathers(rank)
        gathers_two_of_three(rank)
        if rank == 1:
            dist.broadcast(torch.ones(1), 0, async_op=True)
        else:
            dist.broadcast(torch.ones(1), 0)

    run = launch(in_group, (several,), nprocs=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(warning) for warning in run.warnings]
    assert [warning.ranks for warning in run.warnings] == [(0, 1, 2), (1,)]
    assert "test_mistakes.py, line" in lines[0]
    assert lines[0].endswith("The same at 1 other line.")
    assert lines[1].startswith("Warning: rank 1 never waited for the broadcast")
    assert run.explain().splitlines()[1:] == lines


def test_a_run_that_failed_tells_only_why() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        gathers(rank)
        reduces(rank)
        raise ValueError

    run = launch(work, nprocs=3, check=False)
    assert run.warnings == []
    assert "more than once" not in run.explain()


# Healthy programs


def gathers_apart(rank: int) -> None:
    x, empty, alone = torch.zeros(3, 4), torch.zeros(0), dist.new_group([0])
    dist.all_gather(list(x), torch.ones(4))
    dist.all_gather(list(x.chunk(3)), torch.ones(1, 4))
    dist.all_gather([empty] * 3, torch.zeros(0))
    dist.gather(torch.ones(4), list(x) if rank == 0 else None)
    dist.scatter(x[0], [torch.ones(4)] * 3 if rank == 0 else None)
    dist.reduce_scatter(x[0], [torch.ones(4)] * 3)
    dist.all_gather_object([None] * 3, rank)
    if rank == 0:
        dist.all_gather([torch.zeros(1)] * 1, torch.ones(1), group=alone)
    with pytest.raises(ValueError, match="dtype"):
        dist.all_gather([torch.zeros(1)] * 3, torch.ones(1, dtype=torch.int64))


def waits(rank: int) -> None:
    x = torch.ones(10)
    dist.all_reduce(x, async_op=True).wait()
    dist.all_reduce(x, async_op=True).get_future().wait()
    dist.all_reduce(x, async_op=True).get_future().then(lambda done: done.value()[0]).wait()
    torch.futures.wait_all([dist.all_reduce(x, async_op=True).get_future() for _ in range(3)])
    polled = dist.all_reduce(x, async_op=True)
    while not polled.is_completed():
        time.sleep(0.001)
    for work in [dist.broadcast(x, 0, async_op=True) for _ in range(3)]:
        work.wait()
        work.wait()


def waits_elsewhere(rank: int) -> None:
    x = torch.ones(10)
    atexit.register(dist.all_reduce(x, async_op=True).wait)
    threading.Timer(0.3, dist.all_reduce(x, async_op=True).wait).start()


def needs_no_wait(rank: int) -> None:
    """Only the rank that gets data must wait; and a barrier that others wait for is announced."""
    x = torch.ones(10)
    barrier = dist.barrier(async_op=True)
    reduction, copy = dist.reduce(x, 0, async_op=True), dist.broadcast(x, 1, async_op=True)
    if rank == 0:
        barrier.wait()
        reduction.wait()
    if rank != 1:
        copy.wait()


def passes_on(rank: int) -> None:
    x, y = torch.ones(10), torch.zeros(10)
    sending = dist.isend(x, (rank + 1) % 3)
    dist.recv(y, (rank - 1) % 3)
    sending.wait()
    ops = [dist.P2POp(dist.isend, x, (rank + 1) % 3), dist.P2POp(dist.irecv, y, (rank - 1) % 3)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    if rank < 2:
        dist.send_object_list([rank], 1) if rank == 0 else dist.recv_object_list([None], 0)


def coalesces(rank: int) -> None:
    x = torch.ones(10)
    with _coalescing_manager():
        dist.all_reduce(x)
        dist.all_reduce(x)
    with _coalescing_manager(async_ops=True) as manager:
        dist.all_reduce(x, async_op=True)
    manager.wait()
    dist.all_reduce_coalesced([x, x.clone()], async_op=True).wait()


def is_refused(rank: int) -> None:
    with pytest.raises(TypeError):
        dist.all_reduce("no tensor", async_op=True)
    group = dist.new_group([0])
    if rank == 1:
        with pytest.warns(UserWarning, match="not part of|on global rank"):
            dist.all_reduce(torch.ones(1), group=group, async_op=True)


def leaves_it_to_torch(rank: int) -> None:
    """torch's own calls count for none: it may wait for their work in C++."""
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    mean = functional.all_reduce(torch.ones(10), "avg", dist.group.WORLD)
    assert mean.sum() == 10
    model = DistributedDataParallel(nn.Linear(4, 4))
    with model.join():
        for _ in range(1 + rank):
            model(torch.ones(2, 4)).sum().backward()
    hooked = DistributedDataParallel(nn.Linear(4, 4))
    hooked.register_comm_hook(None, allreduce_hook)
    parameters = hooked.parameters()
    zero = ZeroRedundancyOptimizer(parameters, torch.optim.SGD, overlap_with_ddp=False, lr=0.1)
    sharded = fully_shard(nn.Linear(4, 3))
    for each in (hooked, hooked, sharded):
        each(torch.ones(2, 4)).sum().backward()
        zero.step()


def own_hook(rank: int) -> None:
    def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads the annotations
        work = dist.all_reduce(bucket.buffer().div_(3), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model = DistributedDataParallel(nn.Linear(4, 4))
    model.register_comm_hook(None, hook)
    model(torch.ones(2, 4)).sum().backward()


HEALTHY = (
    gathers_apart, waits, waits_elsewhere, needs_no_wait, passes_on, coalesces, is_refused,
    leaves_it_to_torch, own_hook, receives_all, receives_from_anyone,
    changes_in_time, changes_the_inside_meanwhile,
)  # fmt: skip


@pytest.mark.parametrize("body", HEALTHY)
def test_healthy_programs_give_no_warning(body: Body) -> None:
    assert warnings_of(body) == []


@pytest.mark.slow
@pytest.mark.parametrize("body", [waits_elsewhere, needs_no_wait])
def test_nor_do_they_where_ranks_are_new_interpreters(body: Body) -> None:
    assert launch(in_group, (body,), nprocs=3, start_method="spawn").warnings == []


# In a script and in a notebook


@pytest.mark.slow
@pytest.mark.system
def test_a_script_is_warned_in_its_record(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import atexit, torch\n"
        "import torch.distributed as dist\n"
        "import ddp_lessons\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.ones(1)\n"
        "dist.all_gather([x] * 2, torch.ones(1))\n"
        "atexit.register(dist.all_reduce(x, async_op=True).wait)\n"
        "for _ in range(2): dist.all_reduce(x, async_op=True)\n"
        "dist.barrier()\n"
    )
    code, text = torchrun.run(script, "--nproc-per-node=2", env={"DDP_LESSONS_RECORD": "record"})
    assert code == 0, text
    run = load_run(tmp_path / "record")
    assert [(warning.kind, warning.ranks) for warning in run.warnings] == [
        ("overlapping outputs", (0, 1)),
        ("never waited for", (0, 1)),
    ]
    assert "train.py, line 6" in run.explain()
    assert "never waited for the all_reduce that began at" in run.explain()
    assert "train.py, line 8" in run.explain()


@pytest.mark.slow
@pytest.mark.system
def test_a_cell_is_warned_under_its_output() -> None:
    with Kernel(
        "import torch, torch.distributed as dist\nfrom ddp_lessons import launch"
    ) as kernel:
        cell = kernel.run(
            "def work(rank):\n"
            "    dist.init_process_group('gloo')\n"
            "    print('hello')\n"
            "    dist.all_gather([torch.ones(1)] * 2, torch.ones(1))\n"
            "    dist.destroy_process_group()\n"
            "launch(work);"
        )
    said, _, warning = ANSI.sub("", cell.stdout).partition("Warning: ")
    assert said.splitlines() == ["[rank 0] hello", "[rank 1] hello"]
    assert warning.startswith("ranks 0 and 1 passed all_gather a list")
    assert "Cell In[2], line 4" in " ".join(warning.split())  # lines are broken between words
