"""From a function of a notebook to a script for torchrun, as a person would write it.

Runs in the command `ddp-lessons export`, which prints what `script` returns. `cells.py` reads the
notebook, `launches.py` finds the call that gives the arguments, `needs.py` gathers what is needed.
"""

from __future__ import annotations

import ast
import difflib
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ddp_lessons.export import cells, import_lines, per_rank
from ddp_lessons.export.cells import FUNCTIONS, CannotExport, Cell, Statement
from ddp_lessons.export.import_lines import LINE_LENGTH, Import
from ddp_lessons.export.launches import Call, check_arguments, environment, find_call
from ddp_lessons.export.needs import Needs


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
    definition = _definition(function, read, statements)
    call = find_call(function, definition, statements, args)
    check_arguments(definition, call)
    call.env = environment(statements, call.position) | call.env
    needs = Needs(read, statements, call.position, call.statement)
    needs.require(function)
    for name in sorted(call.names):
        needs.require(name)
    per_rank.refuse(needs, call.arguments)
    return _written(notebook, definition, call, needs)


def _definition(function: str, read: Sequence[Cell], statements: list[Statement]) -> Statement:
    """The last definition of the function; it must be one that ranks can run."""
    bound = [statement for statement in statements if function in statement.binds]
    if not bound:
        raise CannotExport(_unknown(function, read, statements))
    last = bound[-1]
    why = _unfit(last.node)
    if why:
        raise CannotExport(f"{function!r} {why} ({last}). Export a function that a cell defines.")
    return last


def _unfit(node: ast.stmt) -> str | None:
    """Why no script can be made of this; None if one can."""
    match node:
        case ast.AsyncFunctionDef():
            return "is an async function: a rank calls its function and does not await it"
        case ast.ClassDef():
            return "is a class, not a function"
        case ast.Assign(value=ast.Lambda()):
            return "is a lambda: write it as `def`, and it has a name to export"
        case ast.Import() | ast.ImportFrom():
            return "is imported: it is in a file already"
        case ast.Delete():
            return "is deleted"
        case ast.FunctionDef():
            return _unfit_body(node)
    return "is not defined by a `def` at the top level of a cell"


def _unfit_body(node: ast.FunctionDef) -> str | None:
    own = [part for statement in node.body for part in cells.runs_at_once(statement)]
    if any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in own):
        return "is a generator: calling it runs nothing of it"
    if all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in node.body):
        return "has no body yet, in its last definition"
    return None


def _unknown(function: str, read: Sequence[Cell], statements: list[Statement]) -> str:
    """What to say where no cell binds that name."""
    classes = [s.node for s in statements if isinstance(s.node, ast.ClassDef)]
    method = function.rpartition(".")[2]
    for node in classes:
        if any(isinstance(part, FUNCTIONS) and part.name == method for part in node.body):
            return (
                f"{function!r} is a method of the class {node.name} ({_place(statements, node)}). "
                "Write a function that calls it, and export that."
            )
    there = list(
        dict.fromkeys(s.node.name for s in statements if isinstance(s.node, ast.FunctionDef))
    )
    close = difflib.get_close_matches(function, there, n=1)
    lines = [f"There is no function {function!r} in the notebook."]
    lines += [f"Did you mean {close[0]!r}?"] if close else []
    broken = [c.number for c in read if c.tree is None and f"def {function}" in c.source]
    lines += [f"It may be in code cell {broken[0]}, which does not parse."] if broken else []
    return " ".join([*lines, f"There are: {', '.join(there) or 'none'}."])


def _place(statements: list[Statement], node: ast.stmt) -> Statement:
    return next(statement for statement in statements if statement.node is node)


def _written(notebook: Path, definition: Statement, call: Call, needs: Needs) -> str:
    """All parts, in their order."""
    found = [statement for _, statement in sorted(needs.found.items())]
    body = _body(found)
    main = _main(definition, call, needs.names)
    lines = import_lines.block(_imports(needs, found, body + main))
    first = found[0].node
    space = "\n\n\n" if isinstance(first, (*FUNCTIONS, ast.ClassDef)) else "\n\n"
    about = _about(notebook, definition, call).replace('"""', "'''")
    raw = "r" if "\\" in about else ""
    head = f'{raw}"""{about}\n"""\n\n{lines}{space}'
    return f"{head}{body}\n\n\n{main}\n"


def _about(notebook: Path, definition: Statement, call: Call) -> str:
    """The docstring: what it is, where it is from, how to run it."""
    name = definition.node.name  # type: ignore[attr-defined]
    own = (ast.get_docstring(definition.node) or "").partition("\n")[0]  # type: ignore[arg-type]
    origin = f"The function {name} of {notebook.name}, as a script."
    where = "on each of the machines" if call.nnodes > 1 else "on one machine"
    command = [f"torchrun {_options(call)}", f"{name}.py"]
    fits = 4 + len(" ".join(command)) <= LINE_LENGTH
    lines = [*([own, ""] if own else []), *textwrap.wrap(origin, LINE_LENGTH - 3)]
    lines += ["", f"Run it {where}:", "", "    " + (" " if fits else " \\\n        ").join(command)]
    if call.env:
        variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in call.env.items())
        lines.append(f"    # {variables} torchrun ...")
    return "\n".join(lines)


