"""What a notebook makes once, and what each rank of a script would make anew, and differently.

Temporary directories, times, random numbers: `launch` sends one and the same to all ranks. Runs in
the command `ddp-lessons export`, which refuses them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from ddp_lessons.export.cells import FUNCTIONS, CannotExport, Statement, runs_at_once
from ddp_lessons.export.needs import Needs

_ANOTHER = (
    "tempfile",
    "uuid",
    "secrets",
    "socket",
    "os.getpid",
    "os.urandom",
    "time.time",
    "time.perf_counter",
    "time.monotonic",
    "datetime.datetime.now",
)
_RANDOM = (
    "random",
    "numpy.random",
    *(f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")),
)
# DDP gives all ranks the weights of rank 0; without it, each rank has its own.
_RANDOM_WEIGHTS = (
    *(f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LSTM")),
    *(f"ddp_lessons.data.{name}" for name in ("SmallMLP", "SmallCNN")),
)
_SEEDS = {"manual_seed", "seed", "generator", "Generator", "default_rng", "Random", "RandomState"}


def refuse(needs: Needs, arguments: Iterable[str]) -> None:
    """Raise CannotExport if the script would make something once a rank that must be one.

    Parameters
    ----------
    needs : all that the script holds
    arguments : the source of each argument of the call
    """
    for argument in arguments:
        node = ast.parse(f"_({argument}\n)").body[0]
        _refuse(node, needs, f"The argument {argument}")
    for statement in needs.found.values():
        if not isinstance(statement.node, (*FUNCTIONS, ast.ClassDef)):
            name = min(statement.binds | statement.changes, default="")
            _refuse(statement.node, needs, f"{name!r} ({statement})")


def _refuse(node: ast.stmt, needs: Needs, what: str) -> None:
    reached = list(_reached(node, needs))
    words = {getattr(part, "attr", getattr(part, "id", "")) for part in reached}
    words |= {part.arg for part in reached if isinstance(part, ast.keyword) and part.arg}
    differing = _ANOTHER if words & _SEEDS else _ANOTHER + _RANDOM + _weights(needs)
    full = {_full(part.func, needs) for part in reached if isinstance(part, ast.Call)}
    for name in sorted(full):
        if any(f"{name}.".startswith(f"{other}.") for other in differing):
            raise CannotExport(
                f"{what} takes something from {name}: the notebook made it once and gave the same "
                "to all ranks, but in a script each rank would make another. Make it in a function "
                "that seeds first, or on one rank that broadcasts it, or give it with --args."
            )


def _weights(needs: Needs) -> tuple[str, ...]:
    wrapped = any(alias.name == "DistributedDataParallel" for _, alias in needs.imports)
    return () if wrapped else _RANDOM_WEIGHTS


def _reached(node: ast.stmt, needs: Needs) -> Iterator[ast.AST]:
    """What runs when the statement does, also in the notebook's functions that it calls."""
    todo, seen = list(runs_at_once(node)), set()
    while todo:
        part = todo.pop()
        yield part
        called = (
            part.func.id if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) else ""
        )
        for statement in _defined(called, needs):
            if statement not in seen:
                seen.add(statement)
                todo += ast.walk(statement.node)


def _defined(name: str, needs: Needs) -> Iterator[Statement]:
    for statement in needs.found.values():
        if name in statement.binds and isinstance(statement.node, (*FUNCTIONS, ast.ClassDef)):
            yield statement


def _full(node: ast.AST, needs: Needs) -> str:
    """`torch.nn.Linear` of `nn.Linear`; empty for what is not imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    for statement, alias in needs.imports:
        if (alias.asname or alias.name.partition(".")[0]) == node.id:
            module = getattr(statement.node, "module", None)
            whole = alias.name if alias.asname else node.id
            start = f"{module}.{alias.name}" if module else whole
            return ".".join([start, *reversed(parts)])
    return ""
