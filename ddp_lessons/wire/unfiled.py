"""Finds the text of code without a file: code below a cell's magic, or after `python -c`.

IPython compiles a cell below `%%time`, `%%timeit` or `%%prun` under a made-up name such as
"<timed exec>", Python the code after `-c` under "<string>", and neither keeps the text. The
session's inputs and the command line still have it. A text counts as that of a code object only if
compiling it gives the same code, so that no wrong line is ever shown. Called by pickling.py; only
the parent has such texts.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import re
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

MOST_KEPT = 4096  # texts, so that a cell is compiled once for all launches
TIMEIT = "<magic-timeit>"
MADE_UP = ("<timed exec>", "<timed eval>", TIMEIT, "<string>")
_LINE_MAGIC = re.compile(r"^\s*(?:\w+\s*=\s*)?%(?:time|timeit|prun)\b(?P<code>.*)$")

Signs = tuple[Any, ...]


class Text(NamedTuple):
    """A piece of source: as compiled, and where it stands in what a person sees."""

    source: str
    name: str  # of the whole, as shown: "Cell In[5]"
    whole: str
    before: int  # lines of the whole before the source


def place_of(code: CodeType) -> tuple[str, int]:
    """The name under which `linecache` has the text of some code, and the code's first line there.

    If code has a made-up name and its text is found, this puts the text into linecache under a name
    of its own. Otherwise it returns the code's own name and line.
    """
    if code.co_filename in MADE_UP:
        for text in itertools.chain(_of_session(), _of_command()):
            if _gives(text, code):
                lines = text.whole.splitlines(keepends=True)
                # Without a modification time, as IPython does for cells: so linecache keeps it.
                linecache.cache[text.name] = len(text.whole), None, lines, text.name
                return text.name, code.co_firstlineno + text.before
    return code.co_filename, code.co_firstlineno


def _of_session() -> Iterator[Text]:
    """The code below or behind magics in the inputs of an IPython session, newest first."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    history = getattr(shell, "history_manager", None)
    inputs = history.input_hist_raw if history else []
    for number in range(len(inputs) - 1, 0, -1):
        yield from _of_cell(shell, number, inputs[number])


@functools.lru_cache(MOST_KEPT)
def _of_cell(shell: Any, number: int, cell: str) -> tuple[Text, ...]:
    """The code below or behind magics in one input."""
    name, lines, found = f"Cell In[{number}]", cell.splitlines(keepends=True), []
    _, *rest = [n for n, line in enumerate(lines) if line.strip()] or [0]
    if cell.lstrip().startswith("%%") and rest:  # IPython leaves out blank lines above
        below = shell.transform_cell("".join(lines[rest[0] :]))
        found.append(Text(below, name, cell, rest[0]))
    for before, line in enumerate(lines):
        if magic := _LINE_MAGIC.match(line):
            found.append(Text(magic["code"].strip(), name, cell, before))
    return tuple(found)


def _of_command() -> Iterator[Text]:
    """The code after `-c` on the command line."""
    if sys.argv[:1] != ["-c"]:
        return
    options = [n for n, a in enumerate(sys.orig_argv) if re.fullmatch(r"-[a-zA-Z]*c", a)]
    if options and options[0] + 1 < len(sys.orig_argv):
        source = sys.orig_argv[options[0] + 1]
        yield Text(source, "python -c", source, 0)


def _gives(text: Text, code: CodeType) -> bool:
    """Whether compiling the text gives this code object."""
    flags = code.co_flags & annotations.compiler_flag
    return _signs(code) in _signs_of_all(text.source, code.co_filename, flags)


@functools.lru_cache(MOST_KEPT)
def _signs_of_all(source: str, filename: str, flags: int) -> frozenset[Signs]:
    """The signs of all code objects that compiling a source gives."""
    try:
        tree = ast.parse(source)
        if filename == TIMEIT:  # %timeit puts the code into a function
            inner = ast.parse("def inner(): pass")
            inner.body[0].body = tree.body or inner.body[0].body  # type: ignore[attr-defined]
            tree = inner
        whole = compile(tree, filename, "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return frozenset()
    return frozenset(map(_signs, _all(whole)))


def _all(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all(constant)


def _signs(code: CodeType) -> Signs:
    """The features that tell code objects apart; constants with their types, for 1 equals True."""
    constants = tuple(
        _signs(c) if isinstance(c, CodeType) else (type(c), repr(c)) for c in code.co_consts
    )
    lines = tuple(line for *_, line in code.co_lines())
    return code.co_name, code.co_code, code.co_names, code.co_varnames, constants, lines
