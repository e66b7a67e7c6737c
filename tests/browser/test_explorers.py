"""Explorers in JupyterLab: moved by keyboard, and with names that a screen reader can say."""

from __future__ import annotations

from tests.browser.conftest import Open
from tests.browser.server import Server

ALL = """
    from IPython.display import display
    from tests.test_widgets import EXPLORERS

    for explore, _ in EXPLORERS.values():
        display(explore())
"""


def test_names(open_notebook: Open, server: Server) -> None:
    notebook = open_notebook(server.write("all", ALL))
    notebook.start_all()
    notebook.wait_for_all()
    cell = notebook.show(0)
    print(cell.locator(".jp-OutputArea").first.aria_snapshot())
    notebook.picture("explorers")
    for s in cell.locator(".widget-slider").all()[:1]:
        print(s.evaluate("e=>e.outerHTML"))
    for s in cell.locator(".widget-dropdown").all()[:1]:
        print(s.evaluate("e=>e.outerHTML"))
    for s in cell.locator(".widget-checkbox").all()[:1]:
        print(s.evaluate("e=>e.outerHTML"))
