"""Whose code a file holds: the learner's, an installed package's, or Python's, torch's or ours.

Explanations show the learner's lines, and whether a thread may be the learner's decides whether a
run is taken to hang. So what cannot be told to be somebody else's is the learner's. Used in both
processes; imports no torch.
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
# Of any host: an engine's paths are not those of the notebook.
_IN_PACKAGE = re.compile(r"^(?P<root>.*/(?:site|dist)-packages/)(?P<name>[^/]+?)(?:\.py)?(?:/|$)")
_IN_STDLIB = re.compile(r"^.*/lib(?:64)?/python3\.\d+t?/")
# What libraries name the code that they make.
_GENERATED = (
    "<frozen ", "<attrs generated ", "<decorator-gen-", "<eval_with_key>", "<__array_function__ ",
)  # fmt: skip
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
    """Whose code a frame is in: the learner's, an installed package's, or what runs it.

    A library is Python's own, torch or this package. What cannot be told to be one of the others is
    the learner's.
    """

    LEARNER = "learner"
    PACKAGE = "package"
    LIBRARY = "library"


@functools.lru_cache(4096)
def owner_of(filename: str, home: str | None = None) -> Owner:
    """Whose file it is; that of the package `home` is the learner's. See Owner."""
    filename = unmarked(filename)
    if not filename or filename.startswith(_GENERATED):
        return Owner.LIBRARY
    if not os.path.isabs(filename):
        return Owner.LEARNER  # a cell, or code that no file holds
    path = os.path.realpath(filename)
    if path.startswith((_HERE, _torch())):
        return Owner.LIBRARY
    package = _package_of(filename)
    if package is not None:
        if package in _NOT_A_HOME:
            return Owner.LIBRARY
        return Owner.LEARNER if package == home else Owner.PACKAGE
    return Owner.LIBRARY if is_stdlib(filename) else Owner.LEARNER


def recorded(filename: str) -> str:
    """A file's name, marked as one from a record, of which nothing is to be read here."""
    return f"{_RECORDED}{filename}{_RECORDED_END}"


def unmarked(filename: str) -> str:
    """A file's name without that mark."""
    if filename.startswith(_RECORDED):
        return filename[len(_RECORDED) :].removesuffix(_RECORDED_END)
    return filename


def is_installed_here(filename: str) -> bool:
    """Whether a file is Python's own, or was installed here: anybody may see what is in it."""
    path = os.path.realpath(filename)
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
    """The installed package, or module, that holds a file: what its path has first."""
    path = os.path.realpath(filename)
    for root in ROOTS:
        if path.startswith(root):
            return path[len(root) :].partition(os.sep)[0].removesuffix(".py")
    found = _IN_PACKAGE.match(path)
    return found["name"] if found else None


def is_stdlib(filename: str) -> bool:
    """Whether a file is of Python's standard library, on this host or another."""
    filename = unmarked(filename)
    path = os.path.realpath(filename)
    inside = path.startswith(STDLIB) or _IN_STDLIB.match(path) is not None
    return inside and _package_of(filename) is None


@functools.cache
def _torch() -> str:
    """The folder of torch, which is not imported for that."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return _HERE
    return os.path.dirname(os.path.realpath(spec.origin)) + os.sep
