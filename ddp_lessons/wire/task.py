"""What the parent sends to a worker: the function, its arguments, and the rank's place.

Both processes import this module; it starts nothing and imports no torch. processes/packing.py
makes a `Task`, worker/main.py carries it out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace

from ddp_lessons.system import process_attributes
from ddp_lessons.system.host import LOOPBACK_INTERFACE
from ddp_lessons.system.process_attributes import ProcessAttributes
from ddp_lessons.wire.parcels import Parcel


@dataclass(frozen=True)
class RankInfo:
    """Where a rank stands among the others, in torchrun's terms."""

    rank: int
    local_rank: int
    group_rank: int
    world_size: int
    local_world_size: int

    def variables(self) -> dict[str, str]:
        """The environment variables that torchrun would set for this rank."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.group_rank),
        }


def places(nprocs: int, nnodes: int) -> list[RankInfo]:
    """The places of all ranks, by rank: machine by machine, as torchrun numbers them."""
    return [
        RankInfo(group * nprocs + local, local, group, nnodes * nprocs, nprocs)
        for group in range(nnodes)
        for local in range(nprocs)
    ]


@dataclass(frozen=True)
class MasterAddress:
    """Where rank 0's store listens, and the network interface by which ranks reach each other."""

    port: int
    address: str = "127.0.0.1"
    interface: str | None = LOOPBACK_INTERFACE.get(sys.platform)


@dataclass(frozen=True)
class Task:
    """What all ranks of a run have in common.

    `function` holds `(fn, anchor)`, see `packing.pack`. A rank's variables are
    `environment`, then those of its place, then `overrides`, the learner's own. `settings` is the
    pickle of what worker/settings.py took; `definitions` maps the names of classes and functions of
    `__main__` to their pickles; `start_method` is that of the processes that a rank starts, None
    for Python's default. `sources` maps the file names of cells to their text, so that a traceback
    made in the worker shows the cell's own lines. `home` is the installed package that holds the
    function, if one does: its lines are the learner's. `in_notebook`: what a rank displays
    can be shown. `one_clock` is true where all ranks run on
    one machine. `tells_pages`: rank 0 tells which pages it wrote, for spares. `environment`, `cwd`,
    `path` and `process` are those of the process that starts the ranks.
    """

    function: Parcel
    name: str
    overrides: dict[str, str]
    settings: bytes
    definitions: dict[str, bytes] = field(default_factory=dict)
    start_method: str | None = None
    profile: bool = False
    notes: bool = False
    post_mortem: bool = False
    in_notebook: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    home: str | None = None
    one_clock: bool = True
    tells_pages: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    path: list[str] = field(default_factory=list)
    process: ProcessAttributes | None = None

    def here(self, master: MasterAddress) -> Task:
        """The task with the environment and state of this process, for ranks that it starts."""
        return replace(
            self,
            environment={**os.environ, **variables(master)},
            cwd=os.getcwd(),
            path=list(sys.path),
            process=process_attributes.taken(),
        )


def variables(master: MasterAddress) -> dict[str, str]:
    """The variables that torchrun sets alike for all ranks, and some that this package adds."""
    common = {"MASTER_ADDR": master.address, "MASTER_PORT": str(master.port)}
    if master.interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Without it gloo looks up the host's name and may bind to an outside address.
        common["GLOO_SOCKET_IFNAME"] = master.interface
    if master.interface not in (None, *LOOPBACK_INTERFACE.values()) and (
        "NCCL_SOCKET_IFNAME" not in os.environ
    ):
        common["NCCL_SOCKET_IFNAME"] = str(master.interface)
    if sys.platform == "linux" and "RES_OPTIONS" not in os.environ:
        # torch's store looks up the name of every peer, which for ::ffff:127.0.0.1 asks the name
        # server: one that does not answer would cost each rank 10 s (resolv.conf(5)).
        common["RES_OPTIONS"] = "timeout:1 attempts:1"
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = "1"  # as torchrun does: ranks share the cores
    return common
