"""Why a rank keeps the others waiting, found in real trainings with DDP.

What slows rank 1 down is long beside what a busy machine adds to a step.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ddp_lessons import Run, launch, load_run, span, steps
from ddp_lessons.wire import span_buffer
from tests.worker.test_torchrun import record

pytestmark = [pytest.mark.ranks, pytest.mark.alone]

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LATE, STEPS = 1, 8  # of the steps the first two do not count
EXTRA = 0.15  # seconds that rank 1 takes longer in each step
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the processor's time is Linux's")
SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def computes(seconds: float) -> None:
    """Keep the processor busy, or queue for it."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def used(seconds: float) -> None:
    """Use so much of the processor's time, however long it takes."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def train(
    rank: int,
    delay: Callable[[bool], object],
    batches: Any = range(STEPS),
    late: int = LATE,
    *more: nn.Module,
) -> None:
    """Train; before each forward `delay` is called with whether this is the late rank."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), *more))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in batches:
        delay(rank == late)
        model(torch.ones(8, 64)).sum().backward()
        optimizer.step()
    dist.destroy_process_group()


def cause_of(run: Run) -> tuple[str, str | None] | None:
    verdict = run.straggler()
    assert (verdict.kind, verdict.rank) == ("chronic", LATE)
    assert verdict.seconds > (STEPS - 2) * 0.3 * EXTRA
    if verdict.cause is None:
        return None
    assert 0.8 <= verdict.cause.share <= 1
    return verdict.cause.kind, verdict.cause.span


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (2, 1), (3, 0), (3, 1), (4, 1), (4, 3)])
def test_with_buffers_the_rank_that_is_late_for_their_broadcast_is_named(
    ranks: int, late: int
) -> None:
    """The root waits for it, and some ranks have the buffers and wait only in backward."""
    args = (lambda is_late: time.sleep(EXTRA * is_late)), range(STEPS), late, nn.BatchNorm1d(64)
    verdict = launch(train, args, nprocs=ranks).straggler()
    assert (verdict.kind, verdict.rank) == ("chronic", late)
    assert set(verdict.late_by_step.values()) == {late}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_with_buffers_no_rank_is_blamed_if_all_take_equally_long(ranks: int) -> None:
    args = (lambda _: time.sleep(EXTRA)), range(STEPS), LATE, nn.BatchNorm1d(64)
    verdict = launch(train, args, nprocs=ranks).straggler()
    assert verdict.kind in ("none", "take turns")


@ON_LINUX
def test_a_rank_that_sleeps() -> None:
    run = launch(train, (lambda late: time.sleep(EXTRA * late),), nprocs=3)
    assert cause_of(run) == ("blocked", None)
    assert str(run.straggler()).endswith("% of it asleep or blocked")


@ON_LINUX
def test_a_rank_that_waits_for_another_process() -> None:
    def delay(late: bool) -> None:
        if late:
            subprocess.run(["sleep", str(EXTRA)], check=True)

    assert cause_of(launch(train, (delay,))) == ("blocked", None)


@ON_LINUX
def test_a_rank_that_computes_more() -> None:
    run = launch(train, (lambda late: used(0.1 + EXTRA * late),))
    assert cause_of(run) == ("compute", None)


@ON_LINUX
def test_half_asleep_and_half_computing_is_not_known() -> None:
    def delay(late: bool) -> None:
        time.sleep(EXTRA * late)
        computes(EXTRA * late)

    assert cause_of(launch(train, (delay,))) is None


def test_a_rank_in_a_span_of_its_own() -> None:
    def delay(late: bool) -> None:
        with span("prepare"), span("augment"):
            time.sleep(EXTRA * late)

    assert cause_of(launch(train, (delay,), nprocs=3)) == ("span", "augment")


def test_a_rank_that_takes_longer_in_a_span_of_all() -> None:
    def delay(late: bool) -> None:
        with span("augment"):
            used(0.01 + EXTRA * late)

    assert cause_of(launch(train, (delay,))) == ("span", "augment")


