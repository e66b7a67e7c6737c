"""What a run came to: `Run` and `RankResult`, and how they look as text and in a notebook.

Lives in the parent. The text carries no timings, so a notebook's stored output is the same on
every run; timings are for the pictures. Whatever a worker printed is escaped before it is HTML.
"""

from __future__ import annotations

import html
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddp_lessons import analysis, diagnosis, meetings, stacks, trace, wording
from ddp_lessons.analysis import Link, Overlap, Straggler, Total
from ddp_lessons.errors import LaunchError
from ddp_lessons.meetings import Arrival, Share
from ddp_lessons.messages import ENGINE, ErrorRecord, Frame, Span
from ddp_lessons.output import cut_lines
from ddp_lessons.verdict import Verdict

LINES_SHOWN = 1000  # of all ranks together

# Lines of torch's log with the time of day: its store warns where no name server answers, which
# does not matter on loopback; gloo says what its exceptions say, too.
_NOISE = re.compile(
    r"\[W.*socket\.cpp:\d+\] \[c10d\] The hostname of the client socket cannot be "
    r"|(?:\[rank\d+\]:)?\[E.*ProcessGroupGloo\.cpp:\d+\] "
    r"(?:.*\bmonitoredBarrier\b|Gloo connectFullMesh failed )"
)

# What its store logs of a lost connection, with a C++ traceback, before the exception says it.
_LOST_STORE = re.compile(
    r"^\[W.*TCPStore\.cpp:\d+\] .*\n"
    r"(?:Exception raised from .*\n(?:(?:frame #|<omitting ).*\n)*\n?)?",
    re.MULTILINE,
)

Status = Literal["returned", "raised", "died", "stopped", "unsendable"]
Activity = Literal["busy", "idle", "suspended"]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200  # characters
_short.maxlist = _short.maxtuple = _short.maxdict = 12  # items


