"""The life of one rank, in its own process: become a fresh process, run the function, report.

Imported only in workers and, as a preload, in the forkserver. It must start nothing when it is
imported, and it imports torch only once the environment is the learner's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import linecache
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO

from ddp_lessons import memory, profiling, recording
from ddp_lessons.messages import (
    Message,
    Raised,
    Returned,
    Started,
    Unsendable,
    encode,
)
from ddp_lessons.pickling import dumps
from ddp_lessons.rendezvous import meet_apart
from ddp_lessons.stacks import describe
from ddp_lessons.tape import Tape
from ddp_lessons.task import PackedArgument, Place, Task


def main(
    task: Task,
    place: Place,
    args: tuple[PackedArgument, ...],
    messages: Connection,
    output: Connection,
    stacks: Connection,
    tape: Connection,
) -> None:
    """Run one rank; the process exits with the code that it would have had as a script."""
    os.setsid()  # the notebook's interrupt reaches this rank only through the parent
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with_parent()
    memory.offer_this_process()
    _redirect(output)
    faulthandler.register(signal.SIGUSR1, file=stacks.fileno(), all_threads=True, chain=False)
    _become_fresh(task, place)
    send = _Sender(messages)
    own_tape = Tape(tape.fileno(), place.rank)
    recorder = recording.Recorder(
        place.rank,
        own_tape,
        send,
        one_clock=task.one_clock,
        host_of_rank_zero=task.environment["MASTER_ADDR"],
        home=task.home,
    )
    tape.close()
    recording.install(recorder)
    meet_apart()
    code = _carry_out(task, place.rank, args, recorder)
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    if "TORCHINDUCTOR_CACHE_DIR" not in {**task.environment, **task.overrides}:
        remove_unused_cache()
    for group in recorder.groups:
        # A group that the interpreter frees while it shuts down may wait for ever: let it leak.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    sys.exit(code)


def remove_unused_cache() -> None:
    """Remove the directory that importing torch._dynamo makes and names in the environment."""
    with contextlib.suppress(KeyError, OSError):  # none was made, or it is in use: not empty
        os.rmdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])


class _Sender:
    """Writes whole messages to the parent, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # kept open for the life of the process
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __call__(self, message: Message) -> None:
        if os.getpid() != self._pid:
            return  # a forked child that goes on in the learner's function is not the rank
        data = memoryview(encode(message))
        with self._lock:
            while data:
                data = data[os.write(self._connection.fileno(), data) :]


def _die_with_parent() -> None:
    """Have this rank and its children end at once when the parent process ends, however it does.

    The pipe to the parent closes then. Linux can turn that into a signal for the whole process
    group (fcntl(2), F_SETOWN and F_SETSIG): no thread is needed, and a rank that is stuck in C++
    dies, too. PR_SET_PDEATHSIG would follow the forkserver instead.
    """
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(sentinel, fcntl.F_GETFL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if select.select([sentinel], [], [], 0)[0]:  # it ended before the line above
            os.killpg(0, signal.SIGKILL)
    else:
        threading.Thread(target=_kill_group_after, args=(sentinel,), daemon=True).start()


def _kill_group_after(sentinel: int) -> None:
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)


def _redirect(output: Connection) -> None:
    """Send everything that this process and its C++ code write to the parent, line by line."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    null = sys.stdin.fileno()  # multiprocessing opened the null device
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = _line_writer(1)
    sys.stderr = _line_writer(2)


def _line_writer(descriptor: int) -> TextIO:
    return open(
        descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )


def _become_fresh(task: Task, place: Place) -> None:
    """Take on the parent's present state; give back what a fork shares and a start would not."""
    os.environ.clear()
    os.environ.update({**task.environment, **place.variables(), **task.overrides})
    os.chdir(task.cwd)
    sys.path[:] = task.path
    # Python takes a cached module for current if size and second of change agree: the second of
    # two quick edits would go unseen. Without a cache from here, it takes effect.
    sys.dont_write_bytecode = True
    sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
    for name, text in task.sources.items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    multiprocessing.set_start_method(None, force=True)  # the rank's own children start as usual
    if "torch" in sys.modules:
        _refresh_torch()
    if "numpy.random" in sys.modules:
        # `random` seeds itself again after a fork; NumPy's legacy generator does not.
        sys.modules["numpy.random"].seed()


def _refresh_torch() -> None:
    """Read again what torch read when the forkserver imported it: variables, and a random seed."""
    import torch
    import torch.distributed as dist

    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch.set_num_threads(
        int(threads) if threads.isdigit() and int(threads) else os.cpu_count() or 1
    )
    dist.set_debug_level_from_env()
    torch.default_generator.seed()


def _carry_out(
    task: Task, rank: int, args: tuple[PackedArgument, ...], recorder: recording.Recorder
) -> int:
    """Call the function and send what came of it; the exit code of the process."""
    try:
        fn = _unpack(task)
        values = [argument.load() for argument in args]
        if task.profile:
            profiling.start(recorder)
        recorder.send(Started(time.perf_counter_ns()))
        value = fn(rank, *values)
    except BaseException as error:  # SystemExit and KeyboardInterrupt end a rank, too
        end_ns = _close(recorder)
        code = _exit_code(error)
        recorder.send(
            Returned(end_ns, pickle.dumps(None))
            if code == 0
            else Raised(end_ns, describe(error, task.home), code, _pickled_or_none(error))
        )
        return code
    end_ns = _close(recorder)
    recorder.send(_returned(value, end_ns))
    return 0


def _unpack(task: Task) -> Callable[..., Any]:
    fn, anchor = pickle.loads(task.function)
    main = sys.modules["__main__"].__dict__
    main.update((k, v) for k, v in anchor.__globals__.items() if not k.startswith("__"))
    return fn  # type: ignore[no-any-return]


def _close(recorder: recording.Recorder) -> int:
    end_ns = time.perf_counter_ns()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the report below must arrive whole
    recorder.close()
    return end_ns


def _returned(value: Any, end_ns: int) -> Message:
    try:
        return Returned(end_ns, dumps(value))
    except Exception as error:  # whatever a learner's object raises in its own __reduce__
        return Unsendable(end_ns, type(value).__name__, str(error))


def _exit_code(error: BaseException) -> int:
    """What the interpreter would exit with (documentation of sys.exit)."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _pickled_or_none(error: BaseException) -> bytes | None:
    try:
        return dumps(error)
    except Exception:  # its text travels anyway, in the ErrorRecord
        return None
