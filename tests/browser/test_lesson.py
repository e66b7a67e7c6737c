"""Lessons in JupyterLab: Run All, and look at it."""

from __future__ import annotations

import pytest

from tests.browser.conftest import Open
from tests.browser.pages import Notebook

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("browser")]


def test_two_lessons_run_side_by_side(open_notebook: Open) -> None:
    notebooks = [open_notebook(name) for name in ("00_start_here.ipynb", "03_collectives.ipynb")]
    for notebook in notebooks:
        notebook.start_all()
    for notebook in notebooks:
        notebook.wait_for_all()
        assert_failed_as_meant(notebook)
        notebook.picture(f"side_by_side_{notebook.name}")
    first = notebooks[0]
    cell = first.show(first.find("plots.timeline"))
    picture = cell.get_by_role("img", name="Four ranks and one all_reduce")
    assert picture.evaluate("async img => { await img.decode(); return img.naturalWidth }") > 0
    first.picture("lesson_00")


def assert_failed_as_meant(notebook: Notebook) -> None:
    """Every cell ran; those that are meant to fail did, and no others."""
    for cell in notebook.cells():
        assert (cell["kind"] == "code") == (cell["count"] is not None)
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        assert failed == ("raises-exception" in cell["tags"]), cell["source"]
