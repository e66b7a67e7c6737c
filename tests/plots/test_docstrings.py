"""Shared docstring parts of the plots: complete as shown, absent without docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from ddp_lessons import plots
from ddp_lessons.plots.docstrings import PARTS


@pytest.mark.parametrize("name", plots.__all__)
def test_every_part_is_inserted(name: str) -> None:
    text = inspect.getdoc(getattr(plots, name)) or ""
    assert PARTS["title"] in text
    assert PARTS["ax"] in text
    assert "{" not in text


@pytest.mark.slow
@pytest.mark.system
def test_plots_work_without_docstrings() -> None:
    code = "from ddp_lessons import plots; print(plots.timeline.__doc__)"
    command = [sys.executable, "-OO", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "None"
