"""Starts and keeps the two forkservers, processes that fork workers and end with the parent.

Runs in the parent, called by local.py. The warm forkserver has torch imported (worker/preload.py)
and forks a worker in milliseconds, or beforehand (spares.py). The bare one forks processes that
become new interpreters at once, for the start method "spawn". Both adopt the processes that their
ranks leave behind. They are instances of multiprocessing's `ForkServer`, but not the one that the
library shares: the learner's code may have started that, and its leftover processes are not ours to
end. They are the package's only module-level state.
"""

from __future__ import annotations

import errno
import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing import util
from typing import TYPE_CHECKING, Any, TypeVar

from ddp_lessons.processes.spares import Spares, most
from ddp_lessons.system import reaper
from ddp_lessons.system.notebook import in_kernel

if TYPE_CHECKING:
    from ddp_lessons.processes.rank_process import Forked, Spare

# What a forkserver imports, and names of modules that the warm one imports, too.
WARM, BARE = "ddp_lessons.worker.preload", "ddp_lessons.worker.preload_bare"
also_warm: list[str] = []

# Prefixes of variables that Python, the C library or torch read once, when a process starts. A
# worker forked from a process that started with other values would ignore them.
READ_AT_START = (
    "PYTHON",
    "LD_",
    "MALLOC_",
    "GLIBC_",
    "KMP_",
    "GOMP_",
    "PYTORCH_JIT",
    "TORCH_COMPILE_",
    "TORCH_CPP_LOG_LEVEL",
    "TORCH_SHOW_CPP_STACKTRACES",
    "TORCH_LOGS",
    "TORCHDYNAMO_",
    "TORCHINDUCTOR_",
)
# Importing scikit-learn sets the first two, which matter only to a process that has not loaded
# OpenMP yet; importing torch._dynamo the last, which torch reads when it compiles.
SET_BY_IMPORTS = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR")
FEW = 5  # launches of a script after which more are expected
LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # bytes (unix(7), sun_path)
# Shortages of this process itself, which a new forkserver would not cure.
OURS_TO_BEAR = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


Taken = TypeVar("Taken")


