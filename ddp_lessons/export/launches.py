"""The `launch(...)` of a notebook that shows how a function is called. For `export.py`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddp_lessons.export.cells import CannotExport, Statement, names_in, runs_at_once
from ddp_lessons.export.needs import Position

_PARAMETERS = ("fn", "args", "nprocs")
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Call:
    """How the function is called: the source of its arguments after rank, and on how many ranks.

    `position` is the place of the notebook whose state counts, `statement` the launch there.
    """

    position: Position
    statement: Statement | None = None
    arguments: list[str] = field(default_factory=list)
    known: bool = True  # whether the notebook, or the user, says what the arguments are
    nprocs: int = 2
    nnodes: int = 1
    env: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The names that the arguments need."""
        return names_in(", ".join(self.arguments))


def find_call(
    function: str, definition: Statement, statements: Sequence[Statement], args: str | None
) -> Call:
    """The first launch of the function after its definition, with `args` in place of its own."""
    after = [statement for statement in statements if statement.position > definition.position]
    found = ((s, node) for s in after for node in _launches(function, s, statements))
    statement, node = next(found, (None, None))
    if statement is None or node is None:
        call = Call((definition.cell.number + 1, 0), known=False)
    else:
        call = _read(statement, node, statements)
    if args is not None:
        call.arguments, call.known = _given(args), True
    elif statement and node:
        _not_of_a_comprehension(call, statement, node)
    return call


def environment(statements: Sequence[Statement], position: Position) -> dict[str, str]:
    """What the cells before the place put into os.environ: the ranks of a launch see it."""
    found: dict[str, str] = {}
    for statement in statements:
        match statement.node:
            case ast.Assign(
                targets=[
                    ast.Subscript(
                        value=ast.Attribute(attr="environ"), slice=ast.Constant(value=key)
                    )
                ],
                value=ast.Constant(value=value),
            ) if statement.position < position:
                found[str(key)] = str(value)
    return found


def check_arguments(definition: Statement, call: Call) -> None:
    """Refuse arguments with which the function cannot be called."""
    node = definition.node
    assert isinstance(node, ast.FunctionDef)
    if node.decorator_list or any(argument.startswith("*") for argument in call.arguments):
        return  # what it takes, or gets, is not written there
    given = ast.parse(f"_(0, {', '.join(call.arguments)}\n)", mode="eval").body
    assert isinstance(given, ast.Call)
    try:
        _signature(node).bind(*given.args, **{k.arg: k.value for k in given.keywords if k.arg})
    except TypeError as error:
        raise CannotExport(_ill_called(node, call, str(error))) from error


def _ill_called(node: ast.FunctionDef, call: Call, error: str) -> str:
    takes = f"{node.name}({', '.join(_signature(node).parameters)})"
    if not (node.args.args or node.args.posonlyargs or node.args.vararg):
        return f"{takes} takes no argument: the first one must be the rank."
    if call.known:
        return f"{takes} cannot be called with rank and {call.arguments}: {error}."
    return (
        f"{takes} needs more than the rank, and no launch({node.name}, ...) in a cell says what. "
        f'Give it: --args "..." with what follows the rank.'
    )


