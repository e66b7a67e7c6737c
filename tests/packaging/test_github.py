"""The workflows and issue forms are what GitHub reads, and name what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ddp_lessons
from tests.support.checkout import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_githubs_schema(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_there(path: Path) -> None:
    commands = [step.get("run", "") for job in read(path)["jobs"].values() for step in job["steps"]]
    named = re.findall(r"(?:tests|\.ci)/[\w/.]+|tests(?:\.\w+)+", " ".join(commands))
    for name in named:
        assert (ROOT / name).exists() or (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    assert named or path.stem == "release"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_what_it_must(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in form["body"])


def test_a_report_of_a_bug_comes_with_doctors_output() -> None:
    asked = {part["id"]: part for part in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    assert "ddp-lessons doctor" in asked["doctor"]["attributes"]["label"]
    assert asked["doctor"]["validations"]["required"]


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["Unreleased", ddp_lessons.__version__]
