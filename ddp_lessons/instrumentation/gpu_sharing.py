"""Refuses NCCL where ranks would share a GPU.

Runs in workers; process_groups.py calls it before they join or make a group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.torch_api import NCCL
from ddp_lessons.system.host import LOOPBACK_NAMES
from ddp_lessons.text import count

CARRIES = "gloo carries CUDA tensors through the CPU"
SHARED_ALLOWED = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL 2.31 and newer: ranks may share a GPU


def before_joining(recorder: Recorder, backend: str | None, world_size: Any) -> None:
    """Check the arguments of init_process_group; a world size of -1 means all launched ranks."""
    known = isinstance(world_size, int) and world_size > 0
    _refuse_shared_gpu(recorder, backend, range(world_size) if known else None)


def before_new_group(recorder: Recorder, ranks: Iterable[int] | None, backend: str | None) -> None:
    """Check the arguments of new_group; without a backend it uses the default group's."""
    if backend is not None:
        _refuse_shared_gpu(recorder, backend, ranks)


def _refuse_shared_gpu(
    recorder: Recorder, backend: str | None, ranks: Iterable[int] | None
) -> None:
    """Raise DistBackendError where NCCL would find two of `ranks`, or of all, on one GPU.

    NCCL itself raises only in the first collective, and until then some ranks may wait for others.
    A rank that has set CUDA_VISIBLE_DEVICES itself is left to NCCL, which alone sees whether ranks
    share a GPU then.
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


def wants_nccl(backend: str | None) -> bool:
    """Whether CUDA tensors will go through NCCL; by default (None) they do."""
    names = str(backend or "cuda:nccl").lower().split(",")  # such as "cpu:gloo,cuda:nccl"
    return any(name.rpartition(":")[2].strip() in NCCL for name in names)


def on_this_machine(environment: Mapping[str, str], ranks: Iterable[int] | None = None) -> int:
    """How many of `ranks`, or of all, run on this machine; 0 if the variables do not tell.

    If the master address is loopback they all do, also those of a second "machine".
    """
    try:
        world_size, group_rank = int(environment["WORLD_SIZE"]), int(environment["GROUP_RANK"])
        each = int(environment["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0
    chosen = set(range(world_size) if ranks is None else ranks)
    if environment.get("MASTER_ADDR") in LOOPBACK_NAMES:
        return len(chosen)
    return len(chosen.intersection(range(group_rank * each, (group_rank + 1) * each)))


def shared_gpu(ranks: int, gpus: int) -> str:
    """Why NCCL cannot serve so many ranks on so many GPUs; "" if it can, or that is unknown.

    Without any GPU torch's own error is clear.
    """
    if not 0 < gpus < ranks:
        return ""
    return (
        f"NCCL needs a GPU for each rank: {ranks} ranks would share {count(gpus, 'GPU')}. "
        'It would say "Duplicate GPU detected".\n'
        f'Join with dist.init_process_group("gloo"): {CARRIES}. Or launch with nprocs={gpus}.'
    )
