"""The command line and the settings with which JupyterLab starts; `test_wheel.py` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lessons.cli import jupyterlab
from tests.cli.test_command import open_without_packages


def test_the_learner_s_options_come_last(tmp_path: Path) -> None:
    command = jupyterlab.command(tmp_path / "a b", "00_start_here.ipynb", ["--port", "8889"])
    assert command[0] == sys.executable
    assert f"--ServerApp.root_dir={tmp_path / 'a b'}" in command
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command
    assert command[-2:] == ["--port", "8889"]
    assert not any(word in " ".join(command) for word in ("token", "--ip", "password"))


def test_settings_come_after_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(jupyterlab.PATH, raising=False)
    assert jupyterlab.environment()[jupyterlab.PATH] == str(jupyterlab.SETTINGS)
    monkeypatch.setenv(jupyterlab.PATH, "/own")
    assert jupyterlab.environment()[jupyterlab.PATH] == f"/own{os.pathsep}{jupyterlab.SETTINGS}"
    (defaults,) = jupyterlab.SETTINGS.rglob("*.json")
    assert list(json.loads(defaults.read_text()).values()) == [{"fetchNews": "false"}]


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_root_is_told_in_one_line_what_to_add(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddp_lessons.cli", "--folder", str(tmp_path / "copy")]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "ddp-lessons: you are root, for whom JupyterLab starts only if told so: "
        "ddp-lessons --allow-root"
    ]


def test_root_may_where_an_option_or_a_setting_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    assert jupyterlab._root_may(["--no-browser", "--allow-root"])
    assert jupyterlab._root_may(["--ServerApp.allow_root=True"])
    assert not jupyterlab._root_may(["--no-browser"])
    (tmp_path / "jupyter_server_config.py").write_text("c.ServerApp.allow_root = True")
    assert jupyterlab._root_may([])


@pytest.mark.system
def test_without_jupyterlab_it_says_what_to_install(tmp_path: Path) -> None:
    """The lessons are copied anyway: other programs can open notebooks."""
    done = open_without_packages("3", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ddp-lessons: JupyterLab is not installed: pip install jupyterlab\n"
    assert (tmp_path / "ddp-lessons" / "03_collectives.ipynb").exists()
