"""The checks of lesson 04: rank zero first, one download a machine, the cost of barriers."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddp_lessons import Run, span
from ddp_lessons.exercises.framework import (
    Wrong,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import first_miss, predict, wrong_rule
from ddp_lessons.text import count

LIMIT = timedelta(seconds=3)  # of a process group: a barrier that some rank misses fails soon
_in_group = functools.partial(in_group, timeout=LIMIT)


def _judge_barriers(what: str, run: Run) -> None:
    """Raise a rank's own error, or `Wrong` if ranks called different numbers of barriers."""
    if not stuck(run):
        run.raise_for_failure()
    called = [sum(s.op == "barrier" for s in rank.spans) for rank in run.ranks]
    other = next((rank for rank, times in enumerate(called) if times != called[0]), None)
    if other is not None:
        first, second = count(called[0], "time"), count(called[other], "time")
        raise Wrong(
            f"{what}: rank 0 called barrier {first}, rank {other} {second}.",
            "A barrier ends only when every rank of the group has called it. Whatever the `if`s "
            "are, each rank must pass as many barriers as the others; else one waits alone, or "
            "meets the others in the wrong place.",
        )


VERY_LATE = 1.2  # seconds, longer than most sleep that guess how long rank 0 takes
# Seconds until each rank reaches the `with`, and seconds that its body takes.
CASES = (
    ("1 rank", (0.0,), (0.0,)),
    ("2 ranks, rank 0 comes late", (VERY_LATE, 0.0), (0.1, 0.1)),
    ("4 ranks, rank 3 comes late", (0.0, 0.0, 0.0, 0.3), (0.2, 0.0, 0.0, 0.1)),
)
FirstOne = Callable[[int], AbstractContextManager[Any]]
Seconds = Sequence[float]  # by rank


@_in_group
def _enter(rank: int, rank_zero_first: FirstOne, late: Seconds, busy: Seconds) -> None:
    time.sleep(late[rank])
    with rank_zero_first(rank), span("body"):
        time.sleep(busy[rank])
    dist.all_reduce(torch.ones(1))  # where ranks with too many barriers do not meet


@exercise(
    "Who must pass a barrier before the `yield`, and who only after it?",
    "The others wait before the `yield`; rank 0 comes to that same barrier after its own. Two "
    "`if`s, one barrier in each.",
    "Under `@contextmanager`: `if rank != 0: dist.barrier()`, then `yield`, then "
    "`if rank == 0: dist.barrier()`.",
)
def check_rank_zero_first(rank_zero_first: FirstOne) -> str:
    """Check that `with rank_zero_first(rank):` runs its body on rank 0 before all others."""
    for what, late, busy in CASES:
        run = run_ranks(_enter, (rank_zero_first, late, busy), nprocs=len(late), check=False)
        _judge_manager(what, run)
        _judge_barriers(what, run)
        run.raise_for_failure()
        _judge_order(what, run)
    return "rank 0 first, then all others, whoever came late; and every barrier was met."


def _judge_manager(what: str, run: Run) -> None:
    raised = " ".join(error.summary for error in errors(run))
    mistakes = {
        "rank_zero_first(rank) returned None.\n"
        "It must return a context manager. Is `return` or "
        "`yield` missing?": "'NoneType' object does not support the context manager" in raised,
        "`with` does not take what rank_zero_first(rank) returns.\n"
        "A function with a `yield` makes a generator. `@contextmanager` above it, from contextlib, "
        "makes a context manager of that.": "object does not support the context manager" in raised,
        "rank_zero_first came to its end without a `yield`.\n"
        "The body of the `with` runs at the `yield`, and every rank needs it: the others load the "
        "file, too, only later.": "generator didn't yield" in raised,
        "rank_zero_first has more than one `yield`.\n"
        "The body of the `with` runs once, at the `yield`. Put the barriers under `if`s, not the "
        "`yield`.": "generator didn't stop" in raised,
    }
    judge(f"{what}: ", mistakes)


