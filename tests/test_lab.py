"""The command line and the settings with which JupyterLab starts; `test_wheel.py` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lessons import lab
from tests.test_course import ROOT

CODE = """
import sys
sys.path.insert(0, {root!r})
from ddp_lessons.cli import main
sys.exit(main(["open", "3"]))
"""


def test_the_learner_s_options_come_last(tmp_path: Path) -> None:
    command = lab.command(tmp_path / "a b", "00_start_here.ipynb", ["--port", "8889"])
    assert command[0] == sys.executable
    assert f"--ServerApp.root_dir={tmp_path / 'a b'}" in command
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command
    assert command[-2:] == ["--port", "8889"]
    assert not any(word in " ".join(command) for word in ("token", "--ip", "password"))


def test_settings_come_after_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lab.PATH, raising=False)
    assert lab.environment()[lab.PATH] == str(lab.SETTINGS)
    monkeypatch.setenv(lab.PATH, "/own")
    assert lab.environment()[lab.PATH] == f"/own{os.pathsep}{lab.SETTINGS}"
    (defaults,) = lab.SETTINGS.rglob("*.json")
    assert list(json.loads(defaults.read_text()).values()) == [{"fetchNews": "false"}]


def test_without_jupyterlab_it_says_what_to_install(tmp_path: Path) -> None:
    """In an interpreter without any installed packages; the lessons are copied all the same."""
    command = [sys.executable, "-S", "-c", CODE.format(root=str(ROOT))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == "ddp-lessons: JupyterLab is not installed: pip install jupyterlab\n"
    assert (tmp_path / "ddp-lessons" / "03_collectives.ipynb").exists()
