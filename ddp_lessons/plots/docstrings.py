"""Docstring parts that the functions of `plots` share.

`documented` inserts them when a module is imported, in whichever process, so that `help()`, IPython
and Sphinx show complete docstrings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

PARTS = {
    "run": """\
run : Run
    What `launch` or `load_run` returned, also of a run that failed.""",
    "title": """\
title : str, optional
    The finding that the picture shows""",
    "ax": """\
ax : matplotlib Axes, optional
    Where to draw; by default a new figure.

Returns
-------
matplotlib Axes""",
    "raises": """\
Raises
------
ValueError""",
}


def documented(function: Function) -> Function:
    """Replace `{run}` and the other names of PARTS in a function's docstring."""
    if function.__doc__:  # None under python -OO
        function.__doc__ = inspect.cleandoc(function.__doc__).format(**PARTS)
    return function
