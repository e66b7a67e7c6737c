"""The learner's copy: brought up to date, and nothing that they wrote is ever overwritten."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4

from ddp_lessons import course
from ddp_lessons.copies import MANIFEST, bring, changed, standing_in
from tests.test_course import ROOT

LESSON, PICTURE = "00_a.ipynb", "pictures/a.png"
BRING = """
import sys
from pathlib import Path
from ddp_lessons.copies import bring
print(bring(*map(Path, sys.argv[1:]), "1"))
"""
# What root may do beside permissions, CAP_DAC_OVERRIDE, is gone with the next exec.
UNPRIVILEGED = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, for root
os.execv(sys.executable, [sys.executable, "-c", {BRING!r}, *sys.argv[1:]])
"""


def _notebook(*sources: str, output: str = "stored") -> bytes:
    cells = [v4.new_code_cell(source, execution_count=1) for source in sources]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
        cell.outputs = [v4.new_output("stream", text=output)]
    text: str = nbformat.writes(v4.new_notebook(cells=cells))
    return text.encode()


def _make(folder: Path, **more: bytes) -> Path:
    """A course: one lesson, its solution and a picture."""
    contents = {LESSON: _notebook("one"), "solutions/00_a.ipynb": _notebook("solved")}
    contents[PICTURE] = b"picture"
    for name, content in {**contents, **more}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The course at version 1."""
    return _make(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Version 2: the lesson has other cells, and there is one lesson more."""
    contents: dict[str, Any] = {LESSON: _notebook("two"), "01_b.ipynb": _notebook("new")}
    return _make(tmp_path / "second", **contents)


@pytest.fixture
def copy(tmp_path: Path, first: Path) -> Path:
    """A copy of version 1."""
    assert bring(first, tmp_path / "copy", "1").new
    return tmp_path / "copy"


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _edit(path: Path, *sources: str, output: str = "run again") -> bytes:
    path.write_bytes(content := _notebook(*sources, output=output))
    return content


def test_a_copy_holds_the_course(first: Path, copy: Path) -> None:
    assert _files(copy) == _files(first)
    assert changed(copy) == []


def test_bringing_it_again_touches_nothing(first: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert bring(first, copy, "1") == (False, [], {})
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_the_real_course_is_copied_whole(tmp_path: Path) -> None:
    bring(course.source(), tmp_path / "copy", "1")
    assert sorted(_files(tmp_path / "copy")) == course.files(ROOT / "notebooks")


def test_what_the_learner_left_alone_is_updated(second: Path, copy: Path) -> None:
    assert bring(second, copy, "2") == (False, [], {})
    assert _files(copy) == _files(second)


def test_running_a_lesson_does_not_change_it(first: Path, copy: Path) -> None:
    mine = _edit(copy / LESSON, "one", "")  # JupyterLab appends a cell after the last one
    assert changed(copy) == []
    assert bring(first, copy, "1") == (False, [], {})
    assert (copy / LESSON).read_bytes() == mine


def test_ids_indentation_and_metadata_are_no_change(first: Path, copy: Path) -> None:
    notebook = nbformat.read(first / LESSON, as_version=4)
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[0].update(id="other", metadata={"scrolled": True}, execution_count=7)
    (copy / LESSON).write_text(nbformat.writes(notebook, indent=4, sort_keys=False))
    assert changed(copy) == []


def test_a_lesson_that_was_only_run_is_updated_and_named(second: Path, copy: Path) -> None:
    _edit(copy / LESSON, "one")
    assert bring(second, copy, "2") == (False, [LESSON], {})
    assert _files(copy) == _files(second)


def test_outputs_stay_where_the_cells_are_the_same(tmp_path: Path, copy: Path) -> None:
    mine = _edit(copy / LESSON, "one")
    other: dict[str, Any] = {LESSON: _notebook("one", output="stored anew")}
    bring(_make(tmp_path / "next", **other), copy, "2")
    assert (copy / LESSON).read_bytes() == mine


def test_what_the_learner_wrote_is_kept(second: Path, copy: Path) -> None:
    mine = _edit(copy / LESSON, "one", "my own cell")
    assert changed(copy) == [LESSON]
    brought = bring(second, copy, "2")
    assert brought.kept == {LESSON: "00_a.new-2.ipynb"}
    assert (copy / LESSON).read_bytes() == mine
    assert (copy / "00_a.new-2.ipynb").read_bytes() == (second / LESSON).read_bytes()
    assert changed(copy) == [LESSON]


def test_a_new_version_is_put_beside_once(second: Path, copy: Path) -> None:
    _edit(copy / LESSON, "mine")
    bring(second, copy, "2")
    (copy / "00_a.new-2.ipynb").unlink()
    assert bring(second, copy, "2") == (False, [], {})
    assert not (copy / "00_a.new-2.ipynb").exists()


def test_a_new_version_is_never_put_over_anything(second: Path, copy: Path) -> None:
    _edit(copy / LESSON, "mine")
    beside = _edit(copy / "00_a.new-2.ipynb", "mine, too")
    assert bring(second, copy, "2").kept == {LESSON: "00_a.new-2-2.ipynb"}
    assert (copy / "00_a.new-2.ipynb").read_bytes() == beside


def test_taking_over_the_new_version_ends_the_difference(second: Path, copy: Path) -> None:
    _edit(copy / LESSON, "mine")
    bring(second, copy, "2")
    (copy / "00_a.new-2.ipynb").replace(copy / LESSON)
    assert bring(second, copy, "2") == (False, [], {})
    assert changed(copy) == []


def test_other_files_are_judged_by_all_that_they_hold(tmp_path: Path, copy: Path) -> None:
    (copy / PICTURE).write_bytes(b"drawn by me")
    other: dict[str, Any] = {PICTURE: b"new picture"}
    brought = bring(_make(tmp_path / "next", **other), copy, "2")
    assert brought.kept == {PICTURE: "a.new-2.png"}
    assert (copy / PICTURE).read_bytes() == b"drawn by me"
    assert (copy / "pictures/a.new-2.png").read_bytes() == b"new picture"


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"cells": 3}', b'{"cells": [{}]}', b"\xff"])
def test_a_broken_notebook_is_the_learner_s(second: Path, copy: Path, broken: bytes) -> None:
    (copy / LESSON).write_bytes(broken)
    assert list(bring(second, copy, "2").kept) == [LESSON]
    assert (copy / LESSON).read_bytes() == broken


