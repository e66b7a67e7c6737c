"""The ranks of this machine: starts their processes, reads their pipes, ends them.

Runs in the parent, called by launcher/; and in the engines of a cluster (cluster/engine.py), each
for its one rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import math
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from ddp_lessons.errors import LaunchError
from ddp_lessons.processes import forkserver
from ddp_lessons.processes.activity import ActivitySampler, have_unsent_data
from ddp_lessons.processes.base import (
    CHANNELS,
    MESSAGES,
    UNKNOWN_EXIT,
    Worker,
    WorkerGroup,
)
from ddp_lessons.processes.packing import Argument
from ddp_lessons.system import memory, reaper, standard_files
from ddp_lessons.system.host import blocking_pair, reserve_port
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.text import count
from ddp_lessons.wire.messages import STACK_SIGNAL
from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.wire.records import FORKSERVER, Caught, ErrorRecord, Span
from ddp_lessons.wire.span_buffer import SpanBuffers
from ddp_lessons.wire.task import MasterAddress, RankInfo, Task

FORKSERVER_ENDED = ErrorRecord(
    FORKSERVER,
    "the process that starts the ranks, multiprocessing's forkserver, was ended while they ran\n"
    "The next launch starts a new one.",
    (),
)
LAUNCH_AGAIN = (
    "If memory, processes or open files have run out, use fewer ranks. Otherwise launch again: "
    "what starts the ranks is started anew."
)
NEW_PYTHON = 30.0  # seconds that a new Python may take to import torch
CHUNK = 1 << 16  # bytes read from a pipe at once
EVERY = 0.1  # seconds between two checks of all ranks


Reader = Connection | socket.socket
_Source = tuple["WorkerProcess", Reader | None]  # a pipe of a rank; None is for its end


class WorkerProcess(Worker):
    """A rank whose process this process has started."""

    takes_files = True  # what the function returns may come in a file in memory

    def __init__(self, place: RankInfo, buffers: SpanBuffers) -> None:
        super().__init__(place)
        self.buffers = buffers
        self.forkserver: int | None = None  # its process id
        self._progress = 0
        self._sampler = ActivitySampler()
        self._channels: dict[Reader, int] = {}
        self._process: Any = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self.exitcode is None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def start(
        self,
        method: str,
        task: Task,
        args: Sequence[Argument | Parcel],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the process. Raises CannotSend, and starts nothing, if an argument won't pickle.

        `check` is called before, and now and then while the start takes time; it may raise.
        """
        from ddp_lessons.processes.rank_process import Forked, Replaced, Spawned
        from ddp_lessons.worker.main import run_rank

        check()
        self.buffers.prepare(self.rank)
        pipes: list[tuple[Any, Any]] = [multiprocessing.Pipe(duplex=False) for _ in CHANNELS]
        if self.takes_files:
            pipes[MESSAGES] = blocking_pair()
        readers, writers = [p[0] for p in pipes], [p[1] for p in pipes]
        try:
            context: Any = multiprocessing.get_context(method)
            process = context.Process(
                target=run_rank,
                args=(task, self.place, tuple(args), *writers, self.buffers.sendable()),
                name=f"rank {self.rank}",
                daemon=False,  # a daemon could not have children, such as a DataLoader's workers
            )
            if method == "forkserver":
                self._process = forkserver.server().start(
                    lambda by: Forked(process, by, check),
                    lambda spare: spare.become(process, check),
                )
            elif forkserver.default_start_method() == "forkserver":
                self._process = forkserver.server(forkserver.BARE).start(
                    lambda by: Replaced(process, task.overrides, by, check)
                )
            else:
                self._process = Spawned(process, task.overrides)
            if forkserver.default_start_method() == "forkserver":
                self.forkserver = reaper.parent_of(self.pid)
        except BaseException:
            for reader in readers:
                reader.close()
            raise
        finally:
            for writer in writers:
                writer.close()
        for reader in readers:
            os.set_blocking(reader.fileno(), False)
        self._channels = dict(zip(readers, CHANNELS, strict=True))

    @property
    def readers(self) -> list[Reader]:
        """The pipes that are still open."""
        return list(self._channels)

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        return int(self._process.sentinel)

    def read(self, reader: Reader) -> int:
        """Take what a pipe holds now, one chunk; its bytes, 0 if it held nothing or has closed."""
        files: list[int] = []
        try:
            if isinstance(reader, socket.socket):
                data, files, *_ = socket.recv_fds(reader, CHUNK, 1)
            else:
                data = os.read(reader.fileno(), CHUNK)
        except BlockingIOError:
            return 0
        if data:
            self.take(self._channels[reader], data, list(map(Connection, files)))
        else:
            del self._channels[reader]
            reader.close()
        return len(data)

    def note_progress(self) -> None:
        """Note whether the rank has finished anything since the last call."""
        progress = self.buffers.progress(self.rank)
        if progress != self._progress:
            self._progress, self.moved_at = progress, time.monotonic()

    def poll(self) -> bool:
        """See whether the process has ended; True once, when it has.

        Then take in what it wrote before, and kill the children that it left in its group.
        """
        if not self.alive:
            return False
        if (code := self._process.poll()) is None:
            self._end_suspended_forkserver()
            return False
        self.exitcode = code
        if (
            self.forkserver is not None
            and self.exitcode == UNKNOWN_EXIT
            and reaper.ends_soon(self.forkserver)
        ):
            # Without the forkserver it is unknown how the rank ended, or whether it did.
            self.lost = FORKSERVER_ENDED if self.outcome is None else None
            self.send_signal(signal.SIGKILL)
        self.signal_group(signal.SIGKILL)
        for reader in self.readers:
            rest = _waiting(reader)  # no more: a daemon of the rank's may write without end
            while rest > 0 and (size := self.read(reader)):
                rest -= size
        self.ended_ns = self.ended_ns or time.perf_counter_ns()
        self.moved_at = time.monotonic()
        return True

    def _end_suspended_forkserver(self) -> None:
        """If the rank has ended, but a suspended forkserver cannot tell, end that one, too."""
        suspended = self.forkserver is not None and reaper.is_suspended(self.forkserver)
        if self.forkserver is not None and suspended and reaper.has_ended(self.pid):
            reaper.kill_and_wait(self.forkserver)

    def note_activity(self) -> None:
        if (found := self._sampler.sample(self.pid)) is not None:
            self.activity, self.queued, self.starved = found

    def send_signal(self, number: int) -> None:
        if number == STACK_SIGNAL and not reaper.catches(self.pid, number):
            return  # the rank has become another program, by exec, which the signal would end
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Close the file descriptors. The process must have ended."""
        for reader in self.readers:
            reader.close()
        self._channels.clear()
        if self._process is not None:
            self._process.close()

    def spans(self) -> list[Span]:
        return self.buffers.spans(self.rank)

    def calls_now(self) -> list[tuple[str, int]]:
        return self.buffers.of(self.rank).calls_now()

    def dropped(self) -> int:
        return self.buffers.dropped(self.rank)

    def caught(self) -> list[Caught] | None:
        return self.buffers.caught(self.rank)


def _waiting(reader: Reader) -> int:
    """The bytes that can be read now."""
    size = ctypes.c_int()
    fcntl.ioctl(reader.fileno(), termios.FIONREAD, size)
    return size.value


class Pump:
    """Takes in what the processes of some ranks send."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers = workers
        self._polled = 0.0
        self._poll = select.poll()  # kept from call to call, as registering takes time
        self._sources: dict[int, _Source] = {}  # what is registered, by descriptor

    def __call__(self, seconds: float) -> None:
        """Wait at most `seconds` for something to come, and take it in."""
        alive = [worker for worker in self._workers if worker.alive]
        self._look_at(alive)
        ended = []
        for descriptor, _ in self._poll.poll(math.ceil(seconds * 1000)):
            worker, reader = self._sources[descriptor]
            if reader is None:
                ended.append(worker)
            else:
                worker.read(reader)
        # A child forked by a spawned rank keeps the rank's sentinel open: poll all now and then.
        everyone = time.monotonic() - self._polled > EVERY
        for worker in alive if everyone else ended:
            worker.poll()
        if everyone:
            for worker in alive:
                if worker.alive:
                    worker.note_progress()
            self._polled = time.monotonic()

    def _look_at(self, alive: Sequence[WorkerProcess]) -> None:
        """Wait for the open pipes of these ranks, and for their ends, from now on."""
        sources: dict[int, _Source] = {}
        for worker in alive:
            sources[worker.sentinel] = worker, None
            for reader in worker.readers:
                sources[reader.fileno()] = worker, reader
        if sources == self._sources:
            return
        for descriptor in self._sources.keys() - sources.keys():
            self._poll.unregister(descriptor)
        for descriptor in sources:
            self._poll.register(descriptor, select.POLLIN)
        self._sources = sources


