"""Reads stacks and tracebacks, and shows them to learners: their own lines, marked.

The parent parses and renders with it; workers describe their exceptions with it. Frames run from
the learner's function (first) to the innermost call (last).
"""

from __future__ import annotations

import itertools
import linecache
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ddp_lessons.text import agree, count, listed
from ddp_lessons.wire.owners import (
    ROOTS,
    STDLIB,
    Owner,
    is_at_home,
    is_stdlib,
    owner_of,
    real_path,
    unmarked,
)
from ddp_lessons.wire.records import ErrorRecord, Frame
from ddp_lessons.wire.unfiled import MADE_UP

MOST_TEXT = 20_000  # characters kept of an exception's message
MOST_BEFORE = 5  # exceptions kept at either end of a chain
MOST_PARTS = 5  # exceptions kept of a group
MOST_ERRORS = 50  # exceptions kept of all chains and groups together, about
MOST_FRAMES = 5  # of the learner's, shown at either end
MOST_DUMPED = 100  # frames of a thread, the innermost, that faulthandler prints
# Names for what keeps a rank from ending after its function returned, besides threads.
HANDLER, CHILD, PROCESS = "an atexit handler", "a child process", "its process"
WAIT = "Work.wait"  # the call, in C++, that waits for asynchronous work
CONTEXT = 1  # lines shown before and after the marked one

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d{1,9}) in (?P<function>.*)$')
_THREAD = re.compile(r"(?:Current t|T)hread 0x(?P<ident>[0-9a-f]+)")
_ESCAPE = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")
_DDP = "DistributedDataParallel"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Folders of our code that runs between the learner's function and torch.
_INFRASTRUCTURE = tuple(
    os.path.join(_PACKAGE, folder, "") for folder in ("instrumentation", "worker")
)
_WORKER = os.path.join(_PACKAGE, "worker", "main.py")  # calls the learner's function
_RENDEZVOUS = os.path.join(_PACKAGE, "instrumentation", "rendezvous.py")
# Our wrappers of Work.wait and of functional collectives: where a rank waits in C++, or where an
# exception came from.
_WAITING = (os.path.join("ddp_lessons", "instrumentation", "async_work.py"), "waited")
_FUNCTIONAL = os.path.join("ddp_lessons", "instrumentation", "functional.py")

# Files of torch.distributed that only call the function in which a rank waits.
_ONLY_CALL = ("c10d_logger.py", "_functional_collectives.py")

# Functions that wait until a thread is done, and where they are. Those of multiprocessing with the
# same names wait for a process.
_OF_THREADS = ("join", "result", "result_iterator", "as_completed", "shutdown")
_THREADS_FILES = tuple(
    os.path.join("", *path)
    for path in (("threading.py",), ("futures", "_base.py"), ("futures", "thread.py"))
)
# Lines of threading.py in which such a wait has a timeout; in that of Python 3.13 it may have one.
_TIMED = ("gotit = waiter.acquire(True", "self._wait_for_tstate_lock(timeout")
_PERHAPS_TIMED = "self._handle.join(timeout)"

# Functions in which Python's own threads only wait for work: an idle pool's; queues' and pools'.
# The thread of `_handle_results` calls callbacks, too.
_IDLE_POOL = "_worker"
_IDLE_HELPERS = ("_feed", "_handle_workers", "_handle_tasks", "_monitor")
# Threads of packages that never call the learner's code.
_IDLE_FILES = (os.path.join("tqdm", "_monitor.py"),)


class Position(NamedTuple):
    """Where a rank is: the learner's line, and the call of torch.distributed that it waits in."""

    frame: Frame | None
    call: str | None


def is_infrastructure(filename: str) -> bool:
    """True for the files of this package that run between a learner's call and torch's code."""
    return filename.startswith(_INFRASTRUCTURE)


