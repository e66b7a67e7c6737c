"""The parent's side of one rank: starting its process, reading its pipes, ending it.

Runs in the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ddp_lessons import orphans
from ddp_lessons.messages import (
    Decoder,
    GivesUp,
    Joining,
    Raised,
    Returned,
    Started,
    Unsendable,
)
from ddp_lessons.output import OutputBuffer
from ddp_lessons.tape import Tapes
from ddp_lessons.task import Argument, Place, Task

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from ddp_lessons.results import Activity

STACK_SIGNAL = signal.SIGUSR1  # asks a worker for its Python stack
UNKNOWN_EXIT = 255  # what multiprocessing makes of a forkserver that no longer answers
CHUNK = 1 << 16  # bytes read from a pipe at once
NOTED_OVER = 0.4  # seconds, at least, over which use of the processor is measured
BUSY = 0.1  # share of that time: a rank that uses more computes


class WorkerProcess:
    """One rank as its parent sees it: a process and the three pipes that come from it.

    `messages` carries framed facts (`messages.py`), `output` whatever the rank writes to its stdout
    and stderr, `stacks` what faulthandler prints when asked where the rank is.
    """

    def __init__(self, place: Place, tapes: Tapes) -> None:
        self.place = place
        self.tapes = tapes
        self.output = OutputBuffer()
        self.stack_text = ""
        self.began_ns = time.perf_counter_ns()
        self.started_ns: int | None = None
        self.ended_ns: int | None = None
        self.own_timeout: float | None = None  # seconds after which it gives up by itself
        self.outcome: Returned | Raised | Unsendable | None = None
        self.exitcode: int | None = None
        self.forkserver: int | None = None  # its process id
        self.lost_forkserver = False
        self.stopped = False  # the parent ended it
        self.activity: Activity | None = None  # what it did when it was stopped
        self.moved_at = time.monotonic()  # when it last printed, finished a span, or ended
        self._progress = 0
        self._cpu_noted: tuple[float, float] | None = None  # when, and the time used until then
        self._decoder = Decoder()
        self._handlers: dict[Connection, Callable[[bytes], None]] = {}
        self._process: Any = None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def alive(self) -> bool:
        return self._process is not None and self.exitcode is None

    @property
    def failed(self) -> bool:
        """True if the rank raised, died or returned what cannot be sent; not if it was stopped."""
        if isinstance(self.outcome, Raised | Unsendable):
            return True
        return self.exitcode is not None and self.outcome is None and not self.stopped

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def start(
        self, context: BaseContext, task: Task, fn: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        """Start the process. Raises CannotSend, and starts nothing, if an argument can't travel."""
        from ddp_lessons import worker

        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(3)]
        readers, writers = [p[0] for p in pipes], [p[1] for p in pipes]
        try:
            packed = tuple(Argument(value, i, fn) for i, value in enumerate(args))
            process = context.Process(  # type: ignore[attr-defined]
                target=worker.main,
                args=(task, self.place, packed, *writers, self.tapes.sendable()),
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
        handlers = (self._on_messages, self.output.feed, self._on_stacks)
        self._handlers = dict(zip(readers, handlers, strict=True))

    @property
    def readers(self) -> list[Connection]:
        """The pipes that are still open."""
        return list(self._handlers)

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
            handler = self._handlers[reader]
            handler(data)
            if handler != self._on_stacks:
                self.moved_at = time.monotonic()
            return True
        del self._handlers[reader]
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
            self.lost_forkserver = self.outcome is None
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
        """See what the rank does: whether it has used the processor since the last note."""
        import psutil

        now = time.monotonic()
        if self._cpu_noted is not None and now - self._cpu_noted[0] < NOTED_OVER:
            return
        used = self.cpu_seconds()
        if self._cpu_noted is not None:
            then, before = self._cpu_noted
            self.activity = "busy" if used - before > BUSY * (now - then) else "idle"
        self._cpu_noted = now, used
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(self.pid).status() == psutil.STATUS_STOPPED:
                self.activity = "suspended"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank's own process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the rank and its children, which share its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Give back the file descriptors. The process must have ended."""
        for reader in self.readers:
            reader.close()
        self._handlers.clear()
        if self._process is not None:
            self._process.close()

    def _on_messages(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message:
                case Started(t_ns):
                    self.started_ns = t_ns
                case Joining(timeout):
                    self.own_timeout = timeout
                case GivesUp(timeout):
                    self.own_timeout = min(timeout, self.own_timeout or timeout)
                case Returned(t_ns) | Raised(t_ns) | Unsendable(t_ns):
                    self.outcome = message
                    self.ended_ns = t_ns

    def _on_stacks(self, data: bytes) -> None:
        self.stack_text += data.decode("utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the main script again in the worker.

    It would do so for the functions that live there; ours travel by value. So a script
    needs no `if __name__ == "__main__":`, and workers do not import what only the script needs.
    """
    main = sys.modules["__main__"]
    names = [name for name in ("__file__", "__spec__") if hasattr(main, name)]
    hidden = {name: getattr(main, name) for name in names}
    for name in names:
        delattr(main, name)
    main.__spec__ = None
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


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
