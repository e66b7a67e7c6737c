"""Starts the process of a rank: forked by a forkserver, or a new interpreter.

Runs in the parent, called by local.py. It uses multiprocessing one level below `Process.start`,
whose side effects reach other code. So a rank does not run the main script again, because functions
are pickled by value; the variables of a new interpreter are set in the rank only; and the rank does
not appear in `multiprocessing.active_children()`, for which the learner's code may wait.

On Linux a new interpreter, too, starts in a process that a forkserver forked, which then adopts
what the rank leaves behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import (
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any

from ddp_lessons.system import memory, reaper
from ddp_lessons.system.host import blocking_pair
from ddp_lessons.worker.spare import MOST_DESCRIPTORS, MoreDescriptors, Waiting

NEEDED = 8  # descriptors that are open for a moment while a rank starts
PATIENCE = 120.0  # seconds that the forkserver may take, which first imports torch
PAUSE = 0.1  # seconds between two checks whether it still runs
REST = 300.0  # seconds after which a spare ends if no launch came
GO_ON = (  # modelled on multiprocessing's forkserver._serve_one and spawn.spawn_main
    "import sys; from multiprocessing import forkserver, resource_tracker, spawn; "
    "forkserver._forkserver._inherited_fds = {received}; "
    "resource_tracker._resource_tracker._fd = {tracker}; "
    "sys.exit(spawn._main({data}, {parent}))"
)
_close_fds: Any = util.close_fds  # type: ignore[attr-defined]
_interpreter_flags: Any = util._args_from_interpreter_flags  # type: ignore[attr-defined]
ENV = "/usr/bin/env"  # becomes a program, by exec, with more variables


class Forked(popen_forkserver.Popen):
    """A rank's process, forked by a forkserver."""

    _fds: list[int]

    def __init__(self, process: BaseProcess, server: Any, check: Callable[[], None]) -> None:
        self._server, self._check = server, check
        self._polling = threading.Lock()
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        data = self._data(process)
        with self._sends_more(), self._asked_for() as data_w:
            self._read_pid()
            self._write(data_w, data)

    def _data(self, process: BaseProcess) -> bytes:
        """What the forked process reads."""
        return _pickled(self, process)

    @contextlib.contextmanager
    def _asked_for(self) -> Iterator[int]:
        """Ask the forkserver for a process; the descriptor from which that will read."""
        _make_sure_of_descriptors()
        self.sentinel, data_w = self._server.connect_to_new_process(self._fds)
        # The rank holds the other end of this pipe, and so notices when its parent ends.
        parent_w = os.dup(data_w)
        self.finalizer = util.Finalize(self, _close_fds, (parent_w, self.sentinel))
        try:
            yield data_w
        except BaseException:
            self.finalizer()
            raise
        finally:
            os.close(data_w)

    @contextlib.contextmanager
    def _sends_more(self) -> Iterator[None]:
        """Send the descriptors for which a message has no room through a socket, in its place.

        Then wait until the process has them, as Linux lets only so many be on their way.
        """
        if not _has_more(self._fds):
            yield
            return
        ours, theirs = blocking_pair()
        with ours, theirs:
            more = self._fds[MOST_DESCRIPTORS - 2 :]
            self._fds[MOST_DESCRIPTORS - 2 :] = [theirs.fileno()]
            for at in range(0, len(more), MOST_DESCRIPTORS):
                socket.send_fds(ours, [b"+"], more[at : at + MOST_DESCRIPTORS])
            ours.shutdown(socket.SHUT_WR)
            yield
            theirs.close()
            self._await_forkserver(ours.fileno(), for_writing=False)

    def _read_pid(self) -> None:
        self._await_forkserver(self.sentinel, for_writing=False)
        self.pid = forkserver.read_signed(self.sentinel)

    def _write(self, descriptor: int, data: bytes) -> None:
        os.set_blocking(descriptor, False)
        view = memoryview(data)
        while view:
            self._await_forkserver(descriptor, for_writing=True)
            view = view[os.write(descriptor, view) :]

    def _await_forkserver(self, descriptor: int, *, for_writing: bool) -> None:
        """Wait for a pipe. Raises OSError if the forkserver has ended or does not answer.

        A forkserver that does not answer, or is suspended, is killed, so that a new one can start.
        """
        poll = select.poll()  # as select.select takes no descriptor above 1023
        poll.register(descriptor, select.POLLOUT if for_writing else select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while True:
            if poll.poll(1000 * PAUSE):
                return
            self._check()
            pid = self._server._forkserver_pid
            if reaper.is_suspended(pid):
                reaper.kill_and_wait(pid)
                raise OSError("the forkserver was suspended")
            if reaper.has_ended(pid):
                raise OSError("the forkserver has ended")
            if time.monotonic() > deadline:
                reaper.kill_and_wait(pid)
                raise OSError(f"the forkserver did not answer for {PATIENCE:g} s")

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The exit code, or None. The lock keeps two threads from each reading a part of it."""
        with self._polling:
            return super().poll(flag)


class Spare(Forked):
    """A process that a forkserver forks when it has time, and that becomes a rank later.

    Its own side is worker/spare.py.
    """

    pid: int | None = None  # type: ignore[assignment] # until it is asked for

    def __init__(self, server: Any, written: bytes) -> None:
        self.forkserver = server._forkserver_pid
        self._channel, theirs = blocking_pair()
        with theirs:
            self._fds = [theirs.fileno()]
            self._server, self._check = server, lambda: None
            self._polling = threading.Lock()
            self.returncode = None
            with self._asked_for() as data_w:
                data = pickle.dumps({}) + pickle.dumps(Waiting(REST, written))
                if len(data) > fcntl.fcntl(data_w, fcntl.F_GETPIPE_SZ):  # one would have to wait
                    data = pickle.dumps({}) + pickle.dumps(Waiting(REST, b""))
                os.write(data_w, data)

    @property
    def usable(self) -> bool:
        """Whether its forkserver and it still live and run."""
        if self.forkserver != self._server._forkserver_pid or (pid := self.known_pid()) is None:
            return False
        return self.poll() is None and not (reaper.has_ended(pid) or reaper.is_suspended(pid))

    def known_pid(self) -> int | None:
        """Its process id, once the forkserver has forked it; None if that has ended before."""
        if self.pid is None:
            with contextlib.suppress(OSError, EOFError):
                self._read_pid()
        return self.pid

    def become(self, process: BaseProcess, check: Callable[[], None]) -> bool:
        """Have it run a rank's process object; False if it has ended, or cannot take it.

        Raises CannotSend, as the start of a process does.
        """
        self._fds, self._check = [], check
        data = _pickled(self, process)
        tracker: Any = resource_tracker.getfd()
        try:
            with self._sends_more():
                socket.send_fds(self._channel, [b"+"], [tracker, *self._fds])
                self._write(self._channel.fileno(), data)
        except OSError:
            return False
        self._channel.close()
        return True

    def give_up(self) -> None:
        """Have it end, if it has not become a rank."""
        self._channel.close()
        self.close()

    def forget(self) -> None:
        """In a forked copy of its owner: close the socket that keeps it."""
        self._channel.close()


class Replaced(Forked):
    """A rank's process: forked by a forkserver, then a new interpreter by exec.

    It has this process's variables and `variables`, and none of the forkserver's.
    """

    def __init__(
        self,
        process: BaseProcess,
        variables: Mapping[str, str],
        server: Any,
        check: Callable[[], None],
    ) -> None:
        self._variables = variables
        super().__init__(process, server, check)

    def _data(self, process: BaseProcess) -> bytes:
        becomes = _Becomes(
            super()._data(process),
            [os.fsdecode(spawn.get_executable()), *_interpreter_flags()],
            {**os.environ, **self._variables},
        )
        return pickle.dumps({}) + pickle.dumps(becomes)


class _Becomes:
    """What a forkserver's child runs in place of multiprocessing's process object."""

    def __init__(self, data: bytes, command: list[str], environment: dict[str, str]) -> None:
        self._data, self._command, self._environment = data, command, environment

    def _bootstrap(self, parent_sentinel: int) -> int:
        """Become a new interpreter, which runs the process object that this process was sent."""
        with open(memory.memory_file(), "w+b") as file:
            file.write(self._data)
            file.seek(0)
            tracker: Any = resource_tracker.getfd()
            received: list[int] = forkserver._forkserver._inherited_fds  # type: ignore[attr-defined]
            for descriptor in (0, file.fileno(), parent_sentinel, tracker, *received):
                os.set_inheritable(descriptor, True)
            program = GO_ON.format(
                received=received, tracker=tracker, data=file.fileno(), parent=parent_sentinel
            )
            os.chdir("/")  # import Python's own modules first, not files beside the notebook
            command = [*self._command, "-c", program, "--multiprocessing-fork"]
            os.execve(command[0], command, self._environment)


class Spawned(popen_spawn_posix.Popen):
    """A rank's process where there is no forkserver: a new interpreter with `variables` added."""

    _fds: list[int]

    def __init__(self, process: BaseProcess, variables: Mapping[str, str]) -> None:
        self._variables = variables
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        tracker: Any = resource_tracker.getfd()
        self._fds.append(tracker)
        data = _pickled(self, process)
        with contextlib.ExitStack() as stack:
            self.sentinel, child_w = _pipe(stack)
            child_r, parent_w = _pipe(stack)
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=child_r)
            if self._variables:
                command = [ENV, *(f"{n}={v}" for n, v in self._variables.items()), *command]
            passed = [*self._fds, child_r, child_w]
            # Until it has its own session, the notebook's interrupt would end it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.pid = util.spawnv_passfds(os.fsencode(command[0]), command, passed)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            stack.pop_all()
        for descriptor in (child_r, child_w):
            os.close(descriptor)
        self.finalizer = util.Finalize(self, _close_fds, (self.sentinel, parent_w))
        with open(parent_w, "wb", closefd=False) as pipe:
            pipe.write(data)


def _make_sure_of_descriptors() -> None:
    """Raise OSError if too few files can be opened, as multiprocessing would leave some open."""
    with contextlib.ExitStack() as stack:
        for _ in range(NEEDED // 2):
            _pipe(stack)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _has_more(descriptors: list[int]) -> bool:
    """Whether one message has no room for these and one for the resource tracker."""
    return len(descriptors) >= MOST_DESCRIPTORS


def _pickled(popen: Forked | Spawned, process: BaseProcess) -> bytes:
    """What the new process reads: how to prepare itself, then the process object."""
    preparation = spawn.get_preparation_data(process.name)
    for main in ("init_main_from_name", "init_main_from_path"):
        preparation.pop(main, None)
    first, then = io.BytesIO(), io.BytesIO()
    set_spawning_popen(popen)
    try:
        reduction.dump(process, then)
        if isinstance(popen, Forked) and _has_more(popen._fds):
            preparation["descriptors"] = MoreDescriptors()
        reduction.dump(preparation, first)
    finally:
        set_spawning_popen(None)
    return first.getvalue() + then.getvalue()
