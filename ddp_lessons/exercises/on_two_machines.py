"""Runs a script on a rank as if torchrun's ranks were on two machines, for lesson 13's check.

torchrun starts it with the script's path for its argument. What a rank of torchrun counts on its
own machine is changed before the script runs; RANK and WORLD_SIZE stay.
"""

from __future__ import annotations

import os
import runpy
import sys

MACHINES = 2


def run(script: str) -> None:
    """Run a script as `__main__`, on a rank of one of the machines."""
    on_each = int(os.environ["WORLD_SIZE"]) // MACHINES
    machine, local_rank = divmod(int(os.environ["RANK"]), on_each)
    os.environ.update(
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(on_each),
        GROUP_RANK=str(machine),
        GROUP_WORLD_SIZE=str(MACHINES),
    )
    sys.argv = [script]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1])
