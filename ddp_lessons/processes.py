"""The ranks of this machine: starting their processes, reading their pipes, ending them.

Runs in the parent, and in the engines of a cluster, which do the same for their rank.
"""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ddp_lessons import orphans
from ddp_lessons.messages import FORKSERVER, ErrorRecord, Span
from ddp_lessons.tape import Tapes
from ddp_lessons.task import Argument, PackedArgument, Place, Task
from ddp_lessons.workers import CHANNELS, NOTED_OVER, UNKNOWN_EXIT, Worker

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

FORKSERVER_ENDED = ErrorRecord(
    FORKSERVER,
    "the process that starts the ranks, multiprocessing's forkserver, was ended while they ran\n"
    "The next launch starts a new one.",
    (),
)
CHUNK = 1 << 16  # bytes read from a pipe at once
EVERY = 0.1  # seconds between two looks at all ranks
BUSY = 0.1  # share of the time noted: a rank that uses more of the processor computes


class WorkerProcess(Worker):
    """A rank whose process this one has started."""

    def __init__(self, place: Place, tapes: Tapes) -> None:
        super().__init__(place)
        self.tapes = tapes
        self.forkserver: int | None = None  # its process id
        self._progress = 0
        self._noted: tuple[float, float, float] | None = None  # when; seconds used and queued
        self._channels: dict[Connection, int] = {}
        self._process: Any = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self.exitcode is None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def start(
        self, context: BaseContext, task: Task, args: Sequence[Argument | PackedArgument]
    ) -> None:
        """Start the process. Raises CannotSend, and starts nothing, if an argument can't travel."""
        from ddp_lessons import worker

        pipes = [multiprocessing.Pipe(duplex=False) for _ in CHANNELS]
        readers, writers = [p[0] for p in pipes], [p[1] for p in pipes]
        try:
            process = context.Process(  # type: ignore[attr-defined]
                target=worker.main,
                args=(task, self.place, tuple(args), *writers, self.tapes.sendable()),
                name=f"rank {self.rank}",
                daemon=False,  # a daemon could not have children, such as a DataLoader's workers
            )
            with _main_hidden(), _environment_with(task.overrides):
                process.start()
        except BaseException:
            for reader in readers:
                reader.close()
            raise
        finally:
            for writer in writers:
                writer.close()
        self._process = process
        if context.get_start_method() == "forkserver":
            self.forkserver = orphans.parent_of(process.pid)
        for reader in readers:
            os.set_blocking(reader.fileno(), False)
        self._channels = dict(zip(readers, CHANNELS, strict=True))

    @property
    def readers(self) -> list[Connection]:
        """The pipes that are still open."""
        return list(self._channels)

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        return int(self._process.sentinel)

    def read(self, reader: Connection) -> bool:
        """Take what a pipe holds now, one chunk; False if it held nothing or has closed."""
        try:
            data = os.read(reader.fileno(), CHUNK)
        except BlockingIOError:
            return False
        if data:
            self.take(self._channels[reader], data)
            return True
        del self._channels[reader]
        reader.close()
        return False

    def look_at_tape(self) -> None:
        """See whether the rank has finished anything since the last time."""
        progress = self.tapes.progress(self.rank)
        if progress != self._progress:
            self._progress, self.moved_at = progress, time.monotonic()

    def poll(self) -> bool:
        """See whether the process has ended; True at the moment when it has.

        What it wrote before is taken in, and what it left of children is killed with its group.
        """
        if not self.alive or self._process.exitcode is None:
            return False
        self.exitcode = self._process.exitcode
        if (
            self.forkserver is not None
            and self.exitcode == UNKNOWN_EXIT
            and orphans.ends_soon(self.forkserver)
        ):
            # Nobody is left to tell how the rank ended, or whether it did.
            self.lost = FORKSERVER_ENDED if self.outcome is None else None
            self.send_signal(signal.SIGKILL)
        self.signal_group(signal.SIGKILL)
        for reader in self.readers:
            while self.read(reader):
                pass
        self.ended_ns = self.ended_ns or time.perf_counter_ns()
        self.moved_at = time.monotonic()
        return True

    def cpu_seconds(self) -> float:
        """The processor time that the rank has used so far; 0 if it has ended."""
        import psutil

        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def note_activity(self) -> None:
        import psutil

        now = time.monotonic()
        if self._noted is not None and now - self._noted[0] < NOTED_OVER:
            return
        used, queued = self.cpu_seconds(), queued_seconds(self.pid)
        if self._noted is not None:
            then, used_before, queued_before = self._noted
            least = BUSY * (now - then)
            self.activity = "busy" if used - used_before > least else "idle"
            self.queued = queued - queued_before > least
        self._noted = now, used, queued
        self.sending = has_unsent_data(self.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(self.pid).status() == psutil.STATUS_STOPPED:
                self.activity = "suspended"

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Give back the file descriptors. The process must have ended."""
        for reader in self.readers:
            reader.close()
        self._channels.clear()
        if self._process is not None:
            self._process.close()

    def spans(self) -> list[Span]:
        return self.tapes.spans(self.rank)

    def dropped(self) -> int:
        return self.tapes.dropped(self.rank)


def has_unsent_data(pid: int) -> bool:
    """Whether a process wrote data to TCP sockets that the other side has not received (Linux).

    The kernel keeps it in the socket's send queue until then: proc_net_tcp, `tx_queue`.
    """
    inodes = set()
    for file in glob.iglob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(file))
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}") as lines:
            for fields in map(str.split, lines):
                unsent = fields[4].partition(":")[0]
                if unsent.strip("0") and f"socket:[{fields[9]}]" in inodes and unsent != "tx_queue":
                    return True
    return False


def queued_seconds(pid: int) -> float:
    """How long a process's threads have stood ready to run without a processor (Linux; else 0).

    The second number of /proc/PID/task/TID/schedstat (kernel documentation, sched-stats).
    """
    total_ns = 0
    for file in glob.iglob(f"/proc/{pid}/task/*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError), open(file) as stat:
            total_ns += int(stat.read().split()[1])
    return total_ns / 1e9


class Pump:
    """Takes in what the processes of some ranks send."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers = workers
        self._polled = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait at most `seconds` for something to come, and take it in."""
        alive = [worker for worker in self._workers if worker.alive]
        sources = {r: worker for worker in alive for r in worker.readers}
        ends = {worker.sentinel: worker for worker in alive}
        ready = wait([*sources, *ends], timeout=seconds)
        for source in ready:
            if source in sources:
                sources[source].read(source)
        # A child that a spawned rank forked keeps its sentinel open: look at all now and then.
        everyone = time.monotonic() - self._polled > EVERY
        for worker in alive if everyone else [ends[s] for s in ready if s in ends]:
            worker.poll()
        if everyone:
            for worker in alive:
                if worker.alive:
                    worker.look_at_tape()
            self._polled = time.monotonic()


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the main script again in the worker.

    It would do so for the functions that live there; ours travel by value. So a script
    needs no `if __name__ == "__main__":`, and workers do not import what only the script needs.
    """
    names: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {
        name: names.pop(name) for name in ("__file__", "__spec__") if name in names
    }
    names["__spec__"] = None
    try:
        yield
    finally:
        del names["__spec__"]  # an engine's namespace had none
        names.update(hidden)


@contextlib.contextmanager
def _environment_with(overrides: Mapping[str, str]) -> Iterator[None]:
    """Give a new interpreter the variables that it reads before it runs any of our code."""
    before = {name: os.environ.get(name) for name in overrides}
    os.environ.update(overrides)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
