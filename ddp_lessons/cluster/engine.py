"""An engine's side of `launch(..., cluster=client)`: the engine is the parent of one rank.

Runs in engines, in their main thread, between the learner's own tasks; `remote_worker.py` calls it
from the notebook, by `RemoteCall`. If the notebook stops polling, the engine ends its rank by
itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_lessons.processes.activity import have_unsent_data
from ddp_lessons.processes.forkserver import end_orphans, start_method
from ddp_lessons.processes.local import Pump, WorkerProcess
from ddp_lessons.system import host, memory
from ddp_lessons.system.host import clock_id, reserve_port
from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.wire.records import Caught, ErrorRecord, Span
from ddp_lessons.wire.span_buffer import SpanBuffers
from ddp_lessons.wire.task import MasterAddress, RankInfo, Task

if TYPE_CHECKING:
    from ddp_lessons.results import Activity

LEASE = 15.0  # seconds without a poll after which the rank is ended
LOOK = 1.0  # seconds between two checks of the lease
SOON = 0.01  # seconds to wait for more data once some came
MOST = 1 << 22  # bytes in one reply, about
PACKAGES = ("torch", "ddp-lessons")


@dataclass(frozen=True)
class RemoteCall:
    """A call of a function of this module, by its name, that can be sent to an engine.

    ipyparallel would send the function's code, which only the same Python understands.
    """

    name: str

    def __call__(self, *args: Any) -> Any:
        return globals()[self.name](*args)

    @property
    def __name__(self) -> str:
        return f"{__name__}.{self.name}"


class StartRequest(NamedTuple):
    """What to start: a task, the rank that carries it out, and how."""

    task: Task
    place: RankInfo
    args: tuple[Parcel, ...]
    master: MasterAddress
    start_method: str | None


class Signal(NamedTuple):
    """A signal to send, to the rank alone or to its group."""

    number: int
    group: bool


class PollRequest(NamedTuple):
    """The notebook's poll for news, and what the engine is to do."""

    seconds: float  # how long to wait for news
    heard: int  # the number of the last reply that arrived
    signals: tuple[Signal, ...] = ()
    note_activity: bool = False


class Exit(NamedTuple):
    """How a rank ended."""

    exitcode: int
    ended_ns: int
    spans: list[Span]
    dropped: int
    caught: list[Caught] | None
    lost: ErrorRecord | None
    out_of_memory: bool | None


class PollReply(NamedTuple):
    """What happened since the reply that the notebook received last."""

    number: int
    pieces: tuple[tuple[int, bytes], ...]  # (channel, data) from the rank's pipes
    progress: int  # grows with everything that the rank finishes
    activity: Activity | None
    queued: bool
    starved: float
    end: Exit | None


def describe() -> dict[str, Any]:
    """Facts about this engine. Plain data: the notebook's version of this package may differ."""
    versions = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "host": platform.node(),
        "machine": f"{platform.node()} {clock_id().partition(' ')[0]} {host.network_id()}",
        "clock": clock_id(),
        "versions": versions,
        "address": host.own_address(_controller()),
        "now_ns": time.perf_counter_ns(),
    }


def meet(run: str, towards: str | None, reserve: bool) -> MasterAddress:
    """The master address on this host for ranks of other hosts, one of which is at `towards`.

    If `reserve` is true, the port is free and kept free; else it is 0.
    """
    rank = _ranks[run] = Rank(run)
    return rank.meet(towards, reserve)


def start(run: str, order: StartRequest) -> tuple[int, int]:
    """Start the rank; return its process id, and when it was requested, by this host's clock."""
    if run not in _ranks:
        _ranks[run] = Rank(run)
    return _ranks[run].start(order)


def news(run: str, question: PollRequest) -> PollReply | None:
    """Reply to a poll; None if this engine has no rank of this run."""
    with _uninterrupted():
        return _ranks[run].answer(question) if run in _ranks else None


def spans(run: str) -> list[Span]:
    """The spans in the rank's buffer now."""
    return _ranks[run].spans() if run in _ranks else []


def has_data_on_the_way(run: str) -> bool:
    """Whether the rank has sent data that another one has not received yet."""
    return run in _ranks and _ranks[run].has_data_on_the_way()


def finish(run: str) -> None:
    """End the rank of the run, if there is one, and release what the run held here."""
    if run in _ranks:
        with _uninterrupted():
            _ranks.pop(run).close()


class _Relayed(WorkerProcess):
    """A rank whose data is kept until the notebook has received it."""

    takes_files = False

    def __init__(self, place: RankInfo, buffers: SpanBuffers) -> None:
        super().__init__(place, buffers)
        self.pieces: list[tuple[int, bytes]] = []

    def take(self, channel: int, data: bytes, files: Sequence[Connection] = ()) -> None:
        super().take(channel, data, files)
        self.pieces.append((channel, data))


