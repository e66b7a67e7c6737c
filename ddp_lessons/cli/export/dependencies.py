"""Which statements of a notebook a function needs, as things stood at one place in it.

Runs in the command `ddp-lessons export`. A name means its last binding before that place, together
with all that changed its object since; what cannot be carried over into a script is refused.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence

from ddp_lessons.cli.export import cells
from ddp_lessons.cli.export.cells import CannotExport, Cell, Import, Position, Statement
from ddp_lessons.cli.export.launch_call import LaunchCall, launch_names

_OF_MODULES = {"__name__", "__doc__", "__builtins__", "__spec__", "__loader__", "__package__"}
_OF_NOTEBOOKS = {"display", "get_ipython", "In", "Out", "_", "__", "___"}
_NOTEBOOK_MODULES = ("IPython", "ipywidgets", "ddp_lessons.widgets", "ddp_lessons.exercises")

User = tuple[str, Statement] | None  # a name that needs another, and where; None for the script


class Dependencies:
    """Gathers the statements and imports that names need, name by name.

    Parameters
    ----------
    notebook, statements : its cells, and all their statements
    call : the call of the function; the state of the notebook at that place counts

    Attributes
    ----------
    found : the statements that the script needs, by position
    imports : the imported names that it needs, each with the import statement
    names : all names that were asked for
    """

    def __init__(
        self, notebook: Sequence[Cell], statements: Sequence[Statement], call: LaunchCall
    ) -> None:
        self.notebook, self.statements, self.call = notebook, statements, call
        self.found: dict[Position, Statement] = {}
        self.imports: dict[ast.alias, Import] = {}
        self.names: set[str] = set()
        self._launches = launch_names(statements)
        self._done: set[tuple[str, Position, Position]] = set()

    def require(self, name: str) -> None:
        """Take in all that `name` means at the call.

        Raises
        ------
        CannotExport
            If the name has no meaning outside the notebook, or none that is certain.
        """
        self._require(name, self.call.position, self.call.position, None)

    def require_future(self) -> None:
        """Take in `from __future__ import ...`, which changes what the code of all cells means."""
        for statement in self.statements:
            node = statement.node
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                self.imports.update(dict.fromkeys(node.names, node))

    def _require(self, name: str, before: Position, called: Position, user: User) -> None:
        """Take in what `name` means before one place, for functions called at another."""
        if (name, before, called) in self._done:
            return
        self._done.add((name, before, called))
        self.names.add(name)
        history = self._history(name, before)
        self._check_certain(name, history, before, user)
        if not history:
            self._check_builtin(name, before, user)
        for statement in history:
            if isinstance(statement.node, Import):
                self._take_import(statement.node, name, user)
            else:
                self._take(statement, name, called, user)

    def _history(self, name: str, before: Position) -> list[Statement]:
        """The statements that bound `name` last, and those that changed it since, in order."""
        found: list[Statement] = []
        for statement in reversed(self.statements):
            if statement.position >= before or name not in statement.binds | statement.changes:
                continue
            if isinstance(statement.node, ast.Delete) and name in statement.binds:
                break
            found.append(statement)
            if statement.replaces(name):
                break
        while found and name not in found[-1].binds:
            found.pop()  # changes an object that the name no longer means
        if found and isinstance(found[-1].node, Import):
            # What a cell changes in a module does not reach the ranks: they import it anew.
            found = [statement for statement in found if name in statement.binds]
        return found[::-1]

    def _take(self, statement: Statement, name: str, called: Position, user: User) -> None:
        """Take in a statement, what it needs when it runs, and what its functions need later."""
        if why := self._unfit(statement, name):
            raise _cannot(name, user, why)
        self.found[statement.position] = statement
        here, user = statement.position, (name, statement)
        for used in sorted(statement.at_once):
            if used in statement.binds and not self._history(used, here):
                continue  # as in `with open(path) as file: text = file.read()`
            self._require(used, here, called, user)
            if _may_call(statement.node):
                self._require(used, here, here, user)
        for used in sorted(statement.later):
            # A function called before the launch may not come to a name that is bound later.
            if called == self.call.position or self._history(used, called):
                self._require(used, called, called, user)

    def _unfit(self, statement: Statement, name: str) -> str | None:
        """Why a statement has no place in a script; None if it has one."""
        if isinstance(statement.node, cells.LOOPS):
            did = "bound" if name in statement.binds else "changed"
            advice = f"Write it without that loop, or make {name!r} an argument."
            return f"is {did} in a loop ({statement}). {advice}"
        if "get_ipython" in statement.at_once:
            return f"a magic makes ({statement}). A script has no magics: write it in Python."
        called = [part.func for part in ast.walk(statement.node) if isinstance(part, ast.Call)]
        if not self._launches & set(map(ast.unparse, called)):
            return None
        if isinstance(statement.node, cells.DEFINITIONS):
            return (
                f"calls launch() ({statement}): it starts ranks, and torchrun does that for a "
                "script. Export the function that it launches."
            )
        return (
            f"comes from launch() ({statement}): a script has no notebook run. "
            f"Make {name!r} an argument of the function, or save it to a file that it reads."
        )

    def _take_import(self, node: Import, name: str, user: User) -> None:
        for alias in node.names:
            if cells.bound_by(alias) == name:
                origins = (f"{alias.name}.", f"{cells.full_name(node, alias)}.")
                for module in _NOTEBOOK_MODULES:
                    if any(origin.startswith(f"{module}.") for origin in origins):
                        why = f"comes from {module}: that works in a notebook only."
                        raise _cannot(name, user, why)
                self.imports[alias] = node

    def _check_certain(
        self, name: str, history: list[Statement], before: Position, user: User
    ) -> None:
        """Refuse a name that something out of sight may have bound or changed."""
        if before == self.call.position and name in self._bound_around(arguments=not user):
            advice = "Bind it in a cell above." if user else "Give the arguments with --args."
            why = "the loop, comprehension or `with` around launch(...) binds"
            raise _cannot(name, user, f"{why} ({self.call.statement}). {advice}")
        since = history[0].position if history else (0, 0)
        setters = self._setters(name) if history else set()
        for statement in self.statements:
            if not since < statement.position < before:
                continue
            if isinstance(statement.node, ast.ImportFrom) and statement.node.names[0].name == "*":
                why = f"may come from `{statement.text.strip()}` ({statement})."
                raise _cannot(name, user, f"{why} Import what is needed by name.")
            called = {ast.unparse(call.func) for call in cells.calls(statement.node)}
            if setter := min(called & setters, default=""):
                why = f"{setter}() binds as `global` when it is called ({statement})."
                raise _cannot(name, user, f"{why} Return the value and assign it instead.")

    def _bound_around(self, arguments: bool) -> set[str]:
        """The names that the statement around launch(...) binds for the function, or arguments."""
        around = self.call.statement
        if around and isinstance(around.node, cells.COMPOUND):
            return around.binds | around.changes
        if not around or not arguments:
            return set()
        loops = [part for part in ast.walk(around.node) if isinstance(part, ast.comprehension)]
        targets = [part for loop in loops for part in ast.walk(loop.target)]
        return {part.id for part in targets if isinstance(part, ast.Name)}

    def _setters(self, name: str) -> set[str]:
        """The functions that bind `name` as global, or use one that does."""
        setters = {b for s in self.statements if name in s.declares for b in s.binds}
        while more := {b for s in self.statements if s.later & setters for b in s.binds} - setters:
            setters |= more
        return setters

    def _check_builtin(self, name: str, before: Position, user: User) -> None:
        """Let Python's own names pass; refuse others with what is known of them."""
        if name in _OF_NOTEBOOKS:
            raise _cannot(name, user, "only a notebook has. Take it out, or print() instead.")
        if not hasattr(builtins, name) and name not in _OF_MODULES:
            raise _cannot(name, user, f"is not defined {self._known_of(name, before)}")

    def _known_of(self, name: str, before: Position) -> str:
        """What the notebook says of a name that has no value before a place."""
        bound = [statement for statement in self.statements if name in statement.binds]
        if deleted := [statement for statement in bound if statement.position < before]:
            return f"any more: {deleted[-1]} deletes it."
        if bound:
            return f"until {bound[0]}. Move that up."
        if declared := [statement for statement in self.statements if name in statement.declares]:
            return f"but by `global` in a function ({declared[0]}). Assign it in a cell."
        for cell in self.notebook:
            if cell.nodes is None and re.search(rf"\b{name}\b", cell.source):
                number = cell.number
                return f"in any cell that parses; it may be in code cell {number}, which does not."
        return "anywhere in the notebook."


def _cannot(name: str, user: User, why: str) -> CannotExport:
    """An error that says who needs a name, and where, and why no script can have it."""
    if not user:
        return CannotExport(f"The script needs {name!r}, which {why}")
    needs, statement = user
    place = f"code cell {statement.cell.number}, line {statement.line_of(name)}"
    return CannotExport(f"{needs!r} needs {name!r} ({place}), which {why}")


def _may_call(node: ast.stmt) -> bool:
    """True if functions may be called when the statement runs."""
    if isinstance(node, cells.FUNCTIONS) and not node.decorator_list:
        return any(cells.calls(node))
    return True
