"""Pickles the function and its arguments for the ranks.

Runs in the parent, called by launcher/api.py and the worker groups. cloudpickle also takes
functions from a cell. The arguments may in addition be what `torch.multiprocessing.spawn` can pass:
queues, locks, events, tensors in shared memory. The error names what cannot be pickled.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import multiprocessing
import pickle
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence, Set
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

from ddp_lessons.errors import CannotSend
from ddp_lessons.instrumentation import torch_api
from ddp_lessons.system.notebook import in_kernel
from ddp_lessons.text import short_repr
from ddp_lessons.wire import unfiled
from ddp_lessons.wire.owners import home_of
from ddp_lessons.wire.parcels import Packer, Parcel
from ddp_lessons.wire.parcels import pack as pack_value
from ddp_lessons.wire.pickling import Bounded, Pickler
from ddp_lessons.wire.stacks import is_cell, text_of
from ddp_lessons.wire.task import Task
from ddp_lessons.worker.settings import taken

MOST_OF_A_DEFINITION = 1 << 16  # bytes of its pickle


def pack(
    fn: Callable[..., Any],
    overrides: Mapping[str, str],
    *,
    profile: bool,
    notes: bool,
    post_mortem: bool,
) -> Task:
    """Make the task of one run. Raises CannotSend if the function cannot be pickled."""
    # The anchor is a function whose globals are the notebook's own namespace. cloudpickle gives all
    # functions of one pickle one dict of globals, holding just the names they use; through the
    # anchor the worker finds that dict and makes it its __main__.
    anchor = types.FunctionType((lambda: None).__code__, sys.modules["__main__"].__dict__)
    files: set[str] = set()
    try:
        function = pack_value((fn, anchor), _noting(files))
    except Exception as error:  # whatever a learner's object raises in its own __reduce__
        raise CannotSend(_why_not_function(fn, error)) from error
    return Task(
        function=function,
        name=name_of(fn),
        overrides=dict(overrides),
        settings=pickle.dumps(taken(with_seed=_is_script())),
        definitions=_definitions(),
        start_method=_chosen_start_method(),
        sources=_cell_sources(files),
        home=home_of(fn),
        profile=profile,
        notes=notes,
        post_mortem=post_mortem,
        in_notebook=in_kernel(),
    )


def _is_script() -> bool:
    """Whether `__main__` is a script, whose top level each rank would run under `mp.spawn`."""
    return hasattr(sys.modules["__main__"], "__file__") and not in_kernel()


def _definitions() -> dict[str, bytes]:
    """The pickles of what `__main__` defines, classes and functions, by name.

    They are for what a rank loads by name, such as a saved model; main_module.py loads them. One
    that brings much data along is left out, and so is one that cannot be pickled. What is defined
    before is a reference, so that each pickle holds little more than one definition.
    """
    found: dict[str, bytes] = {}
    names: dict[int, str] = {}  # of those, by id
    for name, value in list(vars(sys.modules["__main__"]).items()):
        if isinstance(value, type | types.FunctionType) and value.__module__ == "__main__":
            with contextlib.suppress(Exception):  # as above: anything may come out of a __reduce__
                buffer = Bounded(MOST_OF_A_DEFINITION)
                _DefinitionPickler(buffer, names).dump(value)
                found[name] = buffer.getvalue()
                names[id(value)] = name
    return found


def _chosen_start_method() -> str | None:
    """The start method that this process has set for multiprocessing; None for the default."""
    method = multiprocessing.get_start_method(allow_none=True)
    return None if method == multiprocessing.get_all_start_methods()[0] else method


def name_of(fn: Callable[..., Any]) -> str:
    """The name to call a worker function by."""
    fn = getattr(fn, "func", fn)  # functools.partial
    return getattr(fn, "__name__", None) or type(fn).__name__


class Argument:
    """One argument on its way to a worker; pickled while its process is being started.

    Queues, locks and shared tensors can only be pickled at that moment, as their file
    descriptors travel with the process.
    """

    def __init__(self, value: Any, position: int, fn: Callable[..., Any]) -> None:
        self._value = value
        self._position = position
        self._fn = fn
        self._packer = Packer()

    def __reduce__(self) -> Any:
        return self.packed(_argument_pickler()).__reduce__()

    def packed(self, pickler: type[Pickler]) -> Parcel:
        try:
            return self._packer.pack(self._value, pickler)
        except Exception as error:  # as above: anything may come out of a learner's __reduce__
            raise CannotSend(self._why_not(error)) from error

    def _why_not(self, error: Exception) -> str:
        name = _parameter_name(self._fn, self._position + 1)
        called = f" (parameter {name!r} of {name_of(self._fn)})" if name else ""
        return _cannot_travel(f"args[{self._position}]{called} is", self._value, error)


def pack_arguments(args: Sequence[Any], fn: Callable[..., Any]) -> tuple[Parcel, ...]:
    """The arguments, which may go to another machine. Raises CannotSend if one cannot."""
    return tuple(Argument(value, i, fn).packed(_Pickler) for i, value in enumerate(args))


def _refuse_file(file: io.TextIOWrapper) -> Any:
    # cloudpickle would send a copy of an open file's text; spawn refuses it, and so do we.
    raise TypeError(f"cannot pickle {type(file).__name__!r} object {file.name!r}")


class _Pickler(Pickler):
    dispatch_table: ClassVar = ChainMap({io.TextIOWrapper: _refuse_file}, Pickler.dispatch_table)

    def reducer_override(self, value: Any) -> Any:
        if type(value) is types.FunctionType and (made_from := torch_api.compiled(value)):
            return torch_api.compile_again, made_from
        return super().reducer_override(value)


class _DefinitionPickler(_Pickler):
    """A pickler of one definition; others, whose names it gets by id, become references."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file)
        self._names = names

    def persistent_id(self, value: Any) -> str | None:
        """The name of another definition. Refuses a large tensor or array, as it takes time."""
        if type(value).__module__ in ("torch", "numpy") and (
            getattr(value, "nbytes", 0) > MOST_OF_A_DEFINITION
        ):
            raise ValueError("too large")
        return self._names.get(id(value))


