"""The checks of lesson 02: the variables of env://, jobs that do not collide, and the wait."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.results import RankResult, Run

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TOLERANCE = 0.15  # seconds


@exercise(
    "Four variables: who am I, how many are we, and where is the meeting point (two of them)?",
    "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; the values are strings.",
)
def check_environment(environment: Callable[[int, int, int], Mapping[str, str]]) -> str:
    """Check that ranks can join with nothing but `environment(rank, world_size, port)`."""

    def join(rank: int, world_size: int) -> float:
        import torch
        import torch.distributed as dist

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
        run = run_quietly(join, (world_size,), nprocs=world_size)
        if not run.ok or run.values != [world_size] * world_size:
            raise _why_not_joined(run)
    return "2, 3 and 1 ranks joined with your variables alone."


def _judge_variables(environment: Callable[[int, int, int], Mapping[str, str]]) -> None:
    port = 40_123
    try:
        variables = environment(0, 2, port)
    except KeyError as error:
        raise Wrong(
            f"environment(0, 2, {port}) looked for {error}, which is not set.",
            "The check takes the launcher's variables away: compute yours from the arguments.",
        ) from error
    if not isinstance(variables, Mapping):
        raise Wrong(
            f"environment(0, 2, {port}) returned {variables!r}, not a dict.",
            "It must return the variables, as a dict of names and texts.",
        )
    if str(variables.get("MASTER_PORT", port)) != str(port):
        raise Wrong(
            f"given port {port}, MASTER_PORT is {variables['MASTER_PORT']!r}.",
            "A port that is written into the code collides with the next job on this machine. Use "
            "the one that you are given.",
        )


def _why_not_joined(run: Run) -> Wrong:
    errors = [rank.error for rank in run.ranks if rank.error is not None]
    texts = " ".join(error.text for error in errors)
    with_ranks = f"with {run.world_size} ranks"
    missing = [name for name in VARIABLES if f"{name} expected, but not set" in texts]
    if missing:
        return Wrong(
            f"{with_ranks}, init_process_group found no {missing[0]}.",
            "env:// reads four variables; torchrun and launch() set all of them for you.",
        )
    if any(error.type_name == "TypeError" for error in errors):
        return Wrong(
            f"{with_ranks}, the variables could not be set: {errors[0].summary}",
            "Environment variables are text. Write str(rank), not rank.",
        )
    if any("already in use" in error.text for error in errors):
        return Wrong(
            f"{with_ranks}, two ranks both opened the meeting point: {errors[0].summary[:90]}",
            "RANK must differ from process to process. Rank 0 opens the meeting point; a second "
            "rank 0 finds the port taken.",
        )
    if run.ok:
        return Wrong(
            f"{with_ranks}, the groups had {run.values} members.",
            "WORLD_SIZE is the number of ranks of the whole job, the same on each of them.",
        )
    return Wrong(
        f"{with_ranks}, the ranks did not find each other: {run.explain().splitlines()[0]}",
        "All ranks need the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and each its own RANK "
        "from 0 to WORLD_SIZE - 1. Who waits for a rank that never comes waits until the timeout.",
    )


@exercise(
    "Both jobs run on one machine at the same time. What could be theirs alone?",
    "A file named after the job, `f'file://{folder}/{job}'`, with rank= and world_size=.",
)
def check_join(join: Callable[[int, int, str, str], None]) -> str:
    """Check that of two jobs at once each joins its own: `join(rank, world_size, job, folder)`."""

    def work(rank: int, folder: str) -> float:
        import torch
        import torch.distributed as dist

        number, job_rank = divmod(rank, 2)
        # Rank 0 of one job comes together with rank 1 of the other: will they meet?
        time.sleep((0.0, 0.5, 0.5, 0.0)[rank])
        join(job_rank, 2, "ab"[number], folder)
        total = torch.tensor([float(10**number)])
        dist.all_reduce(total)
        _await_all(rank, folder)
        dist.destroy_process_group()
        return float(total.item())

    with tempfile.TemporaryDirectory() as folder:
        run = run_quietly(work, (folder,), nprocs=4)
    if run.values == [2.0, 2.0, 20.0, 20.0]:
        return "two jobs of 2 ranks ran at once, and neither met the other's ranks."
    raise _why_collided(run)


def _await_all(rank: int, folder: str, seconds: float = 4.0) -> None:
    """Keep a job open until the other one has joined, too, so that the two run at once."""
    there = [os.path.join(folder, f"rank {r} is there") for r in range(4)]
    open(there[rank], "w").close()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(os.path.exists, there)):
        time.sleep(0.01)


def _why_collided(run: Run) -> Wrong:
    texts = " ".join(rank.error.text for rank in run.ranks if rank.error is not None)
    if "already in use" in texts or "EADDRINUSE" in texts:
        return Wrong(
            "the second job found the port taken.",
            "A port belongs to one job at a time. A number written into the code collides as soon "
            "as two jobs run on one machine, or a crashed one still holds it.",
        )
    if run.ok:
        return Wrong(
            f"the jobs mixed: job a should add up to 2, job b to 20; the sums were {run.values}.",
            "Whoever meets at one place becomes one group. A file or port that both jobs use is "
            "one place, and so is env:// with the launcher's own variables: give each job a place "
            "of its own.",
        )
    if any(_is_not_in_a_group(rank) for rank in run.ranks):
        return Wrong(
            "a rank had no process group after join().",
            "join() must call dist.init_process_group.",
        )
    own = next((r.error for r in run.ranks if r.error and not r.error.frames[1:]), None)
    if own is not None and own.type_name in (
        "TypeError",
        "ValueError",
        "NameError",
        "RuntimeError",
    ):
        return Wrong(
            f"join() itself failed: {own.summary}",
            "file:// and tcp:// need rank= and world_size=, and file:// a full path: "
            "f'file://{folder}/{job}'.",
        )
    return Wrong(
        f"the jobs did not come apart: {run.explain().splitlines()[0]}",
        "Whoever meets at one place becomes one group: give each job a place of its own, and pass "
        "the job's rank and world_size, not those of the launcher.",
    )


def _is_not_in_a_group(rank: RankResult) -> bool:
    return rank.error is not None and "has not been initialized" in rank.error.text


@exercise(
    "Nobody leaves init_process_group before the last rank has come. When does that one come?",
    "The last rank comes after max(delays) seconds. How long has one that came after d waited?",
)
def check_waits(waits: Callable[[Sequence[float]], Sequence[float]]) -> str:
    """Check `waits(delays)`, each rank's seconds in init_process_group, by measuring them."""

    def arrive(rank: int, delays: Sequence[float]) -> float:
        import torch.distributed as dist

        time.sleep(delays[rank])
        began = time.perf_counter()
        dist.init_process_group("gloo")
        waited = time.perf_counter() - began
        dist.destroy_process_group()
        return waited

    for delays in ((0.0, 0.8, 0.3), (0.6, 0.0)):
        answer = _prediction(waits, delays)
        run = run_quietly(arrive, (delays,), nprocs=len(delays))
        run.raise_for_failure()
        _judge_waits(delays, answer, run.values)
    return "your prediction and the measured waits agree."


