"""Descriptors 0, 1 and 2 of a process that was started without some of them, by a daemon say.

The parent of ranks and the forkservers hold them: a pipe or socket with such a number would become
the standard input or output of the next process.
"""

from __future__ import annotations

import os


def hold() -> None:
    """Open the null device in place of those that are closed; new processes inherit it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
