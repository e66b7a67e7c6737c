"""The messages that a worker sends to its parent, and how they are framed on the pipe.

Both processes import this module. A worker calls `encode` and writes; the parent feeds what it
read to a `Decoder` and gets whole messages back. Messages go one way, one type per fact. A worker
that dies sends none: its pipes close. What a function returned may lie in a file (parcels.py),
whose descriptor travels beside the message.
"""

from __future__ import annotations

import pickle
import signal
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.wire.records import (
    ErrorRecord,
    Frame,
    FrameVariables,
    Mistake,
    Noted,
    Report,
    Timeout,
)

_LENGTH = struct.Struct("<Q")
# The parent sends it to ask a worker for its Python stack. A real-time signal where there are any,
# because the learner may use the others; not the last one, which valgrind uses.
STACK_SIGNAL: int = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR1


@dataclass(frozen=True)
class Started:
    """The worker is ready and calls the learner's function now."""

    t_ns: int


@dataclass(frozen=True)
class GivesUp:
    """A call that waits for other ranks gives up by itself after this timeout."""

    timeout: Timeout


@dataclass(frozen=True)
class Handling:
    """A call of torch.distributed was made in an `except` block, which handles `error`.

    `site` is the line of the call, and `t0_ns` when it began.
    """

    site: str
    error: ErrorRecord
    t0_ns: int


@dataclass(frozen=True)
class Unseen:
    """The rank communicates in a way that is not recorded: "RPC"."""

    what: str


@dataclass(frozen=True)
class ThreadCalls:
    """A thread other than the main one makes its first call of torch.distributed, on this lane."""

    lane: str
    thread: str


@dataclass(frozen=True)
class ThreadDied:
    """An exception ended a thread other than the main one."""

    thread: str
    error: ErrorRecord


@dataclass(frozen=True)
class PostMortem:
    """The frames in which the function failed, outermost first, with their variables."""

    frames: tuple[FrameVariables, ...]


@dataclass(frozen=True)
class Displayed:
    """What the rank displayed: `data`, and metadata, by MIME type.

    A display with the same `display_id` as one before takes its place.
    """

    data: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    display_id: str | None = None


@dataclass(frozen=True)
class Clock:
    """The rank's clock is `behind_ns` behind rank 0's, give or take `within_ns`."""

    behind_ns: int
    within_ns: int


@dataclass(frozen=True)
class Returned:
    """The function returned `value`.

    `threads` are the learner's threads that still run, their names by identifier: the process waits
    for them before it ends. `exited` is the stack of a `sys.exit(0)` by which it left instead.
    """

    t_ns: int
    value: Parcel
    threads: dict[int, str] = field(default_factory=dict)
    exited: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Raised:
    """The function raised; `exception` is its pickle if it has one."""

    t_ns: int
    error: ErrorRecord
    exitcode: int
    exception: bytes | None = None


@dataclass(frozen=True)
class Unsendable:
    """The function returned a value that cannot be sent."""

    t_ns: int
    type_name: str
    reason: str


@dataclass(frozen=True)
class WrittenPages:
    """The pages of memory that the rank has written, see worker/written_pages.py."""

    pieces: bytes


Message = (
    Started
    | GivesUp
    | Handling
    | Unseen
    | ThreadCalls
    | ThreadDied
    | PostMortem
    | Displayed
    | Report
    | Mistake
    | Noted
    | Clock
    | Returned
    | Raised
    | Unsendable
    | WrittenPages
)


@dataclass
class Told:
    """What a rank has told of itself so far, by the fields of `results.RankResult`."""

    handling: Handling | None = None
    unseen: tuple[str, ...] = ()
    timeouts: tuple[Timeout, ...] = ()
    threads: dict[str, str] = field(default_factory=dict)
    dead_threads: tuple[tuple[str, ErrorRecord], ...] = ()
    post_mortem: tuple[FrameVariables, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    reports: list[Report] = field(default_factory=list)
    displays: list[Displayed] = field(default_factory=list)
    noted: Noted | None = None

    def take(self, message: Message) -> None:
        """Take in a message, if it is of this kind."""
        match message:
            case GivesUp(timeout):
                self.timeouts += (timeout,)
            case ThreadCalls(lane, thread):
                self.threads[lane] = thread
            case ThreadDied(thread, error):
                self.dead_threads += ((thread, error),)
            case Report():
                self.reports.append(message)
            case Displayed():
                self._show(message)
            case PostMortem(frames):
                self.post_mortem = frames
            case Handling():
                self.handling = message
            case Unseen(what):
                self.unseen += (what,)
            case Mistake():
                self.mistakes += (message,)
            case Noted():
                self.noted = message

    def _show(self, new: Displayed) -> None:
        same = [old.display_id == new.display_id is not None for old in self.displays]
        if any(same):
            self.displays[same.index(True)] = new
        else:
            self.displays.append(new)


def encode(message: Message) -> tuple[bytes, Connection | None]:
    """The message's bytes: its length (8 bytes, little endian), then its pickle.

    The file, if there is one, must be sent with the first of them.
    """
    file = message.value.file if isinstance(message, Returned) else None
    if isinstance(message, Returned):
        message = replace(message, value=message.value.without_file())
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body, file


class Decoder:
    """Turns the bytes of one worker's pipe, in whatever pieces they arrive, back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._files: deque[Connection] = deque()

    def feed(self, data: bytes, files: Iterable[Connection] = ()) -> Iterator[Message]:
        """Yield every message that `data` completes; `files` came with it."""
        self._buffer += data
        self._files.extend(files)
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            # Safe to unpickle: the bytes come from a worker of this run, over a private pipe.
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            message: Message = pickle.loads(body)
            if isinstance(message, Returned) and message.value.sizes:
                # Where descriptors run short, the system drops the file's.
                file = self._files.popleft() if self._files else None
                message = replace(message, value=replace(message.value, file=file))
            yield message
