"""Pictures of a run, one function a module. Each takes its data first and draws on `ax`.

They run in the parent, mostly on a `Run`; the package imports matplotlib nowhere else.
"""

from ddp_lessons.plots.arrivals import arrivals
from ddp_lessons.plots.bandwidth import bandwidth
from ddp_lessons.plots.buckets import buckets
from ddp_lessons.plots.differences import differences
from ddp_lessons.plots.hang_board import hang_board
from ddp_lessons.plots.items import items
from ddp_lessons.plots.losses import losses
from ddp_lessons.plots.machines import machines
from ddp_lessons.plots.memory import memory
from ddp_lessons.plots.pipeline import pipeline
from ddp_lessons.plots.reports import reports
from ddp_lessons.plots.shards import shards
from ddp_lessons.plots.statistics import statistics
from ddp_lessons.plots.steps import steps
from ddp_lessons.plots.tensors import tensors
from ddp_lessons.plots.timeline import timeline
from ddp_lessons.plots.totals import totals
from ddp_lessons.plots.waits import waits

__all__ = [
    "arrivals",
    "bandwidth",
    "buckets",
    "differences",
    "hang_board",
    "items",
    "losses",
    "machines",
    "memory",
    "pipeline",
    "reports",
    "shards",
    "statistics",
    "steps",
    "tensors",
    "timeline",
    "totals",
    "waits",
]
