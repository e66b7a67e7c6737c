"""Pictures of a run, one a module. Each takes the run first and draws on `ax`, which it returns.

Drawn in the parent, from a `Run`; matplotlib is imported here and nowhere else.
"""

from ddp_lessons.plots.arrivals import arrivals
from ddp_lessons.plots.bandwidth import bandwidth
from ddp_lessons.plots.buckets import buckets
from ddp_lessons.plots.differences import differences
from ddp_lessons.plots.hang_board import hang_board
from ddp_lessons.plots.losses import losses
from ddp_lessons.plots.machines import machines
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
    "losses",
    "machines",
    "shards",
    "statistics",
    "steps",
    "tensors",
    "timeline",
    "totals",
    "waits",
]
