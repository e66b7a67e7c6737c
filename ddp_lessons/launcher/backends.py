"""`recommend_backend`: which backend suits a number of ranks.

Runs in the parent, called by learners. It launches a rank that looks for GPUs, so that the
notebook's kernel never touches CUDA.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ddp_lessons.errors import BadLaunch
from ddp_lessons.instrumentation import recording
from ddp_lessons.instrumentation.gpu_sharing import CARRIES
from ddp_lessons.launcher.api import launch, whole_number
from ddp_lessons.text import count


class Machine(NamedTuple):
    """What a rank finds: the GPUs it may use, and what its build of torch has."""

    gpus: int
    nccl: bool
    gloo: bool
    for_gpus: bool  # the build can use GPUs at all


def recommend_backend(nprocs: int) -> str:
    """The backend for `nprocs` ranks on this machine, and why, printed in two lines.

    NCCL where each rank can have a GPU of its own, else gloo. GPUs are counted by a rank of its
    own, which reads the present CUDA_VISIBLE_DEVICES: CUDA is not initialised in this process.

    Parameters
    ----------
    nprocs : int
        Ranks on this machine.

    Returns
    -------
    str
        "nccl" or "gloo", to be passed to `torch.distributed.init_process_group`.

    Raises
    ------
    BadLaunch
        If `nprocs` is no whole number above 0, or this build of torch has no backend that fits.
    """
    nprocs = whole_number("nprocs", nprocs)
    backend, why = choose(nprocs, _machine())
    print(why)
    return backend


def choose(nprocs: int, machine: Machine) -> tuple[str, str]:
    """The backend for so many ranks on such a machine, and the two lines that say why."""
    gpus, build = machine.gpus, _build(machine)
    what = f"{count(nprocs, 'rank')}, {count(gpus, 'GPU') if gpus else 'no GPU'}"
    if machine.nccl and gpus >= nprocs:
        return "nccl", f"nccl: {what}, so each rank has a GPU of its own.\n{build}"
    if not machine.gloo:
        raise BadLaunch(f"no backend fits {what}. {build}")
    if not gpus:
        why = ". NCCL works only between GPUs."
    elif not machine.nccl:
        why = f". Without NCCL, {CARRIES}."
    else:
        share = f"{nprocs // gpus}" if nprocs % gpus == 0 else f"up to {nprocs // gpus + 1}"
        why = f", {share} ranks a GPU. NCCL refuses two ranks on one GPU; {CARRIES}."
    return "gloo", f"gloo: {what}{why}\n{build}"


def _build(machine: Machine) -> str:
    """What this build of torch has, in a sentence."""
    names = [name for name, there in (("NCCL", machine.nccl), ("gloo", machine.gloo)) if there]
    has = " and ".join(names) or "neither NCCL nor gloo"
    if machine.for_gpus:
        return f"This build of torch has {has}."
    has += " but not NCCL" if machine.gloo else ""
    return f"This build of torch is for CPUs: it has {has}, and would not see a GPU."


def _machine() -> Machine:
    """What a rank finds here."""
    if recording.in_worker() or "TORCHELASTIC_RUN_ID" in os.environ:
        return look()  # this is a rank
    machine: Machine = launch(look, nprocs=1).values[0]
    return machine


def look(_: int = 0) -> Machine:
    """What this process finds. torch counts GPUs through NVML, without initialising CUDA."""
    import torch
    import torch.distributed as dist

    available = dist.is_available()
    return Machine(
        torch.cuda.device_count(),
        available and dist.is_nccl_available(),
        available and dist.is_gloo_available(),
        (torch.version.cuda or torch.version.hip) is not None,
    )
