"""What a notebook makes once, and what each rank of a script would make anew, and differently.

Temporary directories, times, random numbers: `launch` sends one and the same to all ranks. Runs in
the command `ddp-lessons export`, which refuses them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from ddp_lessons.cli.export.cells import DEFINITIONS, CannotExport, bound_by, executed, full_name
from ddp_lessons.cli.export.dependencies import Dependencies

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


def refuse_rank_dependent(needed: Dependencies, arguments: Iterable[str]) -> None:
    """Raise CannotExport if the script would make something once a rank that must be one.

    Parameters
    ----------
    needed : all that the script holds
    arguments : the source of each argument of the call
    """
    for argument in arguments:
        _refuse(ast.parse(f"_({argument}\n)"), needed, f"The argument {argument}")
    for statement in needed.found.values():
        if not isinstance(statement.node, DEFINITIONS):
            name = min(statement.binds | statement.changes, default="")
            _refuse(statement.node, needed, f"{name!r} ({statement})")


def _refuse(node: ast.AST, needed: Dependencies, what: str) -> None:
    imported = {bound_by(alias): full_name(of, alias) for alias, of in needed.imports.items()}
    parts = list(_reached(node, needed))
    differing = [*_PER_PROCESS, *_CLOCKS]
    if not any(_seeds(part) for part in parts):
        differing += _RANDOM
        if not any(full.endswith(".DistributedDataParallel") for full in imported.values()):
            differing += _RANDOM_WEIGHTS
    for called in sorted(ast.unparse(part.func) for part in parts if isinstance(part, ast.Call)):
        first, dot, rest = called.partition(".")
        full = f"{imported.get(first, '')}{dot}{rest}"
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
        for statement in needed.found.values():
            defines = name in statement.binds and isinstance(statement.node, DEFINITIONS)
            if defines and statement not in seen:
                seen.add(statement)
                todo += ast.walk(statement.node)