def _signature(node: ast.FunctionDef) -> inspect.Signature:
    kinds, empty, a = inspect.Parameter, inspect.Parameter.empty, node.args
    positional = [*a.posonlyargs, *a.args]
    bare = len(positional) - len(a.defaults)
    made = [
        kinds(
            one.arg,
            kinds.POSITIONAL_ONLY if one in a.posonlyargs else kinds.POSITIONAL_OR_KEYWORD,
            default=empty if index < bare else None,
        )
        for index, one in enumerate(positional)
    ]
    made += [kinds(a.vararg.arg, kinds.VAR_POSITIONAL)] if a.vararg else []
    made += [
        kinds(one.arg, kinds.KEYWORD_ONLY, default=None if default else empty)
        for one, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    made += [kinds(a.kwarg.arg, kinds.VAR_KEYWORD)] if a.kwarg else []
    return inspect.Signature(made)


def _launches(
    function: str, statement: Statement, statements: Sequence[Statement]
) -> Iterator[ast.Call]:
    """The calls launch(function, ...) that happen when the statement runs."""
    for node in runs_at_once(statement.node):
        if isinstance(node, ast.Call) and _is_launch(node.func, statements):
            target = _given_to_launch(node).get("fn")
            if isinstance(target, ast.Name) and target.id == function:
                yield node


def _is_launch(called: ast.expr, statements: Sequence[Statement]) -> bool:
    if isinstance(called, ast.Attribute):
        return called.attr == "launch" and isinstance(called.value, ast.Name)
    return isinstance(called, ast.Name) and any(
        alias.name == "launch" and (alias.asname or alias.name) == called.id
        for statement in statements
        if isinstance(statement.node, ast.ImportFrom)
        and (statement.node.module or "").startswith("ddp_lessons")
        for alias in statement.node.names
    )


def _given_to_launch(node: ast.Call) -> dict[str | None, ast.expr]:
    """What launch() gets, by the names of its parameters; None stands for `**`."""
    given: dict[str | None, ast.expr] = {}
    for name, argument in zip(_PARAMETERS, node.args, strict=False):
        if isinstance(argument, ast.Starred):
            given[None] = argument
            break
        given[name] = argument
    return given | {keyword.arg: keyword.value for keyword in node.keywords}


def _read(statement: Statement, node: ast.Call, statements: Sequence[Statement]) -> Call:
    given = _given_to_launch(node)
    call = Call(statement.position, statement)
    call.known = "args" in given or None not in given
    call.arguments = _arguments(given.get("args"), statement)
    call.nprocs = _whole(given.get("nprocs"), statement, statements, call.nprocs)
    call.nnodes = _whole(given.get("nnodes"), statement, statements, call.nnodes)
    env = _literal(given.get("env"), statement, statements)
    call.env = {str(k): str(v) for k, v in env.items()} if isinstance(env, dict) else {}
    return call


def _arguments(node: ast.expr | None, statement: Statement) -> list[str]:
    """The source of each argument."""
    if node is None:
        return []
    if not isinstance(node, (ast.Tuple, ast.List)):
        return [f"*{_source(node, statement)}"]
    return [_source(element, statement) for element in node.elts]


def _source(node: ast.expr, statement: Statement) -> str:
    """Its text; `path := new()` gives a name that only the notebook needs."""
    if isinstance(node, ast.NamedExpr):
        node = node.value
    text = ast.get_source_segment(statement.cell.source, node) or ""
    first, *rest = text.split("\n")
    if not rest:
        return first
    line = statement.cell.lines[node.lineno - 1]
    shift = 8 - (len(line) - len(line.lstrip()))
    return "\n".join([first, *(_moved(one, shift) for one in rest)])


def _moved(line: str, shift: int) -> str:
    bare = line.lstrip()
    return " " * max(0, len(line) - len(bare) + shift) + bare


def _literal(node: ast.expr | None, statement: Statement, statements: Sequence[Statement]) -> Any:
    """The value of a literal, or of a name that a cell gave one; None if it is neither."""
    if isinstance(node, ast.Name):
        bound = [s for s in statements if s.position < statement.position and node.id in s.binds]
        last = bound[-1].node if bound else None
        single = isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name)
        node = last.value if isinstance(last, ast.Assign) and single else None
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None


def _whole(
    node: ast.expr | None, statement: Statement, statements: Sequence[Statement], default: int
) -> int:
    value = _literal(node, statement, statements)
    return value if isinstance(value, int) and value > 0 else default


def _given(args: str) -> list[str]:
    """The arguments that the user gave, one by one."""
    text = f"_({args}\n)"
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise CannotExport(f"--args {args!r} are no arguments: {error.msg}.") from error
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise CannotExport(f"--args {args!r} are no arguments of a call.")
    found = [_double_quoted(ast.get_source_segment(text, one) or "") for one in node.args]
    for keyword in node.keywords:
        value = _double_quoted(ast.get_source_segment(text, keyword.value) or "")
        found.append(f"{keyword.arg}={value}" if keyword.arg else f"**{value}")
    return found


def _double_quoted(text: str) -> str:
    """A shell's quotes leave only single ones to the user; a script has double ones."""
    simple = re.compile(r"""(?<![\w'"\\])'([^'"\\\n]*)'(?!')""")
    return text if '"' in text else simple.sub(r'"\1"', text)


def _not_of_a_comprehension(call: Call, statement: Statement, node: ast.Call) -> None:
    """Refuse arguments that a comprehension around the launch takes from its loop."""
    for outer in runs_at_once(statement.node):
        if isinstance(outer, _COMPREHENSIONS) and node in set(ast.walk(outer)):
            targets = {
                part.id
                for generator in outer.generators
                for part in ast.walk(generator.target)
                if isinstance(part, ast.Name)
            }
            if names := sorted(targets & call.names):
                raise CannotExport(
                    f"The arguments need {names[0]!r}, which the comprehension around launch(...) "
                    f"binds ({statement}). Give the arguments with --args."
                )
