"""The checks of lesson 04: rank zero first, one download a machine, and what barriers cost."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.recording import span
from ddp_lessons.results import Run
from ddp_lessons.wording import count

LIMIT = timedelta(seconds=3)  # of a process group: a barrier that some rank misses fails soon
TOLERANCE = 0.15  # seconds
EACH_AS_MANY = (
    "A barrier ends only when every rank of the group has called it. Whatever the `if`s are, each "
    "rank must pass as many barriers as the others; else one waits alone, or meets the others in "
    "the wrong place."
)


def _judge_barriers(what: str, run: Run) -> None:
    """Raise `Wrong` if some rank called more barriers than another."""
    called = [sum(s.op == "barrier" for s in rank.spans) for rank in run.ranks]
    other = next((rank for rank, times in enumerate(called) if times != called[0]), None)
    if other is not None:
        first, second = count(called[0], "time"), count(called[other], "time")
        seen = f"{what}: rank 0 called barrier {first}, rank {other} {second}."
        raise Wrong(seen, EACH_AS_MANY)


def _errors(run: Run) -> str:
    """What the ranks that failed said."""
    return " ".join(rank.error.summary for rank in run.ranks if rank.error is not None)


class _Case(NamedTuple):
    """Ranks that come to a `with` after some seconds, and stay in its body for some."""

    what: str
    late: tuple[float, ...]
    busy: tuple[float, ...]


CASES = (
    _Case("1 rank", (0.0,), (0.0,)),
    _Case("2 ranks, rank 0 comes late", (0.3, 0.0), (0.1, 0.1)),
    _Case("4 ranks, rank 3 comes late", (0.0, 0.0, 0.0, 0.3), (0.2, 0.0, 0.0, 0.1)),
)
FirstOne = Callable[[int], AbstractContextManager[Any]]


def _enter(rank: int, rank_zero_first: FirstOne, case: _Case) -> None:
    dist.init_process_group("gloo", timeout=LIMIT)
    time.sleep(case.late[rank])
    with rank_zero_first(rank), span("body"):
        time.sleep(case.busy[rank])
    dist.all_reduce(torch.ones(1))  # where ranks with too many barriers do not meet
    dist.destroy_process_group()


@exercise(
    "Who must pass a barrier before the `yield`, and who only after it?",
    "The others wait before the `yield`; rank 0 comes to that same barrier after its own. Two "
    "`if`s, one barrier in each.",
)
def check_rank_zero_first(rank_zero_first: FirstOne) -> str:
    """Check that `with rank_zero_first(rank):` runs its body on rank 0 before all others."""
    for case in CASES:
        run = run_quietly(_enter, (rank_zero_first, case), nprocs=len(case.late))
        _judge_manager(case.what, run)
        _judge_barriers(case.what, run)
        run.raise_for_failure()
        _judge_order(case.what, run)
    return "rank 0 first, then all others, whoever came late; and every barrier was met."


def _judge_manager(what: str, run: Run) -> None:
    errors = _errors(run)
    if "object does not support the context manager" in errors:
        raise Wrong(
            f"{what}: `with` does not take what rank_zero_first(rank) returns.",
            "A function with a `yield` makes a generator. `@contextmanager` above it, from "
            "contextlib, makes a context manager of that.",
        )
    if "generator didn't yield" in errors:
        raise Wrong(
            f"{what}: rank_zero_first came to its end without a `yield`.",
            "The body of the `with` runs at the `yield`, and every rank needs it: the others load "
            "the file, too, only later.",
        )


def _judge_order(what: str, run: Run) -> None:
    bodies = [s for r in run.ranks for s in r.spans if s.name == "body"]
    early = [body.rank for body in bodies if body.rank and body.t0_ns < (bodies[0].t1_ns or 0)]
    if not early:
        return
    seen = f"{what}: rank {early[0]} began its body before rank 0 had ended its own."
    barriers = [s for s in run.spans() if s.op == "barrier"]
    if not barriers:
        raise Wrong(seen, "Nobody waits: there is no barrier on any rank.")
    before = {s.rank for s in barriers if s.t0_ns < bodies[s.rank].t0_ns}
    if 0 in before and early[0] not in before:
        raise Wrong(
            seen,
            "Rank 0 went last. Who calls barrier before the body waits there for those who call it "
            "after theirs. Here rank 0 waits for the others; it should be the other way round.",
        )
    when = "before the body lets all begin at once" if before else "after the body comes too late"
    raise Wrong(
        seen,
        f"A barrier that all ranks pass {when}. What differs between rank 0 and the others?",
    )


HALVES = "first half\n", "second half\n"
WHOLE = "".join(HALVES)
SLOW = 0.2  # seconds that a download takes
Load = Callable[[int, int, str, Callable[[str], None]], str]


class _Job(NamedTuple):
    """A job whose ranks load a file: on how many machines, and which rank comes late."""

    what: str
    nprocs: int
    nnodes: int = 1
    late: int | None = None
    fails: bool = False
    downloads: int = 1  # how often the file should be downloaded

    def run(self, load: Load, folder: str) -> Run:
        return run_quietly(_load, (load, folder, self), self.nprocs, self.nnodes)


JOBS = (
    _Job("1 rank", 1),
    _Job("4 ranks, rank 0 comes late", 4, late=0),
    _Job("4 ranks, rank 3 comes late", 4, late=3),
    _Job("2 machines with 2 ranks each", 2, nnodes=2, late=2, downloads=2),
)
FAILING = _Job("a job whose download fails halfway", 2, fails=True)
AFTER_FAILURE = _Job("a second job, after one whose download failed halfway", 3)
CACHED = _Job("3 ranks, and the file is there already", 3, downloads=0)


def _load(rank: int, load: Load, folder: str, job: _Job) -> str:
    dist.init_process_group("gloo", timeout=LIMIT)
    time.sleep(0.3 if rank == job.late else 0.0)
    download = functools.partial(_download, job.fails)
    content = load(rank, int(os.environ["LOCAL_RANK"]), _path(folder), download)
    dist.all_reduce(torch.ones(1))  # where ranks with too many barriers do not meet
    dist.destroy_process_group()
    return content


def _path(folder: str) -> str:
    """Where this machine's file belongs, on a disk of its own."""
    disk = os.path.join(folder, f"machine {os.environ.get('GROUP_RANK', '0')}")
    os.makedirs(disk, exist_ok=True)
    return os.path.join(disk, "data.txt")


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
    """Check `load(rank, local_rank, path, download)`: one download a machine, never half a file."""
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
    if "FileNotFoundError" in _errors(run):
        raise _no_file(job, run, loaders)
    _judge_barriers(job.what, run)
    run.raise_for_failure()
    if len(loaders) > job.downloads:
        raise _too_many(job, loaders)
    odd = next((rank for rank, content in enumerate(run.values) if content != WHOLE), None)
    if odd is not None:
        raise _not_whole(job, odd, run.values[odd])


