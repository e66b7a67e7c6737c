"""The checks of lesson 01: global ranks, and a launcher for one process or many."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ddp_lessons.exercises.framework import call, exercise, judge, run_ranks

SHAPES = ((3, 2), (2, 3), (4, 1), (1, 4))  # (nprocs, nnodes)


@exercise(
    "How many ranks stand on the machines before this one?",
    "group_rank machines come before this one, each with nprocs ranks.",
)
def check_global_rank(global_rank: Callable[[int, int, int], int]) -> str:
    """Check `global_rank(group_rank, local_rank, nprocs)` against RANK on real ranks."""

    def compare(_: int) -> tuple[int, int, Any]:
        names = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        group, local, nprocs = (int(os.environ[name]) for name in names)
        return group, local, global_rank(group, local, nprocs)

    for nprocs, nnodes in SHAPES:
        values = run_ranks(compare, nprocs=nprocs, nnodes=nnodes).values
        _judge_ranks(f"on {nnodes} machines with {nprocs} ranks each, ", values)
    return "right on every rank of 2 machines with 3 ranks, 3 with 2, 1 with 4 and 4 with 1."


def _judge_ranks(where: str, values: list[tuple[int, int, Any]]) -> None:
    places = [f"machine {group}, local rank {local}" for group, local, _ in values]
    answers = [answer for _, _, answer in values]
    rank = next((r for r, answer in enumerate(answers) if answer != r), None)
    if rank is None:
        return
    this, answer = places[rank], answers[rank]
    twin = next((places[r] for r, a in enumerate(answers) if a == answer and r != rank), None)
    mistakes = {
        f"{this} got {answer!r}, which is no whole number.\n"
        "The function must return a number: is "
        "`return` missing, or is it a text?": not isinstance(answer, int),
        f"two ranks call themselves {answer!r}: {this}, and {twin}.\n"
        "The local rank starts at 0 on every machine; it only chooses the device. The global rank "
        "must be different for every process of the job.": twin,
        f"{this} should be rank {rank}; it calls itself {answer!r}.\n"
        "Ranks are counted machine by machine: all ranks of machine 0 first, then those of machine "
        "1. The stride between machines is the number of ranks on one.": True,
    }
    judge(where, mistakes)


def _probe(rank: int) -> tuple[int, int]:
    return rank, os.getpid()


@exercise(
    "With one process there is nothing to start: call the function yourself. What is its rank?",
    "`[fn(0)]` for one process, `launch(fn, nprocs=nprocs).values` for more.",
)
def check_run_job(run_job: Callable[[Callable[[int], Any], int], list[Any]]) -> str:
    """Check that `run_job(fn, nprocs)` calls fn for one rank, launches more, returns a list."""
    for nprocs in (1, 3):
        result = call(run_job, _probe, nprocs, because="It must work for one process and for many.")
        _judge_result(nprocs, result)
    return "one process: called in the notebook itself; three: launched, values by rank."


def _judge_result(nprocs: int, result: Any) -> None:
    mistakes = {
        "returned None.\n"
        "Is `return` missing? (`mp.spawn` and a plain call of a worker give back nothing by "
        "themselves; `launch(...).values` is the list of what the ranks returned.)": result is None,
        f"gave {result!r}; expected a list of {nprocs} values.\n"
        "What uses the result should not need to know how many processes there were: one process "
        "gives a list of one value.": not isinstance(result, list) or len(result) != nprocs,
    }
    judge(f"run_job(fn, {nprocs}) ", mistakes)
    ranks, pids = zip(*result, strict=True)
    processes, here = len(set(pids)), pids.count(os.getpid())
    mistakes = {
        f", fn was called with {', '.join(map(str, ranks))} as rank.\n"
        "fn's first argument is its rank, 0 to nprocs - 1; "
        "a single process is rank 0.": list(ranks) != list(range(nprocs)),
        " a process was started.\n"
        "One process is the one you have. Starting another costs time, and a debugger or a print "
        "in the notebook no longer sees the function.": nprocs == 1 and not here,
        f", the function ran in {processes} process(es), {here} of the calls in the notebook's "
        "own.\n"
        "Calling a function N times in a loop is not N ranks: they would never run at the same "
        "time, and the first collective would "
        "wait forever.": nprocs > 1 and (here > 0 or processes < nprocs),
    }
    judge(f"with nprocs={nprocs}", mistakes)
