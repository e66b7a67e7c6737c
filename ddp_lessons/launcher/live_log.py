"""What the ranks print, while they run: a log by rank and one by time, below the panel.

Runs in the parent, used by live_panel.py. A tab chooses between the two: the browser does that
alone, while the kernel is busy with the cell. The log goes when the run ends; then the text is
printed by rank.
"""

from __future__ import annotations

import contextlib
import functools
import html
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ddp_lessons.processes.base import Worker
from ddp_lessons.system.notebook import can_display, prepare_widgets, show_html
from ddp_lessons.text import without_colours

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

MOST_LINES, MOST = 1000, 500  # lines of all ranks together, characters of a line
EVERY = 1.0  # seconds between two updates, as each sends all lines
# It stands at its end, unless one scrolls up.
STYLE = (
    "max-height:20em;overflow:auto;display:flex;flex-direction:column-reverse;margin:0;"
    "font-size:90%;line-height:1.3"
)

Line = tuple[int, str]  # the rank, the text


class Log:
    """The latest lines of all ranks: a widget with two tabs, once there is more than a line."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._by_time: deque[Line] = deque(maxlen=MOST_LINES)
        self._by_rank: dict[int, deque[str]] = {}
        self._unfinished: dict[int, bytes] = {}
        for worker in workers:
            self._by_rank[worker.rank] = deque(maxlen=max(1, MOST_LINES // len(workers)))
            self._unfinished[worker.rank] = b""
            worker.output.tap = functools.partial(self._take, worker.rank)
        self._changed = False
        self._due = 0.0
        self._shown: list[DisplayHandle] = []
        self._tabs: Any = None

    def show(self) -> None:
        """Display it, in the thread of the cell; nothing is seen until there are lines."""
        with contextlib.suppress(ImportError):
            import ipywidgets
            from IPython.display import display

            children = [ipywidgets.HTML(), ipywidgets.HTML()]
            self._tabs = ipywidgets.Tab(
                children, titles=("by rank", "by time"), layout={"display": "none"}
            )
            self._shown = [display(self._tabs, display_id=True), prepare_widgets()]

    def tick(self) -> None:
        """Show what is new, if it is time."""
        if not self._changed or time.monotonic() < self._due or not self._worth_it:
            return
        if not can_display():
            return
        if not self._shown:
            self.show()
        self._due, self._changed = time.monotonic() + EVERY, False
        if self._tabs is not None:
            for widget, lines in zip(self._tabs.children, self.lines(), strict=True):
                widget.value = _html(lines)
            self._tabs.layout.display = ""

    def close(self) -> None:
        """Remove it from the cell."""
        if self._shown:
            for handle in self._shown:
                show_html("", handle)
            for widget in (*self._tabs.children, self._tabs):
                widget.close()

    def lines(self) -> tuple[list[Line], list[Line]]:
        """The latest lines by rank, and by time."""
        unfinished = {
            rank: [_text(data)] for rank, data in self._unfinished.items() if data.strip()
        }
        by_rank = [
            (rank, line)
            for rank, lines in self._by_rank.items()
            for line in [*lines, *unfinished.get(rank, [])]
        ]
        begun = [(rank, line) for rank, lines in unfinished.items() for line in lines]
        return by_rank, [*self._by_time, *begun]

    @property
    def _worth_it(self) -> bool:
        """Whether a rank has printed more than the line that the panel shows."""
        return max(map(len, self._by_rank.values())) > 1

    def _take(self, rank: int, data: bytes) -> None:
        *whole, self._unfinished[rank] = (self._unfinished[rank] + data).split(b"\n")
        for line in whole:
            self._by_rank[rank].append(_text(line))
            self._by_time.append((rank, _text(line)))
        self._unfinished[rank] = self._unfinished[rank][-4 * MOST :]
        self._changed = True


def _text(line: bytes) -> str:
    """A line as a terminal would leave it: a progress bar has overwritten what it drew before."""
    text = line.decode("utf-8", errors="backslashreplace").rstrip("\r").rpartition("\r")[2]
    return without_colours(text)[:MOST]


def _html(lines: Iterable[Line]) -> str:
    text = "\n".join(f"[rank {rank}] {line}" for rank, line in lines)
    return f"<pre style='{STYLE}' tabindex='0'><span>{html.escape(text)}</span></pre>"
