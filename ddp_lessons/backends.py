"""Which backend suits a number of ranks, and the refusal of NCCL where ranks must share a GPU.

`recommend_backend` runs in the parent and asks a rank what it sees, so that the notebook's kernel
never touches CUDA. The refusal runs in workers, called by joining.py before NCCL is reached.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddp_lessons import recording
from ddp_lessons.errors import BadLaunch
from ddp_lessons.recording import Recorder
from ddp_lessons.torch_api import NCCL
from ddp_lessons.wording import count

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CARRIES = "gloo carries CUDA tensors through the CPU"
SHARED_ALLOWED = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL 2.31 and newer: ranks may share a GPU


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
    if not isinstance(nprocs, int) or isinstance(nprocs, bool) or nprocs < 1:
        raise BadLaunch(f"nprocs is {nprocs!r}; it must be a whole number, 1 or more.")
    backend, why = choose(nprocs, _machine())
    print(why)
    return backend


def choose(nprocs: int, machine: Machine) -> tuple[str, str]:
    """The backend for so many ranks on such a machine, and the two lines that say why."""
    build = _build(machine)
    what = f"{count(nprocs, 'rank')}, {count(machine.gpus, 'GPU') if machine.gpus else 'no GPU'}"
    if machine.nccl and machine.gpus >= nprocs:
        return "nccl", f"nccl: {what}, so each rank has a GPU of its own.\n{build}"
    if not machine.gloo:
        raise BadLaunch(f"no backend fits {what}. {build}")
    return "gloo", f"gloo: {what}{_why_gloo(nprocs, machine)}\n{build}"


def _why_gloo(nprocs: int, machine: Machine) -> str:
    if not machine.gpus:
        return ". NCCL works only between GPUs."
    if not machine.nccl:
        return f". Without NCCL, {CARRIES}."
    most = -(-nprocs // machine.gpus)
    least = "" if nprocs % machine.gpus == 0 else "up to "
    return f", {least}{most} ranks a GPU. NCCL refuses two ranks on one GPU; {CARRIES}."


def _build(machine: Machine) -> str:
    """What this build of torch has, in a sentence."""
    if not machine.for_gpus:
        has = "gloo but not NCCL" if machine.gloo else "neither gloo nor NCCL"
        return f"This build of torch is for CPUs: it has {has}, and would not see a GPU."
    names = [name for name, there in (("NCCL", machine.nccl), ("gloo", machine.gloo)) if there] or [
        "neither NCCL nor gloo"
    ]
    return f"This build of torch has {' and '.join(names)}."


def _machine() -> Machine:
    """What a rank finds here."""
    if recording.in_worker() or "TORCHELASTIC_RUN_ID" in os.environ:
        return look()  # this is a rank
    from ddp_lessons.launcher import launch

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


def before_joining(recorder: Recorder, backend: Any, world_size: Any) -> None:
    """Called before init_process_group with what was passed to it; -1 is the world of launch."""
    known = isinstance(world_size, int) and world_size > 0
    _refuse_shared_gpu(recorder, backend, range(world_size) if known else None)


def before_new_group(recorder: Recorder, ranks: Any, backend: Any) -> None:
    """Called before new_group with what was passed; without a backend it takes the world's."""
    if backend is not None:
        _refuse_shared_gpu(recorder, backend, ranks)


def _refuse_shared_gpu(recorder: Recorder, backend: Any, ranks: Iterable[int] | None) -> None:
    """Raise DistBackendError where NCCL would find two of `ranks`, or of all, on one GPU.

    NCCL itself says so only in the first collective, and until then some ranks may wait for others.
    A rank that has chosen GPUs of its own by CUDA_VISIBLE_DEVICES is left to NCCL: it alone sees
    which ranks meet on one.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") != recorder.visible_devices:
        return
    if os.environ.get(SHARED_ALLOWED, "0") != "0" or not wants_nccl(backend):
        return
    import torch
    import torch.distributed as dist

    text = shared_gpu(on_this_machine(os.environ, ranks), torch.cuda.device_count())
    if text:
        raise dist.DistBackendError(text)


def wants_nccl(backend: Any) -> bool:
    """Whether CUDA tensors will go through NCCL; by default (None) they do."""
    names = str(backend or "cuda:nccl").lower().split(",")  # such as "cpu:gloo,cuda:nccl"
    return any(name.rpartition(":")[2].strip() in NCCL for name in names)


def on_this_machine(environment: Mapping[str, str], ranks: Iterable[int] | None = None) -> int:
    """How many of `ranks`, or of all, run on this machine; 0 if the variables do not tell.

    Where the ranks meet on the loopback address they all do, also those of a second "machine".
    """
    try:
        world_size, mine = int(environment["WORLD_SIZE"]), int(environment["GROUP_RANK"])
        each = int(environment["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0
    chosen = set(range(world_size) if ranks is None else ranks)
    if environment.get("MASTER_ADDR") in LOOPBACK:
        return len(chosen)
    return len(chosen.intersection(range(mine * each, (mine + 1) * each)))


def shared_gpu(ranks: int, gpus: int) -> str:
    """Why NCCL will not do for so many ranks on so many GPUs; "" if it will, or nobody knows.

    Without any GPU torch's own error is clear.
    """
    if not 0 < gpus < ranks:
        return ""
    return (
        f"NCCL needs a GPU for each rank: {ranks} ranks would share {count(gpus, 'GPU')}. "
        'It would say "Duplicate GPU detected".\n'
        f'Join with dist.init_process_group("gloo"): {CARRIES}. Or launch with nprocs={gpus}.'
    )
