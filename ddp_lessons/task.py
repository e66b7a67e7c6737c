"""What travels from the parent to a worker: the function, its arguments, and where it runs.

The function goes by cloudpickle, so it may come from a cell. The arguments may in addition be what
`torch.multiprocessing.spawn` can pass: queues, locks, events, tensors in shared memory. Both
processes import this module; it starts nothing and imports no torch.
"""

from __future__ import annotations

import inspect
import io
import linecache
import os
import pickle
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

from ddp_lessons.errors import CannotSend
from ddp_lessons.owners import home_of
from ddp_lessons.pickling import Pickler, dumps
from ddp_lessons.stacks import is_cell

LOOPBACK = {"linux": "lo", "darwin": "lo0"}


@dataclass(frozen=True)
class Place:
    """Where a rank stands among the others, in torchrun's terms."""

    rank: int
    local_rank: int
    group_rank: int
    world_size: int
    local_world_size: int

    def variables(self) -> dict[str, str]:
        """The environment variables that torchrun would set for this rank."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.group_rank),
        }


def places(nprocs: int, nnodes: int) -> list[Place]:
    """The places of all ranks, by rank: machine by machine, as torchrun numbers them."""
    return [
        Place(group * nprocs + local, local, group, nnodes * nprocs, nprocs)
        for group in range(nnodes)
        for local in range(nprocs)
    ]


@dataclass(frozen=True)
class Meeting:
    """Where rank 0's store listens, and the network interface by which ranks reach each other."""

    port: int
    address: str = "127.0.0.1"
    interface: str | None = LOOPBACK.get(sys.platform)


@dataclass(frozen=True)
class Task:
    """What all ranks of a run have in common.

    `function` is the pickle of `(fn, anchor)`, see `pack`. A rank's variables are `environment`,
    then those of its place, then `overrides`, the learner's own. `sources` maps the file names of
    cells to their text, so that a traceback made in the worker shows the cell's own lines.
    `home` is the installed package that holds the function, if one does: its lines are the
    learner's. `one_clock` is true where all ranks run on one machine.
    """

    function: bytes
    name: str
    overrides: dict[str, str]
    profile: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    home: str | None = None
    one_clock: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    path: list[str] = field(default_factory=list)

    def here(self, meeting: Meeting) -> Task:
        """The same task for ranks that this process starts: with its present state."""
        return replace(
            self, environment=_environment(meeting), cwd=os.getcwd(), path=list(sys.path)
        )


def pack(fn: Callable[..., Any], overrides: Mapping[str, str], profile: bool) -> Task:
    """Make the task of one run. Raises CannotSend if the function cannot be pickled."""
    # The anchor is a function whose globals are the notebook's own namespace. cloudpickle gives all
    # functions of one pickle one dict of globals, holding just the names they use; through the
    # anchor the worker finds that dict and makes it its __main__.
    anchor = types.FunctionType((lambda: None).__code__, sys.modules["__main__"].__dict__)
    try:
        function = dumps((fn, anchor), _Pickler)
    except Exception as error:  # whatever a learner's object raises in its own __reduce__
        raise CannotSend(_why_not_function(fn, error)) from error
    return Task(
        function=function,
        name=name_of(fn),
        overrides=dict(overrides),
        profile=profile,
        sources=_cell_sources(function),
        home=home_of(fn),
    )


def name_of(fn: Callable[..., Any]) -> str:
    """The name to call a worker function by."""
    fn = getattr(fn, "func", fn)  # functools.partial
    return getattr(fn, "__name__", None) or type(fn).__name__