def _prediction(waits: Callable[[Sequence[float]], Sequence[float]], delays: Any) -> list[float]:
    @functools.wraps(waits)
    def numbers(delays: Any) -> list[float]:
        return [float(seconds) for seconds in waits(delays)]

    because = "It takes a sequence of seconds and returns one number for each."
    answer: list[float] = call(numbers, delays, because=because)
    if len(answer) != len(delays):
        raise Wrong(
            f"waits({delays}) gave {len(answer)} numbers for {len(delays)} ranks.",
            "It returns one number for each rank.",
        )
    return answer


def _rule(delays: Sequence[float], answer: Sequence[float]) -> str:
    """Which rule a wrong prediction followed, where that can be told."""
    if list(answer) == list(delays):
        return " You gave the times at which they come: waiting is from there to the last arrival."
    if set(answer) == {max(delays)}:
        return " You gave the time at which all leave: waiting begins when a rank comes."
    return ""


def _judge_waits(delays: Sequence[float], answer: Sequence[float], seen: Sequence[float]) -> None:
    for rank, (predicted, measured) in enumerate(zip(answer, seen, strict=True)):
        if abs(predicted - measured) <= TOLERANCE:
            continue
        came = f"rank {rank} came after {delays[rank]:g} s"
        raise Wrong(
            f"{came} and waited about {measured:.1f} s; you said {predicted:g} s.",
            "init_process_group returns when the last rank has arrived: the first rank waits "
            "longest, the last one hardly at all, and rank 0 is no exception."
            f"{_rule(delays, answer)}",
        )
