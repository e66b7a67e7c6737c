"""Finds the learner's line that makes a call of torch.distributed.

Runs in workers, called for each recorded call. A lookup takes a fraction of a microsecond, because
the result is cached by place in the code.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple

from ddp_lessons.wire.owners import Owner, is_of_check, is_outside, owner_of, real_path
from ddp_lessons.wire.unfiled import MADE_UP

_MOST = 10_000  # places kept; code that is made in a loop must not fill the memory


class _Place(NamedTuple):
    code: CodeType  # kept, so that no other code object gets its id
    owner: Owner
    site: str
    of_check: bool
    outside: bool


class Sites:
    """The lines of one process's calls. The package `home` counts as the learner's."""

    def __init__(self, home: str | None = None) -> None:
        self.on_file: Callable[[str], None] = _nothing  # called with the file of each new line
        self._home = home
        self._known: dict[tuple[int, int], _Place] = {}

    def of(self, frame: FrameType | None) -> str | None:
        """The innermost of the learner's own lines at or above `frame`.

        Without any, the innermost line of an installed package, or else of an exercise's check;
        without those, None.
        """
        of_package = of_check = None
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
            if place.outside:
                break
            if place.owner is Owner.PACKAGE and of_package is None:
                of_package = place.site
            if place.of_check and of_check is None:
                of_check = place.site
            frame = frame.f_back
        return of_package or of_check

    def _place(self, frame: FrameType) -> _Place:
        code = frame.f_code
        owner = owner_of(code.co_filename, self._home)
        if owner is not Owner.LIBRARY:
            self.on_file(code.co_filename)
        is_library = owner is Owner.LIBRARY
        return _Place(
            code,
            owner,
            site_at(code, frame.f_lineno),
            is_library and is_of_check(code.co_filename),
            is_library and is_outside(real_path(code.co_filename)),
        )


def _nothing(filename: str) -> None:
    """Do nothing: the default of `Sites.on_file`."""


def site_at(code: CodeType, lineno: int) -> str:
    """`FILE:LINE`, or `FILE in FUNCTION:LINE` if the text of the file is not known."""
    name = code.co_filename
    made_up = name in MADE_UP or (name.startswith("<") and name not in linecache.cache)
    return f"{name}{f' in {code.co_name}' if made_up else ''}:{lineno}"


def is_in(site: str | None, frame: FrameType) -> bool:
    """True if the learner's line is in `frame` itself, and not in a caller of it."""
    return site == site_at(frame.f_code, frame.f_lineno)