def _noting(files: set[str]) -> type[_Pickler]:
    """A pickler that also notes the names of the files of all code that it pickles."""

    class NotingPickler(_Pickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is types.CodeType:
                files.add(unfiled.place_of(value)[0])
            return super().reducer_override(value)

    return NotingPickler


def _argument_pickler() -> type[_Pickler]:
    """A pickler that also knows what multiprocessing and torch have registered by now."""

    class ArgumentPickler(_Pickler):
        shares_memory: ClassVar = True

        dispatch_table: ClassVar = ChainMap(
            _Pickler.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table
        )

    return ArgumentPickler


def _why_not_function(fn: Callable[..., Any], error: Exception) -> str:
    for where, value in _used_by(fn):
        try:
            pack_value(value, _Pickler)
        except Exception as culprit:  # the search for what failed above
            return _cannot_travel(f"{name_of(fn)} uses {where},", value, culprit)
    return f"the function {name_of(fn)} cannot travel to another process: {text_of(error)}"


def _used_by(fn: Callable[..., Any]) -> list[tuple[str, Any]]:
    """What is pickled with a function: (description, value) of variables, self and defaults."""
    used: list[tuple[str, Any]] = []
    owner = getattr(fn, "__self__", None)
    if owner is not None:
        used += [(f"self.{name}", value) for name, value in getattr(owner, "__dict__", {}).items()]
    plain = inspect.unwrap(getattr(fn, "__func__", fn))
    if not isinstance(plain, types.FunctionType):
        return used
    for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            used.append((f"the variable {name!r}", cell.cell_contents))
    variables = plain.__globals__
    used += [
        (f"the variable {name!r}", variables[name])
        for name in plain.__code__.co_names
        if name in variables
    ]
    values = plain.__defaults__ or ()
    used += [(f"the default value {short_repr(value)}", value) for value in values]
    return used


def _parameter_name(fn: Callable[..., Any], position: int) -> str | None:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return named[position].name if position < len(named) else None


def _cannot_travel(what: str, value: Any, error: Exception) -> str:
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    if isinstance(value, types.GeneratorType):
        try_this = "Send a list of its items, or create the generator inside the worker function."
    elif isinstance(value, io.IOBase):
        try_this = "Send the file's name, and open it inside the worker function."
    elif isinstance(error, MemoryError):
        try_this = "Save it to a file, and load what a rank needs of it inside the worker function."
    elif "inheritance" in text_of(error):  # what multiprocessing says of its queues and locks
        try_this = "Pass it as an argument: launch(fn, args=(it,))."
    else:
        try_this = "Create it inside the worker function, or send the plain data it is made from."
    why = text_of(error)
    return f"{what} {article} {name}, which cannot travel to another process: {why}\n{try_this}"


def _cell_sources(files: Set[str]) -> dict[str, str]:
    """The text of those of these files that are cells.

    IPython keeps the text of each cell in linecache without a modification time.
    """
    return {name: "".join(linecache.getlines(name)) for name in sorted(files) if is_cell(name)}
