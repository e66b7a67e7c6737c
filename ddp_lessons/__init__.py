"""Learn PyTorch distributed training by running it: real ranks, started from a notebook cell.

The public names, and nothing else. Importing the package is cheap: a name loads its module when it
is first used, and torch, matplotlib and ipywidgets are loaded when something needs them. In a
notebook kernel the import also begins to warm the process that ranks are forked from, so that the
first launch does not wait for torch. In a script that torchrun starts it begins to record, if the
environment variable DDP_LESSONS_RECORD names a folder.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ddp_lessons.warm import warm_in_kernel

if TYPE_CHECKING:
    from ddp_lessons import plots
    from ddp_lessons.backends import recommend_backend
    from ddp_lessons.buckets import watch_ddp
    from ddp_lessons.errors import (
        BadLaunch,
        CannotSend,
        LaunchError,
        WorkerDied,
        WorkerFailed,
        WorkersHung,
    )
    from ddp_lessons.launcher import launch
    from ddp_lessons.loading import load_run
    from ddp_lessons.recording import span, steps
    from ddp_lessons.results import RankResult, Run

__version__ = "0.1.0"
__all__ = [
    "BadLaunch",
    "CannotSend",
    "LaunchError",
    "RankResult",
    "Run",
    "WorkerDied",
    "WorkerFailed",
    "WorkersHung",
    "launch",
    "load_run",
    "plots",
    "recommend_backend",
    "span",
    "steps",
    "watch_ddp",
]
_HOME = {
    "RankResult": "results",
    "Run": "results",
    "launch": "launcher",
    "load_run": "loading",
    "recommend_backend": "backends",
    "span": "recording",
    "steps": "recording",
    "watch_ddp": "buckets",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "plots":
        return importlib.import_module("ddp_lessons.plots")
    value = getattr(importlib.import_module(f"ddp_lessons.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


warm_in_kernel()
if "DDP_LESSONS_RECORD" in os.environ:
    importlib.import_module("ddp_lessons.script").begin()
