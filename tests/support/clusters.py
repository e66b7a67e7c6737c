"""Real ipyparallel clusters for tests: a controller and engines on loopback, gone at the end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ipyparallel
import psutil

from ddp_lessons import launch

LIMIT = 60.0  # seconds that engines may take to come, and to go


class Cluster:
    """A controller, and engines that can be added and killed."""

    def __init__(self, directory: Path, engines: int) -> None:
        os.environ["IPYTHONDIR"] = str(directory)  # what it leaves, it leaves there
        self._others = _processes()
        self._cluster = ipyparallel.Cluster(
            n=engines, profile_dir=str(directory), controller_ip="127.0.0.1", log_level=40
        )
        self.client: Any = self._cluster.start_and_connect_sync()
        self.client.wait_for_engines(engines, timeout=LIMIT, interactive=False)
        launch(nothing, nprocs=engines, cluster=self.client)  # what starts ranks is there now

    def add(self) -> int:
        """Start one more engine; its id."""
        known = set(self.client.ids)
        self._cluster.start_engines_sync(n=1)
        wait_until(lambda: set(self.client.ids) - known)
        (number,) = set(self.client.ids) - known
        return int(number)

    def pid(self, number: int) -> int:
        return int(self.client[number].apply_sync(os.getpid))

    def shorten_leases(self) -> None:
        """Have engines end a rank after 2 s without a question."""
        self.client[:].apply_sync(
            exec, "from ddp_lessons.cluster import engine; engine.LEASE = 2.0", {}
        )

    @property
    def connection_file(self) -> str:
        """By which other clients connect."""
        directory = f"{self._cluster.profile_dir}/security"
        return f"{directory}/ipcontroller-{self._cluster.cluster_id}-client.json"

    def kill_controller(self) -> None:
        """SIGKILL it and its schedulers, which would go on without it."""
        controller = self._cluster.controller.process
        for process in (controller, *controller.children(recursive=True)):
            process.kill()

    def kill(self, number: int) -> None:
        """SIGKILL an engine, and wait until the cluster knows."""
        os.kill(self.pid(number), signal.SIGKILL)
        wait_until(lambda: number not in self.client.ids)

    def stop(self) -> None:
        processes = [process for process in _processes() if process not in self._others]
        self.client.close()
        self._cluster.stop_cluster_sync()
        for process in processes:
            _end_nanny(process)
        _, left = psutil.wait_procs(processes, timeout=LIMIT)
        assert not left, f"the cluster left {left}"


@contextmanager
def cluster_of(directory: Path, engines: int) -> Iterator[Cluster]:
    """A cluster of so many engines on this machine."""
    before = os.environ.get("IPYTHONDIR")
    cluster = Cluster(directory, engines)
    try:
        yield cluster
    finally:
        cluster.stop()
        if before is None:
            del os.environ["IPYTHONDIR"]
        else:
            os.environ["IPYTHONDIR"] = before


def nothing(rank: int) -> None:
    pass


def state() -> Any:
    """What a learner may have set on an engine; called there."""
    main = sys.modules["__main__"]
    names = sorted(name for name in vars(main) if not name.startswith("_"))
    private = sorted(vars(main).keys() & {"__spec__", "__file__"})
    handler = str(signal.getsignal(signal.SIGINT))
    return names, private, os.getcwd(), dict(os.environ), list(sys.path), handler


def until_there(file: str) -> None:
    """Keep an engine busy until there is such a file; called there."""
    wait_until(lambda: Path(file).exists())


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def as_soon_as(condition: Callable[[], Any], act: Callable[[], Any]) -> Iterator[None]:
    """Do something beside the block when a condition holds."""

    def wait_and_act() -> None:
        wait_until(condition)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield
    thread.join()


def _end_nanny(process: psutil.Process) -> None:
    """The process beside an engine goes on for 5 s to tell a controller that is gone."""
    with suppress(psutil.NoSuchProcess):
        if "ipyparallel.engine.nanny" in process.cmdline():
            process.kill()


def _processes() -> list[psutil.Process]:
    """The processes of all clusters."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if _of_cluster(process)]


def _of_cluster(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "ipyparallel" in " ".join(process.cmdline())
    return False
