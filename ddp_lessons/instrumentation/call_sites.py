"""The learner's line that makes a call of torch.distributed. Runs in workers.

Looking it up takes a fraction of a microsecond: what is known of a place in the code is kept.
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
    code: CodeType  # kept, so that its id stays its own
    owner: Owner
    site: str


class Sites:
    """The lines of one process's calls. `home` is the installed package that counts as its own."""

    def __init__(self, home: str | None = None) -> None:
        self.on_file: Callable[[str], None] = _nothing  # called with the file of each new line
        self._home = home
        self._known: dict[tuple[int, int], _Place] = {}

    def of(self, frame: FrameType | None) -> str | None:
        """The innermost of the learner's own lines at or above `frame`.

        Without any, it is the innermost line of an installed package; None if there is none, too.
        """
        of_package = None
        while frame is not None:
            # By id, as the hash of a code object reads all of it.
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
    """Nobody wants to know."""


def _site(frame: FrameType) -> str:
    """`FILE:LINE`; where nobody has the text of the file, `FILE in FUNCTION:LINE`."""
    code = frame.f_code
    name = code.co_filename
    made_up = name in MADE_UP or (name.startswith("<") and name not in linecache.cache)
    return f"{name}{f' in {code.co_name}' if made_up else ''}:{frame.f_lineno}"


def is_in(site: str | None, frame: FrameType) -> bool:
    """True if the learner's line is the one at which `frame` is, and not in a caller of it."""
    return site == _site(frame)
