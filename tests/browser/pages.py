"""A notebook in a real browser, for tests: do what a learner does, and see what a learner sees."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    TimeoutError,
    ViewportSize,
    expect,
)

from tests.support.checkout import ROOT

SCREENSHOTS = ROOT / "build" / "screenshots"
CLICK = 20_000  # milliseconds until a click is possible
READY, RUN = 60_000, 90_000  # until a kernel is there; until a notebook has run

# JupyterLab asks the kernel of a tab for its debugger also as the tab closes, which cancels the
# question; it logs that as an error.
_CANCELLED = "Could not restore the debugger state: Canceled future"
# One of these comes with every page of Notebook 7.6, whatever is in it.
_OF_NOTEBOOK = (
    "Cannot read properties of undefined (reading 'schema')",
    "Command 'filebrowser:open-path' not registered.",
)
_IDLE = """() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status
    === 'idle'"""
_CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map(cell => ({
    kind: cell.model.type,
    source: cell.model.sharedModel.getSource(),
    tags: cell.model.getMetadata('tags') ?? [],
    count: cell.model.executionCount ?? null,
    outputs: cell.model.outputs?.toJSON() ?? [],
}))"""
_RAN = """number =>
    jupyterapp.shell.currentWidget.content.widgets[number].model.executionCount !== null"""
_ALL_RAN = """() => jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type === 'code')
    .every(cell => cell.model.executionCount !== null)"""

SIZES = {  # of windows; at 200 %, a window of the usual size has half as many pixels of CSS
    "usual": ViewportSize(width=1280, height=900),
    "narrow": ViewportSize(width=700, height=900),
    "200_percent": ViewportSize(width=640, height=450),
}
_INSIDE = """() => jupyterapp.shell.currentWidget.node.getBoundingClientRect().right
    <= window.innerWidth"""
# Elements of outputs that clip what they hold, and pictures that are wider than their output.
_CUT_OFF = """() => [...document.querySelectorAll('.jp-OutputArea-output')].flatMap(output => {
    const edge = output.getBoundingClientRect().right + 1;
    const clips = e => e === output || getComputedStyle(e).overflowX !== 'visible';
    return [output, ...output.querySelectorAll('*')].filter(e => e.tagName === 'IMG'
        ? e.getBoundingClientRect().right > edge
        : clips(e) && !e.closest('.noUi-target') && e.scrollWidth > e.clientWidth + 1);
}).map(e => `${e.tagName} ${e.className}: ${e.textContent.slice(0, 80)}`)"""


class Notebook:
    """One tab with one notebook, its kernel ready."""

    def __init__(self, context: BrowserContext, path: str, url: str) -> None:
        self.name = Path(path).stem
        self.errors: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(CLICK)
        self.page.on("pageerror", self._failed)
        self.page.on("console", self._said)
        self.page.goto(url, timeout=READY)
        self.page.wait_for_function(_IDLE, timeout=READY)

    def _failed(self, error: Error) -> None:
        if str(error) not in _OF_NOTEBOOK:
            self.errors.append(f"{error}")

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(_CANCELLED):
            self.errors.append(f"{message.text} {message.location.get('url', '')}")

    def menu(self, menu: str, entry: str) -> None:
        """Click an entry of the menu bar."""
        self.page.get_by_role("menubar").get_by_text(menu, exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile(f"^{re.escape(entry)}")).click()

    def run(self, number: int) -> None:
        """Begin to run one cell."""
        self.show(number)
        self.menu("Run", "Run Selected Cell and Do not Advance")

    def forget(self) -> None:
        """Clear the stored outputs, and with them the numbers that say that a cell has run."""
        self.menu("Edit", "Clear Outputs of All Cells")

    def start_all(self) -> None:
        """Forget the stored outputs, and run all cells."""
        self.forget()
        self.menu("Run", "Run All Cells")

    def wait_for(self, number: int) -> None:
        """Wait until a cell has run."""
        self.page.wait_for_function(_RAN, arg=number, timeout=RUN)
        self.page.wait_for_function(_IDLE, timeout=RUN)

    def wait_for_all(self) -> None:
        """Wait until every cell has run."""
        self.page.wait_for_function(_ALL_RAN, timeout=RUN)
        self.page.wait_for_function(_IDLE, timeout=RUN)

    def cells(self) -> list[dict[str, Any]]:
        """Kind, source, tags, execution count and outputs of every cell."""
        found: list[dict[str, Any]] = self.page.evaluate(_CELLS)
        return found

    def show(self, number: int) -> Locator:
        """Bring a cell into view, and wait until it is drawn; the cell."""
        self.page.evaluate(
            """async number => {
                const notebook = jupyterapp.shell.currentWidget.content;
                notebook.activeCellIndex = number;
                await notebook.scrollToItem(number, 'start');
            }""",
            number,
        )
        expect(self.cell(number)).to_be_visible()
        return self.cell(number)

    def cell(self, number: int) -> Locator:
        """A cell, which is on the page only while it is in view or nearby."""
        return self.page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{number}']")

    def find(self, text: str) -> int:
        """The number of the only cell whose source has this text."""
        (number,) = (n for n, cell in enumerate(self.cells()) if text in cell["source"])
        return number

    def resize(self, name: str) -> None:
        """Make the window another size; in the smallest, without the list of files beside it."""
        self.page.set_viewport_size(SIZES[name])
        files = self.page.locator("#filebrowser")
        if name == "200_percent" and files.is_visible():
            self.page.keyboard.press("Control+b")
            expect(files).not_to_be_visible()
        self.page.wait_for_function(_INSIDE)

    def check_that_all_fits(self) -> None:
        """Nothing of the outputs on the page is cut off, as soon as all is laid out."""
        with contextlib.suppress(TimeoutError):
            self.page.wait_for_function(f"() => !({_CUT_OFF})().length", timeout=CLICK)
        assert self.page.evaluate(_CUT_OFF) == []

    def wait_for_panel(self, number: int, ranks: int, text: str) -> Locator:
        """The panel of a run in a cell, once each of its ranks has printed the text."""
        panel = self.cell(number).locator(".jp-OutputArea-output table")
        expect(panel.locator("tr", has_text=text)).to_have_count(ranks, timeout=READY)
        return panel

    def picture(self, name: str) -> None:
        """Store what is on the screen."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    def add_first(self, source: str) -> None:
        """Put a code cell before all others."""
        self.page.evaluate(
            """source => jupyterapp.shell.currentWidget.model.sharedModel.insertCell(
                0, {cell_type: 'code', source, metadata: {}})""",
            source,
        )
