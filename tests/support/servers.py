"""A real JupyterLab server as a learner starts it, with a home of its own; lessons run in it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nbformat
from jupyter_client.blocking import BlockingKernelClient

from tests.support.kernels import ANSI

LAB = (sys.executable, "-m", "jupyterlab")
START = 180.0  # seconds that the server may take to listen, on a busy machine
END = 20.0  # seconds that it may take to end all kernels and itself
OPTIONS = ("--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.port_retries=0")


class Server:
    """JupyterLab as a context manager; `address` and `token` are those that it made.

    Parameters
    ----------
    folder : Path
        Becomes its home, and holds what it logs.
    root : Path
        The folder that it shows.
    command : sequence of str
        What is started; options are added.
    env : mapping
        The environment, in which HOME and Jupyter's folders are replaced.
    start : callable
        As subprocess.Popen.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        command: Sequence[str] = LAB,
        *,
        env: Mapping[str, str] = os.environ,
        start: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        self.root = root
        self.address = self.token = ""
        self._home = folder / "home"
        self._log = folder / "server.log"
        self._command = [*command, *OPTIONS, f"--ServerApp.root_dir={root}"]
        self._env = {**env, **self._own_places()}
        self._start = start

    def _own_places(self) -> dict[str, str]:
        places = {
            "HOME": self._home,
            "JUPYTER_CONFIG_DIR": self._home / "jupyter",
            "JUPYTER_DATA_DIR": self._home / "data",
            "JUPYTER_RUNTIME_DIR": self._home / "runtime",
            "IPYTHONDIR": self._home / "ipython",
            "TMPDIR": self._home,  # torchrun leaves folders in it
        }
        return {name: str(path) for name, path in places.items()}

    def __enter__(self) -> Self:
        self._home.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = self._start(
                self._command, env=self._env, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self.address, self.token = self._await_address()
        except BaseException:
            self.__exit__(None, None, None)
            raise
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

    @property
    def pid(self) -> int:
        return self._process.pid

    def _await_address(self) -> tuple[str, str]:
        """What the server writes down, once it also listens there: its address and token."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self._process.poll() is None:
            for file in (self._home / "runtime").glob("jpserver-*.json"):
                # The file may be half written, and it is there before the server listens.
                with contextlib.suppress(ValueError, OSError):
                    facts = json.loads(file.read_text())
                    socket.create_connection(("localhost", facts["port"]), timeout=1).close()
                    return facts["url"].rstrip("/"), facts["token"]
            time.sleep(0.05)
        raise AssertionError(f"JupyterLab did not start:\n{self._log.read_text()}")

    def ask(self, what: str, method: str = "GET", body: Any = None) -> Any:
        """A request to the server's own interface."""
        request = urllib.request.Request(
            f"{self.address}/api/{what}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=START) as answer:
                return json.loads(answer.read() or b"null")
        except OSError as error:
            raise AssertionError(f"{what}: {error}\n{self._log.read_text()}") from error

    def run(self, notebook: str) -> float:
        """Run all cells in a kernel of their own; how many seconds that took.

        Raises AssertionError for a cell that fails.
        """
        began = time.monotonic()
        body = {"path": notebook, "type": "notebook", "name": "", "kernel": {"name": "python3"}}
        session = self.ask("sessions", "POST", body)
        try:
            self._run_cells(self.root / notebook, session["kernel"]["id"])
        finally:
            self.ask(f"sessions/{session['id']}", "DELETE")
        return time.monotonic() - began

    def _run_cells(self, notebook: Path, kernel: str) -> None:
        file = self._home / "runtime" / f"kernel-{kernel}.json"
        client = BlockingKernelClient(connection_file=str(file))
        client.load_connection_file()
        client.start_channels()
        try:
            _await_kernel(client)
            for cell in nbformat.read(notebook, as_version=4).cells:
                if cell.cell_type == "code":
                    _run_cell(client, cell)
        finally:
            client.stop_channels()


def _await_kernel(client: BlockingKernelClient) -> None:
    """Wait until it answers, and what it prints comes here.

    `wait_for_ready` takes a kernel for dead that misses one heartbeat, of a second: on a busy
    machine a living one does.
    """
    deadline = time.monotonic() + START
    while True:
        client.kernel_info()
        client.get_shell_msg(timeout=START)
        try:
            client.get_iopub_msg(timeout=1)
            return
        except queue.Empty:
            assert time.monotonic() < deadline, "nothing that the kernel prints comes"


def _run_cell(client: BlockingKernelClient, cell: Any) -> None:
    reply = client.execute_interactive(
        cell.source, allow_stdin=False, timeout=120, output_hook=lambda _: None
    )
    content = reply["content"]
    fails = "raises-exception" in cell.metadata.get("tags", ())
    told = ANSI.sub("", "\n".join(content.get("traceback", [])))
    assert (content["status"] == "error") is fails, f"{cell.source}\n\n{told}"