def parse(
    dump: str,
    home: str | None = None,
    *,
    script: bool = False,
    name: Callable[[str], str] = str,
) -> tuple[Frame, ...]:
    """The stack of the learner's function, from what faulthandler printed.

    If the function only waits for another thread of the learner's, it is that thread's stack.
    `home` is the installed package that holds the function, if one does. `script=True` gives the
    stack of a script, from its first line on; `name` maps each file name to the one to show.
    """
    threads = _threads(dump, home, name)
    main = _own_part(threads[-1]) if script else _main(threads)
    if not _waits_for_a_thread(main):
        return main
    others = [_own_part(thread) for thread in threads if _own_part(thread)]
    others.sort(key=lambda frames: position(frames).call is None)
    return next((frames for frames in others if not _waits_for_a_thread(frames)), main)


class Keeper(NamedTuple):
    """What keeps a process from ending after its function returned, and its stack."""

    name: str
    frames: tuple[Frame, ...]


def what_keeps(dump: str, threads: Mapping[int, str], home: str | None = None) -> Keeper | None:
    """What keeps a rank whose function returned, from what faulthandler printed; None if nothing.

    `threads` are the names of the threads that it may wait for, by their identifiers.
    """
    of_thread = {ident: frames for ident, frames in _identified(dump, home) if frames}
    waits_in = [f.function for frames in of_thread.values() for f in frames if _is_worker(f)]
    if "wait_for_threads" in waits_in:
        waiting = {threads[ident]: of_thread[ident] for ident in of_thread if ident in threads}
        if not waiting:
            return Keeper("a thread that began later", ())
        names = sorted(waiting)
        first = waiting[names[0]]
        what = agree(names, "thread", "threads")
        return Keeper(f"{what} {listed(map(repr, names))}", _own_part(first) or tuple(first))
    if "run_exit_handlers" in waits_in:
        frames = _main(list(of_thread.values()))
        joins = any(frame.function == "_exit_function" for frame in frames)  # of multiprocessing
        return Keeper(CHILD if joins else HANDLER, frames)
    return None


def is_whole(dump: str) -> bool:
    """Whether a dump of all threads seems to have come to its end.

    faulthandler prints the oldest thread last, and that is the main one: its outermost frame is a
    module. Of more than a hundred frames, or threads, it prints "...".
    """
    return dump.endswith((" in <module>\n", "...\n"))


def all_wait_for_others(dump: str) -> bool:
    """True if all threads that may be the learner's wait in torch.distributed, or for such a one.

    A thread that runs only torch's code or ours is not the learner's, unless a thread of the
    learner's waits for one: it may be that. One that runs only Python's, such as a
    `threading.Timer`, may still be about to call the learner's code.
    """
    threads = [thread for thread in _threads(dump) if not _is_helper(thread)]
    if any(_may_call_something(thread) for thread in threads):
        return False
    parts = [part for thread in threads if (part := _own_part(thread))]
    waiting = [part for part in parts if _waits_for_a_thread(part)]
    if any(map(_may_give_up, waiting)):
        return False
    others = [thread for thread in threads if not _own_part(thread)] if waiting else []
    if any(_call_of_any(thread) is None for thread in others if _is_librarys(thread)):
        return False
    calls = [position(part).call for part in parts if part not in waiting]
    return bool(calls) and None not in calls


def _is_helper(frames: Sequence[Frame]) -> bool:
    return any(frame.filename.endswith(_IDLE_FILES) for frame in frames)


def _is_librarys(frames: Sequence[Frame]) -> bool:
    """Whether a thread runs code of libraries that something of theirs was called for."""
    return any(not is_stdlib(f.filename) and not is_infrastructure(f.filename) for f in frames)


def _call_of_any(frames: Sequence[Frame]) -> str | None:
    return next((name for frame in frames if (name := _call_of(frame))), None)


def _may_give_up(frames: Sequence[Frame]) -> bool:
    """Whether a wait for a thread has a timeout, or may have one."""
    perhaps = [number for number, frame in enumerate(frames) if frame.source == _PERHAPS_TIMED]
    return any(frame.source.startswith(_TIMED) for frame in frames) or any(
        number == 0 or "join()" not in frames[number - 1].source for number in perhaps
    )


def _may_call_something(frames: Sequence[Frame]) -> bool:
    """Whether a thread runs only Python's own code, other than that of an idle pool or a queue."""
    return (
        bool(frames)
        and all(is_stdlib(frame.filename) for frame in frames)
        and frames[-1].function != _IDLE_POOL
        and not any(frame.function in _IDLE_HELPERS for frame in frames)
    )


