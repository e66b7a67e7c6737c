"""All that needs a GPU; `benchmarks/gpu.sh` runs it on any machine that has one, without Jupyter.

Most need one GPU, on which NCCL's world is one rank and gloo's ranks share it; the others need two.
Without any, all are skipped. `needs_two` says which need more.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch, span, syncbn, watch_ddp
from ddp_lessons.instrumentation import recording
from ddp_lessons.wire.records import Span

cloudpickle.register_pickle_by_value(sys.modules[__name__])

GPUS = torch.cuda.device_count()  # through NVML: it initialises nothing
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

SLACK = 1_000_000  # ns by which the clocks of host and device may be apart
STEPS = 20
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def join(backend: str) -> torch.device:
    """Join on a GPU: this rank's own where there are enough, else one that is shared."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group(backend)
    return device


def keep_busy(device: torch.device) -> None:
    """Put work of some 50 ms or more into the current stream; returns at once."""
    x = torch.ones(4096, 4096, device=device)
    for _ in range(40):
        x = x @ x / 4096


def lane(run: Run, rank: int, name: str) -> list[Span]:
    return [s for s in run.ranks[rank].spans if s.lane == name]


def t1(span: Span) -> int:
    assert span.t1_ns is not None, span
    return span.t1_ns


# Starting


def uses_cuda(rank: int) -> tuple[bool, bool, float]:
    before = torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()
    return *before, torch.full((10,), 1.0 + rank, device="cuda").sum().item()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_ranks_start_without_cuda_and_can_use_it(method: str) -> None:
    run = launch(uses_cuda, start_method=method)
    assert run.values == [(False, False, 10.0), (False, False, 20.0)]


USES_CUDA_THEN_LAUNCHES = """
import os, torch, torch.distributed as dist
from ddp_lessons import launch
x = torch.ones(3, device="cuda")
def work(rank):
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    y = torch.ones(3, device="cuda")
    dist.all_reduce(y)
    dist.destroy_process_group()
    return y.sum().item()
print(launch(work, nprocs=2).values, x.sum().item())
"""


