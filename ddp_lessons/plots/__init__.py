"""Pictures of a run, one a module. Each takes the run first and draws on `ax`, which it returns.

Drawn in the parent, from a `Run`; matplotlib is imported here and nowhere else.
"""

from ddp_lessons.plots.buckets import buckets
from ddp_lessons.plots.timeline import timeline

__all__ = ["buckets", "timeline"]