def _why_not_started(error: OSError | EOFError) -> str:
    """What to do about it; where the error does not tell, why a new Python process fails."""
    if getattr(error, "errno", None) in forkserver.OURS_TO_BEAR:
        return "Use fewer ranks, or raise the limit (ulimit -a)."
    command = [sys.executable, "-c", "import multiprocessing.forkserver, cloudpickle, numpy, torch"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=NEW_PYTHON)
    except (OSError, subprocess.TimeoutExpired):
        tried = None
    if tried is not None and tried.returncode != 0 and (said := tried.stderr.splitlines()):
        return f"Here a new Python does not get as far as torch: {said[-1]}"
    return LAUNCH_AGAIN


class LocalWorkerGroup(WorkerGroup):
    """Ranks of this machine, whose processes are started by `start_method`."""

    def __init__(self, places: Sequence[RankInfo], start_method: str) -> None:
        super().__init__()
        standard_files.hold()
        self._method = start_method
        self._kills = memory.kills()
        with contextlib.ExitStack() as stack:
            self._port = stack.enter_context(reserve_port())
            try:
                buffers = forkserver.spares_last(lambda: SpanBuffers(len(places)))
            except OSError as error:
                raise LaunchError(
                    "the memory in which ranks note what they do cannot be had for "
                    f"{count(len(places), 'rank')}: {error.strerror}\n"
                    "Nothing was started. Free memory, raise the limit (ulimit -a), or use fewer "
                    "ranks."
                ) from error
            stack.callback(buffers.close)
            self._held = stack.pop_all()
        self.workers: Sequence[WorkerProcess] = [WorkerProcess(place, buffers) for place in places]
        self._pump = Pump(self.workers)

    def start(
        self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...], interrupts: Interrupts
    ) -> None:
        here = task.here(MasterAddress(self._port.getsockname()[1]))
        if self._method == "forkserver":
            here = replace(here, tells_pages=forkserver.server().wants_pages)
        packed = [Argument(value, i, fn) for i, value in enumerate(args)]
        for worker in self.workers:
            start = functools.partial(worker.start, self._method, here, packed, interrupts.check)
            try:
                forkserver.spares_last(start)
            except (OSError, EOFError) as error:
                raise LaunchError(
                    f"the process of rank {worker.rank} could not be started: {error!r}\n"
                    f"{_why_not_started(error)}"
                ) from error
            first = self.workers[0].forkserver
            if first is not None and first != worker.forkserver and reaper.has_ended(first):
                raise LaunchError(
                    "the process that starts the ranks, multiprocessing's forkserver, was ended "
                    f"before it had started rank {worker.rank}\n{LAUNCH_AGAIN}"
                )

    def pump(self, seconds: float) -> None:
        self._pump(seconds)

    def have_data_on_the_way(self) -> bool:
        return have_unsent_data([worker.pid for worker in self.workers if worker.alive])

    def out_of_memory(self) -> bool | None:
        return None if self._kills is None else memory.kills() != self._kills

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        forkserver.end_orphans()
        self._held.close()
        if self._method == "forkserver":
            forkserver.server().keep_spares(len(self.workers), self.workers[0].written_pages)
