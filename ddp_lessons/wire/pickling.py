"""Pickles functions, arguments and values with cloudpickle, but keeps the file names of code.

The parent and the workers pickle with it. cloudpickle 3.1.3 and newer drop the file name of a code
object; tracebacks, stacks and recorded calls need it to find the learner's line. Here every code
object keeps it, also one nested in another. Code without a file (a cell below `%%time`,
`python -c`) gets the name under which linecache has its text, if unfiled.py finds that.
"""

from __future__ import annotations

import importlib
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
    """cloudpickle's pickler, except that code keeps its file name and first line."""

    # If cloudpickle reduces code in another way, names are lost; `ddp-lessons doctor` reports that.
    dispatch_table: ClassVar = ChainMap(
        {types.CodeType: _reduce} if _reduce_code else {}, cloudpickle.Pickler.dispatch_table
    )

    def reducer_override(self, value: Any) -> Any:
        """Have a module of a class of its own imported, as `torch.backends.cudnn` is one."""
        if (
            isinstance(value, types.ModuleType)
            and type(value) is not types.ModuleType
            and sys.modules.get(value.__name__) is value
        ):
            return importlib.import_module, (value.__name__,)
        return super().reducer_override(value)


def dumps(value: Any, pickler: type[Pickler] = Pickler) -> bytes:
    """The pickle of a value. `pickle.loads` reads it where this package can be imported."""
    if (main := sys.modules.get("__mp_main__")) is not None:
        cloudpickle.register_pickle_by_value(main)  # the script, in a child; ranks cannot import it
    buffer = io.BytesIO()
    pickler(buffer).dump(value)
    return buffer.getvalue()
