"""The ranks of one run on the engines of an ipyparallel cluster: `launch(..., cluster=client)`.

Runs in the parent, in the thread of the cell, called by launcher/. `engine_selection.py` chooses
the engines, `remote_worker.py` talks to each of them, and there `engine.py` owns one rank.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ddp_lessons.cluster import engine_selection
from ddp_lessons.cluster.engine import StartRequest
from ddp_lessons.cluster.remote_worker import SILENT, Engine, RemoteWorker
from ddp_lessons.errors import LaunchError
from ddp_lessons.processes.base import WorkerGroup
from ddp_lessons.processes.packing import pack_arguments
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.wire.records import Span
from ddp_lessons.wire.task import MasterAddress, Task, places

STARTED = 60.0  # seconds that engines may take to start their ranks' processes
LOOK = 0.1  # seconds between two checks whether Stop was pressed
ENDED = 5.0  # seconds that engines may take to release what they hold


class ClusterWorkerGroup(WorkerGroup):
    """Ranks on the engines of a cluster, one on each."""

    stack_wait = 3.0  # a poll may be on its way, and the machines busy
    settle = 0.15

    def __init__(self, cluster: Any, nprocs: int, nnodes: int, start_method: str | None) -> None:
        super().__init__()
        self._client, targets = engine_selection.client_and_targets(cluster)
        engines, ended = engine_selection.find(self._client, targets)
        chosen = engine_selection.choose(engines, nprocs, nnodes, ended)
        self._start_method = start_method
        self._history = contextlib.ExitStack()
        self._history.enter_context(engine_selection.unnoticed(self._client))
        self._looked_at = 0.0
        self._run = uuid.uuid4().hex
        self.workers: Sequence[RemoteWorker] = [
            RemoteWorker(place, engine, self._client, self._run)
            for place, engine in zip(places(nprocs, nnodes), chosen, strict=True)
        ]

    def start(
        self, task: Task, fn: Callable[..., Any], args: tuple[Any, ...], interrupts: Interrupts
    ) -> None:
        packed = pack_arguments(args, fn)
        clocks = {worker.engine.clock for worker in self.workers}
        task = replace(task, one_clock=len(clocks) == 1)
        masters = self._master_addresses(interrupts.check)
        calls = [
            worker.start(StartRequest(task, worker.place, packed, master, self._start_method))
            for worker, master in zip(self.workers, masters, strict=True)
        ]
        replies = self._replies(calls, interrupts.check)
        for worker, started in zip(self.workers, replies, strict=True):
            worker.pid, worker.began_ns = started or (None, worker.began_ns)

    def pump(self, seconds: float) -> None:
        alive = [worker for worker in self.workers if worker.alive]
        for worker in alive:
            worker.ask()
        polls = [worker.pending for worker in alive if worker.pending is not None]
        concurrent.futures.wait(polls, seconds, concurrent.futures.FIRST_COMPLETED)
        for worker in alive:
            worker.hear()
        silent = [worker for worker in alive if worker.is_silent()]
        if silent and time.monotonic() - self._looked_at > SILENT:
            self._ask_controller_about(silent)
            self._looked_at = time.monotonic()

    def _ask_controller_about(self, silent: Sequence[RemoteWorker]) -> None:
        """Lose the silent ranks if the controller is silent, too.

        If it answers, their engines may only be busy with another task.
        """
        if engine_selection.queue_status(self._client) is None:
            for worker in silent:
                worker.lose_controller()

    def spans(self) -> list[Sequence[Span]]:
        calls = [worker.call("spans") if worker.alive else None for worker in self.workers]
        return [
            worker.spans() if reply is None else reply
            for worker, reply in zip(self.workers, self._replies(calls), strict=True)
        ]

    def have_data_on_the_way(self) -> bool:
        calls = [w.call("has_data_on_the_way") if w.alive else None for w in self.workers]
        replies = zip(calls, self._replies(calls), strict=True)
        return any(reply is not False for call, reply in replies if call is not None)

    def out_of_memory(self) -> bool | None:
        reports = [worker.out_of_memory for worker in self.workers]
        return True if True in reports else None if None in reports else False

    def end(self) -> None:
        for worker, by_ns in zip(self.workers, _shifts(self.workers), strict=True):
            if by_ns:
                worker.shift(by_ns)
        self.begin_ns = min([self.begin_ns, *(worker.began_ns for worker in self.workers)])

    def close(self) -> None:
        calls = [(worker.call("finish"), worker.lost) for worker in self.workers]
        results = [result for result, lost in calls if result is not None and lost is None]
        concurrent.futures.wait(results, ENDED)
        self._history.close()

    def _master_addresses(self, check: Callable[[], None]) -> list[MasterAddress]:
        """The master address for each rank: of rank 0's host, by the rank's own interface."""
        first = self.workers[0]
        peers = self._peer_addresses()
        calls = [
            worker.call("meet", peers[worker.engine.machine], worker is first)
            if len(peers) > 1 or worker is first
            else None
            for worker in self.workers
        ]
        replies = self._replies(calls, check)
        master = replies[0]
        if master is None:
            raise LaunchError(f"{first.engine} ended before its rank was started.")
        return [master if own is None else replace(own, port=master.port, address=master.address)
                for own in replies]  # fmt: skip

    def _peer_addresses(self) -> dict[str, str | None]:
        """For each host, an address of another one; None if there is only one."""
        hosts: dict[str, Engine] = {}
        for worker in self.workers:
            hosts.setdefault(worker.engine.machine, worker.engine)
        return {
            machine: next((e.address for m, e in hosts.items() if m != machine), None)
            for machine in hosts
        }

    def _replies(self, calls: Sequence[Any], check: Callable[[], None] = lambda: None) -> list[Any]:
        """The engines' replies; None for engines that were not called, or ended.

        `check` is called now and then, and may raise.
        """
        from ipyparallel import error

        waiting = [result for result in calls if result is not None]
        late = set(waiting)
        deadline = time.monotonic() + STARTED
        while late and time.monotonic() < deadline:
            check()
            late = concurrent.futures.wait(waiting, LOOK).not_done
        replies: list[Any] = []
        for worker, result in zip(self.workers, calls, strict=True):
            if result is None or result in late:
                replies.append(None)
                continue
            try:
                replies.append(result.result(timeout=0))
            except error.RemoteError as failure:
                if failure.ename != "EngineError":
                    raise LaunchError(
                        f"the process of rank {worker.rank} could not be started by "
                        f"{worker.engine}: {failure.ename}: {failure.evalue}"
                    ) from None
                replies.append(None)
        return replies


def _shifts(workers: Sequence[RemoteWorker]) -> list[int]:
    """By how many ns each rank's clock is behind the notebook's.

    Ranks that joined a group compared their clocks with rank 0's, far more exactly than messages
    from the notebook can. A rank on the notebook's own clock is the reference, else rank 0.
    """
    behind = {w.engine.clock: w.clock.behind_ns for w in workers if w.clock is not None}
    anchor = next((w.engine for w in workers if w.engine.ahead_ns == 0), workers[0].engine)
    if anchor.clock not in behind:
        return [-worker.engine.ahead_ns for worker in workers]
    base_ns = behind[anchor.clock] + anchor.ahead_ns
    return [
        behind[worker.engine.clock] - base_ns
        if worker.engine.clock in behind
        else -worker.engine.ahead_ns
        for worker in workers
    ]