def _no_file(job: _Job, run: Run, loaders: Sequence[int]) -> Wrong:
    lost = next(r.rank for r in run.ranks if r.error and "FileNotFound" in r.error.summary)
    seen = f"{job.what}: rank {lost} found no file."
    if job.nnodes > 1 and not any(r // job.nprocs == lost // job.nprocs for r in loaders):
        return Wrong(
            f"{seen} Nobody downloaded on its machine.",
            "Each machine has a disk of its own, and there is only one rank 0 in the whole job. "
            "The rank on its machine is `local_rank`, and that is 0 once on each.",
        )
    if not loaders:
        return Wrong(f"{seen} Nobody called `download`.", "Which rank should call it?")
    return Wrong(
        seen,
        "It looked before the download was over. The others have to wait in a barrier that the "
        "downloading rank calls after the download.",
    )


def _too_many(job: _Job, loaders: Sequence[int]) -> Wrong:
    seen = f"{job.what}: `download` was called by rank {', '.join(map(str, loaders))}."
    if not job.downloads:
        return Wrong(seen, "If there is a file at `path`, nobody needs to download it again.")
    if job.nnodes > 1:
        because = "`local_rank` is 0 once on each machine; `rank` is 0 once in the whole job."
        return Wrong(seen, f"One download a machine is enough. {because}")
    return Wrong(seen, "One is enough: let one rank download, while the others wait in a barrier.")


def _not_whole(job: _Job, rank: int, content: Any) -> Wrong:
    seen = f"{job.what}: rank {rank} returned {content!r}."
    if job is AFTER_FAILURE and content == HALVES[0]:
        return Wrong(
            f"{seen} That is half the file.",
            "The first job left it at `path`, and the second took it for whole. Download to "
            "another name, and `os.replace` it to `path` when it is complete.",
        )
    if content in ("", HALVES[0]):
        return Wrong(
            f"{seen} That is not the whole file.",
            "A file is there as soon as it is opened for writing. Do not look for the file: wait "
            "in a barrier for the rank that writes it.",
        )
    return Wrong(seen, "Every rank returns what is in the file. Is `return` missing on some?")


Work = Sequence[Sequence[float]]  # seconds, [step][rank]
WORKS: tuple[Work, ...] = (
    ((0.0, 0.4, 0.2),),
    ((0.4, 0.0), (0.0, 0.4)),
    ((0.0, 0.4, 0.0, 0.0), (0.0, 0.0, 0.4, 0.2)),
)


def _steps(rank: int, work: Work) -> None:
    dist.init_process_group("gloo")
    for seconds in work:
        time.sleep(seconds[rank])
        dist.barrier()
    dist.destroy_process_group()


@exercise(
    "Take one step first. When does its last rank come to the barrier, and how long has a rank "
    "waited that worked for `seconds` seconds?",
    "In each step a rank waits `max(step) - step[rank]` seconds. Then add up the steps.",
)
def check_waits(waits: Callable[[Work], Sequence[float]]) -> str:
    """Check `waits(work)`, the seconds each rank waits in all barriers, by measuring them."""
    for work in WORKS:
        answer = _prediction(waits, work)
        run = run_quietly(_steps, (work,), nprocs=len(work[0]))
        run.raise_for_failure()
        rows = run.waits()
        seen = [sum(r.wait_ns for r in rows if r.rank == n) / 1e9 for n in range(len(work[0]))]
        _judge_waits(work, answer, seen)
    return "your prediction and the measured waits agree, for one step and for two."


def _prediction(waits: Callable[[Work], Sequence[float]], work: Work) -> list[float]:
    @functools.wraps(waits)
    def numbers(work: Work) -> list[float]:
        return [float(seconds) for seconds in waits(work)]

    because = "It takes `work[step][rank]` in seconds and returns one number for each rank."
    answer: list[float] = call(numbers, work, because=because)
    if len(answer) != len(work[0]):
        ranks = count(len(work[0]), "rank")
        raise Wrong(f"waits({work}) gave {count(len(answer), 'number')} for {ranks}.", because)
    return answer


def _judge_waits(work: Work, answer: Sequence[float], seen: Sequence[float]) -> None:
    for rank, (predicted, measured) in enumerate(zip(answer, seen, strict=True)):
        if abs(predicted - measured) > TOLERANCE:
            did = ", then ".join(f"{step[rank]:g} s" for step in work)
            raise Wrong(
                f"{count(len(answer), 'rank')}; rank {rank} worked {did}, and waited about "
                f"{measured:.1f} s in all; you said {predicted:g} s.",
                f"At each barrier all wait for the last of that step.{_rule(work, answer)}",
            )


def _rule(work: Work, answer: Sequence[float]) -> str:
    """Which rule a wrong prediction followed, where that can be told."""
    worked = [sum(seconds) for seconds in zip(*work, strict=True)]
    rules = {
        " You gave the time that they work: waiting is from there to the last arrival.": worked,
        " You gave the time at which all leave: waiting begins when a rank comes.": [
            sum(map(max, work))
        ]
        * len(worked),
        " Yours would be right for a single barrier at the end. Then delays of different ranks "
        "can pass side by side; with a barrier in each step they add up.": [
            max(worked) - seconds for seconds in worked
        ],
        " You counted one of the steps only.": [max(work[-1]) - seconds for seconds in work[-1]],
    }
    fits = (
        said
        for said, numbers in rules.items()
        if all(abs(a - b) < 1e-6 for a, b in zip(answer, numbers, strict=True))
    )
    return next(fits, "")
