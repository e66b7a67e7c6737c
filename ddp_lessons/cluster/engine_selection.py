"""Selects the engines that carry out a run: asks each for its facts, and chooses by host.

Runs in the parent, called by worker_group.py before anything is started. Raises BadLaunch if it
cannot work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

from ddp_lessons.cluster.engine import PACKAGES
from ddp_lessons.cluster.remote_worker import Engine, send_call
from ddp_lessons.errors import BadLaunch, LaunchError
from ddp_lessons.system.host import clock_id
from ddp_lessons.text import INSTALL, agree, count, listed

SOON = 1.0  # seconds after which to ask the controller about an engine that has not answered
ANSWER = 30.0  # seconds that an idle engine may take: it may have to import this package first
HUB = 5.0  # seconds that the controller may take

MISSING = f"Install it there, in the engines' own Python: {INSTALL}"


def client_and_targets(cluster: Any) -> tuple[Any, list[int]]:
    """The ipyparallel client in what was passed as `cluster`, and the engines to use."""
    import ipyparallel

    if isinstance(cluster, ipyparallel.Client):
        return cluster, sorted(cluster.ids)
    if isinstance(cluster, ipyparallel.DirectView):
        targets = cluster.targets
        if targets in (None, "all"):
            return cluster.client, sorted(cluster.client.ids)
        return cluster.client, [targets] if isinstance(targets, int) else list(targets)
    if isinstance(cluster, ipyparallel.Cluster):
        raise BadLaunch(
            "cluster is a Cluster, which starts engines; launch() needs a client that is connected "
            "to them: launch(..., cluster=it.connect_client_sync())."
        )
    raise BadLaunch(
        f"cluster is {cluster!r}, not a client of ipyparallel. "
        "Pass ipyparallel.Client(), or client[0, 1, 2] for some of its engines."
    )


def find(client: Any, ids: Sequence[int]) -> tuple[list[Engine], list[int]]:
    """The engines that answer, and the ids of those that ended meanwhile.

    Raises BadLaunch if one is busy, or has other versions than the notebook.
    """
    before_ns = time.perf_counter_ns()
    with unnoticed(client):
        asked = {number: _ask(client, number) for number in ids}
        results = {number: result for number, result in asked.items() if result is not None}
        _await(client, results)
    engines, own_clock = [], clock_id()
    ended = [number for number in asked if number not in results]
    for number, result in results.items():
        facts, after_ns = _facts(number, result)
        if facts is None:
            ended.append(number)
            continue
        refuse_unlike(number, facts)
        middle_ns = (before_ns + after_ns) // 2
        same = facts["clock"] == own_clock
        engines.append(
            Engine(
                number,
                facts["host"],
                facts["machine"],
                facts["clock"],
                0 if same else facts["now_ns"] - middle_ns,
                facts["address"],
            )
        )
    if not engines:
        raise BadLaunch(
            "the cluster has no engines. Start some, and wait for them: client.wait_for_engines(4)."
            f"{_just_ended(ended)}"
        )
    return engines, ended


@contextlib.contextmanager
def unnoticed(client: Any) -> Iterator[None]:
    """Keep what is sent in the block, which is not the learner's, out of the client's history."""
    known = len(client.history)
    try:
        yield
    finally:
        del client.history[known:]


def _ask(client: Any, number: int) -> Any:
    """The AsyncResult of an engine's facts; None if it has ended."""
    try:
        result = send_call(client, number, "describe")
    except OSError as error:
        raise BadLaunch(
            f"the client is not connected to its cluster any more: {error}\n"
            "Connect a new one: ipyparallel.Client(), or cluster.connect_client_sync()."
        ) from error
    if result is None:
        return None
    result.answered_ns = 0

    def note(_: Any) -> None:
        result.answered_ns = time.perf_counter_ns()

    result.add_done_callback(note)
    return result


def _await(client: Any, results: dict[int, Any]) -> None:
    """Wait until all have answered; find out why if one does not."""
    deadline = time.monotonic() + ANSWER
    waiting = concurrent.futures.wait(results.values(), timeout=SOON).not_done
    while waiting:
        status = queue_status(client)
        if status is None:
            raise LaunchError(_no_controller(), run=None)
        late = [number for number, result in results.items() if not result.done()]
        busy = [number for number in late if _tasks(status.get(number, {})) > 1]
        if busy:
            raise BadLaunch(
                f"{_named(busy)} {agree(busy, 'is', 'are')} busy with other tasks. Wait for them "
                "(client.wait()), interrupt them, or pass only engines that are idle: "
                "cluster=client[0, 1]."
            )
        if time.monotonic() > deadline:
            raise LaunchError(f"{_named(late)} did not answer in {ANSWER:.0f} s, though not busy.")
        waiting = concurrent.futures.wait(results.values(), timeout=SOON).not_done


