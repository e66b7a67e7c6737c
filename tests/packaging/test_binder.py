"""What Binder makes of `binder/`, and whether lessons fit into the 2 GB that it gives.

Some run in a real JupyterLab, the hungriest among them (`make binder`); `make nbval` runs all of
them within the same limit, and `make room` measures each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.support import confined
from tests.support.checkout import ROOT, files
from tests.support.servers import Server

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("memory")]

NOTEBOOKS = ROOT / "notebooks"
LESSONS = ("00_start_here.ipynb", "01_spawn.ipynb", "07_ddp_timing.ipynb")  # nbval runs all
ROOM = 1500 << 20  # bytes; Binder ends what needs more than 2 GB
needs_a_limit = confined.needed()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds, without what was built here."""
    copy = tmp_path_factory.mktemp("binder") / "ddp-lessons"
    for name in files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    """What Binder's own tool would build; needs no Docker."""
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_binder_would_build_it(dockerfile: str, repository: Path) -> None:
    tested = (repository / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert f"Building conda environment for python={tested}" in dockerfile
    steps = [
        "COPY --chown=0:0 src/ ${REPO_DIR}/",
        'bin/pip install --no-cache-dir -r "binder/requirements.txt"',
        "RUN ./binder/postBuild",
        'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"',
    ]
    found = [dockerfile.find(step) for step in steps]
    assert -1 not in found
    assert found == sorted(found)


def test_binder_takes_the_tested_versions() -> None:
    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    (torch,) = [line for line in lines if line.startswith("torch==")]
    assert torch in (ROOT / "binder" / "constraints.txt").read_text().splitlines()
    assert "-c constraints.txt" in lines


@pytest.mark.binder
@pytest.mark.timeout(600)
def test_binders_steps_in_an_empty_environment(repository: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=True)
    (tmp_path / "home").mkdir()
    env = {
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
        "PIP_RETRIES": "0",  # an index that is out of reach is left at once
        "HOME": str(tmp_path / "home"),
        "PATH": f"{place}/bin:/usr/bin:/bin",
    }
    carry_out(repository, env, f"{place}/bin/pip", "install", "-r", "binder/requirements.txt")
    assert "This machine can run the lessons." in carry_out(repository, env, "binder/postBuild")
    lab = (f"{repository}/binder/start", "jupyter", "lab")
    with Server(tmp_path, repository, lab, env=env) as server:
        server.run("ddp-lessons/00_start_here.ipynb")
        assert psutil.Process(server.pid).environ()["OMP_NUM_THREADS"] == "1"


def carry_out(repository: Path, env: Mapping[str, str], *command: str) -> str:
    """What a command printed, which must succeed."""
    done = subprocess.run(
        command,
        cwd=repository,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, confined.Confined]]:
    """A server that has, with all that it starts, as much memory as we allow ourselves."""
    home = tmp_path_factory.mktemp("home")
    with confined.Confined(ROOM) as group, Server(home, NOTEBOOKS, start=group.start) as server:
        yield server, group


@needs_a_limit
@pytest.mark.binder
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_fits(narrow: tuple[Server, confined.Confined], lesson: str) -> None:
    server, group = narrow
    group.peak = 0
    server.run(lesson)
    assert group.kills == 0
    assert 0 < group.peak < ROOM
