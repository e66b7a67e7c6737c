"""Notes the exceptions that the learner's code catches: an `except` may hide why a call is missing.

Python 3.12 and later tell of each by `sys.monitoring`, at no cost where nothing is raised; before,
only an exception is known that is being handled while a call is made (see collectives.py). Runs in
workers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

from ddp_lessons.instrumentation import recording
from ddp_lessons.instrumentation.call_sites import site_at
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.owners import Owner, owner_of
from ddp_lessons.wire.records import Caught

TOOLS = (4, 3)  # the numbers that sys.monitoring leaves to anybody
ROUTINE = 1_000  # exceptions after which a handler is part of the plan, and tells nothing
LONGEST = 200  # characters of an exception's message
_MOST = 10_000  # handlers kept; code that is made in a loop must not fill the memory


@dataclass(slots=True)
class _Handler:
    code: CodeType  # kept, so that no other code object gets its id
    line: int | None  # None if it is not the learner's
    caught: int = 0


_handlers: dict[tuple[int, int], _Handler] = {}


@functools.cache
def watch() -> bool:
    """Have Python tell of every exception that is caught. False if it cannot, or tools have it.

    Once in a process; a forked one goes on with it.
    """
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:  # before Python 3.12
        return False
    free = [tool for tool in TOOLS if monitoring.get_tool(tool) is None]
    if not free:
        return False
    events = monitoring.events
    monitoring.use_tool_id(free[0], __name__.partition(".")[0])
    monitoring.register_callback(free[0], events.EXCEPTION_HANDLED, _on_handled)
    monitoring.register_callback(free[0], events.RERAISE, _on_raised_again)
    monitoring.set_events(free[0], events.EXCEPTION_HANDLED | events.RERAISE)
    return True


def _on_handled(code: CodeType, offset: int, error: BaseException) -> None:
    """Python goes on at an `except`, a `finally` or the end of a `with`."""
    if (recorder := recording.current()) is not None:
        with contextlib.suppress(Exception):  # as when the stack is full: it would be the learner's
            _note(recorder, code, offset, error)


def _note(recorder: Recorder, code: CodeType, offset: int, error: BaseException) -> None:
    """Keep an exception that the learner's code may have caught."""
    handler = _handlers.get((id(code), offset))
    if handler is None:
        handler = _handler(code, offset, recorder.home)
        if len(_handlers) < _MOST:
            _handlers[id(code), offset] = handler
    trace = error.__traceback__
    if handler.line is None or handler.caught >= ROUTINE or trace is None:
        return
    handler.caught += 1
    own = _innermost(trace, recorder.home)
    for file in {own.tb_frame.f_code.co_filename, code.co_filename}:
        recorder.sites.on_file(file)
    what = Caught(
        time.perf_counter_ns(),
        _text(error),
        site_at(own.tb_frame.f_code, own.tb_lineno),
        site_at(code, trace.tb_lineno),
        site_at(code, handler.line),
    )
    recorder.buffer.caught((id(error), id(code)), what)


def _on_raised_again(code: CodeType, _offset: int, error: BaseException) -> None:
    """An exception leaves what handled it."""
    if (recorder := recording.current()) is not None:
        recorder.buffer.raised_again((id(error), id(code)))


def _handler(code: CodeType, offset: int, home: str | None) -> _Handler:
    own = owner_of(code.co_filename, home) is Owner.LEARNER
    lines = [line for start, _, line in code.co_lines() if start >= offset and line is not None]
    return _Handler(code, lines[0] if own and lines else None)


def _innermost(trace: TracebackType, home: str | None) -> TracebackType:
    """The learner's innermost place in a traceback that begins at one."""
    at: TracebackType | None = trace
    own = trace
    while at is not None:
        if owner_of(at.tb_frame.f_code.co_filename, home) is Owner.LEARNER:
            own = at
        at = at.tb_next
    return own


def _text(error: BaseException) -> str:
    """Its type and the first line of its message."""
    name = type(error).__qualname__
    try:
        message = str(error).strip().partition("\n")[0]
    except Exception:
        message = "<its message cannot be shown>"
    return f"{name}: {message[:LONGEST]}" if message else name
