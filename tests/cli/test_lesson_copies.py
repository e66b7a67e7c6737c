"""The learner's copy: made once for each version, and never overwritten."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4

from ddp_lessons.cli import lesson_copies
from ddp_lessons.cli.lesson_copies import (
    bring,
    changed,
    find_copy,
    is_copy,
    reset,
)
from ddp_lessons.course import lesson_files
from ddp_lessons.course.progress import MARKER, containing
from tests.support.checkout import ROOT

LESSON, PICTURE = "00_a.ipynb", "pictures/a.png"
BRING = """
import sys
from pathlib import Path
from ddp_lessons.cli.lesson_copies import bring
print("new:", bring(*map(Path, sys.argv[1:]), "00_a.ipynb"))
"""
# Root's CAP_DAC_OVERRIDE, which ignores permissions, is dropped at the next exec.
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
    """Version 2: the lesson has other cells, and there is one more lesson."""
    contents: dict[str, Any] = {LESSON: _notebook("two"), "01_b.ipynb": _notebook("new")}
    return _make(tmp_path / "second", **contents)


@pytest.fixture
def copy(tmp_path: Path, first: Path) -> Path:
    """A copy of version 1."""
    assert _open(first, tmp_path / "copy") == (tmp_path / "copy", True)
    return tmp_path / "copy"


def _open(course: Path, folder: Path, wanted: str = LESSON) -> tuple[Path, bool]:
    """Find and make the copy as `ddp-lessons open` does; its folder, and whether it is new."""
    copy = find_copy(course, folder)
    return copy, bring(course, copy, wanted)


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _copied(course: Path) -> dict[str, bytes]:
    """The files of a course as a copy has them: lessons without outputs, for this Python."""
    found = _files(course)
    for name in found:
        if name.endswith(".ipynb") and "/" not in name:
            notebook = json.loads(found[name])
            for cell in notebook["cells"]:
                cell.update(execution_count=None, outputs=[])
            notebook["metadata"] = {
                "kernelspec": lesson_copies.KERNEL,
                "language_info": lesson_copies.LANGUAGE,
            }
            text = json.dumps(notebook, indent=1, ensure_ascii=False)
            found[name] = f"{text}\n".encode()
    return found


def _edit(path: Path, *sources: str, output: str = "run again") -> bytes:
    path.write_bytes(content := _notebook(*sources, output=output))
    return content


def test_a_copy_holds_the_course(first: Path, copy: Path) -> None:
    assert _files(copy) == _copied(first)
    assert is_copy(first, copy)
    assert changed(first, copy) == []


def test_opening_it_again_touches_nothing(first: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert _open(first, copy) == (copy, False)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_the_real_course_is_copied_whole(tmp_path: Path) -> None:
    _open(lesson_files.source(), tmp_path / "copy")
    assert sorted(_files(tmp_path / "copy")) == lesson_files.files(ROOT / "notebooks")


def test_no_lesson_of_a_copy_shows_its_outputs_but_the_appendix_and_solutions_do(
    tmp_path: Path,
) -> None:
    _open(lesson_files.source(), tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        shown = any(cell.get("outputs") for cell in cells)
        assert shown == (path.parent.name == "solutions" or path.name == "gpu.ipynb"), path


def test_the_copy_names_the_kernel_that_jupyterlab_will_start() -> None:
    from ipykernel.ipkernel import IPythonKernel
    from ipykernel.kernelspec import get_kernel_dict

    assert IPythonKernel.language_info == lesson_copies.LANGUAGE
    assert lesson_copies.KERNEL["display_name"] == get_kernel_dict()["display_name"]


def test_a_lesson_begins_afresh_and_the_learner_s_own_stays_beside_it(
    first: Path, copy: Path
) -> None:
    for number in (1, 2):
        mine = _edit(copy / LESSON, "my own")
        assert reset(first, copy, LESSON) == f"00_a-old-{number}.ipynb"
        assert (copy / f"00_a-old-{number}.ipynb").read_bytes() == mine
        assert (copy / LESSON).read_bytes() == _copied(first)[LESSON]
    assert is_copy(first, copy)


def test_what_is_not_there_cannot_begin_afresh(first: Path, copy: Path) -> None:
    (copy / LESSON).unlink()
    with pytest.raises(lesson_files.CommandError, match=r"00_a\.ipynb: No such file"):
        reset(first, copy, LESSON)


def test_what_the_learner_wrote_is_kept_and_named(first: Path, copy: Path) -> None:
    mine = _edit(copy / LESSON, "one", "my own cell")
    (copy / PICTURE).write_bytes(b"drawn by me")
    assert _open(first, copy) == (copy, False)
    assert (copy / LESSON).read_bytes() == mine
    assert (copy / PICTURE).read_bytes() == b"drawn by me"
    assert changed(first, copy) == [LESSON, PICTURE]


def test_running_a_lesson_does_not_change_it(first: Path, copy: Path) -> None:
    mine = _edit(copy / LESSON, "one", "")  # JupyterLab appends a cell after the last one
    assert changed(first, copy) == []
    assert _open(first, copy) == (copy, False)
    assert (copy / LESSON).read_bytes() == mine


def test_ids_indentation_and_metadata_are_no_change(first: Path, copy: Path) -> None:
    notebook = nbformat.read(first / LESSON, as_version=4)
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[0].update(id="other", metadata={"scrolled": True}, execution_count=7)
    (copy / LESSON).write_text(nbformat.writes(notebook, indent=4, sort_keys=False))
    assert changed(first, copy) == []


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"cells": 3}', b'{"cells": [{}]}', b"\xff"])
def test_a_broken_notebook_is_the_learner_s(first: Path, copy: Path, broken: bytes) -> None:
    (copy / LESSON).write_bytes(broken)
    assert changed(first, copy) == [LESSON]
    assert _open(first, copy) == (copy, False)
    assert (copy / LESSON).read_bytes() == broken


def test_a_new_version_is_a_new_folder_beside(second: Path, copy: Path) -> None:
    _edit(copy / LESSON, "one", "my own cell")
    _edit(copy / "solutions" / LESSON, "solved")  # only run
    (copy / "own.ipynb").write_text("mine")
    before = _files(copy)
    beside = copy.with_name("copy-2")
    assert _open(second, copy) == (beside, True)
    assert _files(copy) == before
    assert _files(beside) == _copied(second)
    assert _open(second, copy) == (beside, False)
    assert _open(second, beside) == (beside, False)


def test_every_version_has_a_folder(tmp_path: Path, first: Path, second: Path, copy: Path) -> None:
    third: dict[str, Any] = {LESSON: _notebook("three")}
    beside, _ = _open(second, copy)
    assert _open(_make(tmp_path / "third", **third), beside) == (copy.with_name("copy-3"), True)
    assert _open(first, copy) == (copy, False)  # an older version, installed again
    assert _files(beside) == _copied(second)


def test_a_version_with_the_same_lessons_needs_no_folder(tmp_path: Path, copy: Path) -> None:
    assert _open(_make(tmp_path / "next"), copy) == (copy, False)


def test_a_relative_folder_has_its_neighbours(
    second: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert find_copy(second, Path(".")) == copy.with_name("copy-2")


def test_a_deleted_file_stays_away_until_it_is_wanted(first: Path, copy: Path) -> None:
    for name in (LESSON, PICTURE):
        (copy / name).unlink()
    assert _open(first, copy, "solutions/00_a.ipynb") == (copy, False)
    assert not (copy / LESSON).exists()
    assert _open(first, copy, LESSON) == (copy, False)
    assert (copy / LESSON).read_bytes() == _copied(first)[LESSON]
    assert not (copy / PICTURE).exists()


def test_all_comes_back_when_nothing_is_left(first: Path, copy: Path) -> None:
    for name in _files(copy):
        (copy / name).unlink()
    assert _open(first, copy) == (copy, True)
    assert _files(copy) == _copied(first)


@pytest.mark.parametrize("marker", [None, b"", b"other", b"\xff"])
def test_without_its_marker_a_changed_copy_is_the_learner_s(
    first: Path, copy: Path, marker: bytes | None
) -> None:
    _edit(copy / LESSON, "mine")
    (copy / MARKER).unlink() if marker is None else (copy / MARKER).write_bytes(marker)
    before = _files(copy)
    assert _open(first, copy) == (copy.with_name("copy-2"), True)
    assert _files(copy) == before


def test_other_files_of_the_folder_stay(tmp_path: Path, first: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("mine")
    assert _open(first, tmp_path / "own") == (tmp_path / "own", True)
    assert (tmp_path / "own" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_folder_with_files_of_the_same_names_is_left_alone(
    tmp_path: Path, first: Path, kind: str
) -> None:
    (own := tmp_path / "own").mkdir()
    if kind == "file":
        (own / LESSON).write_text("mine")
    elif kind == "folder":
        (own / LESSON).mkdir()
    else:
        (own / LESSON).symlink_to("nowhere")
    assert _open(first, own) == (tmp_path / "own-2", True)
    assert [path.name for path in own.iterdir()] == [LESSON]


def test_a_file_in_place_of_the_folder(tmp_path: Path, first: Path) -> None:
    (tmp_path / "copy").write_text("mine")
    with pytest.raises(lesson_files.CommandError, match=r"copy is not a folder.*--folder"):
        _open(first, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "mine"


def test_a_file_in_place_of_a_folder_within(first: Path, copy: Path) -> None:
    for name in ("a.png", ""):
        path = copy / "pictures" / name
        path.unlink() if name else path.rmdir()
    (copy / "pictures").write_text("mine")
    with pytest.raises(lesson_files.CommandError, match="pictures is not a folder"):
        _open(first, copy, PICTURE)
    assert (copy / "pictures").read_text() == "mine"


@pytest.mark.system
def test_a_folder_that_may_not_be_written(tmp_path: Path, first: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    done = _without_privileges(first, tmp_path / "locked")
    assert "cannot copy the lessons to" in done.stderr
    assert "Permission denied" in done.stderr
    assert not list((tmp_path / "locked").iterdir())


@pytest.mark.system
def test_a_copy_that_is_current_need_not_be_written(first: Path, copy: Path) -> None:
    copy.chmod(0o555)
    done = _without_privileges(first, copy)
    copy.chmod(0o755)
    assert "new: False" in done.stdout, done.stderr


def _without_privileges(course: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Copy a course in a process that obeys file permissions, even as root."""
    command = [sys.executable, "-c", UNPRIVILEGED, str(course), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


def test_a_disk_that_is_full_half_way(second: Path, copy: Path) -> None:
    """A limit on file size stands for a full disk: the picture does not fit."""
    mine = _edit(copy / LESSON, "mine")
    (second / PICTURE).write_bytes(b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            lesson_files.CommandError, match=r"a\.png: File too large.*Nothing of yours"
        ):
            _open(second, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (copy / LESSON).read_bytes() == mine
    assert (copy / PICTURE).read_bytes() == b"picture"
    beside = copy.with_name("copy-2")
    assert not list(beside.rglob("*.part"))
    assert not is_copy(second, beside)
    assert _open(second, copy) == (beside, False)  # completed
    assert _files(beside) == _copied(second)
    assert is_copy(second, beside)


def test_the_copy_that_contains_a_folder(copy: Path) -> None:
    assert containing(copy) == containing(copy / "solutions") == copy
    assert containing(copy.parent) is None


def test_a_copy_is_written_with_the_usual_permissions(copy: Path) -> None:
    usual = os.umask(0o022)
    os.umask(usual)
    assert (copy / LESSON).stat().st_mode & 0o777 == 0o666 & ~usual
