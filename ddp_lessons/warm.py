"""The one piece of state of the package: multiprocessing's forkserver, warm.

Runs in the parent. The forkserver is a process that has torch imported and forks a worker in
milliseconds (`preload.py` says what it imports). It ends with the parent, however that ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# Variables that Python, the C library or torch read once, when a process starts. A worker forked
# from a process that started with other values would not obey them.
READ_AT_START = (
    "PYTHON",
    "LD_",
    "MALLOC_",
    "GLIBC_",
    "KMP_",
    "GOMP_",
    "TORCH_CPP_LOG_LEVEL",
    "TORCH_SHOW_CPP_STACKTRACES",
    "TORCH_LOGS",
)
# Importing scikit-learn sets these; they matter only to a process that has not loaded OpenMP yet.
SET_BY_IMPORTS = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
_started_with: dict[str, str] = {}


def default_start_method() -> str:
    """forkserver on Linux, spawn elsewhere (macOS frameworks do not survive a fork)."""
    return "forkserver" if sys.platform == "linux" else "spawn"


def warm_in_kernel() -> None:
    """In a notebook kernel, begin to warm the forkserver; returns in a few milliseconds."""
    if in_kernel() and default_start_method() == "forkserver":
        warm()


def warm() -> None:
    """Start the forkserver if it does not run (or has died); it imports torch while we go on."""
    import multiprocessing
    import signal
    from multiprocessing import forkserver, resource_tracker

    if not _started_with:
        _started_with.update(os.environ)
    multiprocessing.set_forkserver_preload(["ddp_lessons.preload"])
    resource_tracker.ensure_running()  # first, because starting it unblocks the interrupt
    # Until it has a session of its own (preload.py), the notebook's interrupt would end it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def obeys(environment: Mapping[str, str]) -> bool:
    """True if a forked worker would behave as one that was started with these variables."""
    started = _started_with or os.environ
    names = {n for n in {*started, *environment} if n.startswith(READ_AT_START)}
    names.difference_update(SET_BY_IMPORTS)
    return all(started.get(name) == environment.get(name) for name in names)


def start_method(overrides: Mapping[str, str]) -> str:
    """How to start ranks that see the present variables, with `overrides` on top."""
    method = default_start_method()
    return "spawn" if method == "forkserver" and not obeys({**os.environ, **overrides}) else method


def in_kernel() -> bool:
    """True in the process of a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def is_live() -> bool:
    """True in a kernel that somebody looks at; not if it runs to store a notebook, or to test it.

    There the environment variable DDP_LESSONS_LIVE is 0.
    """
    return in_kernel() and os.environ.get("DDP_LESSONS_LIVE", "1") != "0"
