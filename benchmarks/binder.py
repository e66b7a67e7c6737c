"""Each lesson's Run All within what Binder gives: one core, 2 GB. Prints seconds and memory.

Memory is the most that the server, the kernel and all ranks had at once and that the kernel of the
system could not have taken back. Needs the right to make a control group.
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