def _judge_order(what: str, run: Run) -> None:
    bodies = [s for r in run.ranks for s in r.spans if s.name == "body"]
    early = [body.rank for body in bodies if body.rank and body.t0_ns < (bodies[0].t1_ns or 0)]
    if not early:
        return
    barriers = [s for s in run.spans() if s.op == "barrier"]
    before = {s.rank for s in barriers if s.t0_ns < bodies[s.rank].t0_ns}
    when = "before the body lets all begin at once" if before else "after the body comes too late"
    mistakes = {
        "Nobody waits: there is no barrier on any rank. (A sleep ends when its time is over, "
        "whether or not rank 0 is done.)": not barriers,
        "Rank 0 went last. A rank that calls barrier before the body waits there for those that "
        "call it after theirs. Here rank 0 waits for the others; it should "
        "be the other way round.": 0 in before and early[0] not in before,
        f"A barrier that all ranks pass {when}. What differs between rank 0 and the others?": True,
    }
    judge(f"{what}: rank {early[0]} began its body before rank 0 had ended its own.", mistakes)


HALVES = "first half\n", "second half\n"
WHOLE = "".join(HALVES)
SLOW = 0.2  # seconds that a download takes
Load = Callable[[int, int, str, Callable[[str], None]], str]


class _Job(NamedTuple):
    """A job whose ranks load a file: its machines, and who comes late."""

    what: str
    nprocs: int
    nnodes: int = 1
    late: Mapping[int, float] = {}  # seconds by rank
    fails: bool = False
    downloads: int = 1  # how often the file should be downloaded

    def run(self, load: Load, folder: str) -> Run:
        return run_ranks(_load, (load, folder, self), self.nprocs, self.nnodes, check=False)


JOBS = (
    _Job("1 rank", 1),
    _Job("4 ranks, rank 0 comes late", 4, late={0: VERY_LATE}),
    _Job("4 ranks, rank 3 comes late", 4, late={3: 3 * SLOW}),
    _Job("2 machines with 2 ranks each", 2, nnodes=2, late={2: 2 * SLOW}, downloads=2),
)
FAILING = _Job("a job whose download fails halfway", 2, fails=True)
AFTER_FAILURE = _Job("a second job, after one whose download failed halfway", 3)
CACHED = _Job("3 ranks, and the file is there already", 3, downloads=0)


@_in_group
def _load(rank: int, load: Load, folder: str, job: _Job) -> str:
    time.sleep(job.late.get(rank, 0.0))
    disk = Path(folder, f"machine {os.environ.get('GROUP_RANK', '0')}")  # one folder a machine
    disk.mkdir(exist_ok=True)
    download = functools.partial(_download, job.fails)
    content = load(rank, int(os.environ["LOCAL_RANK"]), str(disk / "data.txt"), download)
    dist.all_reduce(torch.ones(1))  # where ranks with too many barriers do not meet
    return content


def _download(fails: bool, path: str) -> None:
    with span("download"), open(path, "w") as file:
        file.write(HALVES[0])
        file.flush()
        time.sleep(SLOW)
        if fails:
            raise ConnectionError("the network is down")
        file.write(HALVES[1])


@exercise(
    "One rank of each machine calls `download`, and only if the file is missing. When may the "
    "others open it? And which name may a half file have?",
    "`download` to another name, `os.replace` it to `path` when it is whole; all of that in an "
    "`if local_rank == 0 and ...`. Then a barrier for all, then read.",
)
def check_load(load: Load) -> str:
    """Check `load(rank, local_rank, path, download)`: one download a machine, no partial reads."""
    for job in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            _judge_load(job, job.run(load, folder))
    with tempfile.TemporaryDirectory() as folder:
        failed = FAILING.run(load, folder)
        if failed.ok:
            raise Wrong(
                f"{FAILING.what}: nobody noticed; the ranks returned {failed.values}.",
                "Let the error through. Training without data is worse than a job that stops.",
            )
        _judge_load(AFTER_FAILURE, AFTER_FAILURE.run(load, folder))
        Path(folder, "machine 0", "data.txt").write_text(WHOLE)
        _judge_load(CACHED, CACHED.run(load, folder))
    return "one download a machine, none if the file is there, and nobody read half a file."


def _judge_load(job: _Job, run: Run) -> None:
    loaders = [s.rank for s in run.spans() if s.name == "download"]
    for result in run.ranks:
        if result.error and "FileNotFoundError" in result.error.summary:
            _explain_missing_file(job, result.rank, loaders)
    _judge_barriers(job.what, run)
    run.raise_for_failure()
    if len(loaders) > job.downloads:
        _explain_downloads(job, loaders)
    for rank, content in enumerate(run.values):
        if content != WHOLE:
            _explain_content(job, rank, content)


