"""A notebook's code as top-level statements: what each binds, needs and changes.

Runs in the command `ddp-lessons export`, for `needs.py` and `writing.py`. Nothing of the notebook
is executed; magics are taken out with IPython's own transformer.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import symtable
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
COMPOUND = (*LOOPS, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
# Cell magics whose cell is Python that runs in the notebook's own namespace.
_PYTHON_MAGICS = {"capture", "time", "prun"}


class CannotExport(Exception):
    """The function cannot become a script; says why, where, and what to try."""


@dataclass(eq=False)
class Cell:
    """One code cell: its number among the code cells, from 1, and its source without magics."""

    number: int
    source: str
    tree: ast.Module | None  # None if it does not parse

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the source."""
        return self.source.split("\n")


@dataclass(eq=False)
class Statement:
    """A top-level statement, and the names in it.

    Attributes
    ----------
    at_once : names that must be bound when it runs: also defaults, decorators, class bodies
    later : names that must be bound when a function in it is called
    binds : names that it binds
    changes : names whose objects it changes: `x += 1`, `x[0] = 1`, `x.append(1)`
    declares : names that a function in it binds after `global`
    """

    cell: Cell
    node: ast.stmt
    position: tuple[int, int]
    at_once: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)
    binds: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)
    declares: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"code cell {self.cell.number}, line {self.first_line}"

    @cached_property
    def first_line(self) -> int:
        """Where it begins, decorators included; from 1."""
        decorators: list[ast.expr] = getattr(self.node, "decorator_list", [])
        return min([self.node.lineno, *(d.lineno for d in decorators)])

    @cached_property
    def shares_a_line(self) -> bool:
        """True for `a = 1; b = 2`."""
        others = [
            other for other in (self.cell.tree or ast.Module([], [])).body if other != self.node
        ]
        return any(
            other.lineno == self.node.end_lineno or other.end_lineno == self.first_line
            for other in others
        )

    @cached_property
    def span(self) -> tuple[int, int]:
        """Its lines with the comments directly above and those that end its body; from 0."""
        lines, first, last = self.cell.lines, self.first_line - 1, self.node.end_lineno or 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        if isinstance(self.node, (*COMPOUND, *FUNCTIONS, ast.ClassDef)):
            for number in range(last, len(lines)):
                if re.match(r"\s+#", lines[number]):
                    last = number + 1
                elif lines[number].strip():
                    break
        return first, last

    @property
    def text(self) -> str:
        """Its source, exactly as it stands in the cell."""
        if self.shares_a_line:
            return ast.get_source_segment(self.cell.source, self.node) or ""
        first, last = self.span
        return "\n".join(self.cell.lines[first:last]).rstrip()

    def line_of(self, name: str) -> int:
        """The first line of its cell in which it uses `name`."""
        uses = [n.lineno for n in ast.walk(self.node) if isinstance(n, ast.Name) and n.id == name]
        return min(uses, default=self.first_line)

    def surely_binds(self, name: str) -> bool:
        """True if nothing that `name` was before can be left after it."""
        return surely_bind([self.node], name)


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


def statements(cells: Iterable[Cell]) -> list[Statement]:
    """All top-level statements of the cells that parse, in the notebook's order."""
    found = [
        _analysed(Statement(cell, node, (cell.number, index)))
        for cell in cells
        if cell.tree is not None
        for index, node in enumerate(cell.tree.body)
    ]
    _note_changed_arguments(found)
    return found


