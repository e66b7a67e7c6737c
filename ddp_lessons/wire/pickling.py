"""Pickles of functions, arguments and values: cloudpickle's, with the code's file names kept.

Used wherever this package pickles, in both directions. cloudpickle 3.1.3 and newer send code
without the name of its file, by which tracebacks, stacks and recorded calls find the learner's
line. Here every code object, also one nested in another, travels with its name. Code that no file
holds (a cell below `%%time`, `python -c`) gets the name under which its text is kept, if that is
known (unfiled.py).
"""

from __future__ import annotations

import io
import sys
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle

from ddp_lessons.wire import unfiled

_reduce_code = cloudpickle.Pickler.dispatch_table.get(types.CodeType)


def rebuild(make: Callable[..., Any], args: tuple[Any, ...], name: str, first: int) -> Any:
    """The code object that `make(*args)` gives, with its file's name and its first line."""
    return make(*args).replace(co_filename=name, co_firstlineno=first)


def _reduce(code: types.CodeType) -> tuple[Any, ...]:
    make, args, *rest = _reduce_code(code)
    name, first = unfiled.place_of(code)
    return (rebuild, (make, args, name, first), *rest)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's pickler, for code whose lines are to be found again."""

    # If cloudpickle has another way of its own, names are lost: doctor sees that.
    dispatch_table: ClassVar = ChainMap(
        {types.CodeType: _reduce} if _reduce_code else {}, cloudpickle.Pickler.dispatch_table
    )


def dumps(value: Any, pickler: type[Pickler] = Pickler) -> bytes:
    """The pickle of a value. `pickle.loads` reads it where this package can be imported."""
    if (main := sys.modules.get("__mp_main__")) is not None:
        cloudpickle.register_pickle_by_value(main)  # a child's name for the script; ranks lack it
    buffer = io.BytesIO()
    pickler(buffer).dump(value)
    return buffer.getvalue()
