"""A notebook's code as top-level statements, and what each of them does with names.

Nothing of the notebook is executed. Names are read from compiled code, to which Python has applied
its rules of scope.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
BRANCHES = (*LOOPS, ast.If, ast.Try, ast.TryStar, ast.Match)
# Cell magics whose cell is Python that runs in the notebook's own namespace.
_PYTHON_MAGICS = {"capture", "time", "prun"}
_LOADS = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"}
_STORES = {"STORE_NAME", "STORE_GLOBAL", "DELETE_NAME", "DELETE_GLOBAL"}
# Code of their own up to Python 3.11; from 3.12 on, only generator expressions have that.
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_IN_PLACE = {"shuffle", "setattr", "heapify", "heappush"}  # they change their first argument
_LAUNCH = {"ddp_lessons.launch", "ddp_lessons.launcher.api.launch"}


class CannotExport(Exception):
    """The function cannot become a script; says why, where, and what to try."""


class Cell(NamedTuple):
    """One code cell: its number among the code cells, from 1, and its source without magics."""

    number: int
    source: str
    nodes: list[ast.stmt] | None  # None if it does not parse


class Names:
    """The global names in a statement.

    Attributes
    ----------
    at_once : names that must be bound when it runs: also defaults, decorators, class bodies
    later : names that must be bound when a function in it is called
    binds : names that it binds or deletes
    declares : names that a function in it binds after `global`
    """

    def __init__(self, node: ast.stmt) -> None:
        self.at_once: set[str] = set()
        self.later: set[str] = set()
        self.binds: set[str] = set()
        self.declares: set[str] = set()
        self._read(_compiled([node]), at_once=True)

    def _read(self, code: CodeType, at_once: bool) -> None:
        """Sort the global names in code, and in the code inside it, by when they are used."""
        in_class = code.co_name != "<module>" and not code.co_flags & inspect.CO_OPTIMIZED
        loaded: set[str] = set()
        stored: set[str] = set()
        for instruction in dis.get_instructions(code):
            if instruction.opname in _STORES:
                stored.add(instruction.argval)
            elif instruction.opname in _LOADS and not (in_class and instruction.argval in stored):
                loaded.add(instruction.argval)
        (self.at_once if at_once else self.later).update(loaded)
        if not in_class:  # the names that a class binds are its attributes
            (self.binds if at_once else self.declares).update(stored)
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                function = inner.co_flags & inspect.CO_OPTIMIZED
                waits = function and inner.co_name not in _COMPREHENSIONS
                self._read(inner, at_once and not waits)


class Statement(Names):
    """A top-level statement; an import of several names is as many statements.

    Attributes
    ----------
    index : its place among the statements of the notebook
    changes : names whose objects it changes: `x += 1`, `x[0] = 1`, `x.append(1)`
    """

    def __init__(self, cell: Cell, node: ast.stmt, index: int) -> None:
        super().__init__(node)
        self.cell, self.node, self.index = cell, node, index
        self.changes = {name for part in executed(node) for name in _changed(part)}
        self.at_once |= self.changes
        if isinstance(node, ast.AugAssign):
            self.binds -= self.changes

    def __str__(self) -> str:
        return f"code cell {self.cell.number}, line {self.node.lineno}"

    @property
    def lines(self) -> tuple[int, int]:
        """Its first and last line, with the comments above it and those that end its body."""
        source = self.cell.source.split("\n")
        decorators: list[ast.expr] = getattr(self.node, "decorator_list", [])
        first = min([self.node.lineno, *(decorator.lineno for decorator in decorators)])
        while first > 1 and source[first - 2].startswith("#"):
            first -= 1
        last = self.node.end_lineno or 1
        for number, line in enumerate(source[last:], start=last + 1):
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
        first, last = self.lines
        return "\n".join(self.cell.source.split("\n")[first - 1 : last]).rstrip()

    @property
    def imports(self) -> str:
        """What the name that an import binds stands for: `torch.nn`; empty if it is no import."""
        match self.node:
            case ast.ImportFrom(module=module, names=[alias]):
                return f"{module}.{alias.name}"
            case ast.Import(names=[alias]):
                return alias.name if alias.asname else alias.name.partition(".")[0]
        return ""

    def line_of(self, name: str) -> int:
        """The first line of its cell in which it uses `name`."""
        uses = [n.lineno for n in ast.walk(self.node) if isinstance(n, ast.Name) and n.id == name]
        return min(uses, default=self.node.lineno)

    def replaces(self, name: str) -> bool:
        """True if nothing that `name` was before can be left after it."""
        match self.node:
            case ast.Import(names=[ast.alias(name=module, asname=None)]) if "." in module:
                return False  # `import torch.utils` leaves what `import torch` is
        branches = any(isinstance(part, BRANCHES) for part in executed(self.node))
        return name in self.binds and (not branches or isinstance(self.node, DEFINITIONS))


class Notebook:
    """The code cells of a notebook, and their statements in order.

    Raises
    ------
    CannotExport
        If there is no such file, or it is no notebook.
    """

    def __init__(self, path: Path) -> None:
        self.cells = [_cell(number, source) for number, source in enumerate(_sources(path), 1)]
        nodes = [(cell, node) for cell in self.cells for node in _one_by_one(cell.nodes or [])]
        self.statements = [Statement(cell, node, i) for i, (cell, node) in enumerate(nodes)]
        self._note_changed_arguments()

    def _note_changed_arguments(self) -> None:
        """Note that `fill(x)` changes x where the notebook's `fill` changes its argument."""
        changed: dict[str, set[int]] = {}
        for statement in self.statements:
            if isinstance(node := statement.node, ast.FunctionDef):
                names = {name for part in ast.walk(node) for name in _changed(part)}
                changed[node.name] = {i for i, a in enumerate(node.args.args) if a.arg in names}
            for call in calls(statement.node):
                for index in changed.get(ast.unparse(call.func), ()):
                    statement.changes.update(*map(_root, call.args[index : index + 1]))

    def binding(self, name: str) -> list[Statement]:
        """All statements that bind or delete a name."""
        return [statement for statement in self.statements if name in statement.binds]

    def history(self, name: str, before: int) -> list[Statement]:
        """The statements that bound `name` last, and those that changed it since, in order."""
        found: list[Statement] = []
        for statement in reversed(self.statements[:before]):
            if isinstance(statement.node, ast.Delete) and name in statement.binds:
                break
            if name in statement.binds | statement.changes:
                found.append(statement)
            if statement.replaces(name):
                break
        while found and name not in found[-1].binds:
            found.pop()  # changes an object that the name no longer means
        if found and found[-1].imports:
            # What a cell changes in a module does not reach the ranks: they import it anew.
            found = [statement for statement in found if name in statement.binds]
        return found[::-1]

    def setters(self, name: str) -> set[str]:
        """The functions that bind `name` as global, or use one that does."""
        setters = {b for s in self.statements if name in s.declares for b in s.binds}
        while more := {b for s in self.statements if s.later & setters for b in s.binds} - setters:
            setters |= more
        return setters

    def full_names(self, called: ast.expr) -> set[str]:
        """What `nn.Linear` can be by the notebook's imports: `torch.nn.Linear`."""
        name, dot, rest = ast.unparse(called).partition(".")
        imports = {statement.imports for statement in self.binding(name)} - {""}
        return {f"{full}{dot}{rest}" for full in imports}

    def is_launch(self, node: ast.AST) -> bool:
        """True for a call of ddp_lessons.launch."""
        return isinstance(node, ast.Call) and bool(_LAUNCH & self.full_names(node.func))

    def hint(self, name: str) -> str:
        """Where a name may be that no cell binds: in one that does not parse."""
        for cell in self.cells:
            if cell.nodes is None and re.search(rf"\b{re.escape(name)}\b", cell.source):
                return f"; it may be in code cell {cell.number}, which does not parse"
        return ""