def _environment(meeting: Meeting) -> dict[str, str]:
    """The present variables, and those that torchrun sets alike for all ranks."""
    common = {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    if meeting.interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Without it gloo looks up the host's name and may bind to an outside address.
        common["GLOO_SOCKET_IFNAME"] = meeting.interface
    if meeting.interface not in (None, *LOOPBACK.values()) and (
        "NCCL_SOCKET_IFNAME" not in os.environ
    ):
        common["NCCL_SOCKET_IFNAME"] = str(meeting.interface)
    if sys.platform == "linux" and "RES_OPTIONS" not in os.environ:
        # torch's store looks up the name of every peer, which for ::ffff:127.0.0.1 asks the name
        # server: one that does not answer would cost each rank 10 s (resolv.conf(5)).
        common["RES_OPTIONS"] = "timeout:1 attempts:1"
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = "1"  # as torchrun does: ranks share the cores
    return {**os.environ, **common}


@dataclass(frozen=True)
class PackedArgument:
    """An argument that arrived in a worker, not loaded yet.

    Loading may import the learner's modules: it waits until the worker is like a fresh process.
    """

    data: bytes

    def load(self) -> Any:
        return pickle.loads(self.data)


class Argument:
    """One argument on its way to a worker; pickled while its process is being started.

    Queues, locks and shared tensors can only be pickled at that moment, as their file
    descriptors travel with the process.
    """

    def __init__(self, value: Any, position: int, fn: Callable[..., Any]) -> None:
        self._value = value
        self._position = position
        self._fn = fn

    def __reduce__(self) -> tuple[type[PackedArgument], tuple[bytes]]:
        return PackedArgument, (self.data(_argument_pickler()),)

    def data(self, pickler: type[Pickler]) -> bytes:
        try:
            return dumps(self._value, pickler)
        except Exception as error:  # as above: anything may come out of a learner's __reduce__
            raise CannotSend(self._why_not(error)) from error

    def _why_not(self, error: Exception) -> str:
        name = _parameter_name(self._fn, self._position + 1)
        called = f" (parameter {name!r} of {name_of(self._fn)})" if name else ""
        return _cannot_travel(f"args[{self._position}]{called} is", self._value, error)


def pack_arguments(args: Sequence[Any], fn: Callable[..., Any]) -> tuple[bytes, ...]:
    """The arguments as pickles that may go to another machine. Raises CannotSend if one cannot."""
    return tuple(Argument(value, i, fn).data(_Pickler) for i, value in enumerate(args))


def _refuse_file(file: io.TextIOWrapper) -> Any:
    # cloudpickle would send a copy of an open file's text; spawn refuses it, and so do we.
    raise TypeError(f"cannot pickle {type(file).__name__!r} object {file.name!r}")


class _Pickler(Pickler):
    dispatch_table: ClassVar = ChainMap({io.TextIOWrapper: _refuse_file}, Pickler.dispatch_table)


def _argument_pickler() -> type[_Pickler]:
    """A pickler that also knows what multiprocessing and torch have registered by now."""

    class ArgumentPickler(_Pickler):
        dispatch_table: ClassVar = ChainMap(
            _Pickler.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table
        )

    return ArgumentPickler


def _why_not_function(fn: Callable[..., Any], error: Exception) -> str:
    for where, value in _used_by(fn):
        try:
            dumps(value, _Pickler)
        except Exception as culprit:  # the search for what failed above
            return _cannot_travel(f"{name_of(fn)} uses {where},", value, culprit)
    return f"the function {name_of(fn)} cannot travel to another process: {error}"


def _used_by(fn: Callable[..., Any]) -> list[tuple[str, Any]]:
    """What a function drags along: (description, value) of its variables, self and defaults."""
    used: list[tuple[str, Any]] = []
    owner = getattr(fn, "__self__", None)
    if owner is not None:
        used += [(f"self.{name}", value) for name, value in getattr(owner, "__dict__", {}).items()]
    plain = inspect.unwrap(getattr(fn, "__func__", fn))
    if not isinstance(plain, types.FunctionType):
        return used
    variables = inspect.getclosurevars(plain)
    used += [(f"the variable {name!r}", value) for name, value in variables.nonlocals.items()]
    used += [(f"the variable {name!r}", value) for name, value in variables.globals.items()]
    used += [(f"the default value {value!r}", value) for value in plain.__defaults__ or ()]
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
    elif "inheritance" in str(error):  # what multiprocessing says of its queues and locks
        try_this = "Pass it as an argument: launch(fn, args=(it,))."
    else:
        try_this = "Create it inside the worker function, or send the plain data it is made from."
    return f"{what} {article} {name}, which cannot travel to another process: {error}\n{try_this}"


def _cell_sources(function: bytes) -> dict[str, str]:
    """The text of the cells that the pickled function comes from.

    IPython keeps the text of each cell in linecache without a modification time. Only the cells
    whose file name occurs in the pickle are sent, not the whole session.
    """
    names = [name for name in list(linecache.cache) if is_cell(name) and name.encode() in function]
    return {name: "".join(linecache.getlines(name)) for name in names}
