"""Finds the learner's line that makes a call of torch.distributed.

Runs in workers, called for each recorded call. A lookup takes a fraction of a microsecond, because
the result is cached by place in the code.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple

from ddp_lessons.wire.owners import Owner, owner_of
from ddp_lessons.wire.unfiled import MADE_UP

_MOST = 10_000  # places kept; code that is made in a loop must not fill the memory


class _Place(NamedTuple):
    code: CodeType  # kept, so that no other code object gets its id
    owner: Owner
    site: str


class Sites:
    """The lines of one process's calls. The package `home` counts as the learner's."""

    def __init__(self, home: str | None = None) -> None:
        self.on_file: Callable[[str], None] = _nothing  # called with the file of each new line
        self._home = home
        self._known: dict[tuple[int, int], _Place] = {}

    def of(self, frame: FrameType | None) -> str | None:
        """The innermost of the learner's own lines at or above `frame`.

        Without any, the innermost line of an installed package; without that, None.
        """
        of_package = None
        while frame is not None:
            # By id, because hashing a code object reads all of it.
            key = id(frame.f_code), frame.f_lasti
            place = self._known.get(key)
            if place is None:
                place = self._place(frame)
                if len(self._known) < _MOST:
                    self._known[key] = place
            if place.owner is Owner.LEARNER:
                return place.site
            if place.owner is Owner.PACKAGE and of_package is None:
                of_package = place.site
            frame = frame.f_back
        return of_package

    def _place(self, frame: FrameType) -> _Place:
        code = frame.f_code
        owner = owner_of(code.co_filename, self._home)
        if owner is not Owner.LIBRARY:
            self.on_file(code.co_filename)
        return _Place(code, owner, _site(frame))


def _nothing(filename: str) -> None:
    """Do nothing: the default of `Sites.on_file`."""


def _site(frame: FrameType) -> str:
    """`FILE:LINE`, or `FILE in FUNCTION:LINE` if the text of the file is not known."""
    code = frame.f_code
    name = code.co_filename
    made_up = name in MADE_UP or (name.startswith("<") and name not in linecache.cache)
    return f"{name}{f' in {code.co_name}' if made_up else ''}:{frame.f_lineno}"


def is_in(site: str | None, frame: FrameType) -> bool:
    """True if the learner's line is in `frame` itself, and not in a caller of it."""
    return site == _site(frame)
