"""A JupyterLab server for tests in a browser: a copy of the lessons, and notebooks made for tests.

It runs the package of this checkout, with the token that the server itself made.
"""

from __future__ import annotations

import os
import textwrap
import urllib.parse
from pathlib import Path
from typing import Self

import matplotlib
import nbformat
import psutil

from ddp_lessons.cli import jupyterlab
from ddp_lessons.cli.lesson_copies import bring
from tests.support import checkout, servers

NOTEBOOK_TOO = "--JupyterNotebookApp.expose_app_in_browser=True"


class Server(servers.Server):
    """JupyterLab as a context manager, on a copy of the lessons."""

    def __init__(self, folder: Path) -> None:
        command = (*servers.LAB, "--expose-app-in-browser", NOTEBOOK_TOO)
        super().__init__(folder, folder / "lessons", command, env=_environment())

    def __enter__(self) -> Self:
        bring(checkout.ROOT / "notebooks", self.root, "")
        return super().__enter__()

    def write(self, name: str, *cells: str) -> str:
        """Make a notebook with these code cells; its path."""
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        notebook.cells = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in cells]
        nbformat.write(notebook, self.root / f"{name}.ipynb")
        return f"{name}.ipynb"

    def url(self, path: str, workspace: str = "default") -> str:
        """The address of a notebook in a fresh workspace, with the token to log in."""
        place = f"{self.address}/lab/workspaces/{workspace}/tree/{urllib.parse.quote(path)}"
        return f"{place}?reset&token={self.token}"

    def notebook_url(self, path: str) -> str:
        """The same in Notebook 7, which the same server has."""
        return f"{self.address}/notebooks/{urllib.parse.quote(path)}?token={self.token}"

    def kernels(self) -> dict[str, psutil.Process]:
        """The process of each kernel, by its id."""
        return {kernel["id"]: self._process_of(kernel["id"]) for kernel in self.ask("kernels")}

    def _process_of(self, kernel_id: str) -> psutil.Process:
        children = psutil.Process(self.pid).children()
        return next(c for c in children if kernel_id in " ".join(c.cmdline()))

    def end_kernels(self) -> None:
        """Shut every kernel down, as the page does."""
        for kernel_id in [kernel["id"] for kernel in self.ask("kernels")]:
            self.ask(f"kernels/{kernel_id}", "DELETE")


def _environment() -> dict[str, str]:
    """That of the command `ddp-lessons`; pictures of a cell are live, as for a learner."""
    path = os.pathsep.join(filter(None, (str(checkout.ROOT), os.environ.get("PYTHONPATH"))))
    fonts = matplotlib.get_cachedir()  # to find all fonts takes seconds
    kept = {
        name: value
        for name, value in jupyterlab.environment().items()
        if name != "DDP_LESSONS_LIVE"
    }
    return {**kept, "PYTHONPATH": path, "MPLCONFIGDIR": fonts}
