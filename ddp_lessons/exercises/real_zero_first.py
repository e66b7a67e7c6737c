"""The checks of real_5: rank zero first that tells how it went, one download for each disk."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp_lessons import Run, span
from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.text import count, ranks_text

First = Callable[[int], AbstractContextManager[Any]]
ROUNDS = ("all goes well", "rank 0's body fails", "all goes well, after a failure")
FAILING = 1
FAILURE = "the download failed"
LATE = 0.3  # seconds; rank 0 comes so much later than the others
OFF = "rank -1, without a group"


@in_group
def _use(rank: int, first: First) -> str:
    """What left the `with` when rank 0's body failed; "" for nothing."""
    raised = ""
    for number in range(len(ROUNDS)):
        with span(f"round {number}"):
            time.sleep(0 if rank else LATE)
            try:
                _enter(rank, first, number)
            except Exception as error:
                if number != FAILING or (rank == 0 and not isinstance(error, ConnectionError)):
                    raise
                raised = f"{type(error).__name__}: {error}"
            dist.all_reduce(torch.ones(1))  # where ranks with too many calls do not meet
    return raised


def _enter(rank: int, first: First, number: int) -> None:
    with first(rank), span(f"body {number}"):
        time.sleep(0.1 if rank == 0 else 0)
        if rank <= 0 and number == FAILING:
            raise ConnectionError(FAILURE)


@exercise(
    "A barrier carries no message, a broadcast does. What should rank 0 send, and on which two "
    "ways may it come out of the `yield`?",
    "On rank 0: `try: yield`, then send whether it went well, also under `except`, and `raise` "
    "again there. The others receive that before their `yield`, and raise if it did not. Rank -1 "
    "only yields.",
    "On rank 0, `ok = torch.zeros(1)`, `try: yield; ok += 1`, `finally: dist.broadcast(ok, 0)`. On "
    "the others `dist.broadcast(ok, 0)`, then `if not ok: raise RuntimeError(...)`, then `yield`.",
)
def check_first(first: First) -> str:
    """Check `with first(rank):`: rank 0 first, and if its body fails, all raise."""
    for nprocs in (3, 1):
        rounds = [f"{count(nprocs, 'rank')}, {text}" for text in ROUNDS]
        run = run_ranks(_use, (first,), nprocs, check=False)
        _judge_stuck(run, rounds)
        _judge_raised(run)
        for number, what in enumerate(rounds):
            _judge_round(what, run, number)
    _judge_off(first)
    return "rank 0 first; when its body failed, all raised and nobody hung; and it can be off."


def _judge_stuck(run: Run, rounds: Sequence[str]) -> None:
    if not stuck(run):
        return
    assert run.verdict is not None
    ended = min(
        sum(s.name.startswith("round") and s.t1_ns is not None for s in rank.spans)
        for rank in run.ranks
    )
    where = rounds[min(ended, len(rounds) - 1)]
    mistakes = {
        "Rank 0's error leaves the generator at the `yield`: what stands below it does not run, "
        "unless in an `except` or a `finally`. The others wait for it.": "body fails" in where,
        "Whatever the `if`s are, each rank must make the same calls as the others, in the same "
        "order.": True,
    }
    judge(f"{where}: they hang. {run.verdict.title}.", mistakes)


def _judge_raised(run: Run) -> None:
    """Raise the error of the rank that failed first, explained where that can be."""
    if run.verdict is None:
        return
    rank = run.verdict.ranks[0]
    error = run.ranks[rank].error
    raised = error.summary if error else ""
    was_failure = error is not None and FAILURE in f"{error.text}{error.previous}"
    mistakes = {
        "`first(rank)` must be something for `with`: put `@contextmanager`, from contextlib, "
        "above a function with one `yield`.": "context manager" in raised,
        "The body runs at the `yield`: each rank that has something to do must come to "
        "one.": "generator didn't yield" in raised,
        "The body of the `with` runs once, so there is one `yield` on each way "
        "through.": "generator didn't stop" in raised,
        "The body's own error has to leave the `with` as it is: `raise` it again when the others "
        "know.": rank == 0 and was_failure,
    }
    judge(f"rank {rank} raised {raised}", mistakes)
    run.raise_for_failure()


def _judge_round(what: str, run: Run, number: int) -> None:
    bodies = {s.rank: s for s in run.spans() if s.name == f"body {number}"}
    if number == FAILING:
        if not run.values[0]:
            raise Wrong(
                f"{what}: no error left the `with` on rank 0.",
                "Rank 0 must not go on as if nothing had happened: `raise` the error again when "
                "the others know. (And a `return` in a `finally` swallows it.)",
            )
        if entered := [rank for rank in bodies if rank]:
            raise Wrong(
                f"{what}: rank {min(entered)} ran its body, too.",
                "It had waited, and could not know that rank 0 had failed. A barrier says that "
                "rank 0 has come, not how it went: send that along, and raise before the `yield`.",
            )
    early = [rank for rank, s in bodies.items() if rank and s.t0_ns < (bodies[0].t1_ns or 0)]
    if early:
        raise Wrong(
            f"{what}: rank {min(early)} began its body before rank 0 had ended its own.",
            "The others wait before their `yield` for what rank 0 does after its own. A sleep ends "
            "when its time is over, whether or not rank 0 is done.",
        )


