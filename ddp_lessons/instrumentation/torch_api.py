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

from collections.abc import Callable
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
