"""Every `pip install` that README, lessons, docs and errors name works as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ddp_lessons.course import lesson_files
from ddp_lessons.course.lesson_files import files
from ddp_lessons.text import INSTALL
from tests.support.checkout import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = f"git+{PROJECT['urls']['Repository']}"
EXTRAS = [name for names in PROJECT["optional-dependencies"].values() for name in names]
# Packages as pip knows them; where one of them is named, the registry has it.
PACKAGES = {re.split(r"[<>=]", name)[0] for name in [*PROJECT["dependencies"], *EXTRAS]}
OPTIONS = {"--force-reinstall", "--no-deps", "-q"}
PLACES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "notebooks").glob("*.md"),
    *(ROOT / "notebooks" / name for name in files(ROOT / "notebooks") if name.endswith(".ipynb")),
    *(ROOT / "ddp_lessons").rglob("*.py"),
]
LINE = re.compile(r"pip install ((?:[^\s`)]|\s(?=[-\w'\"\\]))+)")


def lines(path: Path) -> list[str]:
    """What is to be installed, as far as the words go that belong to it."""
    text = (
        lesson_files.code(path) + path.read_text() if path.suffix == ".ipynb" else path.read_text()
    )
    return [
        found.replace('\\"', "").replace("'", "").replace('"', "") for found in LINE.findall(text)
    ]


def works(what: str) -> bool:
    """Whether the first words of a line name something that pip finds where the line says."""
    if what.split()[:1] == ["."]:  # in a clone
        return True
    words = [word.rstrip(".,:;") for word in what.split()]
    index = words.index("--index-url") if "--index-url" in words else len(words)
    named = [word for word in words[:index] if word not in OPTIONS]
    package = re.split(r"[<>=]", named[0])[0] if named else ""
    return named[:1] == [HOME] or package in PACKAGES or "{" in package


@pytest.mark.parametrize(
    ("what", "right"),
    [
        (f"{HOME} --no-deps", True),
        ("ipyparallel", True),
        (".", True),
        ("torch --index-url https://download.pytorch.org/whl/cpu", True),
        ("cloudpickle==3.1.2", True),
        ("ddp-lessons", False),
        ("ddp-lessons[cluster]", False),
        ("git+https://github.com/someone/else", False),
    ],
)
def test_what_works(what: str, right: bool) -> None:
    assert works(what) == right


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PLACES if lines(p)]
)
def test_a_line_names_what_is_there(path: Path) -> None:
    for what in lines(path):
        assert works(what), what


def test_the_line_that_code_names_is_the_readmes() -> None:
    assert f"pip install {HOME}" == INSTALL
    assert INSTALL in (ROOT / "README.md").read_text()
    assert INSTALL in (ROOT / "notebooks" / "index.md").read_text()


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_line_works_for_this_repository(tmp_path: Path) -> None:
    """With the place of this clone for that of the repository, and without what it depends on."""
    what = f"git+file://{ROOT}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*command, what], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    listed = subprocess.run(
        [sys.executable, "-m", "ddp_lessons.cli", "list"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=60,
    )
    assert "13      torchrun" in listed.stdout
    assert (tmp_path / "ddp_lessons" / "cli" / "newest.txt").is_file()
