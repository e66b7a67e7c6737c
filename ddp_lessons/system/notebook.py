"""Whether this process is a notebook's kernel, and whether a person is watching it."""

from __future__ import annotations

import os
import sys


def in_kernel() -> bool:
    """True in the process of a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def is_live() -> bool:
    """True in a kernel that a person watches; False if it runs to store or test a notebook.

    There the environment variable DDP_LESSONS_LIVE is 0.
    """
    return in_kernel() and os.environ.get("DDP_LESSONS_LIVE", "1") != "0"