def test_launching_works_after_a_script_has_used_cuda() -> None:
    done = subprocess.run(
        [sys.executable, "-c", USES_CUDA_THEN_LAUNCHES], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[6.0, 6.0] 3.0\n", done.stderr


def test_launching_works_after_the_kernel_has_used_cuda() -> None:
    pytest.importorskip("jupyter_client")
    from tests.support.kernels import Kernel

    with Kernel() as k:
        cell = k.run(USES_CUDA_THEN_LAUNCHES)
        assert not cell.error, cell.error
        assert cell.stdout == "[6.0, 6.0] 3.0\n"


def test_recommending_a_backend_does_not_initialise_cuda() -> None:
    """A process that forks after cuInit cannot use CUDA in the child."""
    code = (
        "import os, torch\nfrom ddp_lessons import recommend_backend\n"
        f"assert recommend_backend({GPUS}) == 'nccl'\n"
        f"assert recommend_backend({GPUS + 1}) == 'gloo'\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(torch.cuda._is_in_bad_fork())\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_visible_devices_hold_if_they_are_set_in_time() -> None:
    def work(rank: int) -> int:
        if rank == 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return int(torch.cuda.device_count())

    assert launch(work).values == [GPUS, 0]
    assert launch(work, nprocs=1, env={"CUDA_VISIBLE_DEVICES": ""}).values == [0]


def test_visible_devices_set_too_late_have_no_effect() -> None:
    """Though `torch.cuda.device_count()` may answer 0 then (torch 2.11)."""

    def work(rank: int) -> float:
        x = torch.ones(1, device="cuda")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return float((x + torch.ones(1, device="cuda")).item())

    assert launch(work, nprocs=1).values == [2.0]


# Backends


def adds_up(rank: int, backend: str) -> list[float]:
    device = join(backend)
    x = torch.full((1000,), float(rank), device=device)
    dist.all_reduce(x)
    parts = [torch.empty(1, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.full((1,), float(rank), device=device))
    y = torch.full((1,), float(rank + 5), device=device)
    dist.broadcast(y, src=0)
    dist.barrier()
    dist.destroy_process_group()
    return [x.mean().item(), *(part.item() for part in parts), y.item()]


@pytest.mark.parametrize(("backend", "ranks"), [("nccl", GPUS), ("gloo", 2 * GPUS)])
def test_collectives(backend: str, ranks: int) -> None:
    run = launch(adds_up, args=(backend,), nprocs=ranks)
    assert run.values == [[float(sum(range(ranks))), *map(float, range(ranks)), 5.0]] * ranks


def test_nccl_on_a_shared_gpu_is_refused_and_the_next_launch_works() -> None:
    began = time.monotonic()
    run = launch(adds_up, args=("nccl",), nprocs=GPUS + 1, check=False)
    assert time.monotonic() - began < 30  # it does not hang
    assert f"{GPUS + 1} ranks would share {GPUS} GPU" in run.explain()
    assert launch(adds_up, args=("nccl",), nprocs=GPUS).ok


@needs_two
def test_a_forgotten_set_device_is_explained() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("nccl")
        dist.all_reduce(torch.ones(1, device="cuda"))

    text = launch(work, check=False).explain()
    assert "torch.cuda.set_device" in text


# Times of the device


def calls_while_busy(rank: int, asynchronous: bool) -> None:
    device = join("nccl")
    x = torch.ones(1_000_000, device=device)
    dist.all_reduce(x)  # the first one makes the communicator
    torch.cuda.synchronize()
    for _ in range(5):
        keep_busy(device)
        work = dist.all_reduce(x, async_op=asynchronous)
        if asynchronous:
            work.wait()
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_collectives_of_nccl_have_times_of_the_device(asynchronous: bool) -> None:
    run = launch(calls_while_busy, args=(asynchronous,), nprocs=GPUS)
    for rank in run.ranks:
        flights = lane(run, rank.rank, "cuda")
        issues = [s for s in rank.spans if s.kind == "issue"]
        assert [(s.op, s.group, s.seq) for s in flights] == [
            ("all_reduce", "world", n) for n in range(6)
        ]
        assert len(issues) == 6
        for issue, flight in zip(issues, flights, strict=True):
            assert flight.t0_ns < t1(flight) <= rank.ended_ns + SLACK
            assert flight.t0_ns >= issue.t0_ns - SLACK
        for flight, later in itertools.pairwise(flights):
            assert t1(flight) <= later.t0_ns + SLACK
        # The last calls had returned long before the device came to them.
        assert t1(flights[-1]) > t1(issues[-1]) + 10_000_000


def test_the_clock_of_the_device_does_not_run_away() -> None:
    """After two seconds a span must still lie between two readings of the host's clock."""

    def work(rank: int) -> tuple[int, int]:
        device = join("nccl")
        x = torch.ones(1000, device=device)
        dist.all_reduce(x)
        time.sleep(2)
        torch.cuda.synchronize()
        before_ns = time.perf_counter_ns()
        dist.all_reduce(x)
        torch.cuda.synchronize()
        after_ns = time.perf_counter_ns()
        dist.destroy_process_group()
        return before_ns, after_ns

    run = launch(work, nprocs=1)
    before_ns, after_ns = run.values[0]
    last = lane(run, 0, "cuda")[-1]
    assert before_ns - SLACK <= last.t0_ns <= t1(last) <= after_ns + SLACK


@needs_two
def test_sends_and_batches() -> None:
    def work(rank: int) -> list[float]:
        device = join("nccl")
        size = dist.get_world_size()
        x = torch.full((10,), float(rank), device=device)
        y = torch.zeros(10, device=device)
        ops = [
            dist.P2POp(dist.isend, x, (rank + 1) % size),
            dist.P2POp(dist.irecv, y, (rank - 1) % size),
        ]
        for handle in dist.batch_isend_irecv(ops):
            handle.wait()
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return list(y[:1].tolist())

    run = launch(work, nprocs=GPUS)
    assert run.values == [[float((rank - 1) % GPUS)] for rank in range(GPUS)]
    assert [s.op for s in lane(run, 0, "cuda")] == ["isend", "irecv"]
    assert all(s.t1_ns is not None for s in lane(run, 0, "cuda"))


@needs_two
def test_what_nccl_does_as_a_group_of_calls() -> None:
    """Its handle has no future to ask."""

    def work(rank: int) -> list[int]:
        device = join("nccl")
        unequal = [torch.zeros(1 + r, device=device) for r in range(2)]
        dist.all_gather(unequal, torch.ones(1 + rank, device=device), async_op=True).wait()
        handle: Any = (
            dist.isend(unequal[0], 1) if rank == 0 else dist.irecv(torch.zeros(1, device=device), 0)
        )
        handle.wait()
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return [int(part.sum().item()) for part in unequal]

    run = launch(work, nprocs=2)
    assert run.values == [[1, 2], [1, 2]]
    assert [s.op for s in lane(run, 0, "cuda")] == ["all_gather", "isend"]
    assert all(s.t1_ns is not None for s in lane(run, 0, "cuda"))


@needs_two
def test_who_waits_for_whom_is_seen_on_the_device() -> None:
    def work(rank: int) -> None:
        device = join("nccl")
        x = torch.ones(1000, device=device)
        dist.all_reduce(x)
        for _ in range(10):
            torch.cuda.synchronize()
            if rank == 1:
                time.sleep(0.05)
            dist.all_reduce(x)
        torch.cuda.synchronize()
        dist.destroy_process_group()

    run = launch(work, nprocs=2)
    mine = [share for share in run.waits() if share.rank == 0 and share.seq > 0]
    assert {share.last_rank for share in mine} == {1}
    assert all(share.wait_ns > 30_000_000 for share in mine)


@needs_two
def test_what_hangs_on_the_device_is_open_in_the_span_buffer() -> None:
    def work(rank: int) -> None:
        device = join("nccl")
        x = torch.ones(1000, device=device)
        dist.all_reduce(x)
        if rank == 0:
            dist.all_reduce(x)
        torch.cuda.synchronize()
        while rank == 1:
            time.sleep(0.1)

    run = launch(work, timeout=5, check=False)
    assert "rank 0 has not finished on its GPU: all_reduce" in run.explain()
    assert [s.t1_ns is None for s in lane(run, 0, "cuda")] == [False, True]
    assert [s.t1_ns is None for s in lane(run, 1, "cuda")] == [False]


@pytest.mark.parametrize("attempt", range(3))
def test_an_error_of_the_device_is_the_one_that_is_reported(attempt: int) -> None:
    """By Python, or by NCCL's watchdog, which then ends the process: whichever sees it first."""

    def work(rank: int) -> None:
        device = join("nccl")
        x = torch.zeros(2, device=device)
        dist.all_reduce(x)
        x[torch.tensor([5], device=device)] += 1
        torch.cuda.synchronize()

    run = launch(work, nprocs=1, check=False)
    text = run.explain()
    print(text)
    assert "device-side assert" in text
    assert "index out of bounds" in text
    assert "CUDA_LAUNCH_BLOCKING" in text
    assert ("torch.cuda.synchronize()" if run.ranks[0].error else "dist.all_reduce(x)") in text
    assert "frame #" not in text  # of C++


def test_an_error_of_the_device_without_a_group_is_a_learners() -> None:
    def work(rank: int) -> None:
        x = torch.zeros(2, device="cuda")
        x[torch.tensor([5], device="cuda")] += 1
        torch.cuda.synchronize()

    text = launch(work, nprocs=1, check=False).explain()
    assert "device-side assert" in text
    assert "torch.cuda.synchronize()" in text
    assert "CUDA_LAUNCH_BLOCKING" in text


def test_cpu_tensors_of_a_mixed_group_have_no_times_of_the_device() -> None:
    def work(rank: int) -> None:
        join("cpu:gloo,cuda:nccl")
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        dist.destroy_process_group()

    run = launch(work, nprocs=GPUS)
    assert [s.seq for s in lane(run, 0, "cuda")] == [1]
    assert [s.kind for s in run.ranks[0].spans if s.seq == 0] == ["comm"]


# DDP


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.Tanh())]
    return nn.Sequential(*layers)


def train(
    rank: int, backend: str, recorded: bool, options: dict[str, Any], how: str = ""
) -> Tensor:
    """The weights after some steps; without `recorded`, as without this package."""
    if not recorded:
        recording.use(None)
    device = join(backend)
    torch.use_deterministic_algorithms(True)
    model = DistributedDataParallel(network().to(device), bucket_cap_mb=0.3, **options)
    hook = default_hooks.fp16_compress_hook if how.startswith("fp16") else None
    if how == "fp16, watched":
        watch_ddp(model, hook)
    elif hook is not None:
        model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=how != "views kept")
        with span("backward"):
            model(torch.randn(8, 256, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
    torch.cuda.synchronize()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
    dist.destroy_process_group()
    return weights


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, ""),
        ({"find_unused_parameters": True}, ""),
        ({"gradient_as_bucket_view": True}, "views kept"),
        ({"static_graph": True}, ""),
        ({}, "fp16, watched"),
        ({}, "fp16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize(
    ("backend", "ranks"), [("nccl", GPUS), ("gloo", GPUS + 1), ("cpu:gloo,cuda:nccl", GPUS)]
)
def test_recording_ddp_changes_no_weight_and_shows_all_buckets(
    backend: str, ranks: int, options: dict[str, Any], how: str
) -> None:
    plain, recorded = (
        launch(train, args=(backend, is_recorded, options, how), nprocs=ranks, env=DETERMINISTIC)
        for is_recorded in (False, True)
    )
    for mine, theirs in zip(plain.values, recorded.values, strict=True):
        assert torch.equal(mine, theirs)
    assert recorded.unseen == []
    for rank in range(ranks):
        sent = [s for s in recorded.ranks[rank].spans if s.kind == "comm" and s.op == "all_reduce"]
        assert {s.step for s in sent} >= set(range(STEPS))
        assert all(s.t0_ns < t1(s) for s in sent)
        if how == "fp16":  # a hook that is not watched, whose calls are public ones
            continue
        buckets = lane(recorded, rank, "buckets")
        numbers = {s.bucket for s in buckets}
        assert len(numbers) > 1
        assert len(buckets) >= STEPS * (len(numbers) - 1)
        assert {s.step for s in buckets} == set(range(STEPS))
    assert all(o.comm_ns > 0 for o in recorded.overlap() if o.step is not None)
    if backend != "gloo":  # the host never waits for them
        assert not any(s.name == "wait for buckets" for s in recorded.spans())


def with_buffers(rank: int) -> None:
    device = join("nccl")
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)).to(device)
    model = DistributedDataParallel(net, device_ids=[device.index], bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 64, device=device)).sum().backward()
        optimizer.step()
    dist.destroy_process_group()


