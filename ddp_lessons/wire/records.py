"""Plain data about a rank: spans, stack frames, errors. Workers make it, the parent reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Lane(StrEnum):
    """The row of the timeline that a span is on; more threads are on "thread 1" and so on."""

    PROCESS = "process"
    MAIN = "main"
    COMM = "comm"
    BUCKETS = "buckets"
    STEPS = "steps"
    GLOO = "gloo"
    NCCL = "nccl"
    CUDA = "cuda"

    __repr__ = str.__repr__  # a printed span shows 'main', as one would compare it


class Kind(StrEnum):
    """What a span shows. span_buffer.py stores a kind as its position here."""

    COMPUTE = "compute"
    ISSUE = "issue"
    COMM = "comm"
    WAIT = "wait"
    DATA = "data"
    MARK = "mark"

    __repr__ = str.__repr__


IN_FLIGHT = (Lane.COMM, Lane.BUCKETS)  # lanes whose spans overlap by chance, without nesting
PROFILED = (Lane.GLOO, Lane.NCCL)  # what torch.profiler saw of the same communication
NOT_OF_A_THREAD = (Lane.PROCESS, Lane.STEPS, *IN_FLIGHT, *PROFILED, Lane.CUDA)

MOST_SUMMARY = 500  # characters


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
        The number of the call in its group; for send and recv, in its group, sender, receiver and
        tag.
        Equal group and seq on two ranks are the same collective.
    nbytes : int or None
        The bytes of one rank's piece: the call's tensor, not the gathered or scattered whole.
    bucket : int or None
        The index of a gradient bucket.
    peer : int or None
        The other rank of a send or recv; the root of a broadcast, reduce, gather or scatter.
    tensor : str or None
        The dtype and shape of the call's tensor: "float32 (2, 3)"; of a list of two, "2 x float32
        (2, 3)" with those of the first.
    site : str or None
        The learner's line that made the call, or on the lane "steps" the optimizer's step: its
        file, a colon and the line's number.
    failed : bool
        The call raised.
    tag : int or None
        The tag of a send or recv.
    cpu_ns : int or None
        How long the rank's main thread had used a processor when the span began. Read every 20 ms
        at most, and not where CUDA is used.
    queued_ns : int or None
        How long it had waited for a processor, ready to run, by then.
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
    tag: int | None = None
    cpu_ns: int | None = None
    queued_ns: int | None = None


def split_site(site: str) -> tuple[str, int]:
    """The file and the number of the line."""
    filename, _, number = site.rpartition(":")
    return filename, int(number)


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
    `previous` is the exception that came before it, and `link` says how ("cause", "context");
    `left_out` exceptions between the two are not kept. `parts` are the exceptions in a group, and
    `parts_left_out` how many more there were.
    """

    type_name: str
    text: str
    frames: tuple[Frame, ...]
    previous: ErrorRecord | None = None
    link: str = ""
    left_out: int = 0
    parts: tuple[ErrorRecord, ...] = ()
    parts_left_out: int = 0

    @property
    def summary(self) -> str:
        """Type and message in one line, as a traceback ends; the first 500 characters of it."""
        lines = self.text.splitlines() or [self.type_name]
        ends = re.compile(rf"(?:\S+\.)?{re.escape(self.type_name)}(?::|$)")
        line = next((line for line in lines if ends.match(line)), lines[0])
        return line if len(line) <= MOST_SUMMARY else f"{line[:MOST_SUMMARY]}..."


class FrameVariables(NamedTuple):
    """A frame of a failure, and its local variables: names and values as text."""

    frame: Frame
    variables: tuple[tuple[str, str], ...]


class Caught(NamedTuple):
    """An exception that the learner's code caught, and then went on.

    Attributes
    ----------
    t_ns : int
        When.
    error : str
        Its type and the first line of its message: "ValueError: bad sample 17".
    raised : str
        The learner's innermost line in its traceback.
    passed : str
        The line through which it came out of the `try` or `with`.
    handler : str
        The line of the `except`, or of the `with`, that caught it.
    """

    t_ns: int
    error: str
    raised: str
    passed: str
    handler: str


class Report(NamedTuple):
    """Numbers that a rank reported at a moment, by name."""

    t_ns: int
    values: dict[str, float]


class Timeout(NamedTuple):
    """A timeout of the learner's: after so many seconds a call gives up by itself.

    `call` is the function that got it ("init_process_group", "Work.wait"), `site` that line.
    """

    seconds: float
    call: str
    site: str | None


class Mistake(NamedTuple):
    """A mistake that a rank noticed in its own calls of `op` at a line, though nothing failed.

    `kind` is one of `MISTAKES`.
    """

    kind: str
    op: str
    site: str


OVERLAPPING, NOT_AWAITED, CHANGED = "overlapping outputs", "never waited for", "changed too early"
MISTAKES = (OVERLAPPING, NOT_AWAITED, CHANGED)
MOST_MISTAKES = 20  # that a rank tells of


class Batches(NamedTuple):
    """What one line of a rank took from a DataLoader with so many `workers`, as checksums.

    `draws` counts how often random numbers were drawn meanwhile; with workers, how many seeds they
    got. See instrumentation/notes.py.
    """

    site: str
    batches: int
    samples: int
    digest: int
    draws: int
    drawn: int
    workers: int


class Noted(NamedTuple):
    """What a rank noted on request.

    `weights` are checksums of the parameters of each DDP model by name, `rates` the last learning
    rates of each optimizer as text.
    """

    weights: tuple[dict[str, int], ...]
    rates: tuple[str, ...]
    batches: tuple[Batches, ...]


# `type_name` of the errors that the parent makes when the process that started a rank is gone.
FORKSERVER, ENGINE, NOT_LOADED = "ForkserverEnded", "EngineLost", "NotLoaded"