def test_a_deleted_file_stays_away_until_it_is_wanted(
    first: Path, second: Path, copy: Path
) -> None:
    (copy / LESSON).unlink()
    bring(first, copy, "1")
    bring(second, copy, "2")
    assert not (copy / LESSON).exists()
    bring(second, copy, "2", LESSON)
    assert (copy / LESSON).read_bytes() == (second / LESSON).read_bytes()


def test_all_comes_back_when_nothing_is_left(first: Path, copy: Path) -> None:
    for name in _files(copy):
        (copy / name).unlink()
    assert bring(first, copy, "1").new
    assert _files(copy) == _files(first)


@pytest.mark.parametrize("manifest", [None, b"", b"[]", b'{"files": {"00_a.ipynb": 1}}', b"\xff"])
def test_without_a_manifest_all_is_the_learner_s(
    second: Path, copy: Path, manifest: bytes | None
) -> None:
    if manifest is None:
        (copy / MANIFEST).unlink()
    else:
        (copy / MANIFEST).write_bytes(manifest)
    before = _files(copy)
    assert bring(second, copy, "2").kept == {LESSON: "00_a.new-2.ipynb"}
    assert {name: _files(copy)[name] for name in before} == before


def test_other_files_of_the_folder_stay(tmp_path: Path, first: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("mine")
    (tmp_path / "own" / LESSON).mkdir()  # not even a file
    assert bring(first, tmp_path / "own", "1").kept == {LESSON: "00_a.new-1.ipynb"}
    assert (tmp_path / "own" / "thesis.tex").read_text() == "mine"


def test_a_file_in_place_of_the_folder(tmp_path: Path, first: Path) -> None:
    (tmp_path / "copy").write_text("mine")
    with pytest.raises(course.CourseError, match=r"copy is not a folder.*--folder"):
        bring(first, tmp_path / "copy", "1")
    assert (tmp_path / "copy").read_text() == "mine"


def test_a_file_in_place_of_a_folder_within(first: Path, copy: Path) -> None:
    for name in ("a.png", ""):
        path = copy / "pictures" / name
        path.unlink() if name else path.rmdir()
    (copy / "pictures").write_text("mine")
    with pytest.raises(course.CourseError, match="pictures is not a folder"):
        bring(first, copy, "1", PICTURE)
    assert (copy / "pictures").read_text() == "mine"


def test_a_folder_that_may_not_be_written(tmp_path: Path, first: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    done = _without_privileges(first, tmp_path / "locked")
    assert "cannot bring the lessons to" in done.stderr
    assert "Permission denied" in done.stderr
    assert not list((tmp_path / "locked").iterdir())


def test_a_copy_that_is_current_need_not_be_written(first: Path, copy: Path) -> None:
    copy.chmod(0o555)
    done = _without_privileges(first, copy)
    copy.chmod(0o755)
    assert "new=False" in done.stdout, done.stderr


def _without_privileges(course: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Bring a course in a process for which the permissions of files hold, even if we are root."""
    command = [sys.executable, "-c", UNPRIVILEGED, str(course), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_disk_that_is_full_half_way(second: Path, copy: Path) -> None:
    """A limit on the size of files stands for the disk: the picture does not fit any more."""
    mine = _edit(copy / LESSON, "mine")
    (second / PICTURE).write_bytes(b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(course.CourseError, match=r"a\.png: File too large.*Nothing of yours"):
            bring(second, copy, "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (copy / LESSON).read_bytes() == mine
    assert (copy / PICTURE).read_bytes() == b"picture"
    assert not list(copy.rglob("*.part"))
    assert bring(second, copy, "2").kept == {LESSON: "00_a.new-2.ipynb"}
    assert (copy / PICTURE).read_bytes() == b"x" * 100_000
    assert len(list(copy.glob("00_a*"))) == 2


def test_standing_in_a_copy(copy: Path) -> None:
    assert standing_in(copy) == standing_in(copy / "solutions") == copy
    assert standing_in(copy.parent) is None


def test_a_copy_is_written_with_the_usual_permissions(copy: Path) -> None:
    usual = os.umask(0o022)
    os.umask(usual)
    assert (copy / LESSON).stat().st_mode & 0o777 == 0o666 & ~usual
