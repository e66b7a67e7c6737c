"""The places where a lesson can be opened: each link names this project and this lesson."""

from __future__ import annotations

import json
import re
import tomllib

import nbformat
import pytest
import yaml

import ddp_lessons
from ddp_lessons.course.lesson_files import lessons
from tests.support.checkout import ROOT

HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PROJECT = HOME.removeprefix("https://github.com/")
LESSONS = [lesson.file for lesson in lessons(ROOT / "notebooks")]


def links(file: str) -> dict[str, str]:
    path = f"blob/main/notebooks/{file}"
    return {
        "Binder": f"https://mybinder.org/v2/gh/{PROJECT}/HEAD?urlpath=lab/tree/ddp-lessons/{file}",
        "Colab": f"https://colab.research.google.com/github/{PROJECT}/{path}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src={HOME}/{path}",
    }


@pytest.mark.parametrize("file", LESSONS)
def test_a_lesson_can_be_opened_elsewhere(file: str) -> None:
    first, *cells = nbformat.read(ROOT / "notebooks" / file, as_version=4).cells
    for name, link in links(file).items():
        assert f"[{name}]({link})" in first.source
    fetch = next(cell for cell in cells if cell.cell_type == "code")
    assert f'    %pip install -q --no-deps "git+{HOME}"' in fetch.source.splitlines()
    assert fetch.metadata["jupyter"]["source_hidden"]


def test_the_cell_that_fetches_the_course_does_nothing_here() -> None:
    sources = set()
    for file in LESSONS:
        cells = nbformat.read(ROOT / "notebooks" / file, as_version=4).cells
        fetch = next(cell for cell in cells if cell.cell_type == "code")
        sources.add(fetch.source)
        assert fetch.execution_count == 1
        assert fetch.outputs == []
    assert len(sources) == 1


def test_the_table_of_lessons_is_whole() -> None:
    readme = (ROOT / "README.md").read_text()
    assert links("00_start_here.ipynb")["Binder"] in readme
    for file in LESSONS:
        assert f"](notebooks/{file})" in readme


def test_nothing_names_another_home() -> None:
    for path in (ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "CONTRIBUTING.md"):
        for found in re.findall(
            r"(?:/gh|github\.com|/github)/([\w-]+/ddp-[\w-]+)", path.read_text()
        ):
            assert found == PROJECT, path


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ddp_lessons.__version__
    assert citation["repository-code"] == HOME
    assert citation["title"]
    assert citation["authors"]


def test_codespaces_sets_up_what_a_clone_does() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    make, target = container["postCreateCommand"].split()
    assert make == "make"
    assert target in targets
