"""Runs the campaign's faults under launch() and other launchers: which message comes, and when?

    python -m benchmarks.compared

Each fault happens once to rank 2 of 3, in a separate script for each launcher. The time is from
the fault to the end of the script; `rank` and `line` say whether the text names them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults import MARKER, TIMEOUT, processes_of
from tests.support import faults

COMPARED = ("mp_spawn", "notebook_launcher")
LIMIT = 15.0  # seconds after the fault within which a message must come


def compare() -> None:
    """Run the faults on 3 ranks with each launcher; print which message comes, and when."""
    print(f"fault                          {'launch':>22} {COMPARED[0]:>26} {COMPARED[1]:>26}")
    for fault in faults.FAULTS:
        if fault in faults.FROM_OUTSIDE:
            continue
        cells = [_compared(launcher, fault) for launcher in ("launch", *COMPARED)]
        print(f"{fault:30} {cells[0]:>22} {cells[1]:>26} {cells[2]:>26}", flush=True)


def _compared(launcher: str, fault: str) -> str:
    """`0.2 s rank line`: the seconds until all had ended, and what the text names."""
    marker = f"{os.getpid()}-{launcher}"
    command = [sys.executable, "-m", "benchmarks.compared", launcher, fault]
    with tempfile.TemporaryDirectory() as folder:
        note, log = Path(folder, "note"), Path(folder, "log")
        environment = {**os.environ, MARKER: marker, faults.NOTE: str(note), "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        happened = _happened(note, process)
        try:
            process.wait(timeout=LIMIT)
            seconds = f"{time.time() - happened:.1f} s"
        except subprocess.TimeoutExpired:
            seconds = f"none in {LIMIT:.0f} s"
            process.kill()
            process.wait()
        time.sleep(1.0)
        left = processes_of(marker, process)
        for entry in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.split()[0]), signal.SIGKILL)
        text = log.read_text(errors="replace")
    said = text.partition("VERDICT")[2] if launcher == "launch" else text
    names = [] if seconds.startswith("none") else _names(said, faults.FAULTS[fault].line)
    return " ".join([seconds, *names, *([f"left {len(left)}"] if left else [])])


def _happened(note: Path, process: subprocess.Popen[bytes]) -> float:
    """The time of the fault; the current time if it never happened."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if note.exists() and (text := note.read_text()):
            return float(text)
        time.sleep(0.01)
    return float(note.read_text()) if note.exists() else time.time()


def _names(text: str, line: str) -> list[str]:
    rank = any(words in text for words in ("rank 2", "process 2", "Process 2", "local_rank: 2"))
    return [*(["rank"] if rank else []), *(["line"] if line and line in text else [])]


def one(launcher: str, fault: str) -> None:
    """Run one fault on 3 ranks with one launcher to the end, as a script does."""
    arguments = (fault, 2, 1)
    if launcher == "launch":
        from ddp_lessons import launch

        launch(_nothing, nprocs=2)
        run = launch(faults.train, arguments, nprocs=3, timeout=TIMEOUT, check=False)
        print("VERDICT", run.explain(), flush=True)
    elif launcher == "mp_spawn":
        import torch.multiprocessing as mp

        mp.spawn(_spawned, (3, _free_port(), *arguments), nprocs=3)
    else:
        from accelerate import notebook_launcher

        notebook_launcher(_ranked, arguments, num_processes=3, use_port=str(_free_port()))


def _nothing(rank: int) -> None:
    pass


def _spawned(rank: int, world_size: int, port: int, *arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    faults.train(rank, *arguments)


def _ranked(*arguments: Any) -> None:
    faults.train(int(os.environ["RANK"]), *arguments)


def _free_port() -> int:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    one(*sys.argv[1:]) if sys.argv[1:] else compare()
