"""How a script calls the function: as the `launch(...)` of the notebook does, or as the user says.

Runs in the command `ddp-lessons export`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddp_lessons.cli.export import cells
from ddp_lessons.cli.export.cells import CannotExport, Cell, Import, Position, Statement

_PARAMETERS = ("fn", "args", "nprocs")  # of launch, those that may be given by position
Passed = dict[str | None, ast.expr]  # the arguments of a launch, by the names of its parameters


@dataclass
class LaunchCall:
    """How the function is called: its arguments after rank, and on how many ranks.

    Attributes
    ----------
    position : the place in the notebook
    statement : the launch there, if there is one
    arguments : the source of each argument after rank
    env : the environment variables that the notebook, or the launch, gives to the ranks
    """

    position: Position
    statement: Statement | None = None
    arguments: list[str] = field(default_factory=list)
    nprocs: int = 2
    nnodes: int = 1
    env: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The global names that the arguments need, those of lambdas in them included."""
        call = ast.parse(f"_({', '.join(self.arguments)}\n)").body[0]
        statement = Statement(Cell(0, "", None), call, (0, 0))
        return (statement.at_once | statement.later) - {"_"}


def find_call(
    definition: Statement, node: ast.FunctionDef, statements: Sequence[Statement], args: str | None
) -> LaunchCall:
    """The first launch of the function after its definition, with `args` in place of its own.

    Raises
    ------
    CannotExport
        If the function cannot be called with these arguments.
    """
    names = launch_names(statements)
    after = (statement for statement in statements if statement.position > definition.position)
    launches = ((s, passed) for s in after for passed in _launches_of(node.name, s, names))
    first = next(launches, None)
    no_launch = LaunchCall((definition.cell.number + 1, 0))
    call = _read(*first, statements) if first else no_launch
    if args is not None:
        call.arguments = _given(args)
    before = [statement for statement in statements if statement.position < call.position]
    call.env = _environment(before) | call.env
    _check_arguments(node, call, "--args" if args is not None else call.statement)
    return call


def launch_names(statements: Sequence[Statement]) -> set[str]:
    """What the notebook writes for `launch`: `launch`, `ddp_lessons.launch` and the like."""
    names = set()
    for statement in statements:
        if isinstance(node := statement.node, Import):
            for alias in node.names:
                full = cells.full_name(node, alias)
                if full in ("ddp_lessons.launch", "ddp_lessons.launcher.api.launch"):
                    names.add(cells.bound_by(alias))
                elif full == "ddp_lessons":
                    names.add(f"{cells.bound_by(alias)}.launch")
    return names


def _launches_of(function: str, statement: Statement, names: set[str]) -> Iterator[Passed]:
    """What each launch(function, ...) is given that is made when the statement runs."""
    for call in cells.calls(statement.node):
        if ast.unparse(call.func) in names:
            positional = itertools.takewhile(lambda p: not isinstance(p, ast.Starred), call.args)
            passed: Passed = dict(zip(_PARAMETERS, positional, strict=False))
            passed |= {keyword.arg: keyword.value for keyword in call.keywords}
            if "fn" in passed and ast.unparse(passed["fn"]) == function:
                yield passed


def _read(statement: Statement, passed: Passed, statements: Sequence[Statement]) -> LaunchCall:
    call = LaunchCall(statement.position, statement)
    args = passed.get("args")
    if isinstance(args, (ast.Tuple, ast.List)):
        call.arguments = [_source(argument, statement.cell.source) for argument in args.elts]
    elif args:
        call.arguments = [f"*{_source(args, statement.cell.source)}"]
    before = [other for other in statements if other.position < statement.position]
    for name, kind in (("nprocs", int), ("nnodes", int), ("env", dict)):
        value = _literal(passed.get(name), before)
        if value and isinstance(value, kind):
            setattr(call, name, value)
    return call


def _source(node: ast.AST, text: str) -> str:
    """An argument as it is written, or on one line if it is written on several."""
    if isinstance(node, ast.NamedExpr):  # `path := new()` gives a name that the notebook needs
        node = node.value
    written = ast.get_source_segment(text, node) or ""
    return ast.unparse(node) if "\n" in written else written


def _literal(node: ast.expr | None, before: Sequence[Statement]) -> Any:
    """The value of a literal, or of a name that a cell gave one; None if it is neither."""
    if isinstance(node, ast.Name):
        bound = [statement.node for statement in before if node.id in statement.binds]
        match bound[-1:]:
            case [ast.Assign(targets=[ast.Name()], value=value)]:
                node = value
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None


def _environment(before: Sequence[Statement]) -> dict[str, str]:
    """What the cells before the launch put into os.environ: its ranks see that."""
    env: dict[str, str] = {}
    for statement in before:
        match statement.node:
            case ast.Assign(
                targets=[ast.Subscript(value=variables, slice=ast.Constant(name))],
                value=ast.Constant(value),
            ) if ast.unparse(variables) == "os.environ":
                env[str(name)] = str(value)
    return env


def _given(args: str) -> list[str]:
    """The arguments that the user gave, one by one."""
    text = f"_({args}\n)"
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise CannotExport(f"--args {args!r} are no arguments: {error.msg}.") from error
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise CannotExport(f"--args {args!r} are no arguments of a call.")
    return [_source(argument, text) for argument in (*node.args, *node.keywords)]


def _check_arguments(node: ast.FunctionDef, call: LaunchCall, origin: object) -> None:
    """Refuse arguments with which the function cannot be called."""
    if node.decorator_list or any(argument.startswith("*") for argument in call.arguments):
        return  # what it takes, or gets, is not written there
    called = ", ".join(["rank", *call.arguments])
    given = ast.parse(f"_({called}\n)", mode="eval").body
    assert isinstance(given, ast.Call)
    takes = f"{node.name}({ast.unparse(node.args)})"
    if not (node.args.posonlyargs or node.args.args or node.args.vararg):
        raise CannotExport(f"{takes} takes no argument: the first one must be the rank.")
    try:
        keywords = {keyword.arg: keyword.value for keyword in given.keywords if keyword.arg}
        _signature(node.args).bind(*given.args, **keywords)
    except TypeError as error:
        raise CannotExport(
            f"{takes} cannot be called as {node.name}({called}) "
            f"({origin or 'no cell launches it'}): {error}. "
            'Give what follows the rank with --args "...".'
        ) from error


def _signature(parameters: ast.arguments) -> inspect.Signature:
    """The signature of a function with these parameters, of which nothing is evaluated."""
    bare = copy.deepcopy(parameters)
    for part in ast.walk(bare):
        if isinstance(part, ast.arg):
            part.annotation = None
    bare.defaults = [ast.Constant(None) for _ in bare.defaults]
    bare.kw_defaults = [default and ast.Constant(None) for default in bare.kw_defaults]
    return inspect.signature(eval(f"lambda {ast.unparse(bare)}: None"))
