"""Reads the learner's code around a line: branches, loops, and what a loop goes over.

Runs in the parent. mismatch.py, hangs.py and notes.py ask it. What does not parse, as a cell with
an IPython magic, has no branches and no loops.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Sequence
from typing import NamedTuple

from ddp_lessons.wire.records import Frame, split_site


@functools.lru_cache(maxsize=256)
def _parsed(filename: str) -> ast.Module:
    """The code of a file or cell; nothing if it is not known, or no Python."""
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ast.Module([], [])


@functools.lru_cache(maxsize=256)
def exclusive(one: str | None, other: str | None) -> bool:
    """Whether two lines are in different branches of one `if`."""
    if one is None or other is None:
        return False
    (file, line), (other_file, other_line) = split_site(one), split_site(other)
    if file != other_file:
        return False
    return any(
        (_within(node.body, line) and _within(node.orelse, other_line))
        or (_within(node.body, other_line) and _within(node.orelse, line))
        for node in ast.walk(_parsed(file))
        if isinstance(node, ast.If)
    )


class Loop(NamedTuple):
    """The lines of a loop."""

    file: str
    first: int
    last: int

    def holds(self, frame: Frame) -> bool:
        """Whether a line is in it."""
        return frame.filename == self.file and self.first <= frame.lineno <= self.last


def training_loop(frames: Sequence[Frame]) -> Loop | None:
    """The innermost loop around a stack's lines in which an optimizer steps, as far as it shows."""
    for frame in reversed(frames):
        found = [loop for loop in _stepping_loops(frame.filename) if loop.holds(frame)]
        if found:
            return min(found, key=lambda loop: loop.last - loop.first)
    return None


@functools.lru_cache(maxsize=256)
def _stepping_loops(file: str) -> list[Loop]:
    lines = linecache.getlines(file)
    loops = [
        Loop(file, node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(_parsed(file))
        if isinstance(node, ast.For | ast.While)
    ]
    return [loop for loop in loops if ".step(" in "".join(lines[loop.first - 1 : loop.last])]


def _within(block: Sequence[ast.stmt], line: int) -> bool:
    return bool(block) and block[0].lineno <= line <= (block[-1].end_lineno or 0)


def is_in_loop_over_set(filename: str, lineno: int) -> bool:
    """Whether a line is in a `for` loop over what is certainly a set."""
    tree = _parsed(filename)
    around = [node for node in ast.walk(tree) if _holds(node, lineno)]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    function = max(
        (node for node in around if isinstance(node, functions)),
        key=lambda node: node.lineno,
        default=tree,
    )
    loops = (n for n in around if isinstance(n, ast.For) and n.body[0].lineno <= lineno)
    return any(_is_set(loop.iter, function) for loop in loops)


def _holds(node: ast.AST, lineno: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is not None and last is not None and first <= lineno <= last


def _assigned(function: ast.AST, name: str) -> list[ast.expr]:
    """All that is assigned to a name in a function."""
    found = []
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For):
            targets = [node.target]
        value = node.iter if isinstance(node, ast.For) else getattr(node, "value", None)
        if value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found.append(value)
    return found


def _is_set(node: ast.expr, function: ast.AST, followed: tuple[str, ...] = ()) -> bool:
    """Whether an expression in a function is a set, or goes through one in its order."""
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Call(func=ast.Name(id="enumerate" | "list" | "tuple"), args=[inner]):
            return _is_set(inner, function, followed)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor()):
            return _is_set(left, function, followed)
        case ast.Name(id=name) if name not in followed:
            assigned = _assigned(function, name)
            return bool(assigned) and all(
                _is_set(value, function, (*followed, name)) for value in assigned
            )
    return False
