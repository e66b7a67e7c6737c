"""The panel that a cell shows while a run takes longer than a second; removed when the run ends.

Below it stands the log (live_log.py), once a rank has printed more than a line.

Runs in the parent, in the thread of the cell; launcher/api.py creates it, the watchdog updates it.
It is off outside notebooks, where DDP_LESSONS_LIVE=0 (set when notebooks are stored or tested), and
where `hidden` is set because there is no cell to show it.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

from ddp_lessons.launcher import live_curves
from ddp_lessons.launcher.live_log import Log
from ddp_lessons.processes.base import Worker
from ddp_lessons.system.notebook import is_live, show_html
from ddp_lessons.text import without_colours

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

FIRST_AFTER, EVERY = 1.0, 0.5  # seconds
MOST = 120  # characters of a line
hidden: ContextVar[bool] = ContextVar("hidden", default=False)


class Panel:
    """A line a rank: what it does, and its last line; above them, curves of what ranks report.

    A context manager around the run.

    It goes when the run ends; with `stays`, of a run that the cell does not wait for, it is there
    from the beginning and shows in the end how each rank ended.
    """

    def __init__(self, workers: Sequence[Worker], *, stays: bool = False) -> None:
        self._workers, self._stays = workers, stays
        self._due = time.monotonic() + FIRST_AFTER
        self._handle: DisplayHandle | None = None
        self._log = Log(workers) if is_live() and not hidden.get() else None

    def __enter__(self) -> Panel:
        if self._log is not None and self._stays:  # now, in the cell's own thread
            self._show(_table(self._workers, ""))
            self._log.show()
        return self

    def tick(self, suspicion: str = "") -> None:
        """Draw the panel if it is time; called often from the pump."""
        if self._log is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        self._show(_table(self._workers, suspicion))
        self._log.tick()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._show(_table(self._workers, "") if self._stays else "")
        if self._log is not None:
            self._log.close()

    def _show(self, text: str) -> None:
        self._handle = show_html(text, self._handle)


def _table(workers: Sequence[Worker], suspicion: str) -> str:
    curves = live_curves.html_of(workers)
    rows = "".join(
        f"<tr>{_cell(f'{live_curves.dot(worker.rank) if curves else str()}rank {worker.rank}')}"
        f"{_cell(_state(worker))}<td style='text-align:left'>"
        f"<code style='overflow-wrap:anywhere'>{html.escape(_last_line(worker))}</code></td></tr>"
        for worker in workers[:16]
    )
    more = f"<tr><td colspan=3>and {len(workers) - 16} more</td></tr>" if len(workers) > 16 else ""
    last = f"<tr><td colspan=3 style='text-align:left'>{suspicion}</td></tr>" if suspicion else ""
    return f"{curves}<table>{rows}{more}{last}</table>"


def _cell(text: str) -> str:
    return f"<td style='white-space:nowrap;text-align:left'>{text}</td>"


def _last_line(worker: Worker) -> str:
    return without_colours(worker.output.last_line())[:MOST]


def _call(worker: Worker) -> str:
    """The call in which the rank is, and for how long, if that is a second or more."""
    calls = worker.calls_now() if worker.alive and worker.outcome is None else ()
    op, t0_ns = max(calls, key=lambda call: call[1], default=("", 0))
    seconds = (time.perf_counter_ns() - t0_ns) / 1e9
    return f"in {op} for {seconds:.0f} s" if op and seconds >= 1.0 else ""


def _state(worker: Worker) -> str:
    if worker.failed:
        return "✗ failed"
    if worker.outcome is not None:
        return "✓ returned"
    return "starting" if worker.started_ns is None else _call(worker) or "running"
