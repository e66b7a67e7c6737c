"""The checks of lesson 02: the variables of env://, separate jobs, and waiting times."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ddp_lessons import Run
from ddp_lessons.exercises.framework import Wrong, call, errors, exercise, judge, run_ranks
from ddp_lessons.exercises.numeric_answers import first_miss, predict, wrong_rule

Seconds = Sequence[float]  # by rank

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@exercise(
    "Four variables: who am I, how many are we, and where is the meeting point (two of them)?",
    "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; the values are strings.",
    '`str(rank)`, `str(world_size)` and `str(port)`; and this machine is "127.0.0.1".',
)
def check_environment(environment: Callable[[int, int, int], Mapping[str, str]]) -> str:
    """Check that ranks can join with nothing but `environment(rank, world_size, port)`."""

    def join(rank: int, world_size: int) -> float:
        port = int(os.environ["MASTER_PORT"])
        for name in VARIABLES:
            del os.environ[name]
        os.environ.update(environment(rank, world_size, port))
        dist.init_process_group("gloo", timeout=timedelta(seconds=4))
        seen = torch.ones(1)
        dist.all_reduce(seen)
        dist.destroy_process_group()
        return float(seen.item())

    _judge_variables(environment)
    for world_size in (2, 3, 1):
        run = run_ranks(join, (world_size,), nprocs=world_size, check=False)
        if not run.ok or run.values != [world_size] * world_size:
            _explain_failed_join(run)
    return "2, 3 and 1 ranks joined with your variables alone."


def _explain_failed_join(run: Run) -> None:
    raised = errors(run)
    texts = " ".join(error.text for error in raised)
    first = raised[0].summary if raised else ""
    missing = next((name for name in VARIABLES if f"{name} expected, but not set" in texts), "")
    mistakes = {
        f"init_process_group found no {missing}.\n"
        "env:// reads four variables; torchrun and launch() set all of them for you.": missing,
        f"the variables could not be set: {first}\n"
        "Environment variables are text. Write str(rank), "
        "not rank.": "TypeError" in {error.type_name for error in raised},
        f"two ranks both opened the meeting point: {first[:90]}\n"
        "RANK must differ from process to process. Rank 0 opens the meeting point; a second rank 0 "
        "finds the port taken.": "already in use" in texts,
        f"the groups had {run.values} members.\n"
        "WORLD_SIZE is the number of ranks of the whole job, the same on each of them.": run.ok,
        f"the ranks did not find each other: {run.explain().splitlines()[0]}\n"
        "All ranks need the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and each its own RANK "
        "from 0 to WORLD_SIZE - 1. The others wait until the timeout for a rank that never "
        "comes.": True,
    }
    judge(f"with {run.world_size} ranks, ", mistakes)


def _judge_variables(environment: Callable[[int, int, int], Mapping[str, str]]) -> None:
    port = 40_123
    before = dict(os.environ)
    because = (
        "It gets rank, world_size and port, all of them numbers, and must work with nothing else: "
        "the launcher's own variables are taken away."
    )
    try:
        variables = call(environment, 0, 2, port, because=because)
    finally:
        changed = dict(os.environ) != before
        os.environ.clear()
        os.environ.update(before)
    if changed:
        raise Wrong(
            f"environment(0, 2, {port}) changed os.environ.",
            "It must only return the variables; the check sets them on each rank.",
        )
    if not isinstance(variables, Mapping):
        raise Wrong(
            f"environment(0, 2, {port}) returned {variables!r}, not a dict.",
            "It must return the variables, as a dict of names and texts. Is `return` missing?",
        )
    given = variables.get("MASTER_PORT", port)
    if str(given) != str(port):
        raise Wrong(
            f"given port {port}, MASTER_PORT is {given!r}.",
            "A port that is written into the code collides with the next job on this machine. Use "
            "the one that you are given.",
        )


@exercise(
    "Both jobs run on one machine at the same time. What could be theirs alone?",
    "A file named after the job. What must be passed with file://, as with tcp://?",
    '`dist.init_process_group("gloo", f"file://{folder}/{job}", rank=rank, world_size=world_size)`',
)
def check_join(join: Callable[[int, int, str, str], None]) -> str:
    """Check that two concurrent jobs stay apart: `join(rank, world_size, job, folder)`."""

    def work(rank: int, folder: str) -> float:
        number, job_rank = divmod(rank, 2)
        # Rank 0 of one job comes at the same time as rank 1 of the other: do they meet?
        time.sleep((0.0, 0.5, 0.5, 0.0)[rank])
        join(job_rank, 2, "ab"[number], folder)
        total = torch.tensor([float(10**number)])
        dist.all_reduce(total)
        _await_all(rank, 4, folder)  # keeps this job open until the other one has joined, too
        dist.destroy_process_group()
        return float(total.item())

    with tempfile.TemporaryDirectory() as folder:
        run = run_ranks(work, (folder,), nprocs=4, check=False)
    if run.values != [2.0, 2.0, 20.0, 20.0]:
        _explain_collision(run)
    return "two jobs of 2 ranks ran at once, and neither met the other's ranks."


_OWN = ("TypeError", "ValueError", "NameError", "AttributeError", "KeyError", "RuntimeError")


def _explain_collision(run: Run) -> None:
    raised = errors(run)
    texts = " ".join(error.text for error in raised)
    # Errors of the network and of gloo come from ranks that do not meet.
    own = next((e for e in raised if e.type_name in _OWN and "gloo" not in e.text), None)
    mistakes = {
        "the second job found the port taken.\n"
        "A port belongs to one job at a time. A number written into the code collides as soon as "
        "two jobs run on one machine, or a crashed one "
        "still holds it.": "already in use" in texts or "EADDRINUSE" in texts,
        f"the jobs mixed: job a should add up to 2, job b to 20; the sums were {run.values}.\n"
        "All ranks that meet at one place form one group. A file or port that both jobs use is one "
        "place, and so is env:// with the launcher's own variables: give each job a place of its "
        "own.": run.ok,
        "a rank had no process group after join().\n"
        "join() must call dist.init_process_group on every rank, and leave the group to its "
        "caller.": "has not been initialized" in texts,
        f"join() itself failed: {own.summary if own else ''}\n"
        "file:// and tcp:// need rank= and world_size=, and file:// a full path: "
        "f'file://{folder}/{job}'.": own,
        f"the jobs did not come apart: {run.explain().splitlines()[0]}\n"
        "All ranks that meet at one place form one group: give each job a place of its own, and "
        "pass the job's rank and world_size, not those of the launcher.": True,
    }
    judge("", mistakes)


def _await_all(rank: int, world_size: int, folder: str, seconds: float = 4.0) -> None:
    """Wait until all ranks are here, without a process group."""
    there = [os.path.join(folder, f"rank {r} is there") for r in range(world_size)]
    open(there[rank], "w").close()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(os.path.exists, there)):
        time.sleep(0.01)


@exercise(
    "Nobody leaves init_process_group before the last rank has come. When does that one come?",
    "The last rank comes after max(delays) seconds. How long has one that came after d waited?",
    "`max(delays) - d` for each d in delays.",
)
def check_waits(waits: Callable[[Seconds], Seconds]) -> str:
    """Check `waits(delays)`, each rank's seconds in init_process_group, against measured ones."""

    def arrive(rank: int, delays: Sequence[float], folder: str) -> float:
        _await_all(rank, len(delays), folder)  # their delays begin together
        time.sleep(delays[rank])
        began = time.perf_counter()
        dist.init_process_group("gloo")
        waited = time.perf_counter() - began
        dist.destroy_process_group()
        return waited

    because = "It takes a sequence of seconds and returns one number for each."
    for delays in ((0.0, 0.8, 0.3), (0.6, 0.0)):
        answer = predict(waits, delays, len(delays), because)
        with tempfile.TemporaryDirectory() as folder:
            inside = run_ranks(arrive, (delays, folder), nprocs=len(delays)).values
        joining = min(inside)  # what joining takes when nobody is missing, longer under load
        _judge_waits(delays, answer, [seconds - joining for seconds in inside])
    return "your prediction and the measured waits agree."


def _judge_waits(delays: Seconds, answer: Seconds, measured: Seconds) -> None:
    rank = first_miss(answer, measured)
    if rank is None:
        return
    left = [max(delays)] * len(delays)
    rules = {
        " You gave the times at which they come: waiting is from there to the last "
        "arrival.": delays,
        " You gave the time at which all leave: waiting begins when a rank comes.": left,
    }
    raise Wrong(
        f"rank {rank} came after {delays[rank]:g} s and waited about {measured[rank]:.1f} s; you "
        f"said {answer[rank]:g} s.",
        "init_process_group returns when the last rank has arrived: the first rank waits longest, "
        f"the last one hardly at all, and rank 0 is no exception.{wrong_rule(answer, rules)}",
    )
