"""A real notebook kernel for tests: execute cells as a notebook would, interrupt it, kill it."""

from __future__ import annotations

import os
import re
import textwrap
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_core.paths import jupyter_runtime_dir

from ddp_lessons.worker import spare

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(**options: Any) -> KernelManager:
    """A manager whose kernel listens on files.

    Of ports, Jupyter chooses five free ones, and the kernel takes them a second or more later.
    Meanwhile another test's ranks may have taken one; then the kernel dies.
    """
    folder = Path(jupyter_runtime_dir())
    folder.mkdir(parents=True, exist_ok=True)
    return KernelManager(transport="ipc", ip=str(folder / uuid.uuid4().hex[:8]), **options)


@dataclass
class Cell:
    """What one executed cell gave back."""

    stdout: str = ""
    error: str = ""  # the traceback as the notebook shows it, without colours
    error_name: str = ""
    result: dict[str, str] = field(default_factory=dict)  # mime bundle of the last expression
    displays: list[dict[str, str]] = field(default_factory=list)
    updates: list[dict[str, str]] = field(default_factory=list)  # of displays
    begun: bool = False  # not one that the kernel dropped since the cell before it had failed
    seconds: float = 0.0


class Kernel:
    """A kernel as a context manager; `run` executes a cell and waits for its end."""

    def __init__(self, first_cell: str = "from ddp_lessons import launch") -> None:
        self._first_cell = first_cell
        self.manager = on_files(kernel_name="python3")
        self.client: BlockingKernelClient

    def __enter__(self) -> Kernel:
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        cell = self.run(self._first_cell)
        assert not cell.error, cell.error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def children(self) -> list[psutil.Process]:
        """Every process below the kernel, but for the spares: they are no ranks yet."""
        found: list[psutil.Process] = self.process.children(recursive=True)
        return [process for process in found if not is_spare(process)]

    def start(self, code: str) -> str:
        """Begin to execute a cell; its message id."""
        return str(self.client.execute(textwrap.dedent(code).strip()))

    def run(self, code: str, timeout: float = 90.0) -> Cell:
        """Execute a cell and wait for its end."""
        while True:
            cell = self.finish(self.start(code), timeout)
            if cell.begun:
                return cell
            # The cell before had failed, and the kernel still dropped what was queued behind it.

    def await_output(self) -> None:
        """Wait until the cell that runs has printed something."""
        while self.client.get_iopub_msg(timeout=30)["msg_type"] != "stream":
            pass

    def finish(self, message_id: str, timeout: float = 90.0) -> Cell:
        """Collect what a started cell gives until it has ended."""
        cell, began = Cell(), time.monotonic()
        while True:
            left = began + timeout - time.monotonic()
            message = self.client.get_iopub_msg(timeout=max(0.1, left))
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                cell.seconds = time.monotonic() - began
                return cell
            self._take(cell, kind, content)

    def _take(self, cell: Cell, kind: str, content: dict[str, Any]) -> None:
        match kind:
            case "execute_input":
                cell.begun = True
            case "stream":
                cell.stdout += content["text"]
            case "error":
                cell.error = ANSI.sub("", "\n".join(content["traceback"]))
                cell.error_name = content["ename"]
            case "execute_result":
                cell.result = content["data"]
            case "update_display_data":
                cell.updates.append(content["data"])
            case "display_data":
                cell.displays.append(content["data"])


def is_spare(process: psutil.Process) -> bool:
    """Whether it waits to become a rank, and has not ended."""
    try:
        return str(process.name()) == spare.NAME
    except psutil.NoSuchProcess:
        return False


def wait_for_workers(kernel: psutil.Process, count: int) -> list[psutil.Process]:
    """The worker processes, once they are there: those that lead a session of their own."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        leaders = [p for p in kernel.children(recursive=True) if _is_worker(p)]
        if len(leaders) >= count:
            return leaders
        time.sleep(0.02)
    raise AssertionError("the workers did not start")


def _is_worker(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
        leads = os.getsid(process.pid) == process.pid
        return (
            leads
            and "forkserver" in command
            and "forkserver" in " ".join(process.parent().cmdline())
        )
    except (psutil.Error, ProcessLookupError, AttributeError):
        return False


def gone(processes: list[psutil.Process], seconds: float = 30.0) -> bool:
    """Whether all of them end within so many seconds: even to be killed takes processor time."""
    deadline = time.monotonic() + seconds
    while not (ended := all(_has_ended(process) for process in processes)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return ended


def _has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