def _main(threads: Sequence[Sequence[Frame]]) -> tuple[Frame, ...]:
    """The frames of the learner's function, from its first line on; none if no thread runs it."""
    for frames in reversed(threads):
        started = [i for i, frame in enumerate(frames) if frame.filename == _WORKER]
        if started:
            return tuple(frames[started[-1] + 1 :]) or (frames[started[-1]],)
        if frames is threads[-1] and len(frames) >= MOST_DUMPED:
            return tuple(frames)  # the main thread comes last; its outermost frames are left out
    return ()


def _own_part(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """A thread's frames, from the first that may be the learner's on; none if it has none."""
    own = _not_of_libraries(frames)
    return tuple(frames[own[0] :]) if own else ()


def _not_of_libraries(frames: Sequence[Frame]) -> list[int]:
    return [i for i, frame in enumerate(frames) if _owner(frame) is not Owner.LIBRARY]


def _waits_for_a_thread(frames: Sequence[Frame]) -> bool:
    """Whether the innermost of the learner's lines waits for a thread, or for its result."""
    own = _not_of_libraries(frames)
    return bool(own) and any(
        frame.function in _OF_THREADS
        and is_stdlib(frame.filename)
        and frame.filename.endswith(_THREADS_FILES)
        for frame in frames[own[-1] + 1 :]
    )


def _threads(
    dump: str, home: str | None = None, name: Callable[[str], str] = str
) -> list[list[Frame]]:
    """The frames of every thread."""
    return [frames for _, frames in _identified(dump, home, name)]


def _identified(
    dump: str, home: str | None, name: Callable[[str], str] = str
) -> list[tuple[int, list[Frame]]]:
    """The identifier of every thread (0 if it was not printed), and its frames."""
    threads = []
    for thread in re.split(r"\n(?=(?:Current t|T)hread 0x)", _unescaped(dump)):
        lines = [_FRAME.match(line) for line in thread.splitlines()]
        head = _THREAD.match(thread)
        ident = int(head["ident"], 16) if head else 0
        threads.append((ident, [_frame(line, home, name) for line in lines[::-1] if line]))
    return threads


def _is_worker(frame: Frame) -> bool:
    return frame.filename == _WORKER


def frame_at(filename: str, lineno: int) -> Frame:
    """The line as a frame, with its source."""
    return Frame(filename, lineno, "", source_of(filename, lineno))


def _frame(line: re.Match[str], home: str | None, name: Callable[[str], str]) -> Frame:
    file, number = name(line["file"]), int(line["line"])
    return Frame(file, number, line["function"], source_of(file, number), is_at_home(file, home))


def _unescaped(dump: str) -> str:
    """The text of faulthandler, which escapes characters beyond ASCII, with them restored."""
    return _ESCAPE.sub(lambda m: chr(int(m[0][2:], 16)), dump)


def position(frames: Sequence[Frame]) -> Position:
    """The learner's line in a stack or traceback, and the call that it waits in."""
    own = learners(frames)
    below = frames[own[-1] + 1 :] if own else frames
    call = next((name for frame in below if (name := _call_of(frame))), None)
    if call is None and any(frame.filename == _RENDEZVOUS for frame in below):
        call = "init_process_group"  # waiting for rank 0's store
    return Position(frames[own[-1]] if own else None, call)


def learners(frames: Sequence[Frame]) -> list[int]:
    """The indices of the learner's frames; if there are none, of installed packages' frames."""
    owners = [_owner(frame) for frame in frames]
    wanted = Owner.LEARNER if Owner.LEARNER in owners else Owner.PACKAGE
    return [i for i, owner in enumerate(owners) if owner is wanted]


def waiting_where(frames: Sequence[Frame]) -> str:
    """`, waiting in barrier, Cell In[3], line 4`; "" for an unknown stack."""
    frame, call = position(frames)
    if frame is None:
        return ""
    return f", waiting in {call}, {line_name(frame)}" if call else f" at {line_name(frame)}"


def _owner(frame: Frame) -> Owner:
    return Owner.LEARNER if frame.at_home else owner_of(frame.filename)


def is_cell(filename: str) -> bool:
    """True for source that exists only in the interactive session, such as a notebook's cell."""
    entry = linecache.cache.get(filename)
    return entry is not None and len(entry) == 4 and entry[1] is None


def place_name(filename: str) -> str:
    """`Cell In[3]` for a cell, else the path, relative to site-packages or the directory."""
    shell = _shell()
    if shell is not None and unmarked(filename) == filename:
        named = shell.compile.format_code_name(filename)
        if named is not None:
            return " ".join(named)
    filename = unmarked(filename)
    path = real_path(filename)
    for root in (*ROOTS, STDLIB, real_path(os.curdir) + os.sep):
        if path.startswith(root):
            return path[len(root) :]
    return filename


def line_name(frame: Frame) -> str:
    """`Cell In[3], line 4`."""
    return f"{place_name(frame.filename)}, line {frame.lineno}"


def describe(error: BaseException, home: str | None = None) -> ErrorRecord:
    """The exception as plain data, with its causes and parts, without frames of this package.

    Only the frame in which a rank waits for asynchronous work is kept, for `position`. The record
    stays small, however many exceptions there are. `home` is the installed package that
    holds the launched function, if one does.
    """
    return _record(error, home, MOST_ERRORS, set())


def text_of(error: BaseException) -> str:
    """Type and message as a traceback ends, also where `str(error)` fails or is huge."""
    return _text(_alone(error))


def _record(error: BaseException, home: str | None, room: int, seen: set[int]) -> ErrorRecord:
    """An exception, with about `room` others at most: its causes, and the parts of groups."""
    chain = _chain(error, seen)
    ends = max(1, min(MOST_BEFORE, room // 2))
    left_out = max(0, len(chain) - 2 * ends)
    kept = [*chain[:ends], *chain[ends + left_out :]]
    record = None
    for number, one in reversed(list(enumerate(kept))):
        record = replace(
            _one(one, home, (room - len(kept)) // len(kept), seen),
            previous=record,
            link="" if record is None else "context" if one.__cause__ is None else "cause",
            left_out=left_out if number == ends - 1 else 0,
        )
    assert record is not None
    return record


def _chain(error: BaseException, seen: set[int]) -> list[BaseException]:
    """The exception and its causes, newest first; a circle of causes ends where it closes."""
    chain = [error]
    while True:
        seen.add(id(error))
        before = error.__cause__
        if before is None and not error.__suppress_context__:
            before = error.__context__
        if before is None or id(before) in seen:
            return chain
        chain.append(error := before)


def _one(error: BaseException, home: str | None, room: int, seen: set[int]) -> ErrorRecord:
    """An exception without its causes; if it is a group, with about `room` of its parts."""
    alone = _alone(error)
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    kept = parts[: max(0, min(MOST_PARTS, room))]
    return ErrorRecord(
        type_name=_type_name(alone),
        text=_text(alone),
        frames=tuple(
            Frame(
                f.filename,
                f.lineno or 0,
                f.name,
                "" if f.filename in MADE_UP else (f.line or "").strip(),
                is_at_home(f.filename, home),
            )
            for f in alone.stack
            if not is_infrastructure(f.filename) or _is_wait(f.filename, f.name)
        ),
        parts=tuple(_record(part, home, room // len(kept) - 1, seen) for part in kept),
        parts_left_out=len(parts) - len(kept),
    )


def _alone(error: BaseException) -> traceback.TracebackException:
    """The standard library's description of one exception, without its causes and parts.

    `_seen` keeps it from following them: there may be thousands, or groups nested so deep that it
    would exceed Python's recursion limit.
    """
    alone = traceback.TracebackException(type(error), error, error.__traceback__, _seen=set())
    alone.exceptions = None  # Python 3.13 reads it
    return alone


def _text(alone: traceback.TracebackException) -> str:
    text = "".join(alone.format_exception_only()).strip()
    text = re.sub(r'\A(File ".*", line \d+\n)\s*\n', r"\1", text)  # of eval(""): no source
    more = len(text) - MOST_TEXT
    return f"{text[:MOST_TEXT]}\n[... {more:,} characters left out ...]" if more > 0 else text


def _type_name(error: traceback.TracebackException) -> str:
    if sys.version_info >= (3, 13):  # where `exc_type` warns
        return error.exc_type_str.rpartition(".")[2]
    return error.exc_type.__qualname__.rpartition(".")[2]


def render(error: ErrorRecord) -> str:
    """An exception with its causes and parts, as text with the learner's lines marked."""
    lines = [*render_frames(error.frames), error.text]
    for number, part in enumerate(error.parts, 1):
        lines += ["", f"Part {number} of {len(error.parts) + error.parts_left_out}:"]
        lines.append(textwrap.indent(render(part), "    "))
    if error.parts_left_out:
        lines += ["", f"[... {count(error.parts_left_out, 'part')} left out ...]"]
    if error.previous is None:
        return "\n".join(lines)
    because = (
        "That caused the next exception:"
        if error.link == "cause"
        else "While that was handled, another exception happened:"
    )
    between = [f"[... {count(error.left_out, 'exception')} left out ...]"] if error.left_out else []
    return "\n\n".join([render(error.previous), *between, because, "\n".join(lines)])


def render_frames(frames: Sequence[Frame]) -> list[str]:
    """The learner's frames with their source; of the libraries', only the innermost."""
    lines: list[str] = []
    own = [frames[i] for i in learners(frames)]
    first_at = {place: n for n, place in reversed([*enumerate(map(_place, own))])}
    firsts = sorted(first_at.values())  # a recursion comes to the same lines again and again
    told = [*firsts[:MOST_FRAMES], *firsts[MOST_FRAMES:][-MOST_FRAMES:]]
    for number, following in itertools.pairwise([*told, len(own)]):
        frame, left_out = own[number], following - number - 1
        lines += [f"{line_name(frame)}, in {frame.function}", *_excerpt(frame)]
        lines += [f"[... {count(left_out, 'frame')} left out ...]"] if left_out else []
    shown = frames[:-1] if frames and _is_wait(frames[-1].filename, frames[-1].function) else frames
    if shown and shown[-1] not in own[-1:]:
        frame = shown[-1]
        lines += [f"{line_name(frame)}, in {frame.function}"]
        lines += [f"     {frame.source}"] if frame.source else []
    return lines


def _place(frame: Frame) -> tuple[str, int, str]:
    return frame.filename, frame.lineno, frame.function


def _excerpt(frame: Frame) -> list[str]:
    """The marked line between its neighbours, as IPython shows it; nothing without its text."""
    numbers = range(max(1, frame.lineno - CONTEXT), frame.lineno + CONTEXT + 1)
    texts = {n: _line(frame.filename, n).rstrip() for n in numbers}
    texts[frame.lineno] = texts[frame.lineno] or frame.source
    return [
        f"{'---->' if n == frame.lineno else '     '} {n:>3} {text}"
        for n, text in texts.items()
        if text
    ]


def _call_of(frame: Frame) -> str | None:
    """The call in which ranks wait for each other, if the frame is one."""
    directory, name = os.path.split(unmarked(frame.filename))
    if directory.endswith(os.path.join("torch", "distributed")):
        return None if name in _ONLY_CALL else frame.function
    if directory.endswith(os.path.join("torch", "nn", "parallel")) and name == "distributed.py":
        return _DDP
    if directory.endswith(os.path.join("torch", "autograd")) and frame.function == "backward":
        return "backward"  # of a model in DDP, which sums the gradients there
    return WAIT if _is_wait(frame.filename, frame.function) else None


def _is_wait(filename: str, function: str) -> bool:
    filename = unmarked(filename)
    is_work = function == _WAITING[1] and filename.endswith(_WAITING[0])
    return is_work or filename.endswith(_FUNCTIONAL)


def source_of(filename: str, lineno: int) -> str:
    """A line's text without its indentation; "" if it is unknown."""
    return _line(filename, lineno).strip()


def _line(filename: str, lineno: int) -> str:
    """A line's text; "" under a made-up name, where Python 3.13 may keep the text of other code."""
    return "" if filename in MADE_UP else linecache.getline(filename, lineno)


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None