def _judge_off(first: First) -> None:
    try:
        _enter(-1, first, 0)
    except Exception as error:
        raise Wrong(
            f"{OFF}: {type(error).__name__}: {error}",
            "-1 stands for a plain process: there is no group, so nothing of `dist` that needs one "
            "may be called. Just run the body.",
        ) from error
    with contextlib.suppress(ConnectionError):
        _enter(-1, first, FAILING)
        raise Wrong(
            f"{OFF}: the body raised a ConnectionError, and nothing left the `with`.",
            "Let the body's error through. Whoever goes on without data finds out too late.",
        )


Fetch = Callable[[str], str]
FetchOnce = Callable[[int, int, str, Fetch], str]
TEXT = "all the data\n"
SLOW = 0.3  # seconds that a download takes
VERY_LATE = 1.0  # seconds, longer than most sleep that guess how long it takes
DISKS = (
    "a disk on each machine",
    "one disk for all machines",
    "one disk for all machines, and rank 0 comes late",
)


def _fetch(path: str) -> str:
    """The file's text; downloads it if it is not there."""
    if not os.path.exists(path):
        with span(f"download to {Path(path).parent.name}"):
            time.sleep(SLOW)
            Path(f"{path}.{os.getpid()}").write_text(TEXT)
            os.replace(f"{path}.{os.getpid()}", path)
    return Path(path).read_text()


def _path(folder: str, kind: int, machine: str) -> str:
    disk = Path(folder, f"disk {kind} of all" if kind else f"disk of machine {machine}")
    disk.mkdir(exist_ok=True)
    return str(disk / "data.txt")


@in_group
def _fetch_all(rank: int, fetch_once: FetchOnce, folder: str) -> list[Any]:
    """What the answer returned for each kind of disk."""
    local_rank, texts = int(os.environ["LOCAL_RANK"]), []
    for kind in range(len(DISKS)):
        with span(f"round {kind}"):
            time.sleep(VERY_LATE if kind == 2 and rank == 0 else 0)
            path = _path(folder, kind, os.environ.get("GROUP_RANK", "0"))
            texts.append(fetch_once(rank, local_rank, path, _fetch))
            dist.all_reduce(torch.ones(1))
    return texts


@exercise(
    "With one disk for all, the rank whose `rank` is 0 must be alone; with a disk each, those "
    "whose `local_rank` is 0. Who finds the file if both go, one after the other?",
    "Three turns: first rank 0, then each machine's local rank 0, then the others. `fetch` finds "
    "the file where somebody before has brought it. What is between two turns?",
    "`if rank <= 0: fetch(path)`, a barrier, `if local_rank == 0: fetch(path)`, a barrier, then "
    "all `return fetch(path)`. The barriers only if `rank != -1`.",
)
def check_fetch_once(fetch_once: FetchOnce) -> str:
    """Check `fetch_once(rank, local_rank, path, fetch)`: one download for each disk."""
    for nprocs, nnodes in ((2, 2), (3, 1)):
        with tempfile.TemporaryDirectory() as folder:
            run = run_ranks(_fetch_all, (fetch_once, folder), nprocs, nnodes, check=False)
            where = f"{count(nnodes, 'machine')} with {nprocs} ranks"
            _judge_stuck(run, [f"{where}, {disks}" for disks in DISKS])
            run.raise_for_failure()
            for kind, disks in enumerate(DISKS):
                _judge_fetch(f"{where}, {disks}", run, folder, kind, nnodes)
    with tempfile.TemporaryDirectory() as folder:
        because = "-1 stands for a plain process: without a group no barrier can be called."
        path = _path(folder, 1, "0")
        text = call(functools.partial(fetch_once, -1, -1, path), _fetch, because=because)
        _judge_text(f"{OFF}: it", text)
    return "one download for each disk, shared or not, the text on every rank; and it can be off."


def _judge_fetch(what: str, run: Run, folder: str, kind: int, nnodes: int) -> None:
    for rank, texts in enumerate(run.values):
        _judge_text(f"{what}: rank {rank}", texts[kind])
    for machine in range(nnodes):
        path = Path(_path(folder, kind, str(machine)))
        name = f"download to {path.parent.name}"
        loaders = sorted(s.rank for s in run.spans() if s.name == name)
        if not path.exists():
            raise Wrong(
                f"{what}: there is no file on machine {machine}.",
                "The text alone is not enough: the file has to be on each disk, for the next run.",
            )
        _judge_loaders(f"{what}: {ranks_text(loaders)} downloaded", kind, loaders)


def _judge_loaders(seen: str, kind: int, loaders: Sequence[int]) -> None:
    if len(loaders) == 1:
        return
    mistakes = {
        " to the same file.\nOn a disk for all, the local rank 0 of each machine finds no file if "
        "they look at the same time. Let rank 0 be there first.": kind > 0 and loaders == [0, 2],
        " on the second machine.\nRank 0 is on the first machine, and nobody goes first on the "
        "second. There, `local_rank` 0 has to be before "
        "the other.": kind == 0 and loaders == [2, 3],
        " to the same disk.\nWhoever looks for the file while another downloads does not find it. "
        "All others of that disk have to wait until it is there; a "
        "sleep does not know when.": True,
    }
    judge(seen, mistakes)


def _judge_text(who: str, text: Any) -> None:
    mistakes = {
        "Every rank returns the text. Is a `return` missing on some way through?": text is None,
        "Return what `fetch(path)` returns, as it is.": text != TEXT,
    }
    judge(f"{who} returned {text!r}.", mistakes)
