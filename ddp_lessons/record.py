"""`python -m ddp_lessons.record train.py ...` records a script that knows nothing of this package.

Runs in every process that torchrun starts, as `python -m cProfile` does for a profile:

    torchrun --nproc-per-node 4 -m ddp_lessons.record train.py --epochs 3

The script runs as if it had been started itself, but for torch, which is imported before it. The
record goes into the folder that DDP_LESSONS_RECORD names, by default "record"; `ddp-lessons explain
record` and `load_run("record")` read it.
"""

from __future__ import annotations

import os
import runpy
import sys
import types

from ddp_lessons.wire.run_folder import VARIABLE
from ddp_lessons.wire.span_buffer import say
from ddp_lessons.worker import torchrun

FOLDER = "record"
USAGE = "usage: torchrun ... -m ddp_lessons.record [-m] SCRIPT [ARGUMENT ...]"


def main() -> None:
    """Begin to record, and become the script."""
    del sys.argv[0]
    is_module = sys.argv[:1] == ["-m"]
    if is_module:
        del sys.argv[0]
    if not sys.argv or sys.argv[0].startswith("-"):
        sys.exit(USAGE)
    os.environ[VARIABLE] = os.environ.get(VARIABLE) or FOLDER
    if "RANK" not in os.environ:
        say("nothing is recorded: RANK is not set. Start the script with torchrun.")
    if is_module:
        torchrun.begin()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        _run(sys.argv[0])


def _run(script: str) -> None:
    """Run a file as `python FILE` does, in a module of its own that is called __main__."""
    try:
        with open(script, "rb") as file:
            source = file.read()
    except OSError as error:
        sys.exit(f"ddp_lessons.record: {script} cannot be read: {error.strerror}")
    main = types.ModuleType("__main__")
    main.__file__ = os.path.abspath(script)
    sys.modules["__main__"] = main
    sys.path[0] = os.path.dirname(main.__file__)
    torchrun.begin()
    exec(compile(source, main.__file__, "exec", dont_inherit=True), vars(main))


if __name__ == "__main__":
    main()
