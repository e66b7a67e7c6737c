"""`RankResult`, what became of one rank, and `RunRecord`, the plain record of a run.

They live in the parent: launcher/ and recorded_run.py create them; diagnosis, analysis and plots
read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ddp_lessons import text
from ddp_lessons.wire import stacks
from ddp_lessons.wire.messages import Displayed, Handling
from ddp_lessons.wire.records import (
    ENGINE,
    NOT_LOADED,
    Caught,
    ErrorRecord,
    Frame,
    FrameVariables,
    Mistake,
    Noted,
    Report,
    Span,
    Timeout,
)

# Lines of torch's log with the time of day: its store warns if no name server answers, which does
# not matter on loopback; gloo logs what its exceptions say anyway.
_NOISE = re.compile(
    r"\[W.*socket\.cpp:\d+\] \[c10d\] The hostname of the client socket cannot be "
    r"|(?:\[rank\d+\]:)?\[E.*ProcessGroupGloo\.cpp:\d+\] "
    r"(?:.*\bmonitoredBarrier\b|Gloo connectFullMesh failed )"
)

# What the store logs about a lost connection, with a C++ traceback, before it raises an exception.
_LOST_STORE = re.compile(
    r"^\[W.*TCPStore\.cpp:\d+\] .*\n"
    r"(?:Exception raised from .*\n(?:(?:frame #|<omitting ).*\n)*\n?)?",
    re.MULTILINE,
)

Status = Literal["returned", "raised", "died", "stopped", "unsendable"]
Activity = Literal["busy", "idle", "suspended"]


@dataclass(frozen=True)
class RankResult:
    """What became of one rank.

    Attributes
    ----------
    rank : int
        The rank, from 0 to world_size - 1.
    status : str
        "returned", "raised", "died" (ended by a signal or os._exit), "stopped" (by the launcher,
        after another rank's failure, a hang or an interrupt; or it still runs, see `pid`; also
        after its function had returned, see `kept_by`) or "unsendable" (its return value).
    value : object
        What the function returned; None if it did not return.
    output : str
        What the rank wrote to stdout and stderr, in order; at most 1 MiB of it.
    error : ErrorRecord or None
        The exception that it raised.
    exception : BaseException or None
        The exception itself, where it could be pickled, in at most 1 MiB.
    exitcode : int or None
        The exit code of its process; minus the signal's number if a signal ended it. None if it is
        unknown, as in the record of a script that was killed.
    spans : tuple of Span
        What it did when, in the order in which it began; at least one span of its life.
    stack : tuple of Frame
        Where it was when it was stopped, or where it left by ``sys.exit()``; else empty.
    kept_by : str or None
        What kept its process from ending after the function had returned, until it was stopped:
        "thread 'saver'", "an atexit handler", "a child process" of multiprocessing's or, if it did
        not answer, "its process".
    activity : str or None
        What it did when it was stopped: "busy" (it used the processor), "idle" or "suspended".
    dropped : int
        Spans that were not kept: there were too many, or no room for them.
    group_rank : int
        The number of its machine, from 0.
    host : str or None
        The name of its machine; None for this one.
    pid : int or None
        The process id of a rank that still ran when its record was read.
    handling : tuple or None
        The last call of torch.distributed that it made in an `except` block, and the exception
        that was handled there.
    caught : tuple of Caught or None
        The latest exceptions that its code caught and went on, at most 32, in order. None where
        that is unknown: before Python 3.12.
    unseen : tuple of str
        How it communicated without being recorded: "RPC", "DDP over mpi".
    timeouts : tuple of Timeout
        The timeouts that it gave to calls of torch.distributed, in order, at most 100.
    threads : dict
        The names of its threads, besides the main one, that called torch.distributed, by the lane
        of their spans.
    dead_threads : tuple
        The threads that an exception ended, at most 100: their names and the exceptions.
    post_mortem : tuple of FrameVariables
        The frames in which it failed, with their variables; see `frames`.
    reports : list of Report
        What it reported, in order; see `Run.reports`.
    displays : list of Displayed
        What it displayed in a notebook (`display`, `plt.show()`), each with `data` by MIME type; at
        most 50, of 8 MB.
    mistakes : tuple of Mistake
        Mistakes that it noticed in its own calls, though they raised nothing; see `Run.warnings`.
    noted : Noted or None
        What it noted for `Run.notes`; None unless that was asked for.
    began_ns : int
        `time.perf_counter_ns()` when its process was requested.
    started_ns : int or None
        When the function was called; None if it never was.
    ended_ns : int
        When the rank ended.
    """

    rank: int
    status: Status
    value: Any
    output: str
    error: ErrorRecord | None
    exitcode: int | None
    spans: tuple[Span, ...]
    began_ns: int
    started_ns: int | None
    ended_ns: int
    exception: BaseException | None = field(default=None, repr=False)
    stack: tuple[Frame, ...] = field(default=(), repr=False)
    kept_by: str | None = None
    activity: Activity | None = None
    dropped: int = 0
    group_rank: int = 0
    host: str | None = None
    pid: int | None = None
    handling: Handling | None = None
    caught: tuple[Caught, ...] | None = None
    unseen: tuple[str, ...] = ()
    timeouts: tuple[Timeout, ...] = ()
    threads: Mapping[str, str] = field(default_factory=dict)
    dead_threads: tuple[tuple[str, ErrorRecord], ...] = ()
    post_mortem: tuple[FrameVariables, ...] = field(default=(), repr=False)
    reports: Sequence[Report] = field(default=(), repr=False)
    displays: Sequence[Displayed] = field(default=(), repr=False)
    mistakes: tuple[Mistake, ...] = field(default=(), repr=False)
    noted: Noted | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """How long the function ran, in seconds; 0 if it was never called."""
        return (self.ended_ns - self.started_ns) / 1e9 if self.started_ns else 0.0

    @property
    def frames(self) -> tuple[FrameVariables, ...]:
        """The learner's frames in which it failed, outermost first, with their local variables.

        Empty without ``launch(..., post_mortem=True)``. Its text has a paragraph a frame.
        """
        return Frames(self.post_mortem)

    @property
    def lines(self) -> list[str]:
        """The output, line by line."""
        return self.output.splitlines()

    @property
    def shown_lines(self) -> list[str]:
        """The lines without those of torch's log that do not help a learner."""
        lines = _LOST_STORE.sub("", self.output).splitlines()
        return [line for line in lines if not _NOISE.match(line)]

    def outcome(self) -> str:
        """The outcome in one line, without timings."""
        match self.status:
            case "returned" if self.stack:
                return "left by sys.exit()"
            case "returned":
                return f"returned {text.short_repr(self.value)}"
            case "raised":
                return f"raised {self.error.summary if self.error else ''}"
            case "unsendable":
                loads = self.error is not None and self.error.type_name == NOT_LOADED
                return f"returned a value that cannot be {'loaded here' if loads else 'sent back'}"
            case "died" if self.error is not None and self.error.type_name == ENGINE:
                return f"was lost: {self.error.summary}"
            case "died":
                return f"died: {text.exit_name(self.exitcode)}"
            case "stopped" if self.kept_by is not None:
                where = stacks.waiting_where(self.stack)
                return f"returned {text.short_repr(self.value)}, but {self.kept_by} went on{where}"
            case "stopped":
                now = "stopped" if self.pid is None else "still runs"
                return f"{now}{stacks.waiting_where(self.stack)}"


