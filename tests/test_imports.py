"""What `import ddp_lessons` loads and gives. `make check` holds who imports whom."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ddp_lessons

PACKAGE = Path(ddp_lessons.__file__).parent
HEAVY = {"torch", "matplotlib", "ipywidgets", "numpy"}
IMPORT = "import json, sys, ddp_lessons; print(json.dumps(sorted(sys.modules)))"


def fresh_import() -> set[str]:
    """The modules that are loaded after the import in a fresh process."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.system
@pytest.mark.alone
def test_the_import_is_cheap() -> None:
    modules = fresh_import()
    assert not HEAVY & modules
    assert {name for name in modules if name.startswith("ddp_lessons")} == {
        "ddp_lessons",
        "ddp_lessons.processes",
        "ddp_lessons.processes.forkserver",
        "ddp_lessons.processes.spares",
        "ddp_lessons.system",
        "ddp_lessons.system.memory",
        "ddp_lessons.system.notebook",
        "ddp_lessons.system.reaper",
    }


@pytest.mark.system
def test_the_import_leaves_no_process_outside_a_notebook() -> None:
    assert "multiprocessing.forkserver" not in fresh_import()


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


@pytest.mark.parametrize("kind", ["Run", "RankResult", "Verdict", "LaunchError"])
def test_what_its_methods_return_is_public_too(kind: str) -> None:
    found = set()
    for name, value in inspect.getmembers(getattr(ddp_lessons, kind)):
        function = value.fget if isinstance(value, property) else value
        if not name.startswith("_") and inspect.isfunction(function):
            found |= set(
                re.findall(r"\b[A-Z]\w+", str(inspect.signature(function).return_annotation))
            )
    found -= {"Any", "None", "Path", "Self"}
    assert found <= set(ddp_lessons.__all__)
    assert kind != "Run" or {"Share", "Straggler"} <= found
