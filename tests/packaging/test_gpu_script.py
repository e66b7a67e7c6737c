"""`benchmarks/gpu.sh` without a GPU: it runs through, skips what it must, and heeds no settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.run_notebook import run, run_cell
from tests.support.checkout import ROOT

# What a machine with a GPU need not have. A module of that name that cannot be imported hides it.
NOT_NEEDED = (
    *("IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyterlab", "nbformat"),
    *("nbclient", "nbval", "pytest_timeout", "ipyparallel", "accelerate"),
)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_the_script_needs_no_jupyter_and_brings_everything_back(tmp_path: Path) -> None:
    for name in NOT_NEEDED:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name}', name='{name}')")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts passed" in done.stdout
    assert "no GPU: NCCL cannot be measured" in done.stdout
    assert " skipped in " in (tmp_path / "out" / "tests.log").read_text()
    notebook = json.loads((tmp_path / "out" / "gpu.ipynb").read_text())
    text = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
    assert "[1.5, 1.5, 1.5, 1.5]" in text
    assert "skipped: GPUs needed: 1, found: 0" in text


def test_a_cell_gives_what_it_prints_its_last_value_and_its_pictures() -> None:
    source = "import matplotlib.pyplot as plt\nprint('hello')\nfig = plt.figure()\n6 * 7"
    printed, value, shown = run_cell(source, 3, {})
    assert printed["text"] == ["hello\n"]
    assert (value["data"]["text/plain"], value["execution_count"]) == (["42"], 3)
    assert shown["data"]["image/png"].startswith("iVBOR")  # the first bytes of every PNG


def test_a_cell_that_fails_is_counted_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    sources = ["x = 1", "raise ValueError('no')", "print(x)"]
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "metadata": {}, "source": source} for source in sources
    ]
    notebook = {"cells": cells}
    assert run(notebook) == 1
    assert cells[0]["outputs"] == []
    assert cells[1]["outputs"][0]["evalue"] == "no"
    assert cells[2]["outputs"][0]["text"] == ["1\n"]
