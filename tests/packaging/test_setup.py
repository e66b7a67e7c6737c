"""`make lessons`, as a newcomer types it. `make test` and `make whole` are the other commands."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.servers import OPTIONS, Server

pytestmark = pytest.mark.system

sys.path.insert(0, str(ROOT / "binder"))
import install  # noqa: E402

# The make target says itself which folder is shown: what else Server asks for is left out.
COMMAND = ("sh", "-c", f"exec make -C '{ROOT}' lessons LAB_ARGS='{' '.join(OPTIONS)}'")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="not set up by make")
def test_make_lessons_opens_the_course(tmp_path: Path) -> None:
    kept = ("PATH", "TORCH_INDEX")  # the home is empty, and there is no cache
    env = {name: os.environ[name] for name in kept if name in os.environ}
    with Server(tmp_path, ROOT / "notebooks", COMMAND, env=env) as server:
        files = {file["name"] for file in server.ask("contents")["content"]}
        assert {"00_start_here.ipynb", "solutions", "gpu.ipynb"} <= files
        server.run("00_start_here.ipynb")


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_make_lessons_tells_root_in_one_line_what_to_add_before_it_installs() -> None:
    command = ["make", "-C", str(ROOT), "lessons", "PYTHON=false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert line.endswith("make lessons LAB_ARGS=--allow-root")


def test_what_is_set_up_for_tests_serves_learners() -> None:
    """And not the other way round. Nothing is installed here: only what would be is asked."""
    assert list(install.GROUPS) == ["lessons", "test", "bench"]
    for less, more in itertools.pairwise(install.GROUPS.values()):
        assert {*less} <= {*more}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert {*install.GROUPS["bench"]} == {*groups}


def test_the_lock_has_all_that_is_installed() -> None:
    locked = {line.partition("==")[0] for line in install.CONSTRAINTS.read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cluster"]]
    wanted += [*install.BUILD, *install.in_groups(*install.GROUPS["bench"])]
    names = {re.split(r"[<>=]", name)[0].lower() for name in wanted}
    assert names <= {name.lower() for name in locked}
