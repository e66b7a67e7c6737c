"""Which statements of a notebook a function needs, as things stood when it was launched.

A name means its last binding before that place, together with all that changed its object since.
What cannot be carried over into a script is refused.
"""

from __future__ import annotations

import ast
import builtins
import re

from ddp_lessons.cli.export.launch_call import LaunchCall
from ddp_lessons.cli.export.notebook import (
    BRANCHES,
    LOOPS,
    CannotExport,
    Names,
    Notebook,
    Statement,
    calls,
)

_OF_MODULES = {"__name__", "__doc__", "__builtins__", "__spec__", "__loader__", "__package__"}
_OF_NOTEBOOKS = {"display", "get_ipython", "In", "Out", "_", "__", "___"}
_NOTEBOOK_MODULES = r"\b(IPython|ipywidgets|ddp_lessons\.(widgets|exercises))\b"

User = tuple[str, Statement] | None  # a name that needs another, and where; None for the script


class Dependencies:
    """Gathers the statements that a call of a function needs, name by name.

    Attributes
    ----------
    names : all names that are needed

    Raises
    ------
    CannotExport
        If a name has no meaning outside the notebook, or none that is certain.
    """

    def __init__(self, notebook: Notebook, call: LaunchCall) -> None:
        self.notebook, self.call = notebook, call
        self.names: set[str] = set()
        self._found: set[Statement] = set()
        self._done: set[tuple[str, int, int]] = set()
        function = call.function.name
        given = Names(ast.parse(f"{function}({', '.join(call.arguments)}\n)").body[0])
        for name in [function, *sorted(given.at_once | given.later)]:
            self._require(name, call.index, call.index, None)
        # They change what the code of all cells means.
        self._found.update(s for s in notebook.statements if s.imports.startswith("__future__."))

    @property
    def statements(self) -> list[Statement]:
        """The statements that the script needs, imports among them, in the notebook's order."""
        return sorted(self._found, key=lambda statement: statement.index)

    def _require(self, name: str, before: int, called: int, user: User) -> None:
        """Take in what `name` means before one statement, for functions called at another."""
        if (name, before, called) in self._done:
            return
        self._done.add((name, before, called))
        self.names.add(name)
        history = self.notebook.history(name, before)
        if why := self._uncertain(name, history, before, user):
            raise _cannot(name, user, why)
        if not history and (why := self._undefined(name, before)):
            raise _cannot(name, user, why)
        for statement in history:
            if why := self._unfit(statement, name):
                raise _cannot(name, user, why)
            self._found.add(statement)
            self._take_names(statement, name, called)

    def _take_names(self, statement: Statement, name: str, called: int) -> None:
        """Take in what a statement needs when it runs, and what its functions need later."""
        here, user = statement.index, (name, statement)
        for used in sorted(statement.at_once):
            if used in statement.binds and not self.notebook.history(used, here):
                continue  # as in `with open(path) as file: text = file.read()`
            for then in (called, here):  # the statement may call it itself
                self._require(used, here, then, user)
        for used in sorted(statement.later):
            # A function called before the launch may not come to a name that is bound later.
            if called == self.call.index or self.notebook.history(used, called):
                self._require(used, called, called, user)

    def _unfit(self, statement: Statement, name: str) -> str | None:
        """Why a statement has no place in a script; None if it has one."""
        if isinstance(statement.node, LOOPS):
            did = "bound" if name in statement.binds else "changed"
            advice = f"Write it without that loop, or make {name!r} an argument."
            return f"is {did} in a loop ({statement}). {advice}"
        origin = f"{statement.imports} {ast.unparse(statement.node)}" if statement.imports else ""
        if module := re.search(_NOTEBOOK_MODULES, origin):
            return f"comes from {module[1]}: that works in a notebook only."
        if any(map(self.notebook.is_launch, ast.walk(statement.node))):
            return (
                f"calls launch() ({statement}): a script has no notebook run, torchrun starts its "
                f"ranks. Export the function that is launched, or make {name!r} an argument."
            )
        return None

    def _uncertain(
        self, name: str, history: list[Statement], before: int, user: User
    ) -> str | None:
        """What out of sight may have bound or changed a name; None if nothing."""
        if before == self.call.index and name in self._bound_around(user):
            advice = "Bind it in a cell above." if user else "Give the arguments with --args."
            why = "the loop, comprehension or `with` around launch(...) binds"
            return f"{why} ({self.call.statement}). {advice}"
        since = history[0].index + 1 if history else 0
        setters = self.notebook.setters(name) if history else set()
        for statement in self.notebook.statements[since:before]:
            if statement.imports.endswith(".*"):
                why = f"may come from `{ast.unparse(statement.node)}` ({statement})."
                return f"{why} Import what is needed by name."
            called = {ast.unparse(call.func) for call in calls(statement.node)}
            if setter := min(called & setters, default=""):
                why = f"{setter}() binds as `global` when it is called ({statement})."
                return f"{why} Return the value and assign it instead."
        return None

    def _bound_around(self, user: User) -> set[str]:
        """The names that the statement around launch(...) binds before it calls launch."""
        around = self.call.statement
        if not around:
            return set()
        is_block = isinstance(around.node, (*BRANCHES, ast.With, ast.AsyncWith))
        bound = around.binds | around.changes if is_block else set()
        if user:
            return bound
        binders = (ast.comprehension, ast.NamedExpr)
        targets = [p.target for p in ast.walk(around.node) if isinstance(p, binders)]
        parts = [part for target in targets for part in ast.walk(target)]
        return bound | {part.id for part in parts if isinstance(part, ast.Name)}

    def _undefined(self, name: str, before: int) -> str | None:
        """What is known of a name that no cell binds before a place; None if Python has it."""
        if name in _OF_NOTEBOOKS:
            return "only a notebook has. Take it, or the magic, out, or print() instead."
        if hasattr(builtins, name) or name in _OF_MODULES:
            return None
        bound = self.notebook.binding(name)
        if deleted := [statement for statement in bound if statement.index < before]:
            return f"is not defined any more: {deleted[-1]} deletes it."
        if bound:
            return f"is not defined until {bound[0]}. Move that up."
        return f"is not defined anywhere at the top level of a cell{self.notebook.hint(name)}."


def _cannot(name: str, user: User, why: str) -> CannotExport:
    """An error that says who needs a name, and where, and why no script can have it."""
    if not user:
        return CannotExport(f"The script needs {name!r}, which {why}")
    needs, statement = user
    place = f"code cell {statement.cell.number}, line {statement.line_of(name)}"
    return CannotExport(f"{needs!r} needs {name!r} ({place}), which {why}")
