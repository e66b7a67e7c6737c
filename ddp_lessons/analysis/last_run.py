"""Keeps what was computed of a run as long as it is the latest: several plots ask for the same.

Runs in the parent; wait_states.py, metrics.py and stragglers.py use it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

Found = TypeVar("Found")


def kept(function: Callable[[RunRecord], Found]) -> Callable[[RunRecord], Found]:
    """Have a function compute its result once, where it is asked again about the same run.

    The result must not be changed. It goes with its run, or when the function gets another one.
    """
    of: dict[weakref.ref[RunRecord], Found] = {}

    @functools.wraps(function)
    def found(run: RunRecord) -> Found:
        key = weakref.ref(run, lambda gone: of.pop(gone, None))
        if key not in of:
            result = function(run)
            of.clear()
            of[key] = result
        return of[key]

    return found
