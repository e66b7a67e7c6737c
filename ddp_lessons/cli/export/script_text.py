"""From a function of a notebook to a script for torchrun, as a person would write it.

Runs in the command `ddp-lessons export`, which prints what `script` returns.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_lessons.cli.export import cells
from ddp_lessons.cli.export.cells import DEFINITIONS, FUNCTIONS, CannotExport, Cell, Statement
from ddp_lessons.cli.export.dependencies import Dependencies
from ddp_lessons.cli.export.launch_call import LaunchCall, find_call
from ddp_lessons.cli.export.rank_dependent import refuse_rank_dependent

LINE_LENGTH = 100
_UNFIT = {
    ast.AsyncFunctionDef: "is an async function: a rank calls its function and does not await it",
    ast.ClassDef: "is a class, not a function",
    ast.Import: "is imported: it is in a file already",
    ast.ImportFrom: "is imported: it is in a file already",
}


def script(notebook: Path, function: str, args: str | None = None) -> str:
    """The text of a script that runs a notebook's function on every rank that torchrun starts.

    Parameters
    ----------
    notebook : path of a .ipynb file; nothing of it is executed
    function : name of a function that a cell defines at its top level
    args : source text of the arguments after rank, such as "1000, 'x'"; by default those of the
        first launch(...) of the function after its last definition

    Raises
    ------
    CannotExport
        If the function, or something it needs, has no place in a script; says why.
    """
    read = cells.read(notebook)
    statements = cells.statements(read)
    definition, node = _definition(function, read, statements)
    call = find_call(definition, node, statements, args)
    needed = Dependencies(read, statements, call)
    for name in [function, *sorted(call.names)]:
        needed.require(name)
    needed.require_future()
    refuse_rank_dependent(needed, call.arguments)
    found = [statement for _, statement in sorted(needed.found.items())]
    body = _body(found)
    main = _main(node, function, call, needed.names)
    imports = _imports(needed, body + main)
    about = _about(notebook, function, node, call)
    space = "\n" * (3 if isinstance(found[0].node, DEFINITIONS) else 2)
    return f"{about}\n\n{imports}{space}{body}\n\n\n{main}\n"


def _definition(
    function: str, read: Sequence[Cell], statements: Sequence[Statement]
) -> tuple[Statement, ast.FunctionDef]:
    """The last definition of the function; it must be one that ranks can run."""
    bound = [statement for statement in statements if function in statement.binds]
    if not bound:
        raise CannotExport(_unknown(function, read, statements))
    last = bound[-1]
    why = _UNFIT.get(type(last.node), "is not defined by a `def` at the top level of a cell")
    if isinstance(last.node, ast.FunctionDef):
        if any(isinstance(part, ast.Yield | ast.YieldFrom) for part in _body_parts(last.node)):
            why = "is a generator: calling it runs nothing of it"
        elif all(_is_constant(statement) for statement in last.node.body):
            why = "has no body yet, in its last definition"
        else:
            return last, last.node
    raise CannotExport(f"{function!r} {why} ({last}). Export a function that a cell defines.")


def _body_parts(function: ast.FunctionDef) -> list[ast.AST]:
    """What runs when the function is called, without the functions inside it."""
    return [part for statement in function.body for part in cells.executed(statement)]


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _unknown(function: str, read: Sequence[Cell], statements: Sequence[Statement]) -> str:
    """What to say where no cell binds that name."""
    method = function.rpartition(".")[2]
    for statement in statements:
        node = statement.node
        body = node.body if isinstance(node, ast.ClassDef) else []
        if any(isinstance(part, FUNCTIONS) and part.name == method for part in body):
            return (
                f"{function!r} is a method of a class ({statement}). "
                "Write a function that calls it, and export that."
            )
    defined = [s.node.name for s in statements if isinstance(s.node, ast.FunctionDef)]
    words = [f"There is no function {function!r} in the notebook."]
    words += [f"Did you mean {name!r}?" for name in difflib.get_close_matches(function, defined, 1)]
    broken = [
        cell.number for cell in read if cell.nodes is None and f"def {function}" in cell.source
    ]
    words += [f"It may be in code cell {number}, which does not parse." for number in broken[:1]]
    return " ".join([*words, f"There are: {', '.join(dict.fromkeys(defined)) or 'none'}."])


def _about(notebook: Path, name: str, function: ast.FunctionDef, call: LaunchCall) -> str:
    """The script's docstring: what it is, where it is from, how to run it."""
    own = (ast.get_docstring(function) or "").partition("\n")[0]
    command = f"torchrun --nproc-per-node {call.nprocs} {name}.py"
    if call.nnodes > 1:
        command = (
            f"torchrun --nnodes {call.nnodes} --nproc-per-node {call.nprocs} \\\n"
            f"        --rdzv-backend c10d --rdzv-endpoint HOST:29400 {name}.py"
        )
    where = "on each of the machines" if call.nnodes > 1 else "on one machine"
    lines = [own, ""] if own else []
    lines += [f"The function {name} of {notebook.name}, as a script.", "", f"Run it {where}:", ""]
    lines += [f"    {command}"]
    if call.env:
        variables = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in call.env.items())
        lines.append(f"    # {variables} torchrun ...")
    text = "\n".join(lines).replace('"""', "'''")
    raw = "r" if "\\" in text else ""
    return f'{raw}"""{text}\n"""'


