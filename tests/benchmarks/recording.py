"""What recording costs, and how well it finds a late rank.

Run by hand, on a quiet machine: `python -m tests.benchmarks.recording`. In one run the same ranks
take turns: recording off, on, and on under torch.profiler; every second round in reverse. Off means
torch's own functions, a DDP model that is not watched, and nobody who counts steps.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from ddp_lessons import launch, recording, span, steps, watch_ddp
from tests.benchmarks.tables import machine, table

OFF, ON, PROFILED = "off", "on", "profile"
ARMS = (OFF, ON, PROFILED)
RANKS = (2, 4)
KILOBYTES = 256
WARM_UP, CALLS, STEPS = 3, 40, 8  # of one turn
DELAY, DELAYED_STEPS = 0.03, 42  # seconds; the first two steps do not count
LATE = 2
QUIET = {"KINETO_LOG_LEVEL": "6"}  # else the profiler prints on stderr what it does

NOTES = f"""\
Medians of one rank's turns, in ms; a turn's figure is the median of its {CALLS} calls or {STEPS}
steps. Ratios: the median over the rounds of the turns' ratios, with quartiles. DDP: a step of an
MLP with 1.9 million parameters on 256 images, or of a CNN with 72,000 on 512, forward and backward
marked with `span`. The MLP has little work for many gradients, which is the worst case.
"""

Figures = dict[str, list[float]]  # by arm: ms of each round


def order(round_: int) -> Iterator[str]:
    return iter(ARMS if round_ % 2 else reversed(ARMS))


@contextlib.contextmanager
def recorded(arm: str) -> Iterator[None]:
    """Record, or not, or record under the profiler as well."""
    recorder = recording.current()
    with contextlib.ExitStack() as stack:
        if arm == OFF:
            recording._recorder = None
        if arm == PROFILED:
            stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        try:
            yield
        finally:
            recording._recorder = recorder


def median_ms(work: Callable[[], object], times: int) -> float:
    taken = []
    for number in range(WARM_UP + times):
        began = time.perf_counter_ns()
        work()
        if number >= WARM_UP:
            taken.append((time.perf_counter_ns() - began) / 1e6)
    return statistics.median(taken)


def all_reduces(rank: int, rounds: int) -> Figures:
    dist.init_process_group("gloo")
    tensor = torch.ones(KILOBYTES * 250)
    figures: Figures = {arm: [] for arm in ARMS}
    for round_ in range(rounds):
        for arm in order(round_):
            with recorded(arm):
                function = dist.all_reduce.__wrapped__ if arm == OFF else dist.all_reduce
                figures[arm].append(median_ms(lambda: function(tensor), CALLS))  # noqa: B023
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


def ddp_steps(rank: int, rounds: int, network: Callable[[], nn.Module], batch: int) -> Figures:
    dist.init_process_group("gloo")
    images = torch.randn(batch, 1, 8, 8)
    steppers = {}
    for arm in ARMS:
        model = DistributedDataParallel(network(), bucket_cap_mb=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        steppers[arm] = stepper(watch_ddp(model) if arm != OFF else model, optimizer, images)
    figures: Figures = {arm: [] for arm in ARMS}
    for round_ in range(rounds):
        for arm in order(round_):
            with recorded(arm):
                figures[arm].append(median_ms(steppers[arm], STEPS))
    dist.destroy_process_group()
    return figures


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        with span("forward"):
            loss = model(images).square().mean()
        with span("backward"):
            loss.backward()
        optimizer.step()

    return step


def with_a_late_rank(rank: int) -> float:
    """Sleep before each all_reduce on the late rank; the median of how long it slept, in ms."""
    dist.init_process_group("gloo")
    slept = []
    for _ in steps(range(DELAYED_STEPS)):
        began = time.perf_counter_ns()
        if rank == LATE:
            time.sleep(DELAY)
        slept.append((time.perf_counter_ns() - began) / 1e6)
        dist.all_reduce(torch.ones(KILOBYTES * 250))
    dist.destroy_process_group()
    return statistics.median(slept)


def cost_rows(what: str, worker: Callable[..., Figures], *args: Any) -> list[list[str]]:
    rows = []
    for ranks in RANKS:
        figures = launch(worker, args, nprocs=ranks, timeout=300, env=QUIET).values[0]
        medians = [f"{statistics.median(figures[arm]):.2f}" for arm in ARMS]
        ratios = [ratio(figures, arm) for arm in (ON, PROFILED)]
        rows.append([what, str(ranks), *medians, *ratios])
    return rows


def ratio(figures: Figures, arm: str) -> str:
    ratios = [a / b for a, b in zip(figures[arm], figures[OFF], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def straggler_line() -> str:
    """How well a delay of one of four ranks is found."""
    run = launch(with_a_late_rank, nprocs=4)
    rows = [row for row in run.waits() if row.step is not None and row.step >= 2]
    found = statistics.median(row.wait_ns / 1e6 for row in rows if row.rank != LATE)
    late = list(run.straggler().late_by_step.values())
    return (
        f"A rank of 4 that sleeps {run.values[LATE]:.2f} ms in each step: the others' wait is "
        f"found to be {found:.2f} ms (median), and it is named in {late.count(LATE)} of "
        f"{len(late)} steps; verdict: {run.straggler().kind}, rank {run.straggler().rank}."
    )


def report(rounds: int) -> str:
    head = ["", "ranks", "off", "on", "profile", "on : off", "profile : off"]
    rows = cost_rows(f"all_reduce of {KILOBYTES} kB", all_reduces, rounds)
    rows += cost_rows("DDP, CNN", ddp_steps, rounds, cnn, 512)
    rows += cost_rows("DDP, MLP", ddp_steps, rounds, mlp, 256)
    return "\n".join([machine("torch"), table(head, rows), NOTES, straggler_line()])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    print(report(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
