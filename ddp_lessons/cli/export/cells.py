"""A notebook's code as top-level statements: the names that each one uses, binds and changes.

Runs in the command `ddp-lessons export`. Nothing of the notebook is executed: names are read from
the compiled code, in which Python's own rules of scope are applied.
"""

from __future__ import annotations

import ast
import dis
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import NamedTuple

Import = ast.Import | ast.ImportFrom
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
BRANCHES = (*LOOPS, ast.If, ast.Try, ast.TryStar, ast.Match)
COMPOUND = (*BRANCHES, ast.With, ast.AsyncWith)
# Cell magics whose cell is Python that runs in the notebook's own namespace.
_PYTHON_MAGICS = {"capture", "time", "prun"}
_LOADS = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"}
_STORES = {"STORE_NAME", "STORE_GLOBAL", "DELETE_NAME", "DELETE_GLOBAL"}
# Code of their own up to Python 3.11; from 3.12 on, only generator expressions have that.
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}

Position = tuple[int, int]  # number of the cell, index of the statement in it


class CannotExport(Exception):
    """The function cannot become a script; says why, where, and what to try."""


class Cell(NamedTuple):
    """One code cell: its number among the code cells, from 1, and its source without magics."""

    number: int
    source: str
    nodes: list[ast.stmt] | None  # None if it does not parse


class Statement:
    """A top-level statement, and the names in it.

    Attributes
    ----------
    at_once : names that must be bound when it runs: also defaults, decorators, class bodies
    later : names that must be bound when a function in it is called
    binds : names that it binds or deletes
    changes : names whose objects it changes: `x += 1`, `x[0] = 1`, `x.append(1)`
    declares : names that a function in it binds after `global`
    """

    def __init__(self, cell: Cell, node: ast.stmt, position: Position) -> None:
        self.cell, self.node, self.position = cell, node, position
        self.at_once: set[str] = set()
        self.later: set[str] = set()
        self.binds: set[str] = set()
        self.declares: set[str] = set()
        self._read_names(_compiled([node]), at_once=True)
        self.changes = {name for part in executed(node) for name in _changed(part)}
        self.at_once |= self.changes
        if isinstance(node, ast.AugAssign):
            self.binds -= self.changes

    def _read_names(self, code: CodeType, at_once: bool) -> None:
        """Sort the global names in code, and in the code inside it, by when they are used."""
        in_class = code.co_name != "<module>" and not code.co_flags & inspect.CO_OPTIMIZED
        loaded: set[str] = set()
        stored: set[str] = set()
        for instruction in dis.get_instructions(code):
            if instruction.opname in _STORES:
                stored.add(instruction.argval)
            elif instruction.opname in _LOADS and not (in_class and instruction.argval in stored):
                loaded.add(instruction.argval)
        if in_class:
            stored.clear()  # its own names are attributes
        (self.at_once if at_once else self.later).update(loaded)
        (self.binds if at_once else self.declares).update(stored)
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                function = inner.co_flags & inspect.CO_OPTIMIZED
                waits = function and inner.co_name not in _COMPREHENSIONS
                self._read_names(inner, at_once and not waits)

    def __str__(self) -> str:
        return f"code cell {self.cell.number}, line {self.first_line}"

    @property
    def first_line(self) -> int:
        """Where it begins, decorators included; from 1."""
        decorators: list[ast.expr] = getattr(self.node, "decorator_list", [])
        return min([self.node.lineno, *(decorator.lineno for decorator in decorators)])

    @property
    def span(self) -> tuple[int, int]:
        """Its first and last line, with the comments above it and those that end its body."""
        lines = self.cell.source.split("\n")
        first, last = self.first_line, self.node.end_lineno or 1
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        if isinstance(self.node, (*COMPOUND, *DEFINITIONS)):
            for number, line in enumerate(lines[last:], start=last + 1):
                if re.match(r"\s+#", line):
                    last = number
                elif line.strip():
                    break
        return first, last

    @property
    def text(self) -> str:
        """Its source, exactly as it stands in the cell."""
        others = [node for node in self.cell.nodes or [] if node is not self.node]
        if self.node.col_offset or any(node.lineno == self.node.end_lineno for node in others):
            return ast.get_source_segment(self.cell.source, self.node) or ""  # of `a = 1; b = 2`
        first, last = self.span
        return "\n".join(self.cell.source.split("\n")[first - 1 : last]).rstrip()

    def line_of(self, name: str) -> int:
        """The first line of its cell in which it uses `name`."""
        uses = [n.lineno for n in ast.walk(self.node) if isinstance(n, ast.Name) and n.id == name]
        return min(uses, default=self.first_line)

    def replaces(self, name: str) -> bool:
        """True if nothing that `name` was before can be left after it."""
        if isinstance(self.node, ast.Import):  # `import torch.utils` leaves what `import torch` is
            aliases = [alias for alias in self.node.names if bound_by(alias) == name]
            return any(alias.asname or "." not in alias.name for alias in aliases)
        branches = any(isinstance(part, BRANCHES) for part in executed(self.node))
        return name in self.binds and (not branches or isinstance(self.node, DEFINITIONS))


