"""One rank as its parent sees it, and all ranks of a run: the base classes.

Runs in the parent, used by launcher/. local.py implements them for the ranks of this machine, the
package `cluster` for those on the engines of a cluster.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from ddp_lessons.processes.output import OutputBuffer
from ddp_lessons.results import Activity, RankResult, Status
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.wire import stacks
from ddp_lessons.wire.messages import (
    Clock,
    Decoder,
    Raised,
    Returned,
    Started,
    Told,
    Unsendable,
    WrittenPages,
)
from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.wire.records import NOT_LOADED, Caught, ErrorRecord, Kind, Lane, Span
from ddp_lessons.wire.task import RankInfo, Task

UNKNOWN_EXIT = 255  # the exit code that multiprocessing reports when the forkserver is gone
CPU_SAMPLE_SECONDS = 0.4  # least time over which use of the processor is measured
CHANNELS = MESSAGES, OUTPUT, STACKS = range(3)  # the pipes that come from a rank


class Worker(ABC):
    """One rank: a process, and what came through the three pipes from it.

    Through MESSAGES come framed facts (`messages.py`), through OUTPUT whatever the rank writes to
    its stdout and stderr, through STACKS what faulthandler prints when asked where the rank is.
    """

    def __init__(self, place: RankInfo) -> None:
        self.place = place
        self.host: str | None = None  # None: this machine
        self.output = OutputBuffer()
        self.stack_text = ""
        self.began_ns = time.perf_counter_ns()
        self.started_ns: int | None = None
        self.ended_ns: int | None = None
        self.outcome: Returned | Raised | Unsendable | None = None
        self.told = Told()
        self.written_pages: bytes | None = None
        self.clock: Clock | None = None  # against rank 0's, if they were compared
        self.exitcode: int | None = None
        self.lost: ErrorRecord | None = None  # why it is unknown how it ended
        self.stopped = False  # the parent ended it
        self.outcome_after_stop = False  # its outcome came after the parent began to end it
        self.activity: Activity | None = None  # what it did when last noted
        self.queued = False  # when last noted, it had to queue for a processor
        self.starved = 0.0  # and the share of the time in which it did
        self.moved_at = time.monotonic()  # when it last printed, finished a span, or ended
        self._decoder = Decoder()

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    @abstractmethod
    def alive(self) -> bool:
        """True from when its process was asked for until it has ended."""

    @property
    def failed(self) -> bool:
        """True if the rank raised, died or returned an unpicklable value; not if it was stopped."""
        if isinstance(self.outcome, Raised | Unsendable):
            return True
        return self.exitcode is not None and self.outcome is None and not self.stopped

    def take(self, channel: int, data: bytes, files: Sequence[Connection] = ()) -> None:
        """Take in data from a pipe, and the files that came with it."""
        if channel == STACKS:
            self.stack_text += data.decode("utf-8", errors="backslashreplace")
            return
        self.moved_at = time.monotonic()
        if channel == OUTPUT:
            self.output.feed(data)
        else:
            self._read_messages(data, files)

    @abstractmethod
    def spans(self) -> Sequence[Span]:
        """The spans in its buffer."""

    def calls_now(self) -> Sequence[tuple[str, int]]:
        """Calls of torch.distributed that go on, and when each began; none if that is unknown."""
        return ()

    @abstractmethod
    def dropped(self) -> int:
        """How many spans the buffer did not keep."""

    @abstractmethod
    def caught(self) -> Sequence[Caught] | None:
        """The latest exceptions that its code caught; None if that is unknown."""

    @abstractmethod
    def note_activity(self) -> None:
        """Note whether the rank uses a processor, or waits for one."""

    @abstractmethod
    def send_signal(self, number: int) -> None:
        """Send a signal to the rank's own process; STACK_SIGNAL only if it is prepared for it."""

    @abstractmethod
    def signal_group(self, number: int) -> None:
        """Send a signal to the rank and its children, which share its process group."""

    def give_up(self) -> None:  # noqa: B027
        """Count the rank as ended, if it may never answer."""

    def result(self, packed: Task, *, hung: bool) -> RankResult:
        """The result of the rank, which has ended; `hung` if its run was given up as hung."""
        assert self.exitcode is not None
        assert self.ended_ns is not None
        status: Status = "stopped" if self.stopped else "died"
        value, error, exception, kept = None, None, None, None
        stack = stacks.parse(self.stack_text, packed.home)
        match self.outcome:
            case Returned(_, parcel, threads, exited):
                status, value, error = _loaded(parcel)
                if self.stopped and status == "returned":
                    kept = stacks.what_keeps(self.stack_text, threads, packed.home)
                    if kept is None and hung and not self.outcome_after_stop:
                        kept = stacks.Keeper(stacks.PROCESS, ())
                if kept is not None:
                    status, stack = "stopped", kept.frames
                elif status == "returned":
                    stack = exited
            case Raised(_, record, _, data):
                status = "raised" if not self.outcome_after_stop else "stopped"
                error, exception = record, _exception(data)
            case Unsendable(_, type_name, reason):
                status, error = "unsendable", ErrorRecord(type_name, reason, ())
            case None:
                error = self.lost
        caught = self.caught()
        return RankResult(
            rank=self.rank,
            status=status,
            value=value,
            output=self.output.text(),
            error=error,
            exception=exception,
            exitcode=self.exitcode,
            spans=(*_life(self, packed.name), *self.spans()),
            began_ns=self.began_ns,
            started_ns=self.started_ns,
            ended_ns=self.ended_ns,
            stack=stack,
            kept_by=None if kept is None else kept.name,
            activity=self.activity,
            **vars(self.told),
            dropped=self.dropped(),
            caught=None if caught is None else tuple(caught),
            group_rank=self.place.group_rank,
            host=self.host,
        )

    def _read_messages(self, data: bytes, files: Sequence[Connection]) -> None:
        for message in self._decoder.feed(data, files):
            match message:
                case Started(t_ns):
                    self.started_ns = t_ns
                case Clock():
                    self.clock = message
                case Returned(t_ns) | Raised(t_ns) | Unsendable(t_ns):
                    self.outcome = message
                    self.outcome_after_stop = self.stopped
                    self.ended_ns = t_ns
                case WrittenPages(pieces):
                    self.written_pages = pieces
                case _:
                    self.told.take(message)


