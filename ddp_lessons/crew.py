"""The ranks of one run and where they run: what `launcher.py` starts and `watch.py` watches.

Runs in the parent. `Local` has them on this machine; `cluster.py` has a crew on a cluster's
engines.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from ddp_lessons import memory, orphans
from ddp_lessons.errors import LaunchError
from ddp_lessons.interrupts import deferred_interrupt
from ddp_lessons.messages import Span
from ddp_lessons.processes import Pump, WorkerProcess
from ddp_lessons.rendezvous import reserve_port
from ddp_lessons.tape import Tapes
from ddp_lessons.task import Argument, Meeting, Place, Task
from ddp_lessons.warm import warm
from ddp_lessons.workers import Worker


class Crew(ABC):
    """The ranks of one run. A context manager; at its end all of them must have ended."""

    workers: Sequence[Worker]
    stack_wait = 0.5  # seconds that a rank has to print its stack
    settle = 0.03  # seconds of silence after which a stack is taken to be complete

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
    def start(self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Start all ranks. Raises CannotSend and LaunchError; then some may have been started."""

    @abstractmethod
    def pump(self, seconds: float) -> None:
        """Take in what the ranks sent, waiting at most `seconds` for something to come."""

    def spans(self) -> list[Sequence[Span]]:
        """What is on the ranks' tapes now, by rank."""
        return [worker.spans() for worker in self.workers]

    @abstractmethod
    def out_of_memory(self) -> bool | None:
        """Whether a system killed a process meanwhile for want of memory; None if unknown."""

    def end(self) -> None:  # noqa: B027
        """All ranks have ended: bring what is known of them to one clock, the notebook's."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the run held."""


class Local(Crew):
    """Ranks of this machine, which processes started by `start_method` run."""

    def __init__(self, places: Sequence[Place], start_method: str) -> None:
        super().__init__()
        self._context: Any = multiprocessing.get_context(start_method)
        self._kills = memory.kills()
        with contextlib.ExitStack() as stack:
            self._port = stack.enter_context(reserve_port())
            tapes = stack.enter_context(contextlib.closing(Tapes(len(places))))
            self._held = stack.pop_all()
        self.workers: Sequence[WorkerProcess] = [WorkerProcess(place, tapes) for place in places]
        self._pump = Pump(self.workers)

    def start(self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        here = task.here(Meeting(self._port.getsockname()[1]))
        packed = [Argument(value, i, fn) for i, value in enumerate(args)]
        if self._context.get_start_method() == "forkserver":
            warm()
        for worker in self.workers:
            try:
                with deferred_interrupt():
                    worker.start(self._context, here, packed)
            except (OSError, EOFError) as error:
                raise LaunchError(
                    f"the process of rank {worker.rank} could not be started: {error!r}\n"
                    "If memory, processes or open files have run out, use fewer ranks. Otherwise "
                    "launch again: what starts the ranks is started anew."
                ) from error

    def pump(self, seconds: float) -> None:
        self._pump(seconds)

    def out_of_memory(self) -> bool | None:
        return None if self._kills is None else memory.kills() != self._kills

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for forkserver in {w.forkserver for w in self.workers if w.forkserver is not None}:
            orphans.end_orphans_of(forkserver)
        self._held.close()