@dataclass(frozen=True)
class RankResult:
    """What came of one rank.

    Attributes
    ----------
    rank : int
        The rank, from 0 to world_size - 1.
    status : str
        "returned", "raised", "died" (ended by a signal or os._exit), "stopped" (by the launcher,
        after another rank's failure, a hang or an interrupt; or it still runs, see `pid`) or
        "unsendable" (its return value).
    value : object
        What the function returned; None unless it returned.
    output : str
        What the rank wrote to stdout and stderr, in order; at most 1 MiB of it.
    error : ErrorRecord or None
        The exception that it raised.
    exception : BaseException or None
        The exception itself, where it could be pickled.
    exitcode : int or None
        The exit code of its process; minus the signal's number if a signal ended it. None if it is
        not known, as in the record of a script that was killed.
    spans : tuple of Span
        What it did when, in the order in which it began; at least one span of its life.
    stack : tuple of Frame
        Where it was when it was stopped; empty if it was not.
    activity : str or None
        What it did when it was stopped: "busy" (it used the processor), "idle" or "suspended".
    dropped : int
        Spans that were not kept because there were too many.
    group_rank : int
        The number of its machine, from 0.
    host : str or None
        The name of its machine; None for this one.
    pid : int or None
        The process id of a rank that still runs, where a record was read meanwhile.
    began_ns : int
        `time.perf_counter_ns()` when its process was asked for.
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
    activity: Activity | None = None
    dropped: int = 0
    group_rank: int = 0
    host: str | None = None
    pid: int | None = None

    @property
    def seconds(self) -> float:
        """How long the function ran, in seconds; 0 if it was never called."""
        return (self.ended_ns - self.started_ns) / 1e9 if self.started_ns else 0.0

    @property
    def lines(self) -> list[str]:
        """The output, line by line."""
        return self.output.splitlines()

    @property
    def shown_lines(self) -> list[str]:
        """The lines without those that say nothing to a learner."""
        lines = _LOST_STORE.sub("", self.output).splitlines()
        return [line for line in lines if not _NOISE.match(line)]

    def outcome(self) -> str:
        """The outcome in one line, without timings."""
        match self.status:
            case "returned":
                return f"returned {_short.repr(self.value)}"
            case "raised":
                return f"raised {self.error.summary if self.error else ''}"
            case "unsendable":
                return "returned a value that cannot be pickled"
            case "died" if self.error is not None and self.error.type_name == ENGINE:
                return f"was lost: {self.error.summary}"
            case "died":
                return f"died: {wording.exit_name(self.exitcode)}"
            case "stopped":
                now = "stopped" if self.pid is None else "still runs"
                return f"{now}{stacks.waiting_where(self.stack)}"


class Run:
    """The record of one launch: every rank's value, output, error and spans.

    `launch` makes it. It says the same whether the run went well or not; `explain` tells why not.

    Attributes
    ----------
    name : str
        What was run: the name of the function.
    ranks : list of RankResult
        What came of each rank, by rank.
    verdict : Verdict or None
        Why the run failed or hung; None if it did not.
    error : LaunchError or None
        The error that `launch` raises with ``check=True``.
    warnings : list of str
        Lines on what went wrong without a failure, such as calls that changed places.
    hung_after : float or None
        Seconds without progress after which the run was given up; None if it was not.
    interrupted : bool
        It was stopped by an interrupt.
    begin_ns : int
        `time.perf_counter_ns()` when it began.
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
        self.out_of_memory = out_of_memory  # the system killed a process for want of memory
        self.recorded = recorded  # by a script, and loaded
        self.verdict: Verdict | None = diagnosis.verdict(self)
        self.error: LaunchError | None = diagnosis.error(self)
        self.warnings = diagnosis.warnings(self)  # lines on what went wrong without a failure

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

    def spans(self) -> list[Span]:
        """The spans of all ranks on one clock, by start time (`t0_ns`, in nanoseconds)."""
        return sorted((s for rank in self.ranks for s in rank.spans), key=lambda s: s.t0_ns)

    def waits(self) -> list[Share]:
        """Every rank's part in every collective, split into waiting and transfer.

        A list of named tuples, as of all methods here: `pandas.DataFrame(run.waits())` is a table.
        See `meetings.Share` for the fields.
        """
        return meetings.waits(self)

    def arrivals(self) -> list[Arrival]:
        """How much later than the first each rank came to a collective; see `meetings.Arrival`."""
        return meetings.arrivals(self)

    def overlap(self) -> list[Overlap]:
        """How much communication was exposed and overlapped, by step; see `analysis.Overlap`."""
        return analysis.overlap(self)

    def totals(self) -> list[Total]:
        """What each rank's time went on; see `analysis.Total`."""
        return analysis.totals(self)

    def straggler(self) -> Straggler:
        """Who keeps the others waiting, and whether it is always the same rank."""
        return analysis.straggler(self)

    def bandwidth(self) -> list[Link]:
        """Latency and bandwidth of each collective that was called with several sizes."""
        return analysis.bandwidth(self)

    def save_trace(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write what every rank did when, for Perfetto and HolisticTraceAnalysis.

        A name that ends in .json or .json.gz becomes one file of all ranks. Any other name is a
        folder: one file a rank, and merged/all_ranks.json. Returns the files. See `trace.save`.
        """
        return trace.save(self, path)

    def explain(self) -> str:
        """What failed or hung and why; one line if nothing did."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        return "\n".join([f"{wording.all_ranks(self.world_size)} returned.", *self.warnings])

    def raise_for_failure(self) -> None:
        """Raise the error of this run, if it has one."""
        if self.error is not None:
            cause = None if self.error.rank is None else self.ranks[self.error.rank].exception
            raise self.error from cause

    def output_lines(self) -> list[str]:
        """What the ranks printed, grouped by rank and labelled, at most about 1,000 lines."""
        labelled = {
            r.rank: [f"[rank {r.rank}] {line}" for line in r.shown_lines] for r in self.ranks
        }
        if sum(map(len, labelled.values())) <= LINES_SHOWN:
            return [line for lines in labelled.values() for line in lines]
        fair = max(2, LINES_SHOWN // self.world_size)
        return [
            line if line.startswith("[rank") else f"[rank {rank}] {line}"
            for rank, lines in labelled.items()
            for line in cut_lines(lines, fair)
        ]

    def __repr__(self) -> str:
        head = f"Run of {self.name} on {wording.count(self.world_size, 'rank')}"
        return "\n".join([f"{head}:", *(f"  rank {r.rank} {r.outcome()}" for r in self.ranks)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:right'>{r.rank}</td>"
            f"<td style='text-align:left'>{_mark(r.status)}</td>"
            f"<td style='text-align:left'><code>{html.escape(r.outcome())}</code></td></tr>"
            for r in self.ranks
        )
        head = f"{html.escape(self.name)} on {wording.count(self.world_size, 'rank')}"
        return (
            f"<table><caption style='text-align:left'><b>{head}</b></caption>"
            f"<tr><th>rank</th><th></th><th style='text-align:left'>outcome</th></tr>{rows}</table>"
        )


def _mark(status: Status) -> str:
    return {"returned": "✓", "stopped": "■"}.get(status, "✗")