class Frames(tuple[FrameVariables, ...]):
    """Frames of a failure, whose text shows their lines and variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self:
            return "no frames: nothing failed, or launch(..., post_mortem=True) was not asked for"
        return "\n\n".join("\n".join([*_heading(one.frame), *_variables(one)]) for one in self)


def _heading(frame: Frame) -> list[str]:
    head = f"{stacks.line_name(frame)}, in {frame.function}"
    return [f"{head}:  {frame.source}" if frame.source else head]


def _variables(one: FrameVariables) -> list[str]:
    return [f"    {name} = {value}" for name, value in one.variables] or ["    no variables"]


class RunRecord:
    """What is known of one launch: every rank's result, and how the whole ended.

    diagnosis and analysis read it; `Run` adds their results, and documents the attributes.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[RankResult],
        *,
        begin_ns: int,
        hung_after: float | None = None,
        interrupted: bool = False,
        out_of_memory: bool | None = None,
        recorded: bool = False,
    ) -> None:
        self.name = name
        self.ranks = list(ranks)
        self.begin_ns = begin_ns
        self.hung_after = hung_after
        self.interrupted = interrupted
        self.out_of_memory = out_of_memory  # the system ran out of memory and killed a process
        self.recorded = recorded  # loaded from the record of a script

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @property
    def values(self) -> list[Any]:
        """What each rank returned, by rank; None for a rank that did not return."""
        return [rank.value for rank in self.ranks]

    @property
    def ok(self) -> bool:
        """True if every rank returned."""
        return all(rank.status == "returned" for rank in self.ranks)

    @property
    def lossy(self) -> list[int]:
        """The ranks whose later spans were not kept, because their buffer or disk was full."""
        return [rank.rank for rank in self.ranks if rank.dropped]

    @property
    def unseen(self) -> list[str]:
        """How ranks communicated without being recorded: "RPC", "DDP over mpi"."""
        return sorted({what for rank in self.ranks for what in rank.unseen})

    def spans(self) -> list[Span]:
        """The spans of all ranks on one clock, by start time (`t0_ns`, in nanoseconds)."""
        return sorted((s for rank in self.ranks for s in rank.spans), key=lambda s: s.t0_ns)
