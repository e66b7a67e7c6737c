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
import sys
from typing import TYPE_CHECKING, Any

from ddp_lessons.processes.forkserver import also_warm, warm_in_kernel

if TYPE_CHECKING:
    from ddp_lessons import plots
    from ddp_lessons.analysis.metrics import Link, Overlap, Total
    from ddp_lessons.analysis.stragglers import Cause, Straggler
    from ddp_lessons.analysis.wait_states import Arrival, Share
    from ddp_lessons.diagnosis.verdict import Finding, Verdict
    from ddp_lessons.errors import (
        BadLaunch,
        CannotSend,
        LaunchError,
        WorkerDied,
        WorkerFailed,
        WorkersHung,
    )
    from ddp_lessons.instrumentation.ddp_buckets import watch_ddp
    from ddp_lessons.instrumentation.recording import report, span, steps
    from ddp_lessons.launcher.api import launch
    from ddp_lessons.launcher.backends import recommend_backend
    from ddp_lessons.launcher.running import RunningRun
    from ddp_lessons.recorded_run import load_run
    from ddp_lessons.results import RankResult
    from ddp_lessons.run import Run
    from ddp_lessons.wire.messages import Displayed
    from ddp_lessons.wire.records import (
        Batches,
        Caught,
        ErrorRecord,
        Frame,
        FrameVariables,
        Mistake,
        Noted,
        Report,
        Span,
        Timeout,
    )

__version__ = "0.1.0"
__all__ = [
    "Arrival",
    "BadLaunch",
    "Batches",
    "CannotSend",
    "Caught",
    "Cause",
    "Displayed",
    "ErrorRecord",
    "Finding",
    "Frame",
    "FrameVariables",
    "LaunchError",
    "Link",
    "Mistake",
    "Noted",
    "Overlap",
    "RankResult",
    "Report",
    "Run",
    "RunningRun",
    "Share",
    "Span",
    "Straggler",
    "Timeout",
    "Total",
    "Verdict",
    "WorkerDied",
    "WorkerFailed",
    "WorkersHung",
    "launch",
    "load_run",
    "plots",
    "recommend_backend",
    "report",
    "span",
    "steps",
    "watch_ddp",
]
_HOME = {
    "Arrival": "analysis.wait_states",
    "Batches": "wire.records",
    "Caught": "wire.records",
    "Cause": "analysis.stragglers",
    "Displayed": "wire.messages",
    "ErrorRecord": "wire.records",
    "Finding": "diagnosis.verdict",
    "Frame": "wire.records",
    "FrameVariables": "wire.records",
    "Link": "analysis.metrics",
    "Mistake": "wire.records",
    "Noted": "wire.records",
    "Overlap": "analysis.metrics",
    "RankResult": "results",
    "Report": "wire.records",
    "Run": "run",
    "RunningRun": "launcher.running",
    "Share": "analysis.wait_states",
    "Span": "wire.records",
    "Straggler": "analysis.stragglers",
    "Timeout": "wire.records",
    "Total": "analysis.metrics",
    "Verdict": "diagnosis.verdict",
    "launch": "launcher.api",
    "load_run": "recorded_run",
    "recommend_backend": "launcher.backends",
    "report": "instrumentation.recording",
    "span": "instrumentation.recording",
    "steps": "instrumentation.recording",
    "watch_ddp": "instrumentation.ddp_buckets",
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


also_warm.append("ddp_lessons.exercises.framework")  # which ranks of a check would import
warm_in_kernel()
if os.environ.get("DDP_LESSONS_RECORD") and f"{__name__}.record" not in sys.orig_argv:
    importlib.import_module("ddp_lessons.worker.torchrun").begin()
