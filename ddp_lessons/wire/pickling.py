"""Pickles functions, arguments and values with cloudpickle, but keeps the file names of code.

The parent and the workers pickle with it. cloudpickle 3.1.3 and newer drop the file name of a code
object; tracebacks, stacks and recorded calls need it to find the learner's line. Here every code
object keeps it, also one nested in another. Code without a file (a cell below `%%time`,
`python -c`) gets the name under which linecache has its text, if unfiled.py finds that.

For each function that uses a package, cloudpickle looks through all loaded modules, thousands with
torch, for those that the function reaches through it. Here only what its code names is looked up.

A tensor's storage is handed out as a buffer, as NumPy hands out arrays; torch would copy it several
times (`torch.save`). Tensors that share a storage share it on the other side, too.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import cloudpickle
from cloudpickle import cloudpickle as parts

from ddp_lessons.wire import unfiled

_reduce_code = cloudpickle.Pickler.dispatch_table.get(types.CodeType)


def rebuild(make: Callable[..., Any], args: tuple[Any, ...], name: str, first: int) -> Any:
    """The code object that `make(*args)` gives, with its file's name and its first line."""
    return make(*args).replace(co_filename=name, co_firstlineno=first)


def _reduce(code: types.CodeType) -> tuple[Any, ...]:
    make, args, *rest = _reduce_code(code)
    name, first = unfiled.place_of(code)
    return (rebuild, (make, args, name, first), *rest)


def submodules(code: types.CodeType, values: Iterable[Any]) -> list[types.ModuleType]:
    """The loaded modules that code may reach as attributes of packages among `values`.

    A worker must import them, too. In place of cloudpickle's `_find_imported_submodules`.
    """
    found: list[types.ModuleType] = []
    for value in values:
        if not isinstance(value, types.ModuleType) or not getattr(value, "__package__", ""):
            continue
        packages = [value.__name__]
        for package in packages:
            for name in code.co_names:
                if (module := sys.modules.get(f"{package}.{name}")) is not None:
                    found.append(module)
                    packages.append(f"{package}.{name}")
    return found


def _with(function: Any, **replaced: Any) -> Any:
    """A copy of a function of cloudpickle's in which some names mean something else."""
    return types.FunctionType(function.__code__, {**vars(parts), **replaced}, function.__name__)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's pickler, except that code keeps its file name and first line."""

    # A cloudpickle without these parts is slower, no more.
    if hasattr(parts, "_find_imported_submodules") and hasattr(parts, "_function_getstate"):
        _dynamic_function_reduce = _with(
            cloudpickle.Pickler._dynamic_function_reduce,
            _function_getstate=_with(
                parts._function_getstate, _find_imported_submodules=submodules
            ),
        )

    # If cloudpickle reduces code in another way, names are lost; `ddp-lessons doctor` reports that.
    dispatch_table: ClassVar = ChainMap(
        {types.CodeType: _reduce} if _reduce_code else {}, cloudpickle.Pickler.dispatch_table
    )

    shares_memory: ClassVar = False  # whether tensors are to share their memory with the receiver

    def reducer_override(self, value: Any) -> Any:
        """Reduce storages, and modules of a class of their own, such as `torch.backends.cudnn`."""
        if not self.shares_memory and (kind := _STORAGES.get(type(value).__qualname__)):
            return kind(value)
        if (
            isinstance(value, types.ModuleType)
            and type(value) is not types.ModuleType
            and sys.modules.get(value.__name__) is value
        ):
            return importlib.import_module, (value.__name__,)
        return super().reducer_override(value)


def _reduce_typed(storage: Any) -> Any:
    untyped = storage._untyped_storage  # the same object for all tensors that share it
    if untyped.device.type != "cpu":
        return NotImplemented  # torch's own way
    return typed_storage, (untyped, storage.dtype)


def _reduce_untyped(storage: Any) -> Any:
    if storage.device.type != "cpu":
        return NotImplemented
    import torch

    numbers = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
    return untyped_storage, (pickle.PickleBuffer(numbers),)


_STORAGES = {"TypedStorage": _reduce_typed, "UntypedStorage": _reduce_untyped}


def typed_storage(untyped: Any, dtype: Any) -> Any:
    """What a tensor is pickled with; see `_reduce_typed`."""
    import torch

    return torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def untyped_storage(buffer: memoryview | bytearray) -> Any:
    """The storage that a buffer holds: in the buffer itself, if it is a part of a mapped file."""
    import torch

    if not buffer:
        return torch.UntypedStorage(0)
    numbers = torch.frombuffer(buffer, dtype=torch.uint8)
    return (numbers if isinstance(buffer, memoryview) else numbers.clone()).untyped_storage()


class Bounded(io.BytesIO):
    """A file in memory that refuses, by ValueError, to hold more than `most` bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        self.check(len(data))
        return super().write(data)

    def check(self, size: int) -> None:
        """Raise ValueError if so many bytes more are too many."""
        if self.tell() + size > self._most:
            raise ValueError("too large")


def dumps(value: Any, pickler: type[Pickler] = Pickler) -> bytes:
    """The pickle of a value. `pickle.loads` reads it where this package can be imported."""
    return dump(value, pickler)


def dumps_small(value: Any, most: int) -> bytes:
    """The same, but of at most so many bytes: more are not even made. Else raises ValueError."""
    buffer = Bounded(most)

    def stays(data: pickle.PickleBuffer) -> bool:
        buffer.check(data.raw().nbytes)
        return True

    return dump(value, Pickler, stays, buffer)


def dump(
    value: Any,
    pickler: type[Pickler] = Pickler,
    stays: Callable[[pickle.PickleBuffer], object] | None = None,
    buffer: io.BytesIO | None = None,
) -> bytes:
    """The pickle of a value, without the buffers for which `stays` returns False."""
    if (main := sys.modules.get("__mp_main__")) is not None:
        cloudpickle.register_pickle_by_value(main)  # the script, in a child; ranks cannot import it
    buffer = buffer or io.BytesIO()
    pickler(buffer, buffer_callback=stays).dump(value)
    return buffer.getvalue()
