"""The module `__main__` of a rank, and of the processes that a rank starts.

No rank runs the script again, and a notebook could not be run again. A rank's `__main__` holds what
the function uses. What else the parent's `__main__` defines is loaded when somebody looks for it,
as pickle does: to load a saved model, say.

A process that a rank starts by spawn or forkserver gets the same `__main__`, and the settings of
the rank (settings.py). multiprocessing would run a script for it once more, and knows of no
notebook.
"""

from __future__ import annotations

import io
import linecache
import multiprocessing
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from multiprocessing import spawn
from typing import Any, NamedTuple

from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.worker.settings import Settings, take_over


def replace_main(definitions: Mapping[str, bytes], sources: Mapping[str, str]) -> types.ModuleType:
    """Make an empty `__main__`, which loads a definition when it is looked for."""
    main = types.ModuleType("__main__")

    def load(name: str) -> Any:
        if name not in definitions:
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        value = vars(main)[name] = _Definition(io.BytesIO(definitions[name]), main).load()
        return value

    vars(main)["__getattr__"] = load
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    for name, text in sources.items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return main


class _Definition(pickle.Unpickler):
    """Loads a definition; it may refer to others in `main`."""

    def __init__(self, file: io.BytesIO, main: types.ModuleType) -> None:
        super().__init__(file)
        self._main = main

    def persistent_load(self, name: str) -> Any:
        return getattr(self._main, name)


def unpack(function: Parcel) -> Callable[..., Any]:
    """Load the function, and put what it uses into `__main__`."""
    fn, anchor = function.load()
    used = {k: v for k, v in anchor.__globals__.items() if not k.startswith("__")}
    vars(sys.modules["__main__"]).update(used)
    return fn  # type: ignore[no-any-return]


class Inherited(NamedTuple):
    """What processes that a rank starts take from it, once they unpickle it."""

    function: Parcel
    definitions: dict[str, bytes]
    sources: dict[str, str]
    settings: Settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherit, tuple(self)

    def pass_on(self) -> None:
        """Have all processes get it that this one and its children start with multiprocessing.

        A process object is pickled with the configuration of the process that made it, in front of
        its target and arguments.
        """
        config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        config[__name__] = self


def _inherit(*fields: Any) -> Inherited:
    inherited = Inherited(*fields)
    spawn.old_main_modules.append(sys.modules["__main__"])
    main = replace_main(inherited.definitions, inherited.sources)
    load = main.__getattr__

    def load_all(name: str) -> Any:
        """Load first what the function uses, as one: its functions share their variables."""
        if name.startswith("__"):
            return load(name)
        vars(main)["__getattr__"] = load
        unpack(inherited.function)
        return getattr(main, name)

    vars(main)["__getattr__"] = load_all
    take_over(inherited.settings)
    return inherited