def runs_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, without what runs only when a function is called."""
    yield node
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (*FUNCTIONS, ast.Lambda)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from runs_at_once(child)


def names_in(arguments: str) -> set[str]:
    """The global names that the arguments of a call need, those of lambdas in it included."""
    node = ast.parse(f"_({arguments}\n)").body[0]
    statement = Statement(Cell(0, "", None), node, (0, 0))
    _names(_scopes(node), statement, at_once=True)
    return (statement.at_once | statement.later) - {"_"}


def surely_bind(body: list[ast.stmt], name: str) -> bool:
    """True if `name` is bound by `body`, whichever way it goes."""
    return any(_binds(node, name) for node in body)


def _binds(node: ast.stmt, name: str) -> bool:
    match node:
        case ast.If():
            return surely_bind(node.body, name) and surely_bind(node.orelse, name)
        case ast.Try() | ast.TryStar():
            handled = all(surely_bind(handler.body, name) for handler in node.handlers)
            in_body = surely_bind([*node.body, *node.orelse], name)
            return (in_body and handled) or surely_bind(node.finalbody, name)
        case ast.With() | ast.AsyncWith():
            return surely_bind(node.body, name) or _assigns(node.items, name)
        case ast.For() | ast.AsyncFor() | ast.While() | ast.Match() | ast.AugAssign():
            return False
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name == name
        case ast.Import() | ast.ImportFrom():
            return any(bound_by(alias) == name for alias in node.names)
    return _assigns([node], name)


def _assigns(nodes: Iterable[ast.AST], name: str) -> bool:
    return any(
        isinstance(part, ast.Name) and part.id == name and not isinstance(part.ctx, ast.Load)
        for node in nodes
        for part in runs_at_once(node)
    )


def bound_by(alias: ast.alias) -> str:
    """The name that `import a.b`, or `import a as b`, binds."""
    return alias.asname or alias.name.partition(".")[0]


def _cell(number: int, source: str) -> Cell:
    from IPython.core.inputtransformer2 import TransformerManager

    magic = re.match(r"\s*%%(\w+).*", source)
    if magic and magic[1] not in _PYTHON_MAGICS:
        return Cell(number, "", ast.Module([], []))
    if magic:
        source = source[: magic.start(1) - 2] + source[magic.end() :]
    above = len(source) - len(source.lstrip("\n"))  # IPython's transformer takes these lines away
    try:
        source = "\n" * above + TransformerManager().transform_cell(source).lstrip("\n")
        return Cell(number, source, ast.parse(source))
    except (SyntaxError, ValueError):
        return Cell(number, source, None)


def _analysed(statement: Statement) -> Statement:
    node = statement.node
    _names(_scopes(node), statement, at_once=True)
    for part in runs_at_once(node):
        statement.changes |= set(_changed(part))
    statement.at_once |= statement.changes
    if isinstance(node, ast.AugAssign):
        statement.binds -= statement.changes
    if isinstance(node, ast.AnnAssign) and node.value is None:
        statement.binds.clear()
    return statement


def _scopes(node: ast.stmt) -> symtable.SymbolTable:
    """The scopes of a statement, as Python itself sees them."""
    return symtable.symtable(ast.unparse(_Plain().visit(copy.deepcopy(node))), "cell", "exec")


class _Plain(ast.NodeTransformer):
    """The same names in the same scopes, without what symtable or unparse treat in their own ways.

    From Python 3.12 on, comprehensions are part of the scope around them, but generators are not.
    """

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.AST:
        return self.generic_visit(ast.GeneratorExp(node.elt, node.generators))

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        pair = ast.Tuple([node.key, node.value], ast.Load())
        return self.generic_visit(ast.GeneratorExp(pair, node.generators))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        parts = [
            p
            for value in node.values
            if isinstance(value, ast.FormattedValue)
            for p in (value.value, value.format_spec)
            if p is not None
        ]
        return self.generic_visit(ast.Tuple(parts, ast.Load()))


def _names(table: symtable.SymbolTable, statement: Statement, at_once: bool) -> None:
    """Sort the global names of a scope, and of those inside it, by when they are looked up."""
    top = table.get_type() == "module"
    if table.get_type() == "function":
        at_once = at_once and table.get_name() == "genexpr"
    for symbol in table.get_symbols():
        if not (top or symbol.is_global()):
            continue
        if symbol.is_referenced():
            (statement.at_once if at_once else statement.later).add(symbol.get_name())
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            (statement.binds if at_once else statement.declares).add(symbol.get_name())
    for inner in table.get_children():
        _names(inner, statement, at_once)


def _note_changed_arguments(found: Sequence[Statement]) -> None:
    """Note that `fill(x)` changes x where the notebook's function `fill` changes its argument."""
    changed: dict[str, set[int]] = {}
    for statement in found:
        if isinstance(node := statement.node, ast.FunctionDef):
            names = {name for part in ast.walk(node) for name in _changed(part)}
            changed[node.name] = {i for i, a in enumerate(node.args.args) if a.arg in names}
        for part in runs_at_once(statement.node):
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
                for index, argument in enumerate(part.args):
                    if index in changed.get(part.func.id, ()):
                        statement.changes |= set(root(argument))


def _changed(node: ast.AST) -> Iterator[str]:
    """The names whose objects a node changes."""
    match node:
        case ast.Expr(value=ast.Call(func=called, args=[first, *_])) if _in_place(called):
            yield from root(first)
            yield from root(called)
        case ast.AugAssign(target=ast.Name() as target):
            yield target.id
        case (
            ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del())
        ):
            yield from root(node)
        case ast.Expr(value=ast.Call(func=ast.Attribute() as called)):
            yield from root(called)


def _in_place(called: ast.expr) -> bool:
    """True for `random.shuffle`, `setattr`, `nn.init.zeros_`: they change their first argument."""
    name = getattr(called, "attr", getattr(called, "id", ""))
    return name in ("shuffle", "setattr", "heapify", "heappush") or bool(re.search(r"\w_$", name))


def root(node: ast.AST) -> Iterator[str]:
    """`x` of `x.a[0].b`; nothing if it does not begin with a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