def _explain_missing_file(job: _Job, rank: int, loaders: Sequence[int]) -> None:
    machines = {loader // job.nprocs for loader in loaders}
    mistakes = {
        " Nobody downloaded on its machine.\n"
        "Each machine has a disk of its own, and there is only one rank 0 in the whole job. The "
        "rank on its machine is `local_rank`, and that is 0 once "
        "on each.": job.nnodes > 1 and rank // job.nprocs not in machines,
        " Nobody called `download`.\nWhich rank should call it?": not loaders and not job.late,
        "It looked before the download was over. The others have to wait in a barrier that the "
        "downloading rank calls after the download.": True,
    }
    judge(f"{job.what}: rank {rank} found no file.", mistakes)


def _explain_downloads(job: _Job, loaders: Sequence[int]) -> None:
    called_by = ", ".join(map(str, loaders))
    mistakes = {
        "If there is a file at `path`, nobody needs to download it again.": not job.downloads,
        "One download a machine is enough. `local_rank` is 0 once on each machine; `rank` is 0 "
        "once in the whole job.": job.nnodes > 1,
        "One is enough: let one rank download, while the others wait in a barrier.": True,
    }
    judge(f"{job.what}: `download` was called by rank {called_by}.", mistakes)


def _explain_content(job: _Job, rank: int, content: Any) -> None:
    mistakes = {
        " That is half the file.\n"
        "The first job left it at `path`, and the second took it for whole. Download to another "
        "name, and `os.replace` it to `path` when "
        "it is complete.": job is AFTER_FAILURE and content == HALVES[0],
        " That is not the whole file.\n"
        "A file is there as soon as it is opened for writing. Do not look for the file: wait in a "
        "barrier for the rank that writes it.": content in ("", HALVES[0]),
        "Every rank returns what is in the file. Is `return` missing on some?": content is None,
        "Return all of the file's text as it is, a `str`.": True,
    }
    judge(f"{job.what}: rank {rank} returned {content!r}.", mistakes)


Work = Sequence[Seconds]  # of each step
WORKS: tuple[Work, ...] = (
    ((0.0, 0.4, 0.2),),
    ((0.4, 0.0), (0.0, 0.4)),
    ((0.0, 0.4, 0.0, 0.0), (0.0, 0.0, 0.4, 0.2)),
)


@in_group
def _steps(rank: int, work: Work) -> None:
    for seconds in work:
        time.sleep(seconds[rank])
        dist.barrier()


@exercise(
    "Take one step first. When does its last rank come to the barrier, and how long has a rank "
    "waited that worked for `seconds` seconds?",
    "In each step a rank waits `max(step) - step[rank]` seconds. Then add up the steps.",
)
def check_waits(waits: Callable[[Work], Seconds]) -> str:
    """Check `waits(work)`, each rank's seconds in all barriers, against measured ones."""
    because = "It takes `work[step][rank]` in seconds and returns one number for each rank."
    for work in WORKS:
        world_size = len(work[0])
        answer = predict(waits, (work,), world_size, because)
        rows = run_ranks(_steps, (work,), nprocs=world_size).waits()
        measured = [sum(r.wait_ns for r in rows if r.rank == n) / 1e9 for n in range(world_size)]
        _judge_waits(work, answer, measured)
    return "your prediction and the measured waits agree, for one step and for two."


def _judge_waits(work: Work, answer: Seconds, measured: Seconds) -> None:
    rank = first_miss(answer, measured)
    if rank is None:
        return
    worked = [sum(seconds) for seconds in zip(*work, strict=True)]
    left = [sum(map(max, work))] * len(worked)
    rules = {
        " You gave the time that they work: waiting is from there to the last arrival.": worked,
        " You gave the time at which all leave: waiting begins when a rank comes.": left,
        " Yours would be right for a single barrier at the end. Then delays of different ranks "
        "can pass side by side; with a barrier in each "
        "step they add up.": [max(worked) - seconds for seconds in worked],
        " You counted one of the steps only.": [max(work[-1]) - seconds for seconds in work[-1]],
    }
    did = ", then ".join(f"{step[rank]:g} s" for step in work)
    raise Wrong(
        f"{count(len(answer), 'rank')}; rank {rank} worked {did}, and waited about "
        f"{measured[rank]:.1f} s in all; you said {answer[rank]:g} s.",
        f"At each barrier all wait for the last of that step.{wrong_rule(answer, rules)}",
    )
