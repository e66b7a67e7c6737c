"""Puts recording in place: wraps torch.distributed's functions, DDP's own calls and DataLoaders.

worker/main.py and worker/torchrun.py call it in ranks; worker/preload.py calls it in the forkserver
before that forks any.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ddp_lessons.instrumentation import (
    async_work,
    collectives,
    process_groups,
    recording,
    rendezvous,
)
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.torch_api import public
from ddp_lessons.wire.ops import COLLECTIVES, MAKES_GROUP, RECVS, SENDS

FUNCTIONAL = "torch.distributed._functional_collectives"


def install(recorder: Recorder) -> None:
    """Wrap torch.distributed, and make `recorder` the recorder of this process."""
    wrap_torch()
    recording.use(recorder)


@functools.cache
def wrap_torch() -> None:
    """Wrap the public calls of torch.distributed, once in a process.

    The forkserver does it for all workers that it forks; without a recorder the wrappers only call
    through.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.data import dataloader

    from ddp_lessons.instrumentation.ddp_traffic import record_ddp  # which imports torch

    register_optimizer_step_post_hook(collectives.stepped)
    loading = dataloader._BaseDataLoaderIter
    loading.__next__ = recording.batches(loading.__next__)
    record_ddp()
    _replace("init_process_group", process_groups.joining)
    for name in MAKES_GROUP:
        _replace(name, process_groups.making)
    _replace("destroy_process_group", process_groups.leaving)
    _replace("set_timeout", process_groups.setting_a_timeout)
    for name, tensor in {**COLLECTIVES, **SENDS, **RECVS}.items():
        _replace(name, functools.partial(collectives.recorded, tensor=tensor))
    _replace("batch_isend_irecv", collectives.batched)
    dist.Work.wait = async_work.waiting(dist.Work.wait)
    distributed_c10d.rendezvous = rendezvous.on_time(distributed_c10d.rendezvous)


def _replace(name: str, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public function where learners import it from, and where torch defines it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if (function := public(name)) is None:
        return
    wrapped = make(name, function)
    for module in (dist, distributed_c10d):
        if getattr(module, name, None) is function:
            setattr(module, name, wrapped)
    # torch.compile knows by this table, if it is made already, what to trace in a function's place.
    remaps = getattr(sys.modules.get(FUNCTIONAL), "traceable_collective_remaps", {})
    if function in remaps:
        remaps[wrapped] = remaps[function]


def replace_in(names: dict[str, Any]) -> None:
    """Replace functions that a script imported by name from torch.distributed before us."""
    import torch.distributed as dist

    for name, function in list(names.items()):
        wrapped = getattr(dist, getattr(function, "__name__", ""), None)
        if wrapped is not None and getattr(wrapped, "__wrapped__", None) is function:
            names[name] = wrapped
