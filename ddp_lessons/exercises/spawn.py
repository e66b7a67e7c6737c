"""The checks of lesson 01: global ranks, and a launcher for one process or many."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly

SHAPES = ((3, 2), (2, 3), (4, 1), (1, 4))  # (nprocs, nnodes)


@exercise(
    "How many ranks stand on the machines before this one?",
    "group_rank machines come before this one, each with nprocs ranks.",
)
def check_global_rank(global_rank: Callable[[int, int, int], int]) -> str:
    """Check `global_rank(group_rank, local_rank, nprocs)` against RANK on real ranks."""

    def compare(_: int) -> tuple[int, int, Any]:
        group, local, nprocs = (
            int(os.environ[name]) for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        return group, local, global_rank(group, local, nprocs)

    for nprocs, nnodes in SHAPES:
        run = run_quietly(compare, nprocs=nprocs, nnodes=nnodes)
        run.raise_for_failure()
        _judge_ranks(nprocs, nnodes, run.values)
    return "right on every rank of 2 machines with 3 ranks, 3 with 2, 1 with 4 and 4 with 1."


def _judge_ranks(nprocs: int, nnodes: int, values: list[tuple[int, int, Any]]) -> None:
    where = f"on {nnodes} machines with {nprocs} ranks each"
    answers = [answer for _, _, answer in values]
    if answers == list(range(nprocs * nnodes)):
        return
    rank = next(r for r, answer in enumerate(answers) if answer != r)
    group, local, answer = values[rank]
    this = f"machine {group}, local rank {local}"
    if not isinstance(answer, int):
        raise Wrong(
            f"{where}, {this} got {answer!r}, which is no whole number.",
            "The function must return a number: is `return` missing, or is it a text?",
        )
    twins = [r for r, other in enumerate(answers) if other == answer and r != rank]
    if twins:
        other_group, other_local, _ = values[twins[0]]
        raise Wrong(
            f"{where}, two ranks call themselves {answer!r}: {this}, and machine {other_group}, "
            f"local rank {other_local}.",
            "The local rank starts at 0 on every machine; it only chooses the device. The global "
            "rank must be different for every process of the job.",
        )
    raise Wrong(
        f"{where}, {this} should be rank {rank}; it calls itself {answer!r}.",
        "Ranks are counted machine by machine: all ranks of machine 0 first, then those of "
        "machine 1. The stride between machines is the number of ranks on one.",
    )


def _probe(rank: int) -> tuple[int, int]:
    return rank, os.getpid()


@exercise(
    "With one process there is nothing to start: call the function yourself. What is its rank?",
    "`[fn(0)]` for one process, `launch(fn, nprocs=nprocs).values` for more.",
)
def check_run_job(run_job: Callable[[Callable[[int], Any], int], list[Any]]) -> str:
    """Check that `run_job(fn, nprocs)` calls one process plainly, launches more, lists values."""
    here = os.getpid()
    for nprocs in (1, 3):
        result = call(run_job, _probe, nprocs, because="It must work for one process and for many.")
        if result is None:
            raise Wrong(
                f"run_job(fn, {nprocs}) returned None.",
                "Is `return` missing? (`mp.spawn` and a plain call of a worker give back nothing "
                "by themselves; `launch(...).values` is the list of what the ranks returned.)",
            )
        if not isinstance(result, list) or len(result) != nprocs:
            raise Wrong(
                f"run_job(fn, {nprocs}) gave {result!r}; expected a list of {nprocs} values.",
                "What uses the result should not need to know how many processes there were: "
                "one process gives a list of one value.",
            )
        ranks, pids = zip(*result, strict=True)
        if list(ranks) != list(range(nprocs)):
            raise Wrong(
                f"with nprocs={nprocs}, fn was called with {', '.join(map(str, ranks))} as rank.",
                "fn's first argument is its rank, 0 to nprocs - 1; a single process is rank 0.",
            )
        _judge_processes(nprocs, [pid == here for pid in pids], len(set(pids)))
    return "one process: called in the notebook itself; three: launched, values by rank."


def _judge_processes(nprocs: int, is_here: list[bool], distinct: int) -> None:
    if nprocs == 1 and not is_here[0]:
        raise Wrong(
            "with nprocs=1 a process was started.",
            "One process is the one you have. Starting another costs time, and a debugger or a "
            "print in the notebook no longer sees the function.",
        )
    if nprocs > 1 and (any(is_here) or distinct < nprocs):
        raise Wrong(
            f"with nprocs={nprocs}, the function ran in {distinct} process(es), "
            f"{sum(is_here)} of the calls in the notebook's own.",
            "Calling a function N times in a loop is not N ranks: they would never run at the same "
            "time, and the first collective would wait for ever.",
        )
