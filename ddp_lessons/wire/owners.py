"""Decides whose code a file holds: the learner's, a package's, or Python's, torch's or ours.

Explanations show the learner's lines, and a run counts as hung only if no thread of the learner's
can go on. So a file of unknown owner counts as the learner's. Ranks use it to find call sites, the
parent to read stacks; it imports no torch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import site
import sysconfig
from collections.abc import Callable
from enum import StrEnum
from typing import Any

_HERE = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_CHECKS = os.path.join(_HERE, "exercises", "")
_OUTSIDE = tuple(os.path.join(_HERE, folder, "") for folder in ("worker", "launcher"))
# These match paths of any host, because an engine's differ from the notebook's.
_IN_PACKAGE = re.compile(r"^(?P<root>.*/(?:site|dist)-packages/)(?P<name>[^/]+?)(?:\.py)?(?:/|$)")
_IN_STDLIB = re.compile(r"^.*/lib(?:64)?/python3\.\d+t?/")
# File names that libraries give to the code that they generate.
_GENERATED = (
    "<frozen ", "<attrs generated ", "<decorator-gen-", "<eval_with_key>", "<__array_function__ ",
)  # fmt: skip
# A file that torch.compile writes: its name is a hash, in a folder of two of its letters.
_COMPILED = re.compile(r"/(?P<folder>[a-z2-7]{2})/c(?P=folder)[a-z2-7]{49}\.py$")
ROOTS = tuple(  # where packages are installed
    {
        os.path.realpath(path) + os.sep
        for path in (
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
            *site.getsitepackages(),
            site.getusersitepackages(),
        )
    }
)
STDLIB = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_RECORDED, _RECORDED_END = "<recorded ", ">"  # linecache opens no name in such brackets
_NOT_A_HOME = ("torch", "functorch", "torchgen", "ddp_lessons")


class Owner(StrEnum):
    """Whose code a frame is in.

    LIBRARY is Python, torch or this package, PACKAGE any other installed package, and LEARNER all
    the rest.
    """

    LEARNER = "learner"
    PACKAGE = "package"
    LIBRARY = "library"


@functools.lru_cache(4096)
def owner_of(filename: str, home: str | None = None) -> Owner:
    """The owner of a file. Files of the installed package `home` count as the learner's."""
    filename = unmarked(filename)
    if not filename or filename.startswith(_GENERATED) or _COMPILED.search(filename):
        return Owner.LIBRARY
    if not os.path.isabs(filename):
        return Owner.LEARNER  # a cell, or code that no file holds
    path = real_path(filename)
    if path.startswith((_HERE, _torch())):
        return Owner.LIBRARY
    package = _package_of(filename)
    if package is not None:
        if package in _NOT_A_HOME:
            return Owner.LIBRARY
        return Owner.LEARNER if package == home else Owner.PACKAGE
    return Owner.LIBRARY if is_stdlib(filename) else Owner.LEARNER


def real_path(filename: str) -> str:
    """A file's path without links; a relative name as it is where the directory was deleted."""
    try:
        return os.path.realpath(filename)
    except FileNotFoundError:
        return filename


def recorded(filename: str) -> str:
    """The name of a file from a record, marked so that nobody reads a file of that name here."""
    return f"{_RECORDED}{filename}{_RECORDED_END}"


def unmarked(filename: str) -> str:
    """A file's name without that mark."""
    if filename.startswith(_RECORDED):
        return filename[len(_RECORDED) :].removesuffix(_RECORDED_END)
    return filename


def is_installed_here(filename: str) -> bool:
    """Whether a file belongs to Python or to a package installed here: its lines are public."""
    path = real_path(filename)
    return path.endswith(".py") and path.startswith((_HERE, _torch(), STDLIB, *ROOTS))


def home_of(fn: Callable[..., Any]) -> str | None:
    """The installed package that holds a function; None for functions from anywhere else."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    plain = inspect.unwrap(getattr(fn, "__func__", fn))
    if not hasattr(plain, "__code__"):  # an object that can be called
        plain = type(plain).__call__
    code = getattr(plain, "__code__", None)
    package = _package_of(code.co_filename) if code is not None else None
    return None if package in _NOT_A_HOME else package


def is_at_home(filename: str, home: str | None) -> bool:
    """Whether a file lies in the installed package `home`."""
    return home is not None and _package_of(filename) == home


def _package_of(filename: str) -> str | None:
    """The installed package or module that holds a file: what follows site-packages in its path."""
    path = real_path(filename)
    for root in ROOTS:
        if path.startswith(root):
            return path[len(root) :].partition(os.sep)[0].removesuffix(".py")
    found = _IN_PACKAGE.match(path)
    return found["name"] if found else None


def is_of_check(filename: str) -> bool:
    """Whether a file holds the checks of exercises, which make calls of their own in ranks."""
    return real_path(filename).startswith(_CHECKS)


def is_outside(filename: str) -> bool:
    """Whether code in a file calls the learner's function, so that its callers are not theirs."""
    return filename.startswith(_OUTSIDE)


def is_stdlib(filename: str) -> bool:
    """Whether a file is of Python's standard library, on this host or another."""
    filename = unmarked(filename)
    path = real_path(filename)
    inside = path.startswith(STDLIB) or _IN_STDLIB.match(path) is not None
    return inside and _package_of(filename) is None


@functools.cache
def _torch() -> str:
    """The folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return _HERE
    return os.path.dirname(os.path.realpath(spec.origin)) + os.sep
