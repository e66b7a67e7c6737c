"""Which pages ranks write: a spare makes its own copies of them while it waits.

A forked process shares its memory with the forkserver, and Linux copies a page when one of them
first writes to it (fork(2)). Ranks write mostly the same pages, such as those with reference counts
of torch's functions. Rank 0 tells them once, when it ends (worker/main.py); a spare has them copied
beforehand (madvise(2), MADV_POPULATE_WRITE, Linux 5.14), so that the launch need not wait for it.
What they hold stays the same.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable

from ddp_lessons.system.memory import private_memory

MOST = 3000  # pages: 12 MB, mostly
LONGEST = 256  # pages in a row: the longer, the more likely they are the learner's data
AT_ONCE = 64  # pieces between two looks whether a launch has come
_PIECE = struct.Struct("=qq")  # its address, and its bytes
_PRESENT, _OF_FILE, _OWN = 63, 61, 56  # bits of an entry of /proc/PID/pagemap
_ENTRY = 8  # bytes
_POPULATE_WRITE = 23


def written() -> bytes:
    """The pages that this process has written, and shares with no other: pieces, packed."""
    import numpy as np

    found = []
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for start, end in list(private_memory()):
            file.seek(start // mmap.PAGESIZE * _ENTRY)
            data = file.read((end - start) // mmap.PAGESIZE * _ENTRY)
            entries = np.frombuffer(data, np.uint64)
            own = entries >> np.uint64(_PRESENT) & ~(entries >> np.uint64(_OF_FILE))
            own &= entries >> np.uint64(_OWN) & np.uint64(1)
            edges = np.flatnonzero(np.diff(own.astype(np.int8), prepend=0, append=0))
            for first, after in edges.reshape(-1, 2).tolist():
                if after - first <= LONGEST:
                    found.append((start + first * mmap.PAGESIZE, after - first))
    pieces, left = [], MOST
    for address, pages in sorted(found, key=lambda piece: piece[1]):
        if pages <= left:
            pieces.append(_PIECE.pack(address, pages * mmap.PAGESIZE))
            left -= pages
    return b"".join(pieces)


def copy(pieces: bytes, is_needed: Callable[[], bool]) -> None:
    """Copy these pages, as far as this process shares them, until it `is_needed`."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for number, (address, size) in enumerate(_PIECE.iter_unpack(pieces)):
        if number % AT_ONCE == 0 and is_needed():
            return
        libc.madvise(address, size, _POPULATE_WRITE)  # fails where there is no memory: no matter
