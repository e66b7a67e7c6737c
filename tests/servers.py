"""A real Jupyter server, and the lessons run in its kernels, cell by cell, as Run All does."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.blocking import BlockingKernelClient

from tests.kernels import ANSI

PATIENCE = 60.0  # seconds
Start = Callable[..., subprocess.Popen[str]]
OPTIONS = ("--no-browser", "--ServerApp.port=0", "--ServerApp.port_retries=0", "--allow-root")


class Server:
    """A server that has been started; `run` executes a notebook in a kernel of its own."""

    def __init__(self, process: subprocess.Popen[str], runtime: Path, log: Path) -> None:
        self._process = process
        self._runtime = runtime
        self._log = log
        self._facts = self._await_facts()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, notebook: Path) -> float:
        """Run all cells; how many seconds that took. Raises AssertionError for one that fails."""
        began = time.monotonic()
        kernel = {"name": "python3"}
        session = self._ask(
            "POST", "sessions", path=str(notebook), type="notebook", name="", kernel=kernel
        )
        try:
            self._run_cells(notebook, session["kernel"]["id"])
        finally:
            self._ask("DELETE", f"sessions/{session['id']}")
        return time.monotonic() - began

    def end(self) -> None:
        """Ask it to end, with all its kernels."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=PATIENCE)

    def _await_facts(self) -> dict[str, Any]:
        """What the server writes down once it listens: its address and token."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            for file in self._runtime.glob("jpserver-*.json"):
                with contextlib.suppress(ValueError):  # half written
                    return dict(json.loads(file.read_text()))
            time.sleep(0.05)
        self._process.kill()
        self._process.wait(timeout=PATIENCE)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()}")

    def _ask(self, method: str, path: str, /, **what: Any) -> Any:
        request = urllib.request.Request(
            f"{self._facts['url']}api/{path}",
            data=json.dumps(what).encode() if what else None,
            headers={"Authorization": f"token {self._facts['token']}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or b"null")

    def _run_cells(self, notebook: Path, kernel: str) -> None:
        root = Path(self._facts["root_dir"])
        client = BlockingKernelClient(connection_file=str(self._runtime / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=PATIENCE)
            for cell in nbformat.read(root / notebook, as_version=4).cells:
                if cell.cell_type == "code":
                    _run_cell(client, cell)
        finally:
            client.stop_channels()


def _run_cell(client: BlockingKernelClient, cell: Any) -> None:
    reply = client.execute_interactive(
        cell.source, allow_stdin=False, timeout=120, output_hook=lambda _: None
    )
    content = reply["content"]
    fails = "raises-exception" in cell.metadata.get("tags", ())
    told = ANSI.sub("", "\n".join(content.get("traceback", [])))
    assert (content["status"] == "error") is fails, f"{cell.source}\n\n{told}"


@contextlib.contextmanager
def serve(
    root: Path, home: Path, *command: str, start: Start, env: Mapping[str, str]
) -> Iterator[Server]:
    """A server of the files in `root`, with nothing of the user's; ended on leaving."""
    runtime, log = home / "runtime", home / "server.log"
    env = {**env, "HOME": str(home), "JUPYTER_RUNTIME_DIR": str(runtime)}
    options = [*OPTIONS, f"--ServerApp.root_dir={root}"]
    with log.open("w") as stdout:
        process = start([*command, *options], env=env, stdout=stdout)
    server = Server(process, runtime, log)
    try:
        yield server
    finally:
        server.end()
