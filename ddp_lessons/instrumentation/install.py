"""Puts recording in place: wraps torch.distributed's functions, DDP's own calls and DataLoaders.

worker/main.py and worker/torchrun.py call it in ranks; worker/preload.py calls it in the forkserver
before that forks any.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ddp_lessons.instrumentation import (
    async_work,
    caught,
    collectives,
    process_groups,
    recording,
    rendezvous,
    torch_api,
)
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.torch_api import public
from ddp_lessons.wire.ops import COLLECTIVES, MAKES_GROUP, RECVS, SENDS

# Methods of a ProcessGroup by which the public functions communicate. Not every release has all.
METHODS = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_to_all_single",
    "allgather", "allreduce", "alltoall", "alltoall_base", "barrier", "broadcast", "gather",
    "recv", "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single", "scatter",
    "send",
)  # fmt: skip
FUNCTIONAL = "torch.distributed._functional_collectives"


def install(recorder: Recorder) -> None:
    """Wrap torch.distributed, and make `recorder` the recorder of this process."""
    wrap_torch()
    recording.use(recorder)
    if caught.watch():
        recorder.buffer.note_caught()
    is_pythons = threading.excepthook is threading.__excepthook__
    threading.excepthook = _noting(threading.excepthook)
    if is_pythons:  # for a learner's hook that hands on to it
        threading.__excepthook__ = threading.excepthook


def _noting(
    show: Callable[[threading.ExceptHookArgs], Any],
) -> Callable[[threading.ExceptHookArgs], Any]:
    """Wrap threading's excepthook: tell the parent which exception ends a thread."""

    def show_and_note(args: threading.ExceptHookArgs) -> None:
        recorder = recording.current()
        error = None if args.exc_type is SystemExit else args.exc_value
        try:
            if recorder is not None and args.thread is not None and error is not None:
                recorder.thread_died(args.thread.name, error)
        finally:
            show(args)

    return show_and_note


@functools.cache
def wrap_torch() -> None:
    """Wrap the public calls of torch.distributed, once in a process.

    The forkserver does it for all workers that it forks; without a recorder the wrappers only call
    through.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d, rpc
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.data import dataloader

    # These import torch.
    from ddp_lessons.instrumentation.ddp_traffic import record_ddp
    from ddp_lessons.instrumentation.functional import record_functional

    caught.watch()
    register_optimizer_step_post_hook(collectives.stepped)
    loading = dataloader._BaseDataLoaderIter
    loading.__next__ = recording.batches(loading.__next__)
    record_ddp()
    record_functional()
    _replace("init_process_group", process_groups.joining)
    for name in MAKES_GROUP:
        _replace(name, process_groups.making)
    _replace("destroy_process_group", process_groups.leaving)
    _replace("set_timeout", process_groups.setting_a_timeout)
    for name, tensor in {**COLLECTIVES, **SENDS, **RECVS}.items():
        _replace(name, functools.partial(collectives.recorded, tensor=tensor))
    _replace("batch_isend_irecv", collectives.batched)
    for name in [name for name, method in vars(dist.Work).items() if callable(method)]:
        if not name.startswith("_"):
            wrap = async_work.waiting if name == "wait" else async_work.using
            setattr(dist.Work, name, wrap(getattr(dist.Work, name)))
    distributed_c10d.rendezvous = rendezvous.on_time(distributed_c10d.rendezvous)
    if rpc.is_available():
        rpc.init_rpc = process_groups.unrecorded("RPC", rpc.init_rpc)
    for name in METHODS:
        if (method := getattr(dist.ProcessGroup, name, None)) is not None:
            method = process_groups.unrecorded("a process group's own methods", method)
            setattr(dist.ProcessGroup, name, method)
    _leave_to_python()


def _leave_to_python() -> None:
    """Have torch.compile run this package's functions as they are, and compile none of them.

    It would compile each function that is called while a compiled one runs.
    """
    package = __name__.partition(".")[0]
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{package}.")]
    codes = [code for module in modules for code in _codes(module, package)]
    while codes:
        code = codes.pop()
        torch_api.leave_to_python(code)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]


def _codes(owner: ModuleType | type, package: str) -> Iterator[CodeType]:
    """The code of the functions of a module or class, and of the classes in it."""
    for value in list(vars(owner).values()):
        function = getattr(value, "fget", getattr(value, "__func__", value))
        if isinstance(value, type) and value.__module__.startswith(package) and value is not owner:
            yield from _codes(value, package)
        elif isinstance(function := getattr(function, "__wrapped__", function), FunctionType):
            yield function.__code__


def _replace(name: str, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public function wherever torch.distributed has it by this name.

    Its modules import functions from each other, as DeviceMesh does init_process_group. Those that
    are imported later get the wrapped ones.
    """
    if (function := public(name)) is None:
        return
    wrapped = make(name, function)
    for module in [m for path, m in sys.modules.items() if path.startswith("torch.distributed")]:
        if vars(module).get(name) is function:
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
