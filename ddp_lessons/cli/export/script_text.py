"""From a function of a notebook to a script for torchrun, as a person would write it."""

from __future__ import annotations

import ast
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from ddp_lessons.cli.export.dependencies import Dependencies
from ddp_lessons.cli.export.launch_call import LaunchCall, find_call
from ddp_lessons.cli.export.notebook import (
    DEFINITIONS,
    Cell,
    Notebook,
    Statement,
    run_by_call,
)
from ddp_lessons.cli.export.rank_dependent import refuse_rank_dependent

LINE_LENGTH = 100
_IMPORT_OS = Statement(Cell(0, "import os", []), ast.parse("import os").body[0], -1)


def script(path: Path, function: str, args: str | None = None) -> str:
    """The text of a script that runs a notebook's function on every rank that torchrun starts.

    Parameters
    ----------
    path : of a .ipynb file; nothing of it is executed
    function : name of a function that a cell defines at its top level
    args : source text of the arguments after rank, such as "1000, 'x'"; by default those of the
        first launch(...) of the function after its last definition

    Raises
    ------
    CannotExport
        If the function, or something it needs, has no place in a script; says why.
    """
    notebook = Notebook(path)
    call = find_call(notebook, function, args)
    needed = Dependencies(notebook, call)
    refuse_rank_dependent(needed)
    body, main = _body(needed.statements), _main(call, needed.names)
    return f"{_about(path.name, call)}\n\n{body}\n\n\n{main}\n"


def _about(notebook: str, call: LaunchCall) -> str:
    """The script's docstring: what it is, where it is from, how to run it."""
    own = (ast.get_docstring(call.function) or "").partition("\n")[0]
    where, options = "on one machine", f"--nproc-per-node {call.nprocs}"
    if call.nnodes > 1:
        where = "on each of the machines"
        options = f"--nnodes {call.nnodes} {options} \\\n       "
        options += " --rdzv-backend c10d --rdzv-endpoint HOST:29400"
    lines = [own, ""] if own else []
    lines += [f"The function {call.function.name} of {notebook}, as a script.", ""]
    lines += [f"Run it {where}:", "", f"    torchrun {options} {call.function.name}.py"]
    if call.env:
        variables = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in call.env.items())
        lines.append(f"    # {variables} torchrun ...")
    text = "\n".join(lines).replace('"""', "'''")
    raw = "r" if "\\" in text else ""
    return f'{raw}"""{text}\n"""'


def _body(statements: Sequence[Statement]) -> str:
    """The statements as they stand in the cells, with blank lines between them."""
    if not any("os" in statement.binds for statement in statements):
        statements = [_IMPORT_OS, *statements]
    # Python wants `from __future__` first.
    statements = sorted(statements, key=lambda s: not s.imports.startswith("__future__."))
    # Imports that follow each other have the same key.
    groups = itertools.groupby(statements, key=lambda s: -1 if s.imports else s.index)
    blocks = [[*group] for _, group in groups]
    text = _text(blocks[0])
    for before, after in itertools.pairwise(blocks):
        text += _line_breaks(before[-1], after[0]) + _text(after)
    return text


def _text(block: Sequence[Statement]) -> str:
    """The text of a statement, or of imports: a line for each module."""
    if not block[0].imports:
        return block[0].text
    lines: dict[str, dict[str, None]] = {}
    for statement in block:
        module, of, name = ast.unparse(statement.node).partition(" import ")
        lines.setdefault(module + of, {})[name] = None
    return "\n".join(start + ", ".join(names) for start, names in lines.items())


def _line_breaks(before: Statement, after: Statement) -> str:
    if isinstance(before.node, DEFINITIONS) or isinstance(after.node, DEFINITIONS):
        return "\n\n\n"
    adjacent = before.cell is after.cell and after.lines[0] <= before.lines[1] + 1
    return "\n" if adjacent else "\n\n"


def _main(call: LaunchCall, taken: set[str]) -> str:
    """The call, on the rank that torchrun says this process is."""
    head, name = 'if __name__ == "__main__":\n', call.function.name
    parts = run_by_call(call.function)
    returns = {ast.unparse(part) for part in parts if isinstance(part, ast.Return)}
    if returns <= {"return", "return None"}:
        return head + _call(f"    {name}(", ['int(os.environ["RANK"])', *call.arguments])
    rank, value = (f"{word}_" if word in taken else word for word in ("rank", "value"))
    return (
        f'{head}    {rank} = int(os.environ["RANK"])\n'
        + _call(f"    {value} = {name}(", [rank, *call.arguments])
        + "\n    # In one piece: torchrun's ranks write unbuffered, all to the same place."
        + f'\n    print(f"rank {{{rank}}} returned {{{value}}}\\n", end="")'
    )


def _call(head: str, arguments: Sequence[str]) -> str:
    """A call on one line, or with one argument a line."""
    line = f"{head}{', '.join(arguments)})"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([head, *(f"        {argument}," for argument in arguments), "    )"])
