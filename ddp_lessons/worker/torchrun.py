"""Records the ranks of a script: under torchrun, each rank writes what it does into a folder.

Runs in every process that torchrun (or anything else that sets RANK) starts, if the environment
variable DDP_LESSONS_RECORD names a folder; `import ddp_lessons` calls `begin`. The script behaves
as before, except that its ranks end with torchrun, even if that is killed. A rank has three files
in the folder, named after the time at which it began:

    rank_0.TIME.tape     its span buffer, in shared memory: it survives a killed process
    rank_0.TIME.jsonl    one fact a line: how it began, its clock against rank 0's, how it ended;
                         at most as many bytes as are read
    rank_0.TIME.stack    its stack when SIGTERM told it to end, as torchrun does when others fail

A rank reserves room in each for what matters most, filled with zeros, and cuts them off when it
ends by itself. So on a full disk the training goes on, and the record is short but still says how
the rank ended. (Truncating a .tape file while a rank writes to it ends the rank by SIGBUS; checking
for that would take a system call per span.)

`recorded_run.py` reads the files, on this machine or on another one to which they were copied.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import fcntl
import functools
import json
import multiprocessing.process
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ddp_lessons.instrumentation import ddp_traffic, recording
from ddp_lessons.instrumentation.install import install, replace_in
from ddp_lessons.system import reaper, regular_files
from ddp_lessons.system.host import clock_id
from ddp_lessons.wire import facts
from ddp_lessons.wire.messages import (
    Handling,
    Message,
    ThreadDied,
)
from ddp_lessons.wire.owners import Owner, owner_of
from ddp_lessons.wire.records import ErrorRecord
from ddp_lessons.wire.run_folder import NOTES, VARIABLE, VERSION
from ddp_lessons.wire.span_buffer import REGION, SpanWriter, identity, prepare, reserve, say
from ddp_lessons.wire.stacks import describe
from ddp_lessons.worker.in_turn import InTurn

KINDS = ("jsonl", "tape", "stack")
ENDS = {"raised", "ended"}  # facts that matter most
ROOM_TO_END = 1 << 20  # bytes of the file of facts that only those may take
_ROOM = 1 << 16  # bytes reserved in the files of facts and of the stack
_OWNER = "DDP_LESSONS_RECORDED_BY"  # id of the process that records; its children inherit this


def begin() -> None:
    """Record this process, if it is a rank of a script and the environment asks for it."""
    if not _is_rank():
        return
    os.environ[_OWNER] = str(os.getpid())
    began = _how_it_began()
    try:
        files = _made(Path(os.environ[VARIABLE]), began["rank"], began["epoch_ns"])
    except OSError as error:  # the training matters more than its record
        say(f"nothing is recorded, {VARIABLE}: {error}")
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        reaper.end_with_parent()  # else the ranks would outlive an agent that is killed
    _Script(began, files)


def _is_rank() -> bool:
    """False in kernels, launchers, and children of a rank, which inherit its variables."""
    is_child = getattr(multiprocessing.process.current_process(), "_inheriting", False)
    return os.environ.get("RANK", "").isdecimal() and _OWNER not in os.environ and not is_child


def _number(variable: str, default: int = 0) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default


class Files(NamedTuple):
    """A rank's files: two descriptors, and the writer of its span buffer."""

    facts: int
    buffer: SpanWriter
    stack: int


