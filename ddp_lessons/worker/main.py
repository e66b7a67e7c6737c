"""The life of one rank, in its own process: become a fresh process, run the function, report.

processes/local.py starts a worker with `run_rank`; the forkserver imports this module beforehand.
It must start nothing when it is imported, and it imports torch only once the environment is the
learner's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import logging
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import socket
import sys
import threading
import time
import weakref
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO

from ddp_lessons.instrumentation import profiler, recording
from ddp_lessons.instrumentation.install import install
from ddp_lessons.instrumentation.rendezvous import listen_on_loopback, meet_apart
from ddp_lessons.system import memory, reaper
from ddp_lessons.wire.messages import (
    STACK_SIGNAL,
    Message,
    PostMortem,
    Raised,
    Returned,
    Started,
    Unsendable,
    WrittenPages,
    encode,
)
from ddp_lessons.wire.parcels import Parcel, pack
from ddp_lessons.wire.pickling import dumps_small
from ddp_lessons.wire.span_buffer import SpanWriter
from ddp_lessons.wire.stacks import describe, text_of
from ddp_lessons.wire.task import RankInfo, Task
from ddp_lessons.worker import displays, huge_pages, post_mortem, settings, written_pages
from ddp_lessons.worker.in_turn import InTurn
from ddp_lessons.worker.main_module import Inherited, replace_main, unpack

MOST_THREADS = (1 << 31) - 1  # OpenMP ignores a larger number
MOST_PICKLED = 1 << 20  # bytes of an exception's pickle; if it is larger, only its text travels


def run_rank(
    task: Task,
    place: RankInfo,
    args: tuple[Parcel, ...],
    messages: Connection | socket.socket,
    output: Connection,
    stacks: Connection,
    buffers: Connection,
) -> None:
    """Run one rank; the process exits with the code that it would have had as a script."""
    os.setsid()  # the notebook's interrupt reaches this rank only through the parent
    # Its starter may ignore or block interrupts; the rank takes them from here on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    huge_pages.forget_request()
    _die_with_parent()
    memory.prefer_as_oom_victim()
    _redirect(output)
    faulthandler.register(STACK_SIGNAL, file=stacks.fileno(), all_threads=True, chain=False)
    _become_fresh(task, place)
    send = _Sender(messages)
    buffer = SpanWriter(buffers.fileno(), place.rank)
    recorder = recording.Recorder(
        place.rank,
        buffer,
        send,
        world_size=place.world_size,
        one_clock=task.one_clock,
        host_of_rank_zero=task.environment["MASTER_ADDR"],
        home=task.home,
    )
    buffers.close()
    # A new interpreter imports torch now. To look through all of that for garbage, now and when it
    # ends, would take a third of a rank's processor time.
    gc.disable()
    install(recorder)
    gc.freeze()
    gc.enable()
    meet_apart()
    listen_on_loopback()
    code = _carry_out(task, place.rank, args, recorder, by_file=send.takes_files)
    wait_for_threads()
    run_exit_handlers()
    with contextlib.suppress(OSError):  # the learner's handlers may have closed the pipe
        recorder.notice_unused_handles()
        if task.tells_pages and place.rank == 0 and recorder.has_joined:
            send(WrittenPages(written_pages.written()))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it is closed, or an object of the learner's
            stream.flush()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # multiprocessing flushes them next
    ctypes.CDLL(None).fflush(None)  # what C code printed: multiprocessing leaves by os._exit
    if "TORCHINDUCTOR_CACHE_DIR" not in {**task.environment, **task.overrides}:
        remove_unused_cache()
    for group in recorder.groups:
        # A group that the interpreter frees while it shuts down may wait forever: let it leak.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    # Python removes the handler while it shuts down; then the signal would kill the rank.
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACK_SIGNAL})
    sys.exit(code)


def wait_for_threads() -> None:
    """Wait for the learner's threads, as the interpreter does before it runs exit handlers."""
    threading._shutdown()  # type: ignore[attr-defined]


def run_exit_handlers() -> None:
    """Run what the learner registered with `atexit`: multiprocessing leaves by os._exit."""
    atexit._run_exitfuncs()


def remove_unused_cache() -> None:
    """Remove the directory that importing torch._dynamo makes and names in the environment."""
    with contextlib.suppress(KeyError, OSError):  # none was made, or it is in use: not empty
        os.rmdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])


class _Sender:
    """Writes whole messages to the parent, from any thread and from signal handlers."""

    def __init__(self, connection: Connection | socket.socket) -> None:
        self._connection = connection  # kept open for the life of the process
        self._in_turn = InTurn()
        self._pid = os.getpid()

    @property
    def takes_files(self) -> bool:
        """Whether a file can travel beside a message."""
        return isinstance(self._connection, socket.socket)

    def __call__(self, message: Message) -> None:
        if os.getpid() != self._pid:
            return  # in a forked child that runs on in the learner's function: it is not the rank
        self._in_turn(functools.partial(self._write, *encode(message)))

    def _write(self, encoded: bytes, file: Connection | None) -> None:
        data = memoryview(encoded)
        if file is not None:
            assert isinstance(self._connection, socket.socket)
            data = data[socket.send_fds(self._connection, [data], [file.fileno()]) :]
        while data:
            data = data[os.write(self._connection.fileno(), data) :]


def _die_with_parent() -> None:
    """Have this rank and its children end at once when the parent ends, in whatever way.

    The pipe to the parent closes then. PR_SET_PDEATHSIG would follow the forkserver instead.
    """
    parent = parent_process()
    assert parent is not None
    if not reaper.kill_when_closed(parent.sentinel, -os.getpgrp()):
        args = (parent.sentinel,)
        threading.Thread(target=_kill_group_after, args=args, daemon=True).start()


