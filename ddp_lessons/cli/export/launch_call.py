"""The function, and how a script calls it: as the notebook launches it, or as the user says."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ddp_lessons.cli.export.notebook import CannotExport, Notebook, Statement, calls, run_by_call

_PARAMETERS = ("fn", "args", "nprocs")  # of launch, those that may be given by position


@dataclass
class LaunchCall:
    """How a function is called: its arguments after rank, and on how many ranks.

    Attributes
    ----------
    function : its last definition
    index : the statements before this one have run
    statement : the launch, if there is one
    arguments : the source of each argument after rank
    hidden : `*rest` or `**options`, in which the launch may pass arguments
    env : the environment variables that the notebook, or the launch, gives to the ranks
    """

    function: ast.FunctionDef
    index: int
    statement: Statement | None = None
    arguments: list[str] = field(default_factory=list)
    nprocs: int = 2
    nnodes: int = 1
    hidden: str = ""
    env: dict[str, str] = field(default_factory=dict)


def find_call(notebook: Notebook, name: str, args: str | None) -> LaunchCall:
    """The first launch of a function after its last definition, with `args` in place of its own.

    Raises
    ------
    CannotExport
        If no cell defines the function, or it cannot be called with these arguments.
    """
    definition, function = _definition(notebook, name)
    cell = [s.index for s in notebook.statements if s.cell is definition.cell]
    launches = _launches(notebook, function, after=definition.index)
    call = next(launches, LaunchCall(function, index=cell[-1] + 1))
    if args is not None:
        call.arguments = _given(args)
    elif call.hidden:
        raise CannotExport(
            f"launch({name}, {call.hidden}) ({call.statement}) does not show what follows the "
            'rank. Give it with --args "...".'
        )
    call.env = _environment(notebook.statements[: call.index]) | call.env
    _check_arguments(call, "--args" if args is not None else call.statement)
    return call


def _definition(notebook: Notebook, name: str) -> tuple[Statement, ast.FunctionDef]:
    """The last definition of a function; it must be one that ranks can run."""
    bound = notebook.binding(name)
    if not bound:
        nodes = [statement.node for statement in notebook.statements]
        defined = dict.fromkeys(node.name for node in nodes if isinstance(node, ast.FunctionDef))
        words = [f"There is no function {name!r} at the top level of a cell{notebook.hint(name)}."]
        words += [f"Did you mean {n!r}?" for n in difflib.get_close_matches(name, defined, 1)]
        raise CannotExport(" ".join([*words, f"There are: {', '.join(defined) or 'none'}."]))
    node = bound[-1].node
    first_line = ast.unparse(node).partition("\n")[0]
    if not isinstance(node, ast.FunctionDef):
        why = f"is not defined by a plain `def`, but by `{first_line}`"
    elif any(isinstance(part, ast.Yield | ast.YieldFrom) for part in run_by_call(node)):
        why = "is a generator: calling it runs nothing of it"
    elif all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in node.body):
        why = "has no body yet, in its last definition"
    else:
        return bound[-1], node
    raise CannotExport(f"{name!r} {why} ({bound[-1]}). Export a function that a cell defines.")


def _launches(notebook: Notebook, function: ast.FunctionDef, after: int) -> Iterator[LaunchCall]:
    """Each launch(function, ...) that is made when a statement runs."""
    for statement in notebook.statements[after + 1 :]:
        for call in calls(statement.node):
            positional = itertools.takewhile(lambda a: not isinstance(a, ast.Starred), call.args)
            passed = dict(zip(_PARAMETERS, positional, strict=False))
            passed |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            of_function = "fn" in passed and ast.unparse(passed["fn"]) == function.name
            if of_function and notebook.is_launch(call):
                found = LaunchCall(function, statement.index, statement, hidden=_hidden(call))
                yield _read(notebook, found, passed)


def _hidden(launch: ast.Call) -> str:
    """`*rest` or `**options` in a call of launch, if it may hold the arguments."""
    rest = [ast.unparse(argument) for argument in launch.args if isinstance(argument, ast.Starred)]
    named = {keyword.arg for keyword in launch.keywords}
    if len(launch.args) < 2 and "args" not in named:
        rest += [f"**{ast.unparse(k.value)}" for k in launch.keywords if k.arg is None]
    return next(iter(rest), "")


def _read(notebook: Notebook, call: LaunchCall, passed: dict[str, ast.expr]) -> LaunchCall:
    """Note what launch is given."""
    assert call.statement
    source, args = call.statement.cell.source, passed.get("args")
    if isinstance(args, (ast.Tuple, ast.List)):
        call.arguments = [_source(argument, source) for argument in args.elts]
    elif args:
        call.arguments = [f"*{_source(args, source)}"]
    for name, kind in (("nprocs", int), ("nnodes", int), ("env", dict)):
        value = _literal(passed.get(name), notebook, call.index)
        if value and isinstance(value, kind):
            setattr(call, name, value)
    return call


def _source(node: ast.AST, text: str) -> str:
    """An argument as it is written, or on one line if it is written on several."""
    if isinstance(node, ast.NamedExpr):  # `path := new()` gives a name that the notebook needs
        node = node.value
    written = ast.get_source_segment(text, node) or ""
    return ast.unparse(node) if "\n" in written else written


def _literal(node: ast.expr | None, notebook: Notebook, before: int) -> Any:
    """The value of a literal, or of a name that a cell gave one; None if it is neither."""
    if isinstance(node, ast.Name):
        match notebook.history(node.id, before):
            case [Statement(node=ast.Assign(targets=[ast.Name()], value=value))]:
                node = value
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None


def _environment(before: list[Statement]) -> dict[str, str]:
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
        match ast.parse(text, mode="eval").body:
            case ast.Call(func=ast.Name(), args=positional, keywords=keywords):
                return [_source(argument, text) for argument in (*positional, *keywords)]
    except SyntaxError as error:
        raise CannotExport(f"--args {args!r} are no arguments: {error.msg}.") from error
    raise CannotExport(f"--args {args!r} are no arguments of a call.")


def _check_arguments(call: LaunchCall, origin: object) -> None:
    """Refuse arguments with which the function cannot be called."""
    function = call.function
    if function.decorator_list or any(argument.startswith("*") for argument in call.arguments):
        return  # what it takes, or gets, is not written there
    takes = f"{function.name}({ast.unparse(function.args)})"
    if not (function.args.posonlyargs or function.args.args or function.args.vararg):
        raise CannotExport(f"{takes} takes no argument: the first one must be the rank.")
    called = ", ".join(["rank", *call.arguments])
    given = ast.parse(f"_({called}\n)", mode="eval").body
    assert isinstance(given, ast.Call)
    try:
        keywords = {keyword.arg: None for keyword in given.keywords if keyword.arg}
        _signature(function.args).bind(*given.args, **keywords)
    except TypeError as error:
        raise CannotExport(
            f"{takes} cannot be called as {function.name}({called}) "
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
