"""Reads files that somebody else may have made: only regular files, and only up to a size.

Opening a FIFO waits for a writer, reading /dev/zero never ends, and opening a device may have side
effects. Ranks under torchrun read source files with it, the parent reads their records.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator

MOST_SOURCE = 1 << 24  # bytes of a source file


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """The descriptor of a regular file, to read from.

    Raises OSError if it cannot be opened, ValueError if it is something else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("is no regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced just now
            raise ValueError("is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read(descriptor: int, most: int) -> bytes:
    """All bytes of an open file. Raises ValueError if there are more than `most`."""
    parts: list[bytes] = []
    size = 0
    while part := os.read(descriptor, min(1 << 20, most + 1 - size)):
        parts.append(part)
        size += len(part)
        if size > most:
            raise ValueError(f"is too large: it has more than {most:,} bytes")
    return b"".join(parts)


def digest(path: str) -> str | None:
    """The SHA-256 of a source file; None if there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError), opened(path) as file:
        return hashlib.sha256(read(file, MOST_SOURCE)).hexdigest()
    return None
