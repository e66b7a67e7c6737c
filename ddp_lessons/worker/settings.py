"""What a rank takes over of the process that launches: its settings at that moment.

A script that `torch.multiprocessing.spawn` starts runs its top level again in every rank. Here
neither a script nor a notebook is run again: `taken` reads, in the parent, what such lines have
set, and `take_over` sets the same in a rank, and in the processes that a rank starts. notebooks/
faq.md lists what is taken over and what is not. Importing this module imports no torch.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from ddp_lessons.instrumentation import torch_api
from ddp_lessons.wire.pickling import dumps

TORCH, NUMPY, PYTHON = "torch", "numpy", "sys"


class Settings(NamedTuple):
    """The settings of a process. The values of torch and NumPy are pickled, as they import these.

    `values` maps a module's name to the pickle of its settings by name; `filters` are those of the
    module warnings; `loggers` maps the names of loggers to what was set in them.
    """

    values: dict[str, bytes]
    filters: list[Filter]
    loggers: dict[str, Logger]
    disabled_up_to: int  # logging.disable
    captures_warnings: bool  # logging.captureWarnings


class Filter(NamedTuple):
    """A filter of warnings; its category is pickled, as its module may be missing elsewhere."""

    action: str
    message: Any
    category: bytes
    defined_in: str
    module: Any
    lineno: int


class Logger(NamedTuple):
    """What was set in a logger. A library's logger has the name of a module, or of a part of it."""

    level: int
    propagate: bool
    disabled: bool
    handlers: tuple[bytes, ...]  # pickles of `_Handler`
    of_library: bool


class _Handler(NamedTuple):
    kind: type[logging.Handler]
    attributes: dict[str, Any]
    stream: str  # "stderr", "stdout" or none

    def made(self) -> logging.Handler:
        """The handler, in this process. Raises OSError if its file cannot be opened."""
        handler = self.kind.__new__(self.kind)
        logging.Handler.__init__(handler)
        vars(handler).update(self.attributes)
        if self.stream:
            handler.stream = getattr(sys, self.stream)  # type: ignore[attr-defined]
        elif isinstance(handler, logging.FileHandler):
            handler.stream = handler._open()
        return handler


def taken(*, with_seed: bool) -> Settings:
    """The settings of this process, which launches; its seeds only if ranks shall have them."""
    values = {module: _values(module) for module in (TORCH, NUMPY, PYTHON) if module in sys.modules}
    if not with_seed:
        for of_module in values.values():
            of_module["seed"] = None
    return Settings(
        {module: dumps(of_module) for module, of_module in values.items()},
        list(_filters()),
        dict(_loggers()),
        logging.root.manager.disable,
        logging._warnings_showwarning is not None,  # type: ignore[attr-defined]
    )


def take_over(settings: Settings) -> Settings:
    """Set them in this process; the same for its children, less what was set here anyway."""
    changed = {module: _set(module, pickle.loads(v)) for module, v in settings.values.items()}
    _take_filters(settings.filters)
    _take_loggers(settings)
    return settings._replace(values={m: dumps(values) for m, values in changed.items() if values})


