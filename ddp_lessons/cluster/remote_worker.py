"""A rank on a cluster's engine as the notebook sees it: polls the engine and sends it signals.

Runs in the parent, called by worker_group.py; `engine.py` is the other side. Everything goes
through the channels of the ipyparallel client that the learner connected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddp_lessons.cluster.engine import (
    LEASE,
    PollReply,
    PollRequest,
    RemoteCall,
    Signal,
    StartRequest,
)
from ddp_lessons.processes.base import UNKNOWN_EXIT, Worker
from ddp_lessons.wire.records import ENGINE, Caught, ErrorRecord, Span
from ddp_lessons.wire.task import RankInfo

SHORTEST, LONGEST = 0.2, 0.5  # seconds that an engine waits for news before it replies
SILENT = 5.0  # seconds without a reply after which to ask the controller
RETRIES = 5  # polls in a row that may fail


_ENDED = (
    "Its rank ended with it. It was killed or stopped, or its host is gone: the cluster's logs may "
    "tell. Start an engine in its place, or launch on those that are left."
)
_CLOSED = (
    "The cluster was stopped, its host is gone, or the client was closed. The engines end their "
    f"ranks by themselves within {LEASE:.0f} seconds. Start the cluster, connect a new client, and "
    "launch again."
)
_FORGOTTEN = (
    f"An engine ends a rank that nobody asks for in {LEASE:.0f} seconds: the notebook's process "
    "stood still, or the network between them."
)
_SILENT = (
    "It carries out another task, was suspended, or cannot be reached. It ends the rank when it "
    "goes on."
)


def send_call(client: Any, number: int, name: str, *args: Any) -> Any:
    """Have an engine call one of its functions; return the AsyncResult, None if it has ended.

    Raises OSError if there is no connection to the cluster.
    """
    from ipyparallel import error

    try:
        return client[number].apply_async(RemoteCall(name), *args)
    except (LookupError, error.NoEnginesRegistered):  # it ended, or was the last one and did
        return None


@dataclass(frozen=True)
class Engine:
    """An engine of a cluster, and the facts that it reported."""

    id: int
    host: str
    machine: str  # its host; differs between containers on the same host
    clock: str
    ahead_ns: int  # how far its clock is ahead of the notebook's, about
    address: str | None  # of its host, for other hosts

    def __str__(self) -> str:
        return f"engine {self.id} on host {self.host}"


class RemoteWorker(Worker):
    """A rank on an engine."""

    def __init__(self, place: RankInfo, engine: Engine, client: Any, run: str) -> None:
        super().__init__(place)
        self.engine = engine
        self.host = engine.host
        self.began_ns += engine.ahead_ns
        self.out_of_memory: bool | None = None
        self.pid: int | None = None
        self.pending: Any = None  # the AsyncResult of the poll that is on its way
        self._polled_at = 0.0
        self._client = client
        self._run = run
        self._asked_to_start = False
        self._heard = 0
        self._signals: list[Signal] = []
        self._on_their_way: tuple[Signal, ...] = ()
        self._note_activity = False
        self._failures = 0
        self._progress = 0
        self._spans: Sequence[Span] = ()
        self._dropped = 0
        self._caught: Sequence[Caught] | None = None

    @property
    def alive(self) -> bool:
        return self._asked_to_start and self.exitcode is None

    def call(self, name: str, *args: Any) -> Any:
        """Have the engine call one of its functions; return the AsyncResult.

        None if the engine has ended, or there is no connection to it.
        """
        try:
            result = send_call(self._client, self.engine.id, name, self._run, *args)
        except OSError as error:
            self.lose(f"the connection to the cluster is closed: {error}", _CLOSED)
            return None
        if result is None:
            self.lose(f"{self.engine} has ended", _ENDED)
        return result

    def start(self, order: StartRequest) -> Any:
        """Ask the engine to start the process; return the AsyncResult."""
        self._asked_to_start = True
        return self.call("start", order)

    def ask(self) -> None:
        """Send a poll, unless one is on its way."""
        if self.pending is not None:
            return
        self._on_their_way, self._signals = tuple(self._signals), []
        request = PollRequest(
            self._patience(), self._heard, self._on_their_way, self._note_activity
        )
        self.pending = self.call("news", request)
        self._polled_at, self._note_activity = time.monotonic(), False

    def _patience(self) -> float:
        """Seconds that the engine may take to reply: the more, the longer nothing has moved."""
        return min(LONGEST, max(SHORTEST, (time.monotonic() - self.moved_at) / 10))

    def is_silent(self) -> bool:
        """True if the engine has not replied for longer than an idle one ever takes."""
        return self.pending is not None and time.monotonic() - self._polled_at > SILENT

    def hear(self) -> None:
        """Take in the reply, if it has come."""
        if self.pending is None or not self.pending.done():
            return
        from ipyparallel import error

        pending, self.pending = self.pending, None
        try:
            news = pending.result(timeout=0)
        except error.IPythonError as failure:  # the engine ended; the task was aborted; ...
            self._not_answered(failure)
        else:
            self._failures = 0
            self._take_news(news)

    def _not_answered(self, failure: Exception) -> None:
        if getattr(failure, "ename", "") == "EngineError" or self.engine.id not in self._client.ids:
            self.lose(f"{self.engine} has ended", _ENDED)
            return
        self._signals = [*self._on_their_way, *self._signals]
        self._failures += 1
        if self._failures > RETRIES:
            self.lose(f"{self.engine} cannot tell what its rank does", str(failure))

    def _take_news(self, news: PollReply | None) -> None:
        if news is None:
            self.lose(f"{self.engine} has no rank of this run any more", _FORGOTTEN)
            return
        if news.number <= self._heard:
            return
        self._heard = news.number
        for channel, data in news.pieces:
            self.take(channel, data)
        if news.progress != self._progress:
            self._progress, self.moved_at = news.progress, time.monotonic()
        self.activity = news.activity or self.activity
        self.queued, self.starved = news.queued, news.starved
        if news.end is not None:
            self.exitcode, self.lost = news.end.exitcode, news.end.lost
            self.ended_ns = self.ended_ns or news.end.ended_ns
            self._spans, self._dropped = news.end.spans, news.end.dropped
            self._caught = news.end.caught
            self.out_of_memory = news.end.out_of_memory
            self.moved_at = time.monotonic()

    def lose(self, what: str, why: str) -> None:
        """Count the rank as ended, since it cannot be known any more how it ends."""
        if self.exitcode is None:
            self.exitcode = UNKNOWN_EXIT
            self.ended_ns = self.ended_ns or time.perf_counter_ns() + self.engine.ahead_ns
            self.moved_at = time.monotonic()
            if self.outcome is None:
                self.lost = ErrorRecord(ENGINE, f"{what}\n{why}", ())

    def lose_controller(self) -> None:
        """Count the rank as ended, since the cluster's controller is gone."""
        self.lose("the cluster's controller does not answer", _CLOSED)

    def give_up(self) -> None:
        self.lose(f"{self.engine} did not answer when its rank was to end", _SILENT)

    def spans(self) -> Sequence[Span]:
        return self._spans

    def dropped(self) -> int:
        return self._dropped

    def caught(self) -> Sequence[Caught] | None:
        return self._caught

    def note_activity(self) -> None:
        self._note_activity = True

    def send_signal(self, number: int) -> None:
        self._signals.append(Signal(number, group=False))

    def signal_group(self, number: int) -> None:
        self._signals.append(Signal(number, group=True))

    def shift(self, by_ns: int) -> None:
        """Put all times on another clock, which is `by_ns` ahead of the rank's own."""
        self.began_ns += by_ns
        self.started_ns = None if self.started_ns is None else self.started_ns + by_ns
        self.ended_ns = None if self.ended_ns is None else self.ended_ns + by_ns
        self._spans = [_shifted(span, by_ns) for span in self._spans]


def _shifted(span: Span, by_ns: int) -> Span:
    end_ns = None if span.t1_ns is None else span.t1_ns + by_ns
    return span._replace(t0_ns=span.t0_ns + by_ns, t1_ns=end_ns)
