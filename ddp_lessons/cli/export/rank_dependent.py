"""Refuses what the notebook makes once but each rank of a script would make anew, and differently.

Temporary directories, times, random numbers: `launch` sends one and the same to all ranks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ddp_lessons.cli.export.dependencies import Dependencies
from ddp_lessons.cli.export.notebook import DEFINITIONS, CannotExport, executed

_PER_PROCESS = ("tempfile", "uuid", "secrets", "socket", "os.getpid", "os.urandom")
_CLOCKS = ("time.time", "time.perf_counter", "time.monotonic", "datetime.datetime.now")
_RANDOM = (
    *("random", "numpy.random"),
    *(f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")),
)
# DDP gives all ranks the weights of rank 0; without it, each rank has its own.
_RANDOM_WEIGHTS = (
    *(f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LSTM")),
    *(f"ddp_lessons.data.{name}" for name in ("SmallMLP", "SmallCNN")),
)
_SEEDS = {"manual_seed", "seed", "generator", "Generator", "default_rng", "Random", "RandomState"}


def refuse_rank_dependent(needed: Dependencies) -> None:
    """Raise CannotExport if the script would make something once a rank that must be one."""
    for argument in needed.call.arguments:
        _refuse(ast.parse(f"_({argument}\n)"), needed, f"The argument {argument}")
    for statement in needed.statements:
        if not isinstance(statement.node, DEFINITIONS):
            name = min(statement.binds | statement.changes, default="")
            _refuse(statement.node, needed, f"{name!r} ({statement})")


def _refuse(node: ast.AST, needed: Dependencies, what: str) -> None:
    parts = list(_reached(node, needed))
    differing = [*_PER_PROCESS, *_CLOCKS]
    if not any(_seeds(part) for part in parts):
        differing += _RANDOM
        imported = [statement.imports for statement in needed.statements]
        if not any(full.endswith(".DistributedDataParallel") for full in imported):
            differing += _RANDOM_WEIGHTS
    called = [needed.notebook.full_names(p.func) for p in parts if isinstance(p, ast.Call)]
    for full in sorted(set().union(*called)):
        if any(f"{full}.".startswith(f"{other}.") for other in differing):
            raise CannotExport(
                f"{what} takes something from {full}: the notebook made it once and gave the same "
                "to all ranks, but in a script each rank would make another. Make it in a function "
                "that seeds first, or on one rank that broadcasts it, or give it with --args."
            )


def _seeds(part: ast.AST) -> bool:
    match part:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=word):
            return word in _SEEDS
    return False


def _reached(node: ast.AST, needed: Dependencies) -> Iterator[ast.AST]:
    """What runs when the statement does, also in the notebook's functions that it calls."""
    todo, seen = list(executed(node)), set()
    while todo:
        part = todo.pop()
        yield part
        name = getattr(part.func, "id", "") if isinstance(part, ast.Call) else ""
        for statement in needed.statements:
            defines = name in statement.binds and isinstance(statement.node, DEFINITIONS)
            if defines and statement not in seen:
                seen.add(statement)
                todo += ast.walk(statement.node)
