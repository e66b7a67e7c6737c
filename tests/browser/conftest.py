"""Fixtures of the tests in a browser: JupyterLab, Chromium, and notebooks open in it.

Without Chromium the tests are skipped, unless DDP_LESSONS_BROWSER=required.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

from tests.browser.pages import SIZES, Notebook
from tests.browser.server import Server

OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage"]  # it runs in containers, too

LAB, NOTEBOOK = FRONT_ENDS = "JupyterLab", "Notebook"

Open = Callable[..., Notebook]


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        needed = os.environ.get("DDP_LESSONS_BROWSER") == "required"
        (pytest.fail if needed else pytest.skip)("there is no chromium on this machine")
    return found


@pytest.fixture(scope="package")
def server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A JupyterLab server on a free port of this machine, for all tests in a browser."""
    with Server(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="package")
def playwright(chromium: str) -> Iterator[Playwright]:
    """The driver of browsers; it downloads nothing."""
    expect.set_options(timeout=30_000)  # milliseconds, on a busy machine
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def browser(chromium: str, playwright: Playwright) -> Iterator[Browser]:
    """A browser of the test's own: nothing of it may be left."""
    browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
    yield browser
    browser.close()


@pytest.fixture
def open_notebook(browser: Browser, server: Server) -> Iterator[Open]:
    """Opens notebooks, each in a tab; in the end no page may have had an error."""
    context = browser.new_context(viewport=SIZES["usual"])
    opened: list[Notebook] = []

    def open_notebook(path: str, front_end: str = LAB) -> Notebook:
        lab = front_end == LAB
        url = server.url(path, f"tab{len(opened)}") if lab else server.notebook_url(path)
        opened.append(Notebook(context, path, url))
        return opened[-1]

    yield open_notebook
    context.close()
    server.end_kernels()
    assert not [error for notebook in opened for error in notebook.errors]
