"""Fixtures of the whole suite. `leaves_nothing` holds for every test: nothing survives a run."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddp_lessons.worker import spare
from tests.support.kernels import Kernel
from tests.support.scheduling import queued_seconds

# Every process that a worker starts by exec inherits this variable; by it orphans are found, too.
MARK = "DDP_LESSONS_TEST_SESSION"
LEFT_AFTER = 5.0  # seconds that what a run started may take to go, if it gets a processor
SHARED_MEMORY = Path("/dev/shm")
OPEN = Path("/proc/self/fd")  # of Linux

# Importing nbformat would compile a grammar of web addresses, which takes each process a second.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# Collecting tests leaves hardly any garbage; looking for it would take two fifths of the time.
gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among what the test modules imported."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Tell pytest-xdist which tests are of one group: at the end of their ids, as it does itself.

    pytest-xdist 3.8 writes that where pytest 9.2 no longer looks (its issue 1386).
    """
    if not config.getoption("loadgroup", default=False):
        return
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group and hasattr(item, "_id") and "@" not in item.nodeid.rpartition("]")[2]:
            item._id = item.id.parse(f"{item.nodeid}@{group.args[0]}")


@pytest.fixture(scope="session", autouse=True)
def marked_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Mark our processes, and give the session a temporary directory of its own."""
    directory = tmp_path_factory.mktemp("system-temp")
    os.environ[MARK] = str(os.getpid())
    os.environ["TMPDIR"] = str(directory)
    os.environ.pop("PYTHONUNBUFFERED", None)  # ranks would write C's output at once, too
    # A shell has what it runs in the background ignore interrupts; here some are meant.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = str(directory)
    yield
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Fail a test that leaves a process, socket, temp file or shared memory behind."""
    before = _State()
    yield
    began = time.monotonic()
    ready: dict[int, float] = {}  # when first seen, for how long each had waited for a processor
    while left := _State().left_since(before):
        for pid in left.values():
            ready.setdefault(pid, queued_seconds(pid))
        lost = max(0.0, *(queued_seconds(pid) - ready[pid] for pid in left.values()))
        assert time.monotonic() - began < LEFT_AFTER + lost, f"left behind: {sorted(left)}"
        time.sleep(0.02)


@pytest.fixture
def compiles() -> Iterator[None]:
    """Remove what torch.compile leaves in the folder for temporary files."""
    yield
    for folder in Path(tempfile.gettempdir()).glob("torchinductor_*"):
        shutil.rmtree(folder)


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


@pytest.fixture(scope="module")
def shared_kernel() -> Iterator[Kernel]:
    """The same for all tests of a module that do it no harm: they need one `xdist_group`."""
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


class _State:
    """What there is, found at little cost; only what is new is looked at, in `left_since`.

    Other sessions run beside this one: their processes, and what those have in the memory that all
    share, are not ours.
    """

    def __init__(self) -> None:
        self._processes = set(psutil.pids())
        self._sockets = _own_sockets()
        self._files = set(Path(tempfile.gettempdir()).iterdir())
        self._shared = set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()

    def left_since(self, before: _State) -> dict[str, int]:
        """Texts of what is new and ours, each with the process that has to end it."""
        new = self._processes - before._processes
        processes = {_description(pid, before._processes): pid for pid in new}
        files = {f for f in self._files - before._files if not _goes_with_the_forkserver(f)}
        files |= {file for file in self._shared - before._shared if not is_anothers(file)}
        others = _tcp(self._sockets - before._sockets) | {f"file {file}" for file in files}
        processes.pop("", None)
        return processes | dict.fromkeys(others, os.getpid())


def _description(pid: int, there_before: set[int]) -> str:
    """A process in words; nothing if it is not ours, or may stay."""
    try:
        process = psutil.Process(pid)
        if not _is_ours(process) or process.status() == psutil.STATUS_ZOMBIE:
            return ""
        command = " ".join(process.cmdline())
        forkserver = process.parent() if process.name() == spare.NAME else process
        if forkserver and _is_forkserver(forkserver) and forkserver.ppid() in there_before:
            return ""  # it lives as long as the process that launches: this one, or an engine
    except psutil.NoSuchProcess:
        return ""
    if "multiprocessing.resource_tracker" in command:
        return ""
    return f"process {pid} {command[:80]}"


def _is_forkserver(process: psutil.Process) -> bool:
    return "multiprocessing.forkserver" in " ".join(process.cmdline())


def _is_ours(process: psutil.Process) -> bool:
    """Whether it is this process, has our mark, or is below this process."""
    if process.pid == os.getpid():
        return True
    with contextlib.suppress(psutil.AccessDenied):
        if process.environ().get(MARK) == str(os.getpid()):
            return True
    return os.getpid() in (parent.pid for parent in process.parents())


def _own_sockets() -> set[str]:
    """This process's sockets, by the names that Linux gives them; elsewhere, those of TCP."""
    if not OPEN.is_dir():
        return {f"{c.laddr} {c.status}" for c in psutil.Process().net_connections("tcp")}
    found = set()
    for file in OPEN.iterdir():
        with contextlib.suppress(OSError):  # that by which we look
            found.add(os.readlink(file))
    return {name for name in found if name.startswith("socket:")}


def _tcp(sockets: set[str]) -> set[str]:
    """Those of TCP, in words."""
    if not sockets or not OPEN.is_dir():
        return {f"socket {name}" for name in sockets}
    found = set()
    for connection in psutil.Process().net_connections("tcp"):
        with contextlib.suppress(OSError):
            if os.readlink(OPEN / str(connection.fd)) in sockets:
                found.add(f"socket {connection.laddr} {connection.status}")
    return found


def is_anothers(file: Path) -> bool:
    """Whether shared memory is that of a process that lives and is not ours.

    torch has the process in its name; of the others, Linux says who has it.
    """
    named = re.match(r"torch_(\d+)_", file.name)
    try:
        inode = f" {file.stat().st_ino} "
    except FileNotFoundError:
        return False  # a moment later it is not found either
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (named and int(named[1]) == process.pid) or _maps(process.pid, inode):
                return not _is_ours(process)
    return False


def _maps(pid: int, inode: str) -> bool:
    """Whether a process has this file of the shared memory; its name may be another by now."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        return any(inode in line and f" {SHARED_MEMORY}/" in line for line in maps)
    return False


def _goes_with_the_forkserver(path: Path) -> bool:
    """Its socket's folder, which is multiprocessing's, and one that older torch makes."""
    made_by_torch = (path / "_remote_module_non_scriptable.py").exists()
    return path.name.startswith("pymp-") or made_by_torch