def read(notebook: Path) -> list[Cell]:
    """The code cells of a notebook.

    Raises
    ------
    CannotExport
        If there is no such file, or it is no notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except OSError as error:
        raise CannotExport(f"{notebook} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CannotExport(f"{notebook} is no notebook (a .ipynb file of version 4).") from error
    return [_cell(number, source) for number, source in enumerate(sources, start=1)]


def _cell(number: int, source: str) -> Cell:
    from IPython.core.inputtransformer2 import TransformerManager

    magic = re.match(r"\s*%%(\w+).*", source)
    if magic and magic[1] not in _PYTHON_MAGICS:
        return Cell(number, "", [])
    if magic:
        source = source.replace(magic[0].lstrip(), "", 1)
    above = len(source) - len(source.lstrip("\n"))  # IPython's transformer takes these lines away
    try:
        source = "\n" * above + TransformerManager().transform_cell(source).lstrip("\n")
        nodes = ast.parse(source).body
        _compiled(nodes)
    except (SyntaxError, ValueError):
        return Cell(number, source, None)
    return Cell(number, source, nodes)


def _compiled(nodes: list[ast.stmt]) -> CodeType:
    """The code of statements, which may await, as cells do."""
    flags, module = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, ast.Module(nodes, [])
    code: CodeType = compile(module, "cell", "exec", flags=flags, dont_inherit=True)
    return code


def statements(cells: Sequence[Cell]) -> list[Statement]:
    """All top-level statements of the cells that parse, in the notebook's order."""
    found = [
        Statement(cell, node, (cell.number, index))
        for cell in cells
        for index, node in enumerate(cell.nodes or [])
    ]
    _note_changed_arguments(found)
    return found


def _note_changed_arguments(found: Sequence[Statement]) -> None:
    """Note that `fill(x)` changes x where the notebook's function `fill` changes its argument."""
    changed: dict[str, set[int]] = {}
    for statement in found:
        if isinstance(node := statement.node, ast.FunctionDef):
            names = {name for part in ast.walk(node) for name in _changed(part)}
            changed[node.name] = {i for i, a in enumerate(node.args.args) if a.arg in names}
        for call in calls(statement.node):
            for index in changed.get(ast.unparse(call.func), ()):
                statement.changes.update(*map(_root, call.args[index : index + 1]))


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, without what runs only when a function is called."""
    yield node
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (*FUNCTIONS, ast.Lambda)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from executed(child)


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that are made when a statement runs."""
    return (part for part in executed(node) if isinstance(part, ast.Call))


def bound_by(alias: ast.alias) -> str:
    """The name that `import a.b`, or `import a as b`, binds."""
    return alias.asname or alias.name.partition(".")[0]


def full_name(node: Import, alias: ast.alias) -> str:
    """What the name bound by an import stands for: `torch.nn` for `from torch import nn`."""
    if isinstance(node, ast.ImportFrom):
        return f"{node.module}.{alias.name}"
    return alias.name if alias.asname else bound_by(alias)


def _changed(node: ast.AST) -> set[str]:
    """The names whose objects a node changes."""
    match node:
        case ast.AugAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Attribute(ctx=ast.Store() | ast.Del()):
            return _root(node)
        case ast.Subscript(ctx=ast.Store() | ast.Del()):
            return _root(node)
        case ast.Expr(value=ast.Call(func=called, args=arguments)):
            # A method may change its object; shuffle, setattr, zeros_, their first argument.
            name = ast.unparse(called).rpartition(".")[2]
            in_place = name in ("shuffle", "setattr", "heapify", "heappush") or name.endswith("_")
            method = _root(called) if isinstance(called, ast.Attribute) else set()
            return method.union(*map(_root, arguments[:1] if in_place else []))
    return set()


def _root(node: ast.AST) -> set[str]:
    """`x` of `x.a[0].b`; nothing if it does not begin with a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()
