"""A lesson in JupyterLab: run all, and look at it."""

from __future__ import annotations

from tests.browser.conftest import Open


def test_run_all_of_the_first_lesson(open_notebook: Open) -> None:
    notebook = open_notebook("00_start_here.ipynb")
    notebook.start_all()
    notebook.wait_for_all()
    for cell in notebook.cells():
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        assert failed == ("raises-exception" in cell["tags"]), cell["source"]
    picture = notebook.show(notebook.find("plots.timeline")).locator("img")
    assert picture.evaluate("async img => { await img.decode(); return img.naturalWidth }") > 0
    notebook.picture("lesson_00")