def _kill_group_after(sentinel: int) -> None:
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)


def _redirect(output: Connection) -> None:
    """Send everything that this process and its C++ code write to the parent, line by line."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # else the forkserver was started without it
            stream.flush()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    null = sys.stdin.fileno()  # multiprocessing opened the null device
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    # Also where a learner puts the streams back that Python started with.
    sys.stdout = sys.__stdout__ = _line_writer(1, "<stdout>")  # type: ignore[misc, assignment]
    sys.stderr = sys.__stderr__ = _line_writer(2, "<stderr>")  # type: ignore[misc, assignment]


def _line_writer(descriptor: int, name: str) -> TextIO:
    writer = open(
        descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    writer.buffer.raw.name = name  # type: ignore[attr-defined] # as Python does it
    return writer


def _become_fresh(task: Task, place: RankInfo) -> None:
    """Take on the parent's present state; undo what a fork inherits and a fresh start would not."""
    os.environ.clear()
    os.environ.update({**task.environment, **place.variables(), **task.overrides})
    time.tzset()  # as the forkserver's zone may be another
    os.chdir(task.cwd)
    if task.process is not None:
        task.process.take_over()
    added = task.overrides.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, added), *task.path]
    # Python trusts a cached module if the source's size and second of change agree, so it would
    # miss the second of two quick edits. A rank therefore writes no cache.
    sys.dont_write_bytecode = True
    replace_main(task.definitions, task.sources)
    multiprocessing.set_start_method(task.start_method, force=True)  # of the rank's own children
    if "multiprocessing.forkserver" in sys.modules:
        _drop_exit_handlers()
    if "torch" in sys.modules:
        _refresh_torch()
    if "numpy.random" in sys.modules:
        # `random` seeds itself again after a fork; NumPy's legacy generator does not.
        sys.modules["numpy.random"].seed()


def _drop_exit_handlers() -> None:
    """Drop the exit handlers inherited from the forkserver, which runs them itself.

    Keep those that the standard library runs at the end of every process.
    """
    atexit._clear()
    for inherited in weakref.finalize._registry:  # type: ignore[attr-defined]
        inherited.atexit = False
    atexit.register(logging.shutdown)
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def _refresh_torch() -> None:
    """Renew what torch read when the forkserver imported it: variables, and a random seed."""
    import torch
    import torch.distributed as dist

    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    number = int(threads) if threads.isdecimal() else 0
    torch.set_num_threads(number if 0 < number <= MOST_THREADS else os.cpu_count() or 1)
    dist.set_debug_level_from_env()
    torch.default_generator.seed()


def _carry_out(
    task: Task,
    rank: int,
    args: tuple[Parcel, ...],
    recorder: recording.Recorder,
    *,
    by_file: bool,
) -> int:
    """Call the function, send its outcome, and return the exit code of the process.

    `by_file` says whether a value may travel in a file.
    """
    called = False
    shown = displays.Displays(recorder.send)
    if task.in_notebook:
        shown.catch()
    try:
        fn = unpack(task.function)
        values = [argument.load() for argument in args]
        taken = settings.take_over(pickle.loads(task.settings))
        Inherited(task.function, task.definitions, task.sources, taken).pass_on()
        if task.profile:
            profiler.start(recorder)
        if task.notes:
            from ddp_lessons.instrumentation import notes  # which imports torch

            notes.start(recorder)
        recorder.send(Started(time.perf_counter_ns()))
        called = True
        value = fn(rank, *values)
    except BaseException as error:  # SystemExit and KeyboardInterrupt end a rank, too
        end_ns = _close(recorder)
        shown.close()
        code = _exit_code(error)
        record = describe(error, task.home)
        recorder.send(
            Returned(end_ns, pack(None), _threads(), record.frames)
            if called and code == 0
            else Raised(end_ns, record, code, _pickled_or_none(error))
        )
        if task.post_mortem and code:  # last: to show a learner's object may take forever
            recorder.send(PostMortem(post_mortem.frames_of(error, task.home)))
        return code
    end_ns = _close(recorder)
    shown.close()
    recorder.send(_returned(value, end_ns, by_file=by_file))
    return 0


def _close(recorder: recording.Recorder) -> int:
    end_ns = time.perf_counter_ns()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the report below must arrive whole
    recorder.close()
    return end_ns


def _returned(value: Any, end_ns: int, *, by_file: bool) -> Message:
    try:
        return Returned(end_ns, pack(value, by_file=by_file), _threads())
    except BaseException as error:  # whatever a learner's object raises in its own __reduce__
        return Unsendable(end_ns, type(value).__name__, text_of(error))


def _threads() -> dict[int, str]:
    """The threads for which the process waits before it ends."""
    return {
        thread.ident: thread.name
        for thread in threading.enumerate()
        if thread.ident is not None and not thread.daemon and thread != threading.main_thread()
    }


def _exit_code(error: BaseException) -> int:
    """The code with which the interpreter would exit (documentation of sys.exit)."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    if not isinstance(error.code, int):
        return 1
    return error.code & 0xFF if abs(error.code) <= sys.maxsize else 255


def _pickled_or_none(error: BaseException) -> bytes | None:
    try:
        return dumps_small(error, MOST_PICKLED)
    except BaseException:  # it is too large, say; its text travels anyway, in the ErrorRecord
        return None
