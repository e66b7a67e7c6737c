"""Runs each lesson within Binder's limits, one core and 2 GB; prints seconds and memory.

Memory is the peak of the server, the kernel and all ranks together, without what the system could
have reclaimed. Needs the right to make a control group.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.support.confined import Confined, why_not
from tests.support.servers import LAB, Server

NOTEBOOKS = Path("notebooks").resolve()
LIMIT = 2 << 30  # bytes


def main() -> None:
    """Run every lesson once."""
    if reason := why_not():
        sys.exit(reason)
    print("| lesson | seconds | MB |\n| --- | ---: | ---: |")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ("taskset", "--cpu-list", "0", *LAB)
    with tempfile.TemporaryDirectory() as home, Confined(LIMIT) as group:
        with Server(Path(home), NOTEBOOKS, command, env=env, start=group.start) as server:
            for path in sorted(NOTEBOOKS.glob("*.ipynb")):
                group.peak = 0
                seconds = server.run(path.name)
                print(f"| {path.stem} | {seconds:.0f} | {group.peak >> 20} |", flush=True)
        print(f"ended for want of memory: {group.kills}")


if __name__ == "__main__":
    main()
