"""What travels from a worker to the parent, and how it is framed on the pipe.

Both processes import this module. A worker calls `encode` and writes; the parent feeds what it
read to a `Decoder` and gets whole messages back. One direction, one message type per fact. That a
worker died needs no message: its pipes close.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_LENGTH = struct.Struct("<Q")


class Span(NamedTuple):
    """One stretch of time on one rank.

    `t0_ns` and `t1_ns` are `time.perf_counter_ns()` values, one clock for all processes of a host;
    `t1_ns` is None where the work never ended.

    Attributes
    ----------
    lane : str
        "process" (the rank's life), "main" or "thread 1" (what a thread of the learner's did),
        "comm" (asynchronous work in flight), "buckets" (DDP's gradient buckets in flight), "steps"
        (training steps), "gloo" or "nccl" (torch.profiler's own events) or "cuda" (times on the
        device).
    kind : str
        "compute" (marked work), "data" (the next batch), "comm" (a collective, send or recv),
        "issue" (a call that only started one), "wait" (blocked until asynchronous work is done) or
        "mark" (lanes "process" and "steps").
    step : int or None
        The training step in which it began.
    op : str or None
        The function of torch.distributed, such as "all_reduce".
    group : str or None
        "world", or a subgroup by its ranks: "ranks 0 2".
    seq : int or None
        The number of the call in its group; for send and recv, in its group, sender and receiver.
        Equal group and seq on two ranks are the same collective.
    nbytes : int or None
        The bytes of one rank's piece: the call's tensor, not the gathered or scattered whole.
    bucket : int or None
        The index of a gradient bucket.
    peer : int or None
        The other rank of a send or recv; the root of a broadcast, reduce, gather or scatter.
    tensor : str or None
        The dtype and shape of the call's tensor: "float32 (2, 3)"; of a list, "2 x " its first's.
    site : str or None
        The learner's line that made the call: its file, a colon and the line's number.
    failed : bool
        The call raised.
    """

    rank: int
    lane: str
    kind: str
    name: str
    t0_ns: int
    t1_ns: int | None
    step: int | None = None
    op: str | None = None
    group: str | None = None
    seq: int | None = None
    nbytes: int | None = None
    bucket: int | None = None
    peer: int | None = None
    tensor: str | None = None
    site: str | None = None
    failed: bool = False


@dataclass(frozen=True)
class Frame:
    """One line of a traceback or stack: where it is, and its source text ("" if unknown).

    `at_home` is true in the installed package that holds the launched function: such lines count
    as the learner's.
    """

    filename: str
    lineno: int
    function: str
    source: str = ""
    at_home: bool = False


@dataclass(frozen=True)
class ErrorRecord:
    """An exception as text and frames, so that it can be shown where its class is unknown.

    `text` is what a traceback ends with ("ValueError: no rank 7"), notes and all.
    `frames` run from the learner's function (first) to where it was raised (last).
    `previous` is the exception that came before it, and `link` says how ("cause", "context").
    """

    type_name: str
    text: str
    frames: tuple[Frame, ...]
    previous: ErrorRecord | None = None
    link: str = ""

    @property
    def summary(self) -> str:
        """Type and message in one line, as a traceback ends."""
        lines = self.text.splitlines() or [self.type_name]
        ends = re.compile(rf"(?:\S+\.)?{re.escape(self.type_name)}(?::|$)")
        return next((line for line in lines if ends.match(line)), lines[0])


# The types of error records that no rank made: what had started it was gone.
FORKSERVER, ENGINE = "ForkserverEnded", "EngineLost"


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
    """The function returned; `value` is its pickle."""

    t_ns: int
    value: bytes


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