def test_an_ordinary_training_loop_over_nccl_is_on_the_record() -> None:
    run = launch(with_buffers, nprocs=GPUS)
    assert run.unseen == []
    spans = [s for s in run.ranks[0].spans if s.kind == "comm" and s.seq is not None]
    by_step = {n: [s.name for s in spans if s.step == n] for n in range(3)}
    sent = ["broadcast", "bucket 0"]
    assert sorted(by_step[0]) == sorted(["DistributedDataParallel", "broadcast", *sent])
    assert sorted(by_step[1]) == sorted(["broadcast", "broadcast", *sent, "bucket 1"])
    assert sorted(by_step[2]) == sorted([*sent, "bucket 1"])
    assert [s.seq for s in sorted(spans, key=lambda s: s.seq or 0)] == list(range(len(spans)))
    assert {s.lane for s in spans if s.name == "broadcast"} == {"cuda"}
    assert all(s.t1_ns is not None for s in spans)


@needs_two
def test_a_rank_that_is_late_for_ddp_over_nccl_is_found() -> None:
    def work(rank: int) -> None:
        device = join("nccl")
        model = DistributedDataParallel(network().to(device), device_ids=[device.index])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            torch.cuda.synchronize()
            if rank == 1:
                time.sleep(0.05)
            model(torch.randn(8, 256, device=device)).sum().backward()
            optimizer.step()
        torch.cuda.synchronize()
        dist.destroy_process_group()

    late = launch(work, nprocs=2).straggler()
    assert (late.kind, late.rank) == ("chronic", 1)


