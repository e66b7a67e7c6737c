"""The lessons of the course: all present, each found by its names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from ddp_lessons.course import lesson_files
from tests.support.checkout import ROOT

FOLDER = lesson_files.source()
LESSONS = lesson_files.lessons(FOLDER)


def test_the_repository_s_own_lessons_are_used() -> None:
    assert FOLDER == ROOT / "notebooks"


def test_the_lessons_are_in_their_order_with_their_questions() -> None:
    numbers = [lesson.number for lesson in LESSONS]
    assert numbers[:2] == ["00", "01"]
    assert numbers == [*sorted(numbers[:-1]), ""]
    assert LESSONS[-1].name == "gpu"
    assert all(lesson.question.endswith("?") and lesson.minutes >= 5 for lesson in LESSONS)
    assert LESSONS[5] == ("05_distributed_sampler.ipynb", "Who sees which sample?", 55)


@pytest.mark.parametrize(
    "text",
    ["7", "07", "ddp_timing", "DDP-timing", "07_ddp_timing", "07_ddp_timing.ipynb", "ddp timing"],
)
def test_a_lesson_is_found_by_all_its_names(text: str) -> None:
    assert lesson_files.find(text, LESSONS).file == "07_ddp_timing.ipynb"


@pytest.mark.parametrize("text", ["0", "00", "x/00_start_here.ipynb"])
def test_zero_is_a_number(text: str) -> None:
    assert lesson_files.find(text, LESSONS).file == "00_start_here.ipynb"


def test_the_appendix_has_a_name_only() -> None:
    assert lesson_files.find("gpu", LESSONS).file == "gpu.ipynb"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ddp_timming", "ddp_timing"),
        ("sampler", "distributed_sampler"),
        ("7_ddp_tming", "ddp_timing"),
        ("barrier", "barriers"),
        ("syncbatchnorm", "sync_batchnorm"),
    ],
)
def test_a_typo_gets_the_closest_name(text: str, meant: str) -> None:
    with pytest.raises(lesson_files.CommandError, match=rf"{text}'\. Did you mean .*\b{meant}\b"):
        lesson_files.find(text, LESSONS)


@pytest.mark.parametrize("text", ["", "99", "-1", "quux", "../setup", "solutions/07_ddp_timing"])
def test_what_is_no_lesson_gets_the_list(text: str) -> None:
    with pytest.raises(lesson_files.CommandError, match="there is no lesson") as caught:
        lesson_files.find(text, LESSONS)
    assert all(lesson.name in str(caught.value) for lesson in LESSONS)


def test_links_between_the_files_stay_among_them() -> None:
    names = lesson_files.files(FOLDER)
    for name in names:
        for target in re.findall(r"\]\(([^)#]+)\)", _text(FOLDER / name)):
            here = (FOLDER / name).parent / target
            known = here.resolve().is_relative_to(FOLDER) and here.exists()
            if not target.startswith("https://"):
                assert known, f"{name}: {target}"
                assert here.resolve().relative_to(FOLDER).as_posix() in names


def _text(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix != ".ipynb":
        return ""
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_only_what_belongs_to_the_course_is_part_of_it(tmp_path: Path) -> None:
    names = ["00_a.ipynb", "solutions/00_a.ipynb", "pictures/a.png", "clusters.md", "gpu.ipynb"]
    others = ["conf.py", "index.md", "Untitled.ipynb", ".ipynb_checkpoints/00_a-checkpoint.ipynb"]
    for name in [*names, *others, "_build/00_a.ipynb", "pictures/.a.png.swp"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert lesson_files.files(tmp_path) == sorted(names)


def test_a_wheel_is_told_the_same_patterns() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    patterns = [f"/notebooks/{pattern}" for pattern in lesson_files.PATTERNS]
    assert built["targets"]["wheel"]["include"] == ["/ddp_lessons", *patterns]
