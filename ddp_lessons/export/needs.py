"""Which statements of a notebook a function needs, as things stood at one place in it.

Runs in the command `ddp-lessons export`. A name means its last binding before that place, together
with all that changed its object since; what cannot be carried over into a script is refused.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddp_lessons.export.cells import (
    COMPOUND,
    FUNCTIONS,
    LOOPS,
    CannotExport,
    Cell,
    Statement,
    bound_by,
    runs_at_once,
)

Position = tuple[int, int]  # number of the cell, index of the statement in it
IMPORTS = (ast.Import, ast.ImportFrom)
_OF_MODULES = {"__name__", "__doc__", "__builtins__", "__spec__", "__loader__", "__package__"}
_OF_NOTEBOOKS = {"display", "get_ipython", "In", "Out", "_", "__", "___"}
_NOTEBOOK_MODULES = ("IPython", "ipywidgets", "ddp_lessons.widgets", "ddp_lessons.exercises")


@dataclass(frozen=True)
class Use:
    """Who asks for a name: the names, and their statements, from the function itself on down."""

    chain: tuple[tuple[str, Statement], ...] = ()

    def by(self, name: str, statement: Statement) -> Use:
        """What `statement`, which was asked for as `name`, asks for."""
        return Use((*self.chain, (name, statement)))

    def __str__(self) -> str:
        return repr(self.chain[-1][0]) if self.chain else "The call"

    def place(self, name: str) -> str:
        """Where the name is asked for."""
        if not self.chain:
            return "in its arguments"
        statement = self.chain[-1][1]
        return f"code cell {statement.cell.number}, line {statement.line_of(name)}"


@dataclass
class Needs:
    """Gathers statements and imports, name by name.

    Parameters
    ----------
    cells, statements : of the whole notebook
    moment : the place whose state counts
    around : the statement there that holds the launch(...), if there is one
    """

    cells: Sequence[Cell]
    statements: Sequence[Statement]
    moment: Position
    around: Statement | None = None
    found: dict[Position, Statement] = field(default_factory=dict)
    imports: list[tuple[Statement, ast.alias]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    _seen: set[tuple[str, Position, Position]] = field(default_factory=set)

    def require(
        self,
        name: str,
        before: Position | None = None,
        at: Position | None = None,
        use: Use | None = None,
    ) -> None:
        """Take in all that `name` means.

        Parameters
        ----------
        before : the place before which bindings count; the moment by default
        at : when the functions that it leads to are called; the moment by default
        use : who asks, for the message if the name cannot be had

        Raises
        ------
        CannotExport
            If the name has no meaning outside the notebook, or none that is certain.
        """
        before, at, use = before or self.moment, at or self.moment, use or Use()
        if (name, before, at) in self._seen:
            return
        self._seen.add((name, before, at))
        self.names.add(name)
        history = self.history(name, before)
        self._certain(name, history, before, use)
        if not history:
            self._unbound(name, before, use)
        for statement in history:
            self._take(statement, name, at, use)

    def history(self, name: str, before: Position) -> list[Statement]:
        """The statements that bound `name` last, and those that changed it since, in order."""
        found: list[Statement] = []
        for statement in reversed(self.statements):
            if statement.position >= before or name not in statement.binds | statement.changes:
                continue
            if isinstance(statement.node, ast.Delete) and name in statement.binds:
                break
            found.append(statement)
            if statement.surely_binds(name) and not _only_adds_a_submodule(statement, name):
                break
        while found and name not in found[-1].binds:
            found.pop()  # changes of what is not bound any more, or not yet
        if found and isinstance(found[-1].node, IMPORTS):
            # What a cell changes in a module does not reach the ranks: they import it anew.
            found = [statement for statement in found if name in statement.binds]
        return found[::-1]

    def _take(self, statement: Statement, name: str, at: Position, use: Use) -> None:
        if isinstance(statement.node, IMPORTS):
            if name in statement.binds:
                self._take_import(statement.node, statement, name, use)
            return
        if isinstance(statement.node, LOOPS):
            did = "bound" if name in statement.binds else "changed"
            raise CannotExport(
                f"{use} needs {name!r} ({use.place(name)}), which is {did} in a loop "
                f"({statement}). Write it without that loop, or make {name!r} an argument."
            )
        if "get_ipython" in statement.at_once:
            raise CannotExport(
                f"{use} needs {name!r} ({use.place(name)}), which a magic makes ({statement}). "
                "A script has no magics: write it in Python."
            )
        self.found[statement.position] = statement
        self._take_names(statement, at, use.by(name, statement))

    def _take_names(self, statement: Statement, at: Position, use: Use) -> None:
        """Require what the statement needs when it runs, and what its functions need later."""
        here = statement.position
        for name in sorted(statement.at_once):
            if name in statement.binds and not self.history(name, here):
                continue  # as in `with open(path) as file: text = file.read()`
            self.require(name, here, at, use)
            if _calls(statement):
                self.require(name, here, here, use)
        for name in sorted(statement.later):
            # A function called before the moment may not have come to a name that is bound later.
            if at == self.moment or self.history(name, at):
                self.require(name, at, at, use)

    def _take_import(
        self, node: ast.Import | ast.ImportFrom, statement: Statement, name: str, use: Use
    ) -> None:
        for alias in node.names:
            if bound_by(alias) != name:
                continue
            module = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
            self._no_notebook_module(module, alias.name, name, use)
            if (statement, alias) not in self.imports:
                self.imports.append((statement, alias))

    def _no_notebook_module(self, module: str, imported: str, name: str, use: Use) -> None:
        full = f"{module}.{imported}"
        if full in ("ddp_lessons.launch", "ddp_lessons.launcher.launch"):
            _refuse_launch(use)
        if full == "ddp_lessons.ddp_lessons" and use.chain:
            nodes = ast.walk(use.chain[-1][1].node)
            if any(isinstance(n, ast.Attribute) and n.attr == "launch" for n in nodes):
                _refuse_launch(use)
        for of_notebooks in _NOTEBOOK_MODULES:
            if f"{full}.".startswith(f"{of_notebooks}."):
                raise CannotExport(
                    f"{use} needs {name!r} ({use.place(name)}), which comes from {of_notebooks}: "
                    "that works in a notebook only."
                )

    def _certain(self, name: str, history: list[Statement], before: Position, use: Use) -> None:
        """Refuse a name that something out of sight may have bound or changed."""
        around = self._compound_around(before)
        if around and name in around.binds | around.changes:
            advice = "Bind it in a cell above." if use.chain else "Give the arguments with --args."
            raise CannotExport(
                f"{use} needs {name!r} ({use.place(name)}), which is bound by the statement "
                f"around launch(...) itself ({around}). {advice}"
            )
        since = history[0].position if history else (0, 0)
        for statement in self.statements:
            if not since < statement.position < before:
                continue
            if isinstance(statement.node, ast.ImportFrom) and statement.node.names[0].name == "*":
                raise CannotExport(
                    f"{name!r}, which {use} needs ({use.place(name)}), may come from "
                    f"`{statement.text.strip()}` ({statement}). Import what is needed by name."
                )
            if history and (setter := self._setter(name, statement)):
                raise CannotExport(
                    f"{use} needs {name!r} ({use.place(name)}), which {setter}() binds as `global` "
                    f"when it is called ({statement}). Return the value and assign it instead."
                )

    def _compound_around(self, before: Position) -> Statement | None:
        """The `for`, `with` or the like in which the launch stands, if `before` is its place."""
        around = self.around
        if around and before == around.position and isinstance(around.node, COMPOUND):
            return around
        return None

    def _setter(self, name: str, statement: Statement) -> str | None:
        """A function that binds `name` as global and is called by the statement."""
        setters = {b for s in self.statements if name in s.declares for b in s.binds}
        while more := {b for s in self.statements if s.later & setters for b in s.binds} - setters:
            setters |= more
        called = {
            part.func.id
            for part in runs_at_once(statement.node)
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
        }
        return min(called & setters, default=None)

    def _unbound(self, name: str, before: Position, use: Use) -> None:
        """Let Python's own names pass; refuse others with what is known of them."""
        if name in _OF_NOTEBOOKS:
            raise CannotExport(
                f"{use} uses {name!r} ({use.place(name)}), which only a notebook has. "
                "Take it out, or print() instead."
            )
        if hasattr(builtins, name) or name in _OF_MODULES:
            return
        said = f"{use} needs {name!r} ({use.place(name)}), which is not defined"
        raise CannotExport(f"{said} {self._known_of(name, before)}")

    def _known_of(self, name: str, before: Position) -> str:
        bound = [s for s in self.statements if name in s.binds]
        if deleted := [s for s in bound if s.position < before]:
            return f"any more: {deleted[-1]} deletes it."
        if bound:
            return f"until {bound[0]}. Move that up."
        if setters := [s for s in self.statements if name in s.declares]:
            return f"but by `global` in a function ({setters[0]}). Assign it in a cell."
        broken = [c for c in self.cells if c.tree is None and re.search(rf"\b{name}\b", c.source)]
        if broken:
            number = broken[0].number
            return f"in any cell that parses; it may be in code cell {number}, which does not."
        return "anywhere in the notebook."


