"""The one piece of state of the package: multiprocessing's forkserver, warm.

Runs in the parent. The forkserver is a process that has torch imported and forks a worker in
milliseconds (`preload.py` says what it imports). It ends with the parent, however that ends.
"""

from __future__ import annotations

import sys


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
    from multiprocessing import forkserver

    multiprocessing.set_forkserver_preload(["ddp_lessons.preload"])
    forkserver.ensure_running()


def in_kernel() -> bool:
    """True in the process of a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")