class Rank:
    """An engine's part in one run."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._process: _Relayed | None = None
        self._held = contextlib.ExitStack()
        self._kills = memory.kills()
        self._number = 0  # of the last reply
        self._sent = 0  # pieces in the last reply
        self._unasked = 0.0  # seconds since the last poll
        self._watch_lease()

    def meet(self, towards: str | None, reserve: bool) -> MasterAddress:
        self._held.close()
        if towards is None:
            master = MasterAddress(0)
        else:
            address = host.own_address(towards) or towards
            master = MasterAddress(0, address, host.interface_of(address))
        if not reserve:
            return master
        port = self._held.enter_context(reserve_port(master.address))
        return replace(master, port=port.getsockname()[1])

    def start(self, order: StartRequest) -> tuple[int, int]:
        method = order.start_method or start_method(order.task.overrides)
        buffers = self._held.enter_context(contextlib.closing(SpanBuffers(order.place.world_size)))
        process = _Relayed(order.place, buffers)
        with _uninterrupted():
            process.start(method, order.task.here(order.master), order.args)
            self._process = process
        self._pump = Pump([process])
        return process.pid, process.began_ns

    def answer(self, question: PollRequest) -> PollReply | None:
        self._unasked = 0.0
        process = self._process
        if process is None:
            return None
        if question.heard == self._number:
            del process.pieces[: self._sent]
        for number, group in question.signals:
            if process.alive:
                process.signal_group(number) if group else process.send_signal(number)
        if question.note_activity and process.alive:
            process.note_activity()
        self._gather(process, question.seconds)
        self._number += 1
        self._sent = len(process.pieces)
        progress = process.buffers.progress(process.rank)
        end = None if process.alive else self._end(process)
        noted = process.activity, process.queued, process.starved
        return PollReply(self._number, tuple(process.pieces), progress, *noted, end)

    def spans(self) -> list[Span]:
        self._unasked = 0.0
        return [] if self._process is None else self._process.spans()

    def has_data_on_the_way(self) -> bool:
        self._unasked = 0.0
        process = self._process
        return process is not None and process.alive and have_unsent_data([process.pid])

    def close(self) -> None:
        process = self._process
        if process is not None:
            while process.alive:
                process.signal_group(signal.SIGKILL)
                process.send_signal(signal.SIGKILL)  # it may have no group of its own yet
                self._pump(LOOK)
            process.close()
            if process.forkserver is not None:
                end_orphans()
        self._process = None
        self._held.close()

    def _gather(self, process: _Relayed, seconds: float) -> None:
        """Wait for data of the rank, and a moment for more of it."""
        deadline = time.monotonic() + seconds
        while process.alive and (left := deadline - time.monotonic()) > 0 and not process.pieces:
            self._pump(left)
        deadline, size = time.monotonic() + SOON, 0
        while process.alive and (left := deadline - time.monotonic()) > 0 and size < MOST:
            known = len(process.pieces)
            self._pump(left)
            size += sum(len(data) for _, data in process.pieces[known:])

    def _end(self, process: _Relayed) -> Exit:
        assert process.exitcode is not None
        assert process.ended_ns is not None
        return Exit(
            process.exitcode,
            process.ended_ns,
            process.spans(),
            process.dropped(),
            process.caught(),
            process.lost,
            None if self._kills is None else memory.kills() != self._kills,
        )

    def _watch_lease(self) -> None:
        """Check now and then whether the notebook still polls.

        On the engine's own event loop: during another task, when no poll can be answered, the lease
        does not run.
        """
        asyncio.get_running_loop().call_later(LOOK, self._look_at_lease)

    def _look_at_lease(self) -> None:
        if _ranks.get(self._run) is not self:
            return
        self._unasked += LOOK
        if self._unasked > LEASE:
            finish(self._run)
        else:
            self._watch_lease()


_ranks: dict[str, Rank] = {}  # of this engine, by run


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore interrupts of the engine, which could lose data; no task of the learner's runs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _controller() -> str | None:
    """The address by which this engine reaches its controller."""
    application = sys.modules.get("ipyparallel.engine.app")
    if application is None or not application.IPEngine.initialized():
        return None
    url: str = application.IPEngine.instance().registration_url
    return url.rpartition("//")[2].rpartition(":")[0]


def _finish_all() -> None:
    for run in list(_ranks):
        finish(run)


# It runs before multiprocessing's own handler, which waits for the ranks to end by themselves.
atexit.register(_finish_all)
