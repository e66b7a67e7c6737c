"""A rank catches an exception that the others do not get, and leaves out a call: it is told.

Before Python 3.12 nothing is told of what a rank caught. There each test first sees what is said
instead, and then fills in what a later Python tells, which tests/instrumentation/test_caught.py
checks on one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch
from ddp_lessons.diagnosis import diagnose
from ddp_lessons.wire.records import Caught

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SEES = sys.version_info >= (3, 12)
BAD = 'raise ValueError("bad sample 17")'


class Case(NamedTuple):
    """A program, who caught the exception, and the beginning of the verdict."""

    work: Callable[[int], None]
    kind: str
    culprits: tuple[int, ...] = (1,)
    raised: str = BAD
    error: str = "ValueError: bad sample 17"
    handler: str = "except ValueError"
    passed: str = ""  # the line in the `try`; "" if the same as `raised`
    nprocs: int = 3


def load(rank: int, step: int) -> torch.Tensor:
    if (rank, step) == (1, 2):
        raise ValueError("bad sample 17")
    return torch.ones(1)


def a_sample_is_skipped(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(5):
        try:
            x = load(rank, step)
            dist.all_reduce(x)
        except ValueError:
            print("skipped")
    dist.broadcast(torch.ones(1), 0)


def the_call_is_in_another_function(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(5):
        try:
            x = load(rank, step)
            share(x)
        except ValueError:
            pass
        dist.broadcast(torch.ones(1), 0)


def share(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def the_rank_returns(rank: int) -> None:
    dist.init_process_group("gloo")
    try:
        for step in range(4):
            x = load(rank, step)
            dist.all_reduce(x)
    except ValueError:
        print("stopped")


def it_is_suppressed(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(4):
        with contextlib.suppress(ValueError):
            x = load(rank, step)
            dist.all_reduce(x)
    dist.barrier()


def it_is_suppressed_in_the_else_part(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(4):
        try:
            x = load(rank, step)
        except ValueError:
            print("skipped")
        else:
            dist.all_reduce(x)
    dist.barrier()


def most_ranks_catch(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(4):
        try:
            if rank and step == 2:
                raise ValueError("bad sample 17")
            dist.all_reduce(torch.ones(1))
        except ValueError:
            pass
    dist.barrier()


def out_of_memory_in_ddp(rank: int) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        try:
            if rank == 1 and step == 2:
                raise RuntimeError("out of memory")
            model(torch.randn(8, 4)).mean().backward()
            optimizer.step()
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
        optimizer.zero_grad()
    dist.all_reduce(torch.ones(1))
    dist.barrier()


CASES = [
    Case(a_sample_is_skipped, "skipped collective", passed="x = load(rank, step)"),
    Case(the_call_is_in_another_function, "skipped collective", passed="x = load(rank, step)"),
    Case(the_rank_returns, "returned early", passed="x = load(rank, step)"),
    Case(
        it_is_suppressed,
        "skipped collective",
        handler="with contextlib",
        passed="x = load(rank, step)",
    ),
    Case(it_is_suppressed_in_the_else_part, "skipped collective", passed="x = load(rank, step)"),
    Case(most_ranks_catch, "skipped collective", culprits=(1, 2)),
    Case(
        out_of_memory_in_ddp,
        "skipped collective",
        raised='raise RuntimeError("out of memory")',
        error="RuntimeError: out of memory",
        handler="except RuntimeError",
    ),
]


def site(function: Callable[..., Any], source: str) -> str:
    lines, first = inspect.getsourcelines(function)
    (at,) = [number for number, line in enumerate(lines, first) if source in line]
    return f"{inspect.getsourcefile(function)}:{at}"


def as_told(run: Run, case: Case) -> Run:
    """The run, with what Python 3.12 tells of it."""
    raised_in = case.work if case.raised in inspect.getsource(case.work) else load
    raised, handler = site(raised_in, case.raised), site(case.work, case.handler)
    passed = site(case.work, case.passed) if case.passed else raised
    what = Caught(1, case.error, raised, passed, handler)
    ranks = [
        replace(rank, caught=(what,) if rank.rank in case.culprits else ()) for rank in run.ranks
    ]
    told = copy.copy(run)
    told.ranks = ranks
    told.verdict = diagnose.verdict(told)
    told.error = diagnose.error(told, told.verdict)
    return told


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.work.__name__)
def test_the_exception_is_told_and_its_rank_blamed(case: Case) -> None:
    linecache.checkcache()
    run = launch(case.work, nprocs=case.nprocs, timeout=30, check=False)
    if not SEES:
        if case.handler.startswith("except"):
            assert "Python 3.12 and later would tell what was caught" in run.explain()
        run = as_told(run, case)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == (case.kind, case.culprits)
    who = "ranks 1 and 2" if len(case.culprits) > 1 else "rank 1"
    assert f"{who} caught {case.error}: " in run.explain()
    assert case.raised in run.explain()
    assert "An exception that a rank handles alone" in run.explain()
    assert "would tell" not in run.explain()


def test_what_all_ranks_catch_or_one_catches_elsewhere_is_no_evidence() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(4):
            try:
                raise KeyError("label")
            except KeyError:
                dist.all_reduce(torch.ones(1))
            with contextlib.suppress(OSError):
                if rank == 0:
                    open("/no such file")
            if rank == 0 and step == 2:
                dist.barrier()
            dist.all_reduce(torch.ones(1))

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("skipped collective", (0,))
    for text in ("KeyError", "FileNotFoundError", "Python 3.12"):
        assert text not in run.explain()


def test_the_end_of_an_iterator_is_told_as_unequal_steps_are() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        batches = iter(range(3 if rank == 1 else 5))
        try:
            while True:
                next(batches)
                dist.all_reduce(torch.ones(1))
        except StopIteration:
            pass
        dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    if not SEES:
        run = as_told(run, Case(work, "", (1,), "next(batches)", "StopIteration", "except Stop"))
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("skipped collective", (1,))
    assert "rank 1 caught StopIteration: " in run.explain()
    assert "handles alone" not in run.explain()