def _imports(needed: Dependencies, text: str) -> str:
    """The imports that the script needs, os among them, in the usual groups."""
    _refuse_two_meanings(needed)
    names: dict[str, set[str]] = {"import os": set()}
    for alias, node in needed.imports.items():
        if isinstance(node, ast.ImportFrom):
            source = f"from {'.' * node.level}{node.module or ''} import"
            names.setdefault(source, set()).add(ast.unparse(alias))
        elif alias.asname or alias.name in text:
            names[f"import {ast.unparse(alias)}"] = set()
        else:  # `import torch.utils.data` for what is in torch
            names[f"import {cells.bound_by(alias)}"] = set()
    lines = [" ".join([start, ", ".join(sorted(of))]).strip() for start, of in names.items()]
    lines.sort(key=lambda line: (line.startswith("from"), line.lower()))
    groups = ["\n".join(line for line in lines if _group(line) == number) for number in range(4)]
    return "\n\n".join(filter(None, groups))


def _group(line: str) -> int:
    """Python's own switches, its standard library, other packages, ours."""
    package = line.split()[1].partition(".")[0]
    if package in ("__future__", "ddp_lessons"):
        return 0 if package == "__future__" else 3
    return 1 if package in sys.stdlib_module_names else 2


def _refuse_two_meanings(needed: Dependencies) -> None:
    """Imports move to the top, so that a name must not mean something else later."""
    meanings = {"os": {"os"}}
    for alias, node in needed.imports.items():
        meanings.setdefault(cells.bound_by(alias), set()).add(cells.full_name(node, alias))
    for name, imported in meanings.items():
        others = [statement for statement in needed.found.values() if name in statement.binds]
        if others or len(imported) > 1:
            where = f" ({others[0]})" if others else ""
            raise CannotExport(
                f"{name!r} means two things in the notebook, of which one is imported{where}. "
                "Give one of them another name."
            )


def _body(found: Sequence[Statement]) -> str:
    """The statements as they stand in the cells, with blank lines between them."""
    text = found[0].text
    for before, after in itertools.pairwise(found):
        if isinstance(before.node, DEFINITIONS) or isinstance(after.node, DEFINITIONS):
            space = "\n\n\n"
        else:
            adjacent = before.cell is after.cell and after.span[0] <= before.span[1] + 1
            space = "\n" if adjacent else "\n\n"
        text += space + after.text
    return text


def _main(function: ast.FunctionDef, name: str, call: LaunchCall, taken: set[str]) -> str:
    """The call, on the rank that torchrun says this process is."""
    head = 'if __name__ == "__main__":\n'
    if not _returns_value(function):
        return head + _call(f"    {name}(", ['int(os.environ["RANK"])', *call.arguments])
    rank, value = (f"{word}_" if word in taken else word for word in ("rank", "value"))
    return (
        f'{head}    {rank} = int(os.environ["RANK"])\n'
        + _call(f"    {value} = {name}(", [rank, *call.arguments])
        + "\n    # In one piece: torchrun's ranks write unbuffered, all to the same place."
        + f'\n    print(f"rank {{{rank}}} returned {{{value}}}\\n", end="")'
    )


def _returns_value(function: ast.FunctionDef) -> bool:
    returns = [part for part in _body_parts(function) if isinstance(part, ast.Return)]
    return any(ast.unparse(part) not in ("return", "return None") for part in returns)


def _call(head: str, arguments: Sequence[str]) -> str:
    """A call on one line, or with one argument a line."""
    line = f"{head}{', '.join(arguments)})"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([head, *(f"        {argument}," for argument in arguments), "    )"])
