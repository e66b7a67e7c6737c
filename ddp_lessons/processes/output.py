"""What one rank wrote to its stdout and stderr, kept within fixed bounds.

Runs in the parent; base.py feeds the bytes from the rank's pipe. The buffer keeps the first part,
which says what the worker did, and the last, which says why it failed; it only counts the middle.
"""

from __future__ import annotations

from collections.abc import Callable

LIMIT = 1 << 20  # bytes kept of one rank's output


class OutputBuffer:
    """At most `limit` bytes of a stream: its head and its tail."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._total = 0
        self.tap: Callable[[bytes], None] | None = None  # sees whatever comes, too

    def feed(self, data: bytes) -> None:
        if self.tap is not None:
            self.tap(data)
        self._total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    @property
    def total(self) -> int:
        """Bytes that arrived, kept or not."""
        return self._total

    def text(self) -> str:
        """The kept output as lines; a line in the middle tells how many bytes are missing."""
        tail = bytes(self._tail[-self._half :])
        missing = self._total - len(self._head) - len(tail)
        if not missing:
            return _decoded(bytes(self._head) + tail)
        head = bytes(self._head[: self._head.rfind(b"\n") + 1]) or bytes(self._head)
        tail = tail[tail.find(b"\n") + 1 :] or tail
        left_out = self._total - len(head) - len(tail)
        end = "" if head.endswith(b"\n") else "\n"
        return f"{_decoded(head)}{end}[... {left_out:,} bytes left out ...]\n{_decoded(tail)}"

    def last_line(self) -> str:
        """The last line that is not blank, "" if there is none."""
        recent = bytes(self._head[-2000:] + self._tail[-2000:])[-2000:]
        lines = [line for line in _decoded(recent).splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _decoded(data: bytes) -> str:
    """Text, with bytes that are not UTF-8 escaped, and each line as a terminal would leave it."""
    lines = data.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n").split("\n")
    # A progress bar redraws its line after every carriage return: the last state is what one sees.
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
