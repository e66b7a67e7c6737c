"""A JupyterLab server as a learner starts it, for tests: its own home, a copy of the lessons.

It runs the package of this checkout, with the token that the server itself made.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import matplotlib
import nbformat
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
NEWS = "@jupyterlab/apputils-extension:announcements"  # its pop-up asks on the first start
START = 60.0  # seconds that the server may take to say its address
END = 20.0  # seconds that it may take to end all kernels and itself
_ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)")
_OPTIONS = (
    "--no-browser",
    "--allow-root",
    "--expose-app-in-browser",
    "--ServerApp.port=0",  # a free one
    "--ServerApp.port_retries=0",
)


class Server:
    """JupyterLab as a context manager; `address` and `token` are those that it printed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "lessons"
        self._home = folder / "home"
        self.address = self.token = ""
        self.lines: list[str] = []
        self._found: queue.Queue[tuple[str, str]] = queue.Queue()

    def __enter__(self) -> Server:
        shutil.copytree(ROOT / "notebooks", self.root)
        settings = self._home / "jupyter" / "labconfig" / "page_config.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({"disabledExtensions": {NEWS: True}}))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *_OPTIONS, f"--ServerApp.root_dir={self.root}"],
            env=self._environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,))
        self._reader.start()
        try:
            self.address, self.token = self._found.get(timeout=START)
        except queue.Empty:
            self.__exit__(None, None, None)
            raise AssertionError("JupyterLab did not start:\n" + "".join(self.lines)) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._reader.join()

    def _environment(self) -> dict[str, str]:
        """Ours, with a home of its own; pictures of a cell are live, as for a learner."""
        own = {
            "HOME": self._home,
            "JUPYTER_CONFIG_DIR": self._home / "jupyter",
            "JUPYTER_DATA_DIR": self._home / "data",
            "JUPYTER_RUNTIME_DIR": self._home / "runtime",
            "IPYTHONDIR": self._home / "ipython",
            "MPLCONFIGDIR": matplotlib.get_cachedir(),  # to find all fonts takes seconds
        }
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        kept = {k: v for k, v in os.environ.items() if k not in ("DDP_LESSONS_LIVE",)}
        return {**kept, **{k: str(v) for k, v in own.items()}, "PYTHONPATH": path}

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.append(line)
                if found := _ADDRESS.search(line):
                    self._found.put((found[1], found[2]))

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

    def kernels(self) -> dict[str, psutil.Process]:
        """The process of each kernel, by its id."""
        return {kernel["id"]: self._process_of(kernel["id"]) for kernel in self.ask("kernels")}

    def _process_of(self, kernel_id: str) -> psutil.Process:
        children = psutil.Process(self._process.pid).children()
        return next(c for c in children if kernel_id in " ".join(c.cmdline()))

    def end_kernels(self) -> None:
        """Shut every kernel down, as the page does."""
        for kernel_id in [kernel["id"] for kernel in self.ask("kernels")]:
            self.ask(f"kernels/{kernel_id}", method="DELETE")

    def ask(self, what: str, method: str = "GET") -> Any:
        """A request to the server's own interface."""
        request = urllib.request.Request(
            f"{self.address}/api/{what}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=END) as answer:
            text = answer.read()
        return json.loads(text) if text else None
