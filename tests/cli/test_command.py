"""`ddp-lessons`: the command's arguments, output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lessons.cli import command
from ddp_lessons.cli.lesson_copies import bring
from ddp_lessons.course import lesson_files
from tests.support.checkout import ROOT

pytestmark = pytest.mark.system

OPEN = """
import sys
sys.path.insert(0, {root!r})
from ddp_lessons.cli import main
sys.exit(main(["open", {lesson!r}]))
"""
HEAVY = {"torch", "numpy", "matplotlib", "ipywidgets", "jupyterlab"}


def _command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddp_lessons.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd
    )


def open_without_packages(lesson: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`open` in an interpreter without installed packages, so that no JupyterLab starts."""
    code = OPEN.format(root=str(ROOT), lesson=lesson)
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env={}
    )


def test_version() -> None:
    assert _command("--version").stdout.startswith("ddp-lessons 0.")


def test_help_names_every_command_and_gives_examples() -> None:
    text = _command("--help").stdout
    for name in ("open", "list", "doctor", "export"):
        assert f"\n    {name} " in text
    assert text.count("\n  ddp-lessons ") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cure"], "'cure'"),
        (["open", "7", "--gather-logs"], "go after --"),
        (["list", "--port", "8889"], "unrecognized arguments"),
        (["list", "--", "--port"], "list takes nothing after --"),
        (["open", "ddp_timming"], "Did you mean ddp_timing"),
        (["open", "99"], "there is no lesson '99'"),
    ],
)
def test_what_it_does_not_take(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = _command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "jupyters"),
    [
        (["--allow-root"], ["--allow-root"]),
        (["open", "7", "--port", "8889"], ["--port", "8889"]),
        (["--port=8889", "open", "7", "--no-browser"], ["--no-browser", "--port=8889"]),
        (["--LabApp.collaborative=1", "--ip", "::1"], ["--LabApp.collaborative=1", "--ip", "::1"]),
        (["--debug", "open", "7", "--", "--gather"], ["--debug", "--gather"]),
        (["--folder", "here", "--allow-root"], ["--allow-root"]),
    ],
)
def test_options_of_jupyterlab(
    given: list[str], jupyters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []

    def open_lesson(_: str, __: Path, options: list[str]) -> int:
        taken.append(options)
        return 0

    monkeypatch.setattr(command, "open_lesson", open_lesson)
    assert command.main(given) == 0
    assert taken == [jupyters]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["list"], ["open", "99"]])
def test_nothing_heavy_is_loaded(tmp_path: Path, arguments: list[str]) -> None:
    code = f"import sys\nfrom ddp_lessons.cli import main\ntry: main({arguments})\n"
    code += "except SystemExit: pass\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_the_list_is_aligned_and_knows_of_no_copy(tmp_path: Path) -> None:
    *lines, _, state = _command("list", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == len(lesson_files.lessons(ROOT / "notebooks"))
    (line,) = [line for line in lines if line.startswith("05      distributed_sampler ")]
    assert len({line.index(" min  ") for line in lines}) == 1
    assert "Who sees which sample?" in line
    assert "ddp-lessons/" in state
    assert not list(tmp_path.iterdir())


def test_the_course_is_copied_without_opening_it(tmp_path: Path) -> None:
    assert "now in ddp-lessons/" in _command("copy", cwd=tmp_path).stdout
    assert (tmp_path / "ddp-lessons" / "00_start_here.ipynb").exists()
    assert _command("copy", cwd=tmp_path).stdout == ""


def test_progress_is_shown_by_lesson(tmp_path: Path) -> None:
    copy = tmp_path / "ddp-lessons"
    bring(ROOT / "notebooks", copy, "")
    kept = tmp_path / "ddp-lessons-progress.json"
    assert f"will be kept in {kept}" in _command("progress", cwd=tmp_path).stdout
    done = {"passed": True, "tries": 1}
    kept.write_text(json.dumps({"predictions": {}, "exercises": {"barriers.check_load": done}}))
    for place in (tmp_path, copy, copy / "solutions"):
        said = _command("progress", cwd=place).stdout
        (line,) = [line for line in said.splitlines() if line.startswith("04 ")]
        assert line.split()[1:3] == ["barriers", "0"]
        assert line.endswith(" 1 of 3")
        assert f"kept in {kept}" in said
    kept.write_text("{")
    refused = _command("progress", cwd=tmp_path)
    assert refused.returncode == 2
    assert str(kept) in refused.stderr


def test_a_lesson_is_reset(tmp_path: Path) -> None:
    assert _command("reset", "5", cwd=tmp_path).returncode == 2
    copy = tmp_path / "ddp-lessons"
    bring(ROOT / "notebooks", copy, "")
    _replace(copy / "05_distributed_sampler.ipynb", "set_epoch", "set_era")
    said = _command("reset", "5", cwd=tmp_path).stdout
    assert "yours is now 05_distributed_sampler-old-1.ipynb" in said
    assert "Changed by you: none" in _command("list", cwd=tmp_path).stdout
    assert "set_era" in (copy / "05_distributed_sampler-old-1.ipynb").read_text()


def test_the_list_tells_of_the_copy_and_of_changes(tmp_path: Path) -> None:
    copy = tmp_path / "ddp-lessons"
    bring(ROOT / "notebooks", copy, "00_start_here.ipynb")
    _replace(copy / "05_distributed_sampler.ipynb", "set_epoch", "set_era")
    states = {_command("list", cwd=at).stdout[-200:] for at in (tmp_path, copy, copy / "solutions")}
    states.add(_command("list", "--folder", str(copy)).stdout[-200:])
    (state,) = states
    assert state.endswith(f"Your copy: {copy}\nChanged by you: 05\n")


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ddp-lessons").write_text("mine")
    done = _command("open", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ddp-lessons: cannot copy the lessons to ddp-lessons/")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "ddp-lessons").read_text() == "mine"


def test_a_new_version_is_a_new_folder_of_which_it_tells(tmp_path: Path) -> None:
    """The learner changed a lesson of an older course; the command runs inside that copy."""
    lesson, older, copy = "05_distributed_sampler.ipynb", tmp_path / "older", tmp_path / "lessons"
    bring(ROOT / "notebooks", older, lesson)
    _replace(older / lesson, "samples", "SAMPLES")
    bring(older, copy, lesson)
    _replace(copy / lesson, "rank", "RANK")
    mine = (copy / lesson).read_bytes()
    assert "No copy of these lessons yet" in _command("list", cwd=copy).stdout
    told = open_without_packages("5", copy).stdout.splitlines()
    assert told == [
        f"The lessons are now in {copy}-2/, for you to change.",
        f"{copy}/ holds another version, or files of your own, and stays as it is.",
    ]
    assert (copy / lesson).read_bytes() == mine
    assert (tmp_path / "lessons-2" / lesson).exists()
    assert not open_without_packages("5", copy).stdout
    assert f"Your copy: {copy}-2\nChanged by you: none" in _command("list", cwd=copy).stdout


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
