"""Recording in a script: under torchrun, each rank writes what it does when into a folder.

Runs in every process that torchrun (or anything else that sets RANK) starts, if the environment
variable DDP_LESSONS_RECORD names a folder. `import ddp_lessons` begins it; nothing in the script
changes, but that a rank ends with torchrun, also where that is killed. A rank has three files in
the folder, which carry the time at which it began:

    rank_0.TIME.tape     its spans, written through shared memory: they survive a killed process
    rank_0.TIME.jsonl    a fact a line: how it began, its clock against rank 0's, how it ended
    rank_0.TIME.stack    where it was when SIGTERM told it to end, as torchrun does when others fail

`loading.py` reads them, on this machine or on another one to which they were copied.
"""

from __future__ import annotations

import atexit
import dataclasses
import faulthandler
import fcntl
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ddp_lessons import collectives, orphans, recording
from ddp_lessons.clocks import clock_id
from ddp_lessons.messages import Clock, Message
from ddp_lessons.stacks import describe
from ddp_lessons.tape import REGION, Tape

VARIABLE = "DDP_LESSONS_RECORD"  # names the folder
VERSION = 2  # of these files
_OWNER = "DDP_LESSONS_RECORDED_BY"  # the process that records; what it starts sees it


def begin() -> None:
    """Record this process, if it is a rank of a script and the environment asks for it."""
    if not _is_rank():
        return
    os.environ[_OWNER] = str(os.getpid())
    began = _how_it_began()
    try:
        files = _open(Path(os.environ[VARIABLE]), f"rank_{began['rank']}.{began['epoch_ns']}")
    except OSError as error:  # the training matters more than its record
        print(f"ddp_lessons: nothing is recorded, {VARIABLE}: {error}", file=sys.stderr)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        orphans.end_with_parent()  # an agent that is killed leaves its ranks to themselves
    _Script(began, *files)


def _is_rank() -> bool:
    """False in kernels, in launchers, and in what a rank starts, which inherits its variables."""
    return os.environ.get("RANK", "").isdigit() and _OWNER not in os.environ


def _number(variable: str, default: int = 0) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default


def _open(folder: Path, name: str) -> tuple[IO[str], int, IO[str]]:
    """The files of a rank, new and empty."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = open(folder / f"{name}.jsonl", "x", buffering=1, encoding="utf-8")
    fcntl.flock(facts, fcntl.LOCK_EX)  # tells that we are alive
    tape = os.open(folder / f"{name}.tape", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    os.ftruncate(tape, REGION)  # takes no space until it is written
    return facts, tape, open(folder / f"{name}.stack", "x")


class _Script:
    """The record of this process, from now to its end."""

    def __init__(self, began: Mapping[str, Any], facts: IO[str], tape: int, stack: IO[str]) -> None:
        self._facts, self._stack = facts, stack
        self._pid = os.getpid()
        self._recorder = recording.Recorder(
            began["rank"], Tape(tape, 0), self._on_message, one_clock=False
        )
        os.close(tape)
        self._write(began=began)
        # Python's own handlers do not run in a rank that waits in C. Then the signal does its work.
        faulthandler.register(signal.SIGTERM, file=stack, all_threads=True, chain=True)
        os.register_at_fork(after_in_child=lambda: faulthandler.unregister(signal.SIGTERM))
        recording.install(self._recorder)
        collectives.replace_in(vars(sys.modules["__main__"]))
        self._raised = False
        self._show_error = sys.excepthook
        sys.excepthook = self._on_error
        atexit.register(self._on_exit)

    def _write(self, **fact: Any) -> None:
        if os.getpid() == self._pid:  # a forked child has our file, too
            self._facts.write(json.dumps(fact) + "\n")

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Clock):
            self._write(clock=dataclasses.asdict(message))

    def _on_error(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._note_error(error)
        self._show_error(kind, error, trace)

    def _note_error(self, error: BaseException) -> None:
        if not self._raised:
            self._raised = True
            what = dataclasses.asdict(describe(error))
            self._write(raised={"t_ns": time.perf_counter_ns(), **what})

    def _on_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        # An interrupt that came on the way to the hook above keeps it from being called.
        error = getattr(sys, "last_value", None)
        if error is not None:
            self._note_error(error)
        self._recorder.close()
        self._write(ended={"t_ns": time.perf_counter_ns()})
        collectives.release_groups_of_ddp(self._recorder)


def _how_it_began() -> dict[str, Any]:
    return {
        "version": VERSION,
        "script": os.path.basename(sys.argv[0]),
        "rank": _number("RANK"),
        "world_size": _number("WORLD_SIZE", 1),
        "local_rank": _number("LOCAL_RANK"),
        "group_rank": _number("GROUP_RANK"),
        "host": platform.node(),
        "pid": os.getpid(),
        "clock": clock_id(),
        "epoch_ns": time.time_ns(),
        "t_ns": time.perf_counter_ns(),
    }