def _only_adds_a_submodule(statement: Statement, name: str) -> bool:
    """True for `import torch.utils.data`: what `import torch` gave is still there."""
    if not isinstance(statement.node, ast.Import):
        return False
    aliases = [alias for alias in statement.node.names if bound_by(alias) == name]
    return all("." in alias.name and not alias.asname for alias in aliases)


def _calls(statement: Statement) -> bool:
    """True if functions may be called when the statement runs."""
    if not isinstance(statement.node, FUNCTIONS):
        return True
    parts = runs_at_once(statement.node)
    return bool(statement.node.decorator_list) or any(isinstance(p, ast.Call) for p in parts)


def _refuse_launch(use: Use) -> None:
    variables = [
        (name, statement)
        for name, statement in use.chain
        if not isinstance(statement.node, (*FUNCTIONS, ast.ClassDef))
    ]
    if variables:
        name, statement = variables[0]
        raise CannotExport(
            f"{name!r} comes from launch() ({statement}): a script has no notebook run. "
            f"Make {name!r} an argument of the function, or save it to a file that it reads."
        )
    if not use.chain:
        raise CannotExport("The arguments come from launch(): a script has no notebook run.")
    name, statement = use.chain[-1]
    raise CannotExport(
        f"{name!r} calls launch() ({statement}): it starts ranks, and torchrun does that for a "
        "script. Export the function that it launches."
    )
