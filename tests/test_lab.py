"""The command line and the settings with which JupyterLab starts; `test_wheel.py` starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ddp_lessons import lab
from tests.test_cli import open_without_packages


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
    """The lessons are copied all the same: there are other programs for notebooks."""
    done = open_without_packages("3", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ddp-lessons: JupyterLab is not installed: pip install jupyterlab\n"
    assert (tmp_path / "ddp-lessons" / "03_collectives.ipynb").exists()