class Forkserver:
    """A forkserver, and the ranks that it has forked. Safe to use from several threads.

    Starting a rank and ending orphans exclude each other: a rank that was forked a moment ago must
    not be taken for an orphan.
    """

    def __init__(self, imports: str) -> None:
        from multiprocessing.forkserver import ForkServer

        self.owner = os.getpid()
        self.environment = dict(os.environ)  # in which it was started
        self._server: Any = ForkServer()
        more = also_warm if imports == WARM else []
        self._server.set_forkserver_preload([imports, *more])
        self._ranks: set[int] = set()  # process ids
        self._spares = Spares(self._server)
        self._begin_anew()
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Its process id, once it was started."""
        pid: int | None = self._server._forkserver_pid
        return pid

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self.pid is not None and not reaper.has_ended(self.pid)

    def _begin_anew(self) -> None:
        self._launches = 0  # that it has served
        self._has_huge_pages = False
        self._written: bytes | None = None  # the pages that its ranks write

    def ensure_running(self) -> None:
        """Start it if it does not run (or has died); it goes on importing when this returns."""
        from multiprocessing import resource_tracker

        with self._lock:
            if self.pid is not None and reaper.is_suspended(self.pid):
                reaper.kill_and_wait(self.pid)
            before = self.pid
            _own_temporary_folder()  # even if it runs: it may end before the library looks
            resource_tracker.ensure_running()  # first, because starting it unblocks the interrupt
            # Until preload_bare.py gives it its own session, the notebook's interrupt would end it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._start_server()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if self.pid != before:
                self.environment = dict(os.environ)
                self._begin_anew()

    def _start_server(self) -> None:
        try:
            self._server.ensure_running()
        except ChildProcessError:  # it has ended, and the learner's code has asked how
            self.forget()
            self._server._forkserver_alive_fd = self._server._forkserver_pid = None
            self._server.ensure_running()

    def start(
        self,
        popen: Callable[[Any], Forked],
        become: Callable[[Spare], bool] | None = None,
    ) -> Forked:
        """Have a spare `become` a rank, or else `popen` start one by the forkserver.

        Raises what these do: OSError, EOFError, CannotSend. If the forkserver does not answer, it
        is started anew, once.
        """
        with self._lock:
            for last in (False, True):
                self.ensure_running()
                try:
                    started = (become and self._spares.take(become)) or popen(self._server)
                except (OSError, EOFError) as error:
                    if last or getattr(error, "errno", None) in OURS_TO_BEAR:
                        raise
                    if self.pid is not None:
                        reaper.kill_and_wait(self.pid)
                else:
                    break
            self._ranks.add(started.pid)
        return started

    @property
    def wants_pages(self) -> bool:
        """Whether rank 0 shall tell which pages it writes, as that is not known yet."""
        return self._written is None and most() > 0

    def keep_spares(self, ranks: int, written: bytes | None) -> None:
        """Have spares for the launches to come; one that has ended had `ranks`.

        Its rank 0 may have told which pages it had `written`.

        None are added while ranks still run. Before the first spares, and in a script after some
        launches, the forkserver moves its memory into huge pages: copies of it would keep the old.
        """
        with self._lock:
            self._spares.note(ranks)
            self._launches += 1
            self._written = self._written or written
            if self._ranks or self.pid is None or not self.runs:
                return
            if not self._has_huge_pages and self._launches >= (1 if most() else FEW):
                self._has_huge_pages = True
                from ddp_lessons.worker.huge_pages import REQUEST  # late: the import stays cheap

                if reaper.catches(self.pid, REQUEST):
                    os.kill(self.pid, REQUEST)
            self._spares.fill(self._written or b"")

    def give_up_spares(self) -> int:
        """End the spares; how many there were."""
        with self._lock:
            return self._spares.give_up()

    def end_orphans(self) -> None:
        """End the processes that dead ranks left behind: its children that are no ranks.

        While another run of this process goes on (from another thread), some of them may belong to
        its live ranks; then the run that ends last does the work.
        """
        with self._lock:
            self._ranks = {rank for rank in self._ranks if not reaper.has_ended(rank)}
            if self.pid is not None and not self._ranks:
                reaper.end_all_children_of(self.pid, but=self._spares.pids)

    def forget(self) -> None:
        """In a forked copy of its owner: close its pipe, so that it ends when its owner does."""
        if (descriptor := self._server._forkserver_alive_fd) is not None:
            os.close(descriptor)

    def forget_spares(self) -> None:
        """In a forked copy of its owner: the spares, too, end when their owner does."""
        self._spares.forget()


_servers: dict[str, Forkserver] = {}
_changing = threading.Lock()


def _after_fork() -> None:
    global _changing
    _changing = threading.Lock()  # another thread may have held it when this process was forked
    for one in _servers.values():
        one.forget_spares()


os.register_at_fork(after_in_child=_after_fork)


def server(imports: str = WARM) -> Forkserver:
    """A forkserver of this process; a forked copy of a kernel gets one of its own."""
    with _changing:
        known = _servers.get(imports)
        if known is not None and known.owner != os.getpid():
            known.forget()
            known = None
        if known is None:
            known = _servers[imports] = Forkserver(imports)
        return known


def _running() -> list[Forkserver]:
    with _changing:
        return [one for one in _servers.values() if one.owner == os.getpid()]


def end_orphans() -> None:
    """End the processes that dead ranks left behind, however the ranks were started."""
    for one in _running():
        one.end_orphans()


def spares_last(take: Callable[[], Taken]) -> Taken:
    """What `take` gives; if something runs short, it is tried again without the spares."""
    try:
        return take()
    except OSError as error:
        if error.errno not in OURS_TO_BEAR or not sum(one.give_up_spares() for one in _running()):
            raise
        return take()


_IMPORTED_BY = os.getpid()


def _own_temporary_folder() -> None:
    """Give multiprocessing a folder of this process's own for the forkserver's socket.

    A child inherits its parent's folder, which would be removed with the child's forkserver.
    Somebody may have removed the folder. And the path of a socket must be short.
    """
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if multiprocessing.parent_process() is not None or os.getpid() != _IMPORTED_BY:
        config.pop("tempdir", None)
    folder = config.get("tempdir")
    if folder is None and len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        folder = config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
    elif folder is not None and not os.path.isdir(folder):
        os.makedirs(folder, mode=0o700)


def default_start_method() -> str:
    """forkserver on Linux, spawn elsewhere (macOS frameworks do not survive a fork)."""
    return "forkserver" if sys.platform == "linux" else "spawn"


def warm_in_kernel() -> None:
    """In a notebook kernel, begin to warm the forkserver; returns in a few milliseconds."""
    if in_kernel() and default_start_method() == "forkserver":
        warm()


def warm() -> None:
    """Start the warm forkserver if it does not run; it imports torch in the background."""
    server().ensure_running()


def environment_is_current(environment: Mapping[str, str]) -> bool:
    """True if a forked worker would behave as one that was started with these variables."""
    one = server()
    started = one.environment if one.runs else os.environ
    names = {n for n in {*started, *environment} if n.startswith(READ_AT_START)}
    names.difference_update(SET_BY_IMPORTS)
    return all(started.get(name) == environment.get(name) for name in names)


def start_method(overrides: Mapping[str, str]) -> str:
    """The start method for ranks that see the present variables, with `overrides` on top."""
    method = default_start_method()
    return (
        "spawn"
        if method == "forkserver" and not environment_is_current({**os.environ, **overrides})
        else method
    )