def _loaded(parcel: Parcel) -> tuple[Status, Any, ErrorRecord | None]:
    try:
        return "returned", parcel.load(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a learner's object raises while it is rebuilt
        return "unsendable", None, ErrorRecord(NOT_LOADED, stacks.text_of(error), ())


def _exception(data: bytes | None) -> BaseException | None:
    try:
        exception = pickle.loads(data) if data else None
    except KeyboardInterrupt:
        raise
    except BaseException:  # its class may not be importable here; its text travelled separately
        return None
    return exception if isinstance(exception, BaseException) else None


def _life(worker: Worker, name: str) -> list[Span]:
    """Two spans of lane "process": until the function was called, and from then to the end."""
    called = worker.started_ns or worker.ended_ns
    spans = [Span(worker.rank, Lane.PROCESS, Kind.MARK, "start-up", worker.began_ns, called)]
    if worker.started_ns is not None:
        spans.append(
            Span(worker.rank, Lane.PROCESS, Kind.MARK, name, worker.started_ns, worker.ended_ns)
        )
    return spans


class WorkerGroup(ABC):
    """The ranks of one run. A context manager; at its end all of them must have ended."""

    workers: Sequence[Worker]
    stack_wait = 2.0  # seconds that a rank has to print its stack, on a busy machine
    settle = 0.03  # seconds without new text after which a stack counts as complete

    def __init__(self) -> None:
        self.begin_ns = time.perf_counter_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def start(
        self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...], interrupts: Interrupts
    ) -> None:
        """Start all ranks.

        Raises CannotSend, LaunchError and KeyboardInterrupt; then some may have been started.
        """

    @abstractmethod
    def pump(self, seconds: float) -> None:
        """Take in what the ranks sent, waiting at most `seconds` for something to come."""

    def spans(self) -> list[Sequence[Span]]:
        """The spans in the ranks' buffers now, by rank."""
        return [worker.spans() for worker in self.workers]

    @abstractmethod
    def have_data_on_the_way(self) -> bool:
        """Whether a rank has sent data that another one has not received yet."""

    @abstractmethod
    def out_of_memory(self) -> bool | None:
        """Whether a system ran out of memory and killed a process meanwhile; None if unknown."""

    def end(self) -> None:  # noqa: B027
        """Put all times on the notebook's clock. Called once all ranks have ended."""

    @abstractmethod
    def close(self) -> None:
        """Release what the run held."""
