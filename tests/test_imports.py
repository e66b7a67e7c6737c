"""What `import ddp_lessons` costs and gives, and in which direction its modules import."""

from __future__ import annotations

import ast
import graphlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ddp_lessons

PACKAGE = Path(ddp_lessons.__file__).parent
HEAVY = {"torch", "matplotlib", "ipywidgets", "numpy"}
IMPORT = """
import json, sys, time
began = time.perf_counter()
import ddp_lessons
print(json.dumps([time.perf_counter() - began, sorted(sys.modules)]))
"""


def fresh_import() -> tuple[float, set[str]]:
    """Seconds that the import takes in a fresh process, and the modules loaded after it."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_the_import_is_cheap() -> None:
    imports = [fresh_import() for _ in range(5)]
    for _, modules in imports:
        assert not HEAVY & modules
    assert min(seconds for seconds, _ in imports) < 0.05


def test_the_import_leaves_no_process_outside_a_notebook() -> None:
    _, modules = fresh_import()
    assert "multiprocessing.forkserver" not in modules


@pytest.mark.parametrize("name", ddp_lessons.__all__)
def test_public_names_resolve_and_say_what_they_are(name: str) -> None:
    value: Any = getattr(ddp_lessons, name)
    documented = inspect.cleandoc(value.__doc__ or "")
    assert documented.partition("\n")[0].endswith(".")
    assert name in dir(ddp_lessons)


def test_public_names_are_all_that_a_star_gives() -> None:
    names: dict[str, Any] = {}
    exec("from ddp_lessons import *", names)
    assert set(names) - {"__builtins__"} == set(ddp_lessons.__all__)
    assert list(ddp_lessons.__all__) == sorted(ddp_lessons.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="'ddp_lessons' has no attribute 'lunch'"):
        ddp_lessons.lunch  # noqa: B018
    assert not hasattr(ddp_lessons, "WorkerProcess")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("ddp_lessons", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from module_level(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for blocks in ("body", "orelse", "finalbody", "handlers"):
                yield from module_level(getattr(node, blocks, []))


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of this package that a module imports when it is imported itself."""
    names = set()
    for node in module_level(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path.name} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= submodules or {str(node.module)}
    return names & known


def test_modules_import_in_one_direction() -> None:
    paths = modules()
    assert {"ddp_lessons", "ddp_lessons.worker", "ddp_lessons.plots.timeline"} <= set(paths)
    graph = {name: imported(path, set(paths)) for name, path in paths.items()}
    assert "ddp_lessons.errors" in graph["ddp_lessons.launcher"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError for a circle
    assert order.index("ddp_lessons.messages") < order.index("ddp_lessons.launcher")