def _known(module: str) -> dict[str, torch_api.Setting]:
    if module == TORCH:
        return torch_api.settings()
    if module == PYTHON:
        return {
            "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
            "switch interval": (sys.getswitchinterval, sys.setswitchinterval),
            "digits": (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
        }
    import numpy

    return {
        "errors": (_numpy_errors, _set_numpy_errors),
        "print options": (
            numpy.get_printoptions,
            lambda options: numpy.set_printoptions(**options),
        ),
        "seed": (_numpy_seed, numpy.random.set_state),
    }


def _numpy_errors() -> tuple[dict[str, Any], bytes]:
    """What NumPy does with each kind of error, and the pickle of the object that it calls then.

    If that cannot be pickled, what it would be called for is warned of, as by default.
    """
    import numpy

    errors: dict[str, Any] = {**numpy.geterr()}
    try:
        return errors, dumps(numpy.geterrcall())
    except Exception:  # whatever a learner's object raises in its own __reduce__
        kept = {kind: "warn" if does in ("call", "log") else does for kind, does in errors.items()}
        return kept, dumps(None)


def _set_numpy_errors(errors: tuple[dict[str, Any], bytes]) -> None:
    import numpy

    numpy.seterr(**errors[0])
    numpy.seterrcall(pickle.loads(errors[1]))


def _numpy_seed() -> Any:
    """The state of NumPy's global generator after numpy.random.seed; None if it seeded itself."""
    import numpy

    generator = numpy.random.mtrand._rand
    return generator.get_state() if generator._bit_generator.seed_seq is None else None


def _values(module: str) -> dict[str, Any]:
    return {name: read() for name, (read, _) in _known(module).items()}


def _set(module: str, values: dict[str, Any]) -> dict[str, Any]:
    """Set what is otherwise in this process, and return that."""
    changed = {}
    for name, (read, write) in _known(module).items():
        value = values.get(name)
        if value is not None and repr(value) != repr(read()):
            write(value)
            changed[name] = value
    return changed


def _filters() -> Iterable[Filter]:
    for action, message, category, module, lineno in warnings.filters:
        for one in category if isinstance(category, tuple) else (category,):
            yield Filter(action, message, dumps(one), one.__module__, module, lineno)


def _take_filters(filters: Iterable[Filter]) -> None:
    """Put filters before this process's own.

    Those whose category is of a module that is missing here can match nothing yet: the module
    brings its own. Importing it would cost time.
    """
    taken = [
        (one.action, one.message, pickle.loads(one.category), one.module, one.lineno)
        for one in filters
        if one.defined_in in sys.modules
    ]
    own = list(warnings.filters)
    warnings.filters[:] = [*taken, *(one for one in own if one not in taken)]  # type: ignore[index]
    with warnings.catch_warnings():
        pass  # has the module notice


def _loggers() -> Iterable[tuple[str, Logger]]:
    for name, logger in {"": logging.root, **logging.root.manager.loggerDict}.items():
        if isinstance(logger, logging.Logger):
            owner = name.partition(".")[0]
            handlers = [] if owner == TORCH else filter(None, map(_packed, logger.handlers))
            yield (
                name,
                Logger(
                    logger.level,
                    logger.propagate,
                    logger.disabled,
                    tuple(handlers),
                    owner != "__main__" and owner in sys.modules,
                ),
            )


def _packed(handler: logging.Handler) -> bytes | None:
    """The pickle of a handler; None for one that only this process could read.

    A handler that cannot be pickled becomes one that writes to standard error.
    """
    stream, to = getattr(handler, "stream", None), ""
    attributes = {k: v for k, v in vars(handler).items() if k not in ("lock", "stream")}
    if isinstance(handler, logging.NullHandler):
        return None
    if isinstance(handler, logging.FileHandler):
        if handler.baseFilename == os.devnull:
            return None
        attributes["mode"] = "a"  # other ranks write there, too
    elif isinstance(handler, logging.StreamHandler):
        to = _standard(stream)
        if not to:
            return None
    for kind, own, where in (
        (type(handler), attributes, to),
        (logging.StreamHandler, {"level": handler.level, "formatter": handler.formatter}, "stderr"),
        (logging.StreamHandler, {"level": handler.level}, "stderr"),
    ):
        try:
            return dumps(_Handler(kind, own, where))
        except Exception:  # whatever a learner's object raises in its own __reduce__
            continue
    return None


def _standard(stream: Any) -> str:
    """Which of the standard streams it is, "" for none: the names are Python's and ipykernel's."""
    for name in ("stderr", "stdout"):
        own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream in own or getattr(stream, "name", None) in (name, f"<{name}>"):
            return name
    return ""


def _take_loggers(settings: Settings) -> None:
    for name, taken in settings.loggers.items():
        owner = name.partition(".")[0]
        if owner == TORCH and "TORCH_LOGS" in os.environ:
            continue  # set by the variable, which may be the rank's alone
        logger = logging.getLogger(name)
        if logger.level != taken.level:  # setting it clears the caches of all loggers
            logger.setLevel(taken.level)
        logger.propagate, logger.disabled = taken.propagate, taken.disabled
        # A library that is still to be imported brings its own handlers.
        if not logger.handlers and (owner in sys.modules or not taken.of_library):
            for packed in taken.handlers:
                logger.addHandler(_handler(pickle.loads(packed)))
    if logging.root.manager.disable != settings.disabled_up_to:
        logging.disable(settings.disabled_up_to)
    logging.captureWarnings(settings.captures_warnings)


def _handler(packed: _Handler) -> logging.Handler:
    try:
        return packed.made()
    except OSError:  # a file that cannot be opened here: on another machine, say
        return packed._replace(
            kind=logging.StreamHandler,
            attributes={k: packed.attributes[k] for k in ("level", "formatter")},
            stream="stderr",
        ).made()