def _options(call: Call) -> str:
    if call.nnodes == 1:
        return f"--nproc-per-node {call.nprocs}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint HOST:29400"
    return f"--nnodes {call.nnodes} --nproc-per-node {call.nprocs} {meeting}"


def _imports(needs: Needs, found: Sequence[Statement], text: str) -> list[Import]:
    """What to import: the names that are needed, and os."""
    wanted = [_import(statement, alias) for statement, alias in needs.imports]
    wanted += [
        _import(statement, alias)
        for statement in needs.statements
        if isinstance(statement.node, ast.ImportFrom) and statement.node.module == "__future__"
        for alias in statement.node.names
    ]
    wanted = [one for one in wanted if _serves(one, wanted, text)]
    wanted.append(Import("os"))
    if any(one.module.startswith("os.") and not one.alias and not one.name for one in wanted):
        wanted.remove(Import("os"))
    _no_name_twice(wanted, found)
    return wanted


def _import(statement: Statement, alias: ast.alias) -> Import:
    asname = alias.asname or ""
    if isinstance(statement.node, ast.ImportFrom):
        module = "." * statement.node.level + (statement.node.module or "")
        return Import(module, alias.name, asname if asname != alias.name else "")
    return Import(alias.name, "", asname)


def _serves(one: Import, wanted: Sequence[Import], text: str) -> bool:
    """False for `import torch.utils.data` where only other parts of torch are used."""
    if one.name or one.alias or "." not in one.module or one.module in text:
        return True
    return not any(other.bound == one.bound and other != one for other in wanted)


def _no_name_twice(wanted: Sequence[Import], found: Sequence[Statement]) -> None:
    """Imports move to the top, so that a name must not mean something else later."""
    by_name: dict[str, set[Import]] = {}
    for one in wanted:
        whole = not one.name and not one.alias
        by_name.setdefault(one.bound, set()).add(Import(one.bound) if whole else one)
    for name, ones in by_name.items():
        others = [statement for statement in found if name in statement.binds]
        if len(ones) > 1 or others:
            where = f" ({others[0]})" if others else ""
            raise CannotExport(
                f"{name!r} means two things in the notebook, of which one is imported{where}. "
                "Give one of them another name."
            )


def _body(found: Sequence[Statement]) -> str:
    """The statements as they stand in the cells, with the blank lines between them."""
    text = ""
    for before, statement in zip([None, *found], found, strict=False):
        text += (_space(before, statement) if before else "") + statement.text
    return text


def _space(before: Statement, after: Statement) -> str:
    if any(isinstance(one.node, (*FUNCTIONS, ast.ClassDef)) for one in (before, after)):
        return "\n\n\n"
    if before.cell is not after.cell:
        return "\n\n"
    between = before.cell.lines[before.span[1] : after.span[0]]
    if all(not line.strip() for line in between):
        return "\n" * (1 + min(2, len(between)))
    return "\n\n" if any(not line.strip() for line in between) else "\n"


def _main(definition: Statement, call: Call, taken: set[str]) -> str:
    """The call, on the rank that torchrun says this process is."""
    name = definition.node.name  # type: ignore[attr-defined]
    head = 'if __name__ == "__main__":\n'
    if not _returns(definition.node):
        return head + _called(f"    {name}(", ['int(os.environ["RANK"])', *call.arguments])
    rank, value = (f"{word}_" if word in taken else word for word in ("rank", "value"))
    return (
        f'{head}    {rank} = int(os.environ["RANK"])\n'
        + _called(f"    {value} = {name}(", [rank, *call.arguments])
        + f'\n    print(f"rank {{{rank}}} returned {{{value}}}")'
    )


def _returns(node: ast.stmt) -> bool:
    """True if the function itself returns a value."""
    return any(
        isinstance(part, ast.Return)
        and part.value is not None
        and not (isinstance(part.value, ast.Constant) and part.value.value is None)
        for statement in getattr(node, "body", [])
        for part in cells.runs_at_once(statement)
    )


def _called(head: str, arguments: Sequence[str]) -> str:
    """A call on one line, or as ruff breaks it."""
    line = f"{head}{', '.join(arguments)})"
    if len(line) <= LINE_LENGTH and "\n" not in line:
        return line
    inner = f"        {', '.join(arguments)}"
    if len(inner) <= LINE_LENGTH and "\n" not in inner:
        return f"{head}\n{inner}\n    )"
    return "\n".join([head, *(f"        {argument}," for argument in arguments), "    )"])