class Slow(Dataset[torch.Tensor]):  # type: ignore[misc]
    """Samples of which each takes some time to load."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.ones(1)


@pytest.mark.parametrize("counted", [False, True], ids=["plain", "steps"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_whose_data_loader_is_slow(workers: int, counted: bool) -> None:
    def loads(rank: int) -> None:
        loader = DataLoader(Slow(0.001 + EXTRA * (rank == LATE)), num_workers=workers)
        train(rank, lambda _: None, steps(loader) if counted else loader)

    run = launch(loads)
    assert cause_of(run) == ("input", None)
    assert str(run.straggler()).endswith("% of it fetching batches")
    fetched = [s for s in run.ranks[LATE].spans if s.kind == "data"]
    assert {s.name for s in fetched} == {"next batch" if counted else "DataLoader"}
    assert len(fetched) == STEPS + (not counted)  # the last one finds no more


def test_loaders_within_loaders_count_once() -> None:
    class Nested(Slow):
        def __getitem__(self, index: int) -> torch.Tensor:
            return next(iter(DataLoader(Slow(0.0))))

    def loads(rank: int) -> None:
        assert len(list(DataLoader(Nested(0.0)))) == STEPS

    (rank,) = launch(loads, nprocs=1).ranks
    assert sum(s.kind == "data" for s in rank.spans) == STEPS + 1


@contextlib.contextmanager
def competitors(core: int, number: int) -> Iterator[None]:
    """Processes that keep a core busy."""
    command = [sys.executable, "-c", SPIN, str(core)]
    running = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "in spans"])
@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two processors"
)
def test_a_rank_with_a_fifth_of_a_processor(marked: bool) -> None:
    mine, others = sorted(os.sched_getaffinity(0))[:2]

    def delay(_: bool) -> None:
        with span("work") if marked else contextlib.nullcontext():
            used(0.05)

    def starves(rank: int) -> None:
        os.sched_setaffinity(0, {mine if rank == LATE else others})
        with competitors(mine, 4 * (rank == LATE)):
            train(rank, delay)

    assert cause_of(launch(starves)) == ("starved", None)


def test_nobody_is_late() -> None:
    run = launch(train, (lambda _: time.sleep(EXTRA),), nprocs=3)
    verdict = run.straggler()
    assert verdict.kind == "none"
    assert verdict.cause is None
    assert str(verdict) == "no rank makes the others wait"


def test_a_rank_that_uses_cuda_may_only_look_busy_or_asleep() -> None:
    def on_a_gpu(rank: int, load: bool) -> None:
        torch.cuda._initialized = True  # as once a rank has used its GPU
        train(rank, lambda late: time.sleep(EXTRA * late * (not load)), loader(rank, load))

    def loader(rank: int, load: bool) -> DataLoader[torch.Tensor]:
        return DataLoader(Slow(EXTRA * (rank == LATE) * load))

    assert cause_of(launch(on_a_gpu, (False,))) is None
    assert cause_of(launch(on_a_gpu, (True,))) == ("input", None)


def make_old(tape: Path) -> None:
    """Write it as in format 2: without the processor's time, and so in shorter records."""
    with open(tape, "r+b") as file:
        records, _ = span_buffer.SpanReader(file.fileno(), 0, 0).read()
        start = 1 << 20
        file.truncate(start)  # what is cut off and comes back is zero
        file.seek(start)
        for record in records:
            file.write(struct.pack("=qqqqqiiIIIIIIBBxxi", *record[:4], *record[6:]))
        file.truncate(17_104_896)


SCRIPT = """
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(8):
        time.sleep(0.15 * (rank == 1))
        model(torch.ones(8, 64)).sum().backward()
        optimizer.step()
    dist.destroy_process_group()
"""


@pytest.mark.slow
@ON_LINUX
def test_a_script_under_torchrun_and_its_record_in_the_format_before(tmp_path: Path) -> None:
    code, text = record(tmp_path, SCRIPT)
    assert code == 0, text
    folder = tmp_path / "record"
    assert cause_of(load_run(folder)) == ("blocked", None)
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"version": 3', '"version": 2'))
    for file in folder.glob("*.tape"):
        make_old(file)
    run = load_run(folder)
    assert all(s.cpu_ns is None for s in run.spans())
    assert cause_of(run) is None
    assert "; why is not known" in str(run.straggler())
