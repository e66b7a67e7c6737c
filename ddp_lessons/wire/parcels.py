"""Parcels: pickled values, whose large parts travel in a file in memory instead of through a pipe.

Arrays and tensors hand out their bytes beside the pickle (pickle's protocol 5, out of band). Where
there are many, the sender writes them once to a file without a name and sends its descriptor; the
receiver maps the file, so it copies nothing. The mapping is private: what the receiver changes is
its own. The system frees the file when nobody holds it any more, however the processes end.

Both processes import this module. The parent packs the function and its arguments
(processes/packing.py), a rank what its function returned (worker/main.py).
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import get_spawning_popen
from typing import Any

from ddp_lessons.system.memory import available_memory, memory_file
from ddp_lessons.text import size_text
from ddp_lessons.wire.pickling import Pickler, dump

# Each file that is still in use costs the receiver a descriptor, so only large values get one.
LEAST_IN_FILE = 1 << 25  # bytes
_LEAST_BUFFER = 1 << 16  # bytes; smaller arrays and tensors stay in the pickle
_ALIGNMENT = 64  # bytes
_PIECE = 1 << 28  # bytes written between two looks at the memory, which other ranks fill as well


@dataclass(frozen=True)
class Parcel:
    """A pickled value.

    `data` is its pickle and `buffers` are the parts that it lacks; `sizes` are the bytes of those
    that lie in `file`, one after the other. If `data` is empty, the pickle itself is the last one.
    """

    data: bytes
    buffers: tuple[bytearray, ...] = ()
    sizes: tuple[int, ...] = ()
    file: Connection | None = None  # which closes the descriptor when nobody needs it; no pipe

    def load(self) -> Any:
        """The value. Loading may import the learner's modules."""
        if not self.sizes:
            return pickle.loads(self.data, buffers=map(bytearray, self.buffers))
        *buffers, last = self._mapped()
        return (
            pickle.loads(self.data, buffers=[*buffers, last])
            if self.data
            else pickle.loads(last, buffers=buffers)
        )

    @property
    def pickle(self) -> bytes:
        """The pickle itself."""
        return self.data or bytes(self._mapped()[-1])

    def without_file(self) -> Parcel:
        """The parcel for a message beside which the file's descriptor travels."""
        return replace(self, file=None)

    def _mapped(self) -> list[memoryview]:
        if self.file is None:
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}, so its file could not come")
        starts, end = _places(self.sizes)
        memory = memoryview(mmap.mmap(self.file.fileno(), end, access=mmap.ACCESS_COPY))
        return [memory[at : at + size] for at, size in zip(starts, self.sizes, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.data, self.buffers, self.sizes, self.file
        if self.file is None or get_spawning_popen() is not None:
            return Parcel, fields
        *buffers, last = map(bytearray, self._mapped())  # to where no descriptor can go
        return Parcel, (self.data, (*buffers, last)) if self.data else (bytes(last), tuple(buffers))


class Packer:
    """Packs a value, perhaps several times for several ranks; they share what lies in the file."""

    def __init__(self, *, by_file: bool = True) -> None:
        self._by_file = by_file
        self._written: dict[tuple[tuple[int, int], ...], Connection] = {}

    def pack(self, value: Any, pickler: type[Pickler] = Pickler) -> Parcel:
        """Pickle a value.

        Raises MemoryError if its copy would not fit in memory, and whatever pickling raises.
        """
        views: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes < _LEAST_BUFFER:
                return True
            views.append(view)
            return False

        data = dump(value, pickler, stays)
        if not self._by_file or sum(view.nbytes for view in views) + len(data) < LEAST_IN_FILE:
            return Parcel(data, tuple(map(bytearray, views)))
        if len(data) >= _LEAST_BUFFER:
            views.append(memoryview(data))
            data = b""
        return Parcel(data, (), tuple(view.nbytes for view in views), self._file(views))

    def _file(self, views: Sequence[memoryview]) -> Connection:
        import numpy

        places = tuple(
            (numpy.frombuffer(view, numpy.uint8).ctypes.data, view.nbytes) for view in views
        )
        if places not in self._written:
            self._written[places] = _write(views)
        return self._written[places]


def pack(value: Any, pickler: type[Pickler] = Pickler, *, by_file: bool = True) -> Parcel:
    """Pickle a value, once; see `Packer.pack`."""
    return Packer(by_file=by_file).pack(value, pickler)


def _write(views: Sequence[memoryview]) -> Connection:
    starts, end = _places([view.nbytes for view in views])
    file = Connection(memory_file())
    look_at = 0
    try:
        for start, view in zip(starts, views, strict=True):
            done = 0
            while done < view.nbytes:
                if start + done >= look_at:
                    look_at = start + done + _PIECE
                    _refuse_too_large(end, start + done)
                done += os.pwrite(file.fileno(), view[done : done + _PIECE], start + done)
        os.ftruncate(file.fileno(), end)
    except BaseException:
        file.close()  # frees the memory at once, as the error holds on to this frame
        raise
    return file


def _refuse_too_large(size: int, written: int) -> None:
    available = available_memory()
    if size - written > available:
        raise MemoryError(
            f"its copy takes {size_text(size)}, and "
            f"{size_text(available + written)} of memory are left for it"
        )


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each part starts in the file, and the bytes of the file."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
