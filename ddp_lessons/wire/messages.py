"""What travels from a worker to the parent, and how it is framed on the pipe.

Both processes import this module. A worker calls `encode` and writes; the parent feeds what it
read to a `Decoder` and gets whole messages back. One direction, one message type per fact. That a
worker died needs no message: its pipes close.
"""

from __future__ import annotations

import pickle
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ddp_lessons.wire.records import ErrorRecord

_LENGTH = struct.Struct("<Q")
# Asks a worker for its Python stack. Where there are real-time signals it is one of them, as the
# others are the learner's; and not the last, which valgrind takes for itself.
STACK_SIGNAL: int = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR1


@dataclass(frozen=True)
class Started:
    """The worker is ready and calls the learner's function now."""

    t_ns: int


@dataclass(frozen=True)
class Joining:
    """`init_process_group` was called; the group gives up by itself after `timeout` seconds."""

    timeout: float | None


@dataclass(frozen=True)
class GivesUp:
    """A call that waits for other ranks gives up by itself after `timeout` seconds."""

    timeout: float


@dataclass(frozen=True)
class Clock:
    """The rank's clock is `behind_ns` behind rank 0's, give or take `within_ns`."""

    behind_ns: int
    within_ns: int


@dataclass(frozen=True)
class Returned:
    """The function returned; `value` is its pickle.

    The process ends only after `threads`, those of the learner's that still run: their names by
    their identifiers.
    """

    t_ns: int
    value: bytes
    threads: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raised:
    """The function raised; `exception` is its pickle if it has one."""

    t_ns: int
    error: ErrorRecord
    exitcode: int
    exception: bytes | None = None


@dataclass(frozen=True)
class Unsendable:
    """The function returned a value that cannot be pickled."""

    t_ns: int
    type_name: str
    reason: str


Message = Started | Joining | GivesUp | Clock | Returned | Raised | Unsendable


def encode(message: Message) -> bytes:
    """The message's bytes for the pipe: its length (8 bytes, little endian), then its pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns the bytes of one worker's pipe, in whatever pieces they arrive, back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield every message that `data` completes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            # The bytes come from a worker of this run over a private pipe: DESIGN, Security.
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            yield pickle.loads(body)
