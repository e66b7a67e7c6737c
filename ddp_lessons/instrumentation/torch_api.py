"""All differences between the releases of torch, from 2.6 on, that matter to this package.

Runs in workers, called by the modules that depend on a release. If a release lacks or adds
something, write it down here; tests/instrumentation/test_torch_api.py checks each entry against the
installed torch. Importing this module imports no torch.

Other changes, which need no code here: `torchrun` takes a free port on one machine from 2.12
on, as `--standalone` does. DDP's `broadcast_buffers` became `forward_sync_buffers` in 2.13, and the
old name warns. In 2.15 "nccl" is a new implementation, which is "nccl2" in 2.14; the old one is
"nccl-legacy" there, or TORCH_DIST_USE_NCCL2=0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

OLDEST = (2, 6)
# Before this release, destroy_process_group may hang: it frees the group while it holds the GIL,
# and that waits for gloo's threads, which may want the GIL. Plain torch 2.6 and 2.7 hung in 11 and
# 15 of 60 runs that did one all_reduce and left; 2.9 in none.
LEAVING_IS_SAFE = (2, 9)
# From this release on (2.8 was not tried), the store takes a socket that listens already, also with
# libuv, its default.
STORE_TAKES_A_SOCKET = (2, 9)

# Public functions of torch.distributed that not every release has, with the first that does.
SINCE = {
    "all_gather_single": (2, 13),
    "gather_into_tensor": (2, 14),
    "gather_single": (2, 14),
    "get_backend_impl": (2, 14),
    "reduce_scatter_single": (2, 13),
    "set_timeout": (2, 14),
    "shrink_group": (2, 9),
}
# Backends that are NCCL; and all whose calls on an accelerator's tensors return before the work is
# done. (Some are made by torch 2.14 and later only.)
NCCL = ("nccl", "nccl2", "nccl-legacy", "nccl-lazy")
STREAMED = (*NCCL, "xccl", "hccl")


def release(version: str) -> tuple[int, int]:
    """A version of torch as two numbers: (2, 13) for "2.13.0+cpu"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def leaving_is_safe() -> bool:
    """Whether destroy_process_group may free the group."""
    import torch

    return release(torch.__version__) >= LEAVING_IS_SAFE


def store_takes_a_socket() -> bool:
    """Whether `TCPStore(master_listen_fd=...)` works."""
    import torch

    return release(torch.__version__) >= STORE_TAKES_A_SOCKET


def leave_to_python(code: CodeType) -> None:
    """Have torch.compile run a function as it is, where a compiled one calls it."""
    from torch._C._dynamo import eval_frame

    if hasattr(eval_frame, "skip_code"):
        eval_frame.skip_code(code)
    elif hasattr(eval_frame, "set_code_exec_strategy"):  # newer releases
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, default))


def refused(error: BaseException) -> bool:
    """Whether a call raised before it sent anything, as torch found fault with its arguments."""
    if isinstance(error, TypeError | ValueError | AssertionError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith("ProcessGroup")


def public(name: str) -> Callable[..., Any] | None:
    """A public function of torch.distributed; None if this release does not have it."""
    from torch.distributed import distributed_c10d

    function: Callable[..., Any] | None = getattr(distributed_c10d, name, None)
    return function


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # what reads it, and what sets it
# What has an attribute `fp32_precision`, below torch.backends, in newer releases.
FP32_PRECISION_OF = (
    *("cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)
SMALL_SEED = 1 << 32  # seeds that torch draws by itself have 64 bits


def settings() -> dict[str, Setting]:
    """What a program sets in torch for all that follows, by name. None means "not set"."""
    import torch
    from torch.backends import cudnn

    found: dict[str, Setting] = {
        "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "default device": (_default_device, torch.set_default_device),
        "deterministic": (
            torch.get_deterministic_debug_mode,
            torch.set_deterministic_debug_mode,
        ),
        "matmul precision": (
            partial(_unless_mixed, torch.get_float32_matmul_precision),
            torch.set_float32_matmul_precision,
        ),
        "print options": (_print_options, lambda options: torch.set_printoptions(**options)),
        "sharing strategy": (
            torch.multiprocessing.get_sharing_strategy,
            torch.multiprocessing.set_sharing_strategy,
        ),
        "safe globals": (_safe_globals, torch.serialization.add_safe_globals),
        "threads": (_chosen_threads, torch.set_num_threads),
        "seed": (_chosen_seed, torch.manual_seed),
    }
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        read = partial(_unless_mixed, partial(getattr, cudnn, name))
        found[f"cudnn.{name}"] = (read, partial(setattr, cudnn, name))
    for name in FP32_PRECISION_OF:
        owner = torch.backends
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if hasattr(owner, "fp32_precision"):
            write = partial(setattr, owner, "fp32_precision")
            found[f"{name}.fp32_precision"] = (partial(getattr, owner, "fp32_precision"), write)
    return found


def _unless_mixed(read: Callable[[], Any]) -> Any:
    """What an older setting is; None where one of FP32_PRECISION_OF has made it meaningless."""
    try:
        return read()
    except RuntimeError:  # "... you have used mix of the legacy and new APIs"
        return None


def _default_device() -> Any:
    """The device of torch.set_default_device; torch.get_default_device may initialise CUDA."""
    import torch

    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _print_options() -> dict[str, Any]:
    from torch._tensor_str import PRINT_OPTS

    return dict(vars(PRINT_OPTS))


def _safe_globals() -> list[Any]:
    """What torch.load may load besides torch's own; sorted, as torch keeps a set."""
    from torch.serialization import get_safe_globals

    own = (v for v in get_safe_globals() if not getattr(v, "__module__", "").startswith("torch."))
    return sorted(own, key=repr)


def _chosen_threads() -> int | None:
    """The threads of an operation; None for a number to which torch, OpenMP or MKL may have come.

    torch does not tell whether torch.set_num_threads was called.
    """
    import psutil
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = {os.cpu_count(), usable, psutil.cpu_count(logical=False), (usable or 1) // 2, 1}
    variables = {os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    threads = torch.get_num_threads()
    return None if threads in cores or str(threads) in variables else threads


def _chosen_seed() -> int | None:
    """The seed of torch.manual_seed; None if torch drew one by itself."""
    import torch

    seed = torch.initial_seed()
    return seed if seed < SMALL_SEED else None


def compiled(function: Any) -> tuple[Any, ...] | None:
    """What torch.compile made a function from, for `compile_again`; None for any other function."""
    if "_torchdynamo_orig_callable" not in vars(function):
        return None
    from torch._dynamo.eval_frame import OptimizeContext, innermost_backend

    for cell in function.__closure__ or ():
        context = cell.cell_contents
        if isinstance(context, OptimizeContext):
            return (
                function._torchdynamo_orig_callable,
                innermost_backend(context.callback),
                getattr(context, "fullgraph", False),
                getattr(context, "_dynamic", None),
            )
    return None


def compile_again(function: Any, backend: Any, fullgraph: bool, dynamic: bool | None) -> Any:
    """A function as torch.compile makes it, in another process."""
    import torch

    return torch._dynamo.optimize(backend=backend, nopython=fullgraph, dynamic=dynamic)(function)
