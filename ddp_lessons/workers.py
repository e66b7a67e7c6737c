"""One rank as its parent sees it, wherever its process runs: what is known of it so far.

Runs in the parent. `processes.py` has the ranks of this machine, `remote.py` those on the engines
of a cluster.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_lessons.messages import (
    Clock,
    Decoder,
    ErrorRecord,
    GivesUp,
    Joining,
    Raised,
    Returned,
    Span,
    Started,
    Unsendable,
)
from ddp_lessons.output import OutputBuffer
from ddp_lessons.task import Place

if TYPE_CHECKING:
    from ddp_lessons.results import Activity

STACK_SIGNAL = signal.SIGUSR1  # asks a worker for its Python stack
UNKNOWN_EXIT = 255  # what multiprocessing makes of a forkserver that no longer answers
NOTED_OVER = 0.4  # seconds, at least, over which use of the processor is measured
CHANNELS = MESSAGES, OUTPUT, STACKS = range(3)  # the pipes that come from a rank


class Worker(ABC):
    """One rank: a process, and what came through the three pipes from it.

    Through MESSAGES come framed facts (`messages.py`), through OUTPUT whatever the rank writes to
    its stdout and stderr, through STACKS what faulthandler prints when asked where the rank is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.host: str | None = None  # None: this machine
        self.output = OutputBuffer()
        self.stack_text = ""
        self.began_ns = time.perf_counter_ns()
        self.started_ns: int | None = None
        self.ended_ns: int | None = None
        self.own_timeout: float | None = None  # seconds after which it gives up by itself
        self.outcome: Returned | Raised | Unsendable | None = None
        self.clock: Clock | None = None  # against rank 0's, if they were compared
        self.exitcode: int | None = None
        self.lost: ErrorRecord | None = None  # why nobody can tell how it ended
        self.stopped = False  # the parent ended it
        self.activity: Activity | None = None  # what it did when it was stopped
        self.queued = False  # when last noted, it stood in the queue for a processor for long
        self.sending = False  # when last noted, data of its was on the way to another rank
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
        """True if the rank raised, died or returned what cannot be sent; not if it was stopped."""
        if isinstance(self.outcome, Raised | Unsendable):
            return True
        return self.exitcode is not None and self.outcome is None and not self.stopped

    def take(self, channel: int, data: bytes) -> None:
        """Take in what came through a pipe."""
        if channel == STACKS:
            self.stack_text += data.decode("utf-8", errors="backslashreplace")
            return
        self.moved_at = time.monotonic()
        if channel == OUTPUT:
            self.output.feed(data)
        else:
            self._read_messages(data)

    @abstractmethod
    def spans(self) -> Sequence[Span]:
        """What is on its tape."""

    @abstractmethod
    def dropped(self) -> int:
        """How many spans the tape did not keep."""

    @abstractmethod
    def note_activity(self) -> None:
        """See whether the rank uses a processor, waits for one, or has data on the way."""

    @abstractmethod
    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank's own process."""

    @abstractmethod
    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the rank and its children, which share its process group."""

    def give_up(self) -> None:  # noqa: B027
        """Count it as ended, where it may be that it never answers."""

    def _read_messages(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message:
                case Started(t_ns):
                    self.started_ns = t_ns
                case Joining(timeout):
                    self.own_timeout = timeout
                case GivesUp(timeout):
                    self.own_timeout = min(timeout, self.own_timeout or timeout)
                case Clock():
                    self.clock = message
                case Returned(t_ns) | Raised(t_ns) | Unsendable(t_ns):
                    self.outcome = message
                    self.ended_ns = t_ns