def _sources(path: Path) -> list[str]:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except OSError as error:
        raise CannotExport(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CannotExport(f"{path} is no notebook (a .ipynb file of version 4).") from error


def _cell(number: int, source: str) -> Cell:
    from IPython.core.inputtransformer2 import TransformerManager

    if magic := re.match(r"\s*%%(\w+)", source):
        if magic[1] not in _PYTHON_MAGICS:
            return Cell(number, "", [])
        source = re.sub("%%.*", "", source, count=1)
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


def _one_by_one(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, with an import for each name that is imported."""
    for node in nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            yield node
            continue
        for alias in node.names:
            single = copy.copy(node)
            single.names = [alias]
            yield single


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, without what runs only when a function is called."""
    yield node
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from executed(child)


def run_by_call(function: ast.FunctionDef) -> list[ast.AST]:
    """What runs when the function is called, without the functions inside it."""
    return [part for statement in function.body for part in executed(statement)]


def calls(node: ast.AST) -> list[ast.Call]:
    """The calls that are made when a statement runs."""
    return [part for part in executed(node) if isinstance(part, ast.Call)]


def _changed(node: ast.AST) -> set[str]:
    """The names whose objects a node changes."""
    match node:
        case ast.AugAssign(target=ast.Name(id=name)):
            return {name}
        case (
            ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del())
        ):
            return _root(node)
        case ast.Expr(value=ast.Call(func=called, args=arguments)):
            # A method may change its object; torch's functions that end in _, their first argument.
            name = ast.unparse(called).rpartition(".")[2]
            method = _root(called) if isinstance(called, ast.Attribute) else set()
            in_place = name in _IN_PLACE or name.endswith("_")
            return method.union(*map(_root, arguments[:1] if in_place else []))
    return set()


def _root(node: ast.AST) -> set[str]:
    """`x` of `x.a[0].b`; nothing if it does not begin with a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()
