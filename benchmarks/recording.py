"""Measures what recording costs, and how well it finds a late rank.

Run it by hand on a quiet machine: `python -m benchmarks.recording`. In one run the same ranks
alternate, call by call or step by step, between recording off and on, for DDP also with torch's own
communication hook; each round is repeated under torch.profiler. Off means torch's own functions, an
unwatched DDP model, and uncounted steps. With `--backend nccl` there are as many ranks as GPUs, and
every call or step ends when the GPU has done it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.tables import machine, table
from ddp_lessons import launch, span, steps
from ddp_lessons.instrumentation import recording

OFF, HOOK, ON, PROFILED = "off", "hook", "on", "profile"
ARMS = (OFF, HOOK, ON, PROFILED)
OFF_BY_ROUND = "off by round"
RANKS = (2, 4)
KILOBYTES = 256
WARM_UP, CALLS, STEPS = 3, 100, 8  # of one round
DELAY, DELAYED_STEPS = 0.03, 42  # seconds, steps; the first two do not count
LATE = 2
QUIET = {"KINETO_LOG_LEVEL": "6"}  # stops the profiler's messages on stderr

NOTES = f"""\
Medians of one rank's calls or steps, in ms. Ratios: each call or step to the one of torch alone
beside it (of the profiler, the medians of {CALLS} calls or {STEPS} steps beside each other); their
median, and in brackets its standard error. DDP: a step of an MLP with 1.9 million parameters on 256
images, or of a CNN with 72,000 on 512, forward and backward marked with `span`. The MLP has little
work for many gradients, which is the worst case. Hook: torch's own hook, `allreduce_hook`.
"""

Figures = dict[str, list[float]]  # ms by arm: of each call or step; under the profiler, by round
Works = dict[str, Callable[[], object]]


@contextlib.contextmanager
def recorded(arm: str) -> Iterator[None]:
    """Record, do not record, or record under the profiler."""
    recorder, wait = recording.current(), dist.Work.wait
    with contextlib.ExitStack() as stack:
        if arm in (OFF, HOOK):
            recording.use(None)
            dist.Work.wait = wait.__wrapped__
        if arm == PROFILED:
            stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        try:
            yield
        finally:
            recording._recorder, dist.Work.wait = recorder, wait


def taken_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began) / 1e6


def take_turns(works: Works, rounds: int, times: int) -> Figures:
    """Run the works alternately, each `times` times in a round."""
    figures: Figures = {arm: [] for arm in (*works, OFF_BY_ROUND)}
    arms = [arm for arm in works if arm != PROFILED]
    for _ in range(WARM_UP):
        for arm in arms:
            works[arm]()
    for turns in range(1, rounds * times + 1):
        arms.append(arms.pop(0))  # another one goes first
        for arm in arms:
            with recorded(arm):
                figures[arm].append(taken_ms(works[arm]))
        if turns % times == 0:
            with recorded(PROFILED):
                turn = [taken_ms(works[PROFILED]) for _ in range(WARM_UP + times)]
            figures[PROFILED].append(statistics.median(turn[WARM_UP:]))
            figures[OFF_BY_ROUND].append(statistics.median(figures[OFF][-times:]))
    return figures


def join(backend: str) -> tuple[torch.device, Callable[[], None]]:
    """Join; return this rank's device, and a function that waits until its work is done."""
    device, finish = torch.device("cpu"), _nothing
    if backend == "nccl":
        device, finish = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.synchronize
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    return device, finish


def _nothing() -> None:
    pass


def all_reduces(rank: int, rounds: int, backend: str) -> Figures:
    device, finish = join(backend)
    tensor = torch.ones(KILOBYTES * 250, device=device)
    off, on = dist.all_reduce.__wrapped__, dist.all_reduce
    works: Works = {arm: lambda: (on(tensor), finish()) for arm in (ON, PROFILED)}
    figures = take_turns({OFF: lambda: (off(tensor), finish()), **works}, rounds, CALLS)
    dist.destroy_process_group()
    return figures


def mlp() -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(768, 768), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 768), nn.ReLU(), *hidden, nn.Linear(768, 10))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)]
    head = [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.MaxPool2d(2), *head)


