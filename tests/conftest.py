"""Fixtures of the whole suite. `leaves_nothing` holds for every test: nothing survives a run."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kernels import Kernel

# Every process that a worker starts by exec inherits this variable; by it orphans are found, too.
MARK = "DDP_LESSONS_TEST_SESSION"
LEFT_AFTER = 5.0  # seconds that what a run started may take to go
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session", autouse=True)
def marked_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Mark our processes, and give the session a temporary directory of its own."""
    directory = tmp_path_factory.mktemp("system-temp")
    os.environ[MARK] = str(os.getpid())
    os.environ["TMPDIR"] = str(directory)
    # A shell has what it runs in the background ignore interrupts; here some are meant.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = str(directory)
    yield
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Fail a test that leaves a process, socket, temp file or shared memory behind."""
    before = _things()
    yield
    deadline = time.monotonic() + LEFT_AFTER
    while (left := _things() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture
def figures_closed() -> Iterator[None]:
    """Close the figures that a test leaves open."""
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A real notebook kernel with `launch` imported."""
    with Kernel() as kernel:
        yield kernel


@pytest.fixture
def kernels() -> Iterator[Callable[[], Kernel]]:
    """Makes as many kernels as a test asks for."""
    made: list[Kernel] = []

    def make(**options: Any) -> Kernel:
        made.append(Kernel(**options).__enter__())
        return made[-1]

    yield make
    for kernel in made:
        kernel.__exit__(None, None, None)


def _things() -> set[str]:
    return {*_processes(), *_sockets(), *_files()}


def _processes() -> set[str]:
    own = {child.pid: child for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()):
                own[process.pid] = process
        except psutil.Error:
            continue
    return {text for process in own.values() if (text := _description(process))}


def _description(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return ""
    except psutil.NoSuchProcess:
        return ""
    if "multiprocessing.forkserver" in command and process.ppid() == os.getpid():
        return ""  # it lives as long as the process that launches
    if "multiprocessing.resource_tracker" in command:
        return ""
    return f"process {process.pid} {command[:80]}"


def _sockets() -> set[str]:
    mine = psutil.Process()
    return {f"socket {c.laddr} {c.status}" for c in mine.net_connections("tcp")}


def _files() -> set[str]:
    temporary = Path(tempfile.gettempdir())
    found = [*temporary.iterdir(), *(SHARED_MEMORY.iterdir() if SHARED_MEMORY.is_dir() else ())]
    return {f"file {path}" for path in found if not _goes_with_the_forkserver(path)}


def _goes_with_the_forkserver(path: Path) -> bool:
    """Its socket's folder, which is multiprocessing's, and one that older torch makes."""
    made_by_torch = (path / "_remote_module_non_scriptable.py").exists()
    return path.name.startswith("pymp-") or made_by_torch