def _tasks(status: dict[str, int]) -> int:
    return status.get("queue", 0) + status.get("tasks", 0)


def queue_status(client: Any, seconds: float = HUB) -> Any:
    """The controller's report on its engines; None if it does not answer within `seconds`.

    ipyparallel waits for the answer without limit, so this asks in a thread.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(client.queue_status()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def _no_controller() -> str:
    return (
        f"the cluster's controller did not answer within {HUB:.0f} s: it has ended, or cannot be "
        "reached. Start the cluster, connect a new client, and launch again."
    )


def _facts(number: int, result: Any) -> tuple[dict[str, Any] | None, int]:
    """The facts of an engine, None if it ended meanwhile; and when its answer came."""
    from ipyparallel import error

    try:
        return result.result(timeout=0), result.answered_ns or time.perf_counter_ns()
    except error.RemoteError as failure:
        if failure.ename == "EngineError":
            return None, 0
        if failure.ename in ("ModuleNotFoundError", "ImportError", "AttributeError", "KeyError"):
            raise BadLaunch(
                f"engine {number} cannot use this version of ddp-lessons: {failure.evalue}\n"
                f"{MISSING}=={metadata.version('ddp-lessons')}"
            ) from None
        raise BadLaunch(
            f"engine {number} could not say who it is: {failure.ename}: {failure.evalue}"
        ) from None


def refuse_unlike(number: int, facts: dict[str, Any]) -> None:
    """Raise BadLaunch if an engine's versions are not those of the notebook."""
    own = {"Python": ".".join(map(str, sys.version_info[:2]))}
    own |= {package: metadata.version(package) for package in PACKAGES}
    versions = facts["versions"]
    for name, version in own.items():
        if _public(versions.get(name)) != _public(version):
            has = f"{name} {versions[name]}" if name in versions else f"no {name}"
            raise BadLaunch(
                f"engine {number} on host {facts['host']} has {has}, and the notebook {name} "
                f"{version}. Functions and tensors travel between them: install the same version."
            )


def _public(version: str | None) -> str | None:
    """A version without the name of its build: 2.13.0 for 2.13.0+cpu."""
    return None if version is None else version.partition("+")[0]


def choose(
    engines: Sequence[Engine], nprocs: int, nnodes: int, ended: Sequence[int] = ()
) -> list[Engine]:
    """An engine for each rank: `nprocs` on each of `nnodes` hosts, in the order of their engines.

    If there are fewer hosts, one that has engines for all ranks stands for several machines.
    """
    by_host: dict[str, list[Engine]] = {}
    for engine in sorted(engines, key=lambda engine: engine.id):
        by_host.setdefault(engine.machine, []).append(engine)
    hosts = list(by_host.values())
    enough = [host for host in hosts if len(host) >= nprocs]
    if len(enough) >= nnodes:
        return [engine for host in enough[:nnodes] for engine in host[:nprocs]]
    for host in hosts:
        if len(host) >= nprocs * nnodes:
            return host[: nprocs * nnodes]
    raise BadLaunch(_too_few(hosts, nprocs, nnodes) + _just_ended(ended))


def _too_few(hosts: Sequence[Sequence[Engine]], nprocs: int, nnodes: int) -> str:
    wanted = count(nprocs, "engine")
    wanted += f" on each of {nnodes} hosts" if nnodes > 1 else " on one host"
    have = [f"{h[0].host} has {count(len(h), 'engine')} ({_ids(h)})" for h in hosts]
    fewest = min(len(host) for host in hosts)
    works = [f"nprocs={max(map(len, hosts))}"]
    if len(hosts) > 1:
        works.append(f"nnodes={len(hosts)}, nprocs={fewest}")
    return (
        f"nprocs={nprocs}, nnodes={nnodes} needs {wanted}, an engine for each rank, but "
        f"{listed(have)}.\nWhat there is would do for {' or '.join(works)}."
    )


def _just_ended(ended: Sequence[int]) -> str:
    return f"\nMeanwhile {_named(ended)} {agree(ended, 'has', 'have')} ended." if ended else ""


def _ids(engines: Iterable[Engine]) -> str:
    return ", ".join(str(engine.id) for engine in engines)


def _named(numbers: Sequence[int]) -> str:
    return f"{agree(numbers, 'engine', 'engines')} {listed(map(str, numbers))}"
