"""`ddp-lessons`: what the command takes, prints and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ddp_lessons
from ddp_lessons import cli, course
from ddp_lessons.copies import bring
from tests.test_course import ROOT

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

    monkeypatch.setattr(cli, "open_lesson", open_lesson)
    assert cli.main(given) == 0
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
    assert len(lines) == len(course.lessons(ROOT / "notebooks"))
    assert lines[5].startswith("05  distributed_sampler ")
    assert len({line.index(" min  ") for line in lines}) == 1
    assert "Who sees which sample?" in lines[5]
    assert "ddp-lessons/" in state
    assert not list(tmp_path.iterdir())


def test_the_list_tells_of_the_copy_and_of_changes(tmp_path: Path) -> None:
    copy = tmp_path / "ddp-lessons"
    bring(ROOT / "notebooks", copy, "1")
    _replace(copy / "05_distributed_sampler.ipynb", "set_epoch", "set_era")
    states = {_command("list", cwd=at).stdout[-200:] for at in (tmp_path, copy, copy / "solutions")}
    states.add(_command("list", "--folder", str(copy)).stdout[-200:])
    (state,) = states
    assert state.endswith(f"Your copy: {copy}\nChanged by you: 05\n")


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ddp-lessons").write_text("mine")
    done = _command("open", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ddp-lessons: cannot bring the lessons to ddp-lessons: ")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "ddp-lessons").read_text() == "mine"


def test_it_tells_what_an_update_did(tmp_path: Path) -> None:
    """A copy of an older course: one lesson changed by the learner, one only run."""
    changed, run = "05_distributed_sampler.ipynb", "06_data_parallel_by_hand.ipynb"
    older, copy = tmp_path / "older", tmp_path / "ddp-lessons"
    bring(ROOT / "notebooks", older, "0")
    for name in (changed, run):
        _replace(older / name, "samples", "SAMPLES")
    bring(older, copy, "0")
    _replace(copy / changed, "rank", "RANK")
    _replace(copy / run, '"execution_count": 1,', '"execution_count": 51,')
    told = open_without_packages("5", tmp_path).stdout.splitlines()
    version = ddp_lessons.__version__
    assert told == [
        f"Updated to {version}: {run}",
        "The outputs of your runs in it were replaced; run it again for yours.",
        f"Changed by you, so kept: {changed}",
        f"Version {version} is beside, as: 05_distributed_sampler.new-{version}.ipynb",
    ]
    assert not open_without_packages("5", tmp_path).stdout


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