def ddp_steps(
    rank: int, rounds: int, backend: str, network: Callable[[], nn.Module], batch: int
) -> Figures:
    device, finish = join(backend)
    images = torch.randn(batch, 1, 8, 8, device=device)
    works: Works = {}
    for arm in ARMS:
        with recorded(arm if arm in (OFF, HOOK) else ON):  # DDP remembers how it was made
            model = DistributedDataParallel(network().to(device), bucket_cap_mb=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if arm == HOOK:
            model.register_comm_hook(None, allreduce_hook)
        works[arm] = stepper(model, optimizer, images, finish)
    figures = take_turns(works, rounds, STEPS)
    dist.destroy_process_group()
    return figures


def stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    finish: Callable[[], None],
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        with span("forward"):
            loss = model(images).square().mean()
        with span("backward"):
            loss.backward()
        optimizer.step()
        finish()

    return step


def with_a_late_rank(rank: int) -> tuple[float, float]:
    """Sleep before each all_reduce on the late rank; return the median sleep in ms.

    And how long it takes after each to read the processor's time.
    """
    dist.init_process_group("gloo")
    recorder = recording.current()
    assert recorder is not None
    slept, read = [], []
    for _ in steps(range(DELAYED_STEPS)):
        began = time.perf_counter_ns()
        if rank == LATE:
            time.sleep(DELAY)
        slept.append((time.perf_counter_ns() - began) / 1e6)
        dist.all_reduce(torch.ones(KILOBYTES * 250))
        read.append(taken_ms(lambda: recorder.meter(0, time.perf_counter_ns())))
    dist.destroy_process_group()
    return statistics.median(slept), statistics.median(read)


def cost_rows(
    what: str, numbers: Sequence[int], worker: Callable[..., Figures], *args: Any
) -> list[list[str]]:
    rows = []
    for ranks in numbers:
        figures = launch(worker, args, nprocs=ranks, timeout=300, env=QUIET).values[0]
        medians = [f"{statistics.median(figures[a]):.3f}" if a in figures else "" for a in ARMS]
        ratios = [
            ratio(figures[arm], figures[OFF_BY_ROUND if arm == PROFILED else OFF])
            if arm in figures
            else ""
            for arm in ARMS[1:]
        ]
        rows.append([what, str(ranks), *medians, *ratios])
    return rows


def ratio(figures: list[float], off: list[float]) -> str:
    """The median of the paired ratios, and its standard error: half the 68 % interval."""
    ratios = sorted(a / b for a, b in zip(figures, off, strict=True))
    count, middle = len(ratios), len(ratios) // 2
    reach = max(1, round(count**0.5 / 2))  # places by which the median's position varies
    error = (ratios[min(middle + reach, count - 1)] - ratios[max(middle - reach, 0)]) / 2
    return f"{statistics.median(ratios):.3f} (±{error:.3f})"


def straggler_line() -> str:
    """Lines on how well the delay of one of four ranks, and its cause, are found."""
    run = launch(with_a_late_rank, nprocs=4)
    rows = [row for row in run.waits() if row.step is not None and row.step >= 2]
    found = statistics.median(row.wait_ns / 1e6 for row in rows if row.rank != LATE)
    late = list(run.straggler().late_by_step.values())
    return (
        f"A rank of 4 that sleeps {run.values[LATE][0]:.2f} ms in each step: the others' wait is "
        f"found to be {found:.2f} ms (median), and it is named in {late.count(LATE)} of "
        f"{len(late)} steps; verdict: {run.straggler()}.\n"
        f"The processor's time is read in {run.values[LATE][1] * 1e3:.0f} µs (median)."
    )


def report(rounds: int, backend: str) -> str:
    numbers = RANKS if backend == "gloo" else (torch.cuda.device_count(),)
    where = machine("torch")
    head = [backend, "ranks", *ARMS, *(f"{arm} : off" for arm in ARMS[1:])]
    what = f"all_reduce of {KILOBYTES} kB"
    rows = cost_rows(what, numbers, all_reduces, rounds, backend)
    rows += cost_rows("DDP, CNN", numbers, ddp_steps, rounds, backend, cnn, 512)
    rows += cost_rows("DDP, MLP", numbers, ddp_steps, rounds, backend, mlp, 256)
    lines = [where, table(head, rows), NOTES]
    return "\n".join([*lines, straggler_line()] if backend == "gloo" else lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    arguments = parser.parse_args()
    if arguments.backend == "nccl" and not torch.cuda.device_count():
        print("no GPU: NCCL cannot be measured")
        return
    print(report(arguments.rounds, arguments.backend))


if __name__ == "__main__":
    main()