def _made(folder: Path, rank: int, epoch_ns: int) -> Files:
    """Create the files of a rank. Raises OSError, and then leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        facts, buffer, stack = (
            _new(folder / f"rank_{rank}.{epoch_ns}.{kind}", undo) for kind in KINDS
        )
        fcntl.flock(facts, fcntl.LOCK_EX)  # shows readers that this rank is alive
        os.ftruncate(buffer, REGION)
        prepare(buffer)
        for file in (facts, stack):
            reserve(file, 0, _ROOM)
        files = Files(facts, SpanWriter(buffer, rank, 0), stack)
        undo.pop_all()
    os.close(buffer)
    return files


def _new(path: Path, undo: contextlib.ExitStack) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    undo.callback(path.unlink, missing_ok=True)
    undo.callback(os.close, file)
    return file


class _Script:
    """The record of this process, from now to its end."""

    def __init__(self, began: Mapping[str, Any], files: Files) -> None:
        self._facts, self._stack = files.facts, files.stack
        self._identities = {file: identity(file) for file in (files.facts, files.stack)}
        self._written = 0  # bytes of facts
        self._whole = True  # all facts could be written so far
        self._in_turn = InTurn()
        self._pid = os.getpid()
        self._recorder = recording.Recorder(
            began["rank"],
            files.buffer,
            self._on_message,
            world_size=began["world_size"],
            one_clock=False,
        )
        self._write(began=began)
        self._noted: set[str] = set()
        self._recorder.sites.on_file = self._note_file
        # Unlike a Python handler, this one runs in a rank that waits in C. `chain` passes the
        # signal on, so that it then ends the rank.
        faulthandler.register(signal.SIGTERM, file=files.stack, all_threads=True, chain=True)
        os.register_at_fork(after_in_child=_tell_no_stack)
        install(self._recorder)
        if os.environ.get(NOTES):
            from ddp_lessons.instrumentation import notes  # which imports torch

            notes.start(self._recorder)
        main = vars(sys.modules["__main__"])
        self._note_file(main.get("__file__") or "")
        replace_in(main)
        self._raised = False
        self._show_error = sys.excepthook
        sys.excepthook = self._on_error
        atexit.register(self._on_exit)

    def _write(self, **fact: Any) -> None:
        """Append a line, from any thread."""
        if os.getpid() == self._pid:  # a forked child has our file, too
            data = json.dumps(fact).encode() + b"\n"
            most = facts.MOST_BYTES - (0 if fact.keys() & ENDS else ROOM_TO_END)
            self._in_turn(functools.partial(self._append, data, most))

    def _append(self, data: bytes, most: int) -> None:
        """Append a line, unless the file would then have more than `most` bytes.

        Once a line does not fit on the disk, write no more.
        """
        at = self._written
        if not self._whole or at + len(data) > most:
            return
        try:
            while data and self._has(self._facts):
                written = os.pwrite(self._facts, data, at)
                data, at = data[written:], at + written
        except OSError:
            pass
        self._whole, self._written = not data, at

    def _has(self, file: int) -> bool:
        """Whether a descriptor is still ours: a script may close those that it does not know."""
        try:
            return identity(file) == self._identities[file]
        except OSError:
            return False

    def _note_file(self, name: str) -> None:
        """Note the digest of a file of the learner's.

        `load_run` shows lines only of files with that digest: not of others, or changed ones.
        """
        if name not in self._noted and owner_of(name) is not Owner.LIBRARY:
            self._noted.add(name)
            if (digest := regular_files.digest(name)) is not None:
                self._write(file={"name": name, "sha256": digest})

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Handling | ThreadDied):
            self._note_files_of(message.error)
        if fact := facts.of_message(message):
            self._write(**fact)

    def _on_error(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._note_error(error)
        self._show_error(kind, error, trace)

    def _note_error(self, error: BaseException) -> None:
        if not self._raised:
            self._raised = True
            t_ns = time.perf_counter_ns()
            what = describe(error)
            self._note_files_of(what)
            self._write(raised={"t_ns": t_ns, **dataclasses.asdict(what)})

    def _note_files_of(self, error: ErrorRecord) -> None:
        for filename in _files_of(error):
            self._note_file(filename)

    def _on_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        # If an interrupt comes just before the hook above, Python does not call the hook.
        error = getattr(sys, "last_value", None)
        if error is not None:
            self._note_error(error)
        self._recorder.close()
        self._recorder.notice_unused_handles()
        self._write(ended={"t_ns": time.perf_counter_ns()})
        self._in_turn(self._give_room_back)
        ddp_traffic.release_groups(self._recorder)

    def _give_room_back(self) -> None:
        """Cut off the zeros; if SIGTERM comes now, faulthandler still appends its stack."""
        with contextlib.suppress(OSError):
            if self._has(self._facts):
                os.ftruncate(self._facts, self._written)
            if self._has(self._stack):
                os.ftruncate(self._stack, os.lseek(self._stack, 0, os.SEEK_CUR))


def _tell_no_stack() -> None:
    """In a child that a rank forked: SIGTERM does what the script has set, and no more."""
    handler = signal.getsignal(signal.SIGTERM)
    faulthandler.unregister(signal.SIGTERM)  # puts back what was set before the script began
    if handler is not None:  # else one that is not Python's: that one
        signal.signal(signal.SIGTERM, handler)


def _files_of(error: ErrorRecord) -> Iterator[str]:
    """The files of all frames of an exception and of its causes."""
    before: ErrorRecord | None = error
    while before is not None:
        yield from dict.fromkeys(frame.filename for frame in before.frames)
        before = before.previous


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
        "agent": os.getppid(),
        "restarts": _number("TORCHELASTIC_RESTART_COUNT"),
        "clock": clock_id(),
        "epoch_ns": time.time_ns(),
        "t_ns": time.perf_counter_ns(),
    }