def captured(rank: int) -> list[float]:
    """What replaying a captured step of DDP gives, and a captured asynchronous all_reduce."""
    device = join("nccl")
    x, target = torch.randn(8, 256, device=device), torch.ones(10, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model = DistributedDataParallel(network().to(device), bucket_cap_mb=0.3)
        for _ in range(11):  # DDP wants so many before
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
        dist.all_reduce(target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model(x).square().mean()
        loss.backward()
        dist.all_reduce(target, async_op=True).wait()
        dist.all_reduce(target)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    norm = sum(p.grad.square().sum().item() for p in model.parameters())
    value = loss.item()
    del graph
    dist.destroy_process_group()
    return [value, norm]


def test_a_step_of_ddp_can_be_captured_in_a_cuda_graph() -> None:
    run = launch(captured, nprocs=GPUS)
    assert run.ok, run.explain()
    assert all(value > 0 for value in run.values[0])


# Batch norm


def batch(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4 + rank, 3, 5, 5, generator=generator) * (1 + rank) + 10 * rank


def normalised(rank: int, kind: str, backend: str = "gloo") -> list[Tensor]:
    """Output, gradient of the input and of the weight, running mean and variance."""
    device = join(backend)
    layer: Any = nn.SyncBatchNorm(3) if kind == "torch" else syncbn.SyncBatchNorm(3)
    layer = layer if kind == "ours on the CPU" else layer.to(device)
    x = batch(rank).to(layer.weight.device).requires_grad_()
    if kind == "ours on CUDA tensors":
        y, *_ = syncbn._Normalize.apply(x, layer.weight, layer.bias, layer.eps, dist.group.WORLD)
    else:
        y = layer(x)
    y.pow(3).sum().backward()
    dist.destroy_process_group()
    found = [y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var]
    return [tensor.detach().cpu() for tensor in found]


@pytest.mark.parametrize("kind", ["ours on the CPU", "ours on CUDA tensors", "ours"])
def test_syncbn_calculates_as_torchs_own(kind: str) -> None:
    theirs = launch(normalised, args=("torch",), nprocs=2).values
    ours = launch(normalised, args=(kind,), nprocs=2).values
    parts = 3 if kind == "ours on CUDA tensors" else 5  # without the layer nothing is tracked
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine[:parts], other[:parts], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_two
def test_syncbn_over_nccl() -> None:
    gloo, nccl = (launch(normalised, args=("torch", b), nprocs=2) for b in ("gloo", "nccl"))
    for mine, other in zip(gloo.values, nccl.values, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "all_gather_single" in {s.op for s in lane(nccl, 0, "cuda")}


def test_converting_takes_torchs_own_on_a_gpu() -> None:
    def work(rank: int) -> list[str]:
        device = join("gloo")
        model = nn.Sequential(nn.BatchNorm1d(2).to(device), nn.BatchNorm1d(2))
        model = syncbn.convert_sync_batchnorm(model)
        moved = model[1].to(device)(torch.randn(4, 2, device=device)).device.type
        dist.destroy_process_group()
        return [type(layer).__module__.partition(".")[0] for layer in model] + [moved]

    run = launch(work)
    assert run.values == [["torch", "ddp_lessons", "cuda"]] * 2


# The profiler


@needs_two
def test_the_profiler_sees_the_kernels_of_nccl() -> None:
    run = launch(calls_while_busy, args=(False,), nprocs=2, profile=True)
    for rank in (0, 1):
        kernels = lane(run, rank, "nccl")
        flights = lane(run, rank, "cuda")
        assert len(kernels) == len(flights) == 6
        assert all(s.op is not None and s.op.startswith("nccl") for s in kernels)
        for kernel, flight in zip(kernels, flights, strict=True):
            assert flight.t0_ns - SLACK <= kernel.t0_ns <= t1(kernel) <= t1(flight) + SLACK
    assert len([row for row in run.overlap() if row.rank == 0]) == 1


def test_profiling_on_a_gpu_works_with_one_rank() -> None:
    run = launch(calls_while_busy, args=(False,), nprocs=1, profile=True)
    assert len(lane(run, 0, "cuda")) == 6  # of the events; one rank has nothing to send
