"""`ddp-lessons explain RECORD`: what became of a job that was recorded, as text.

Runs in the command, on the machine of the job or on one to which the record was copied; also while
the job still runs or hangs. `load_run` gives a notebook the same, and more pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path


def explain(folder: Path, attempt: int, png: Path | None) -> int:
    """Print the verdict, where each rank is and the last calls of all; return the exit code.

    It is 0 if every rank came to its end, 1 if not, and 2 if the record cannot be read.
    """
    import matplotlib

    matplotlib.use("agg")
    from ddp_lessons.plots.hang_board import as_text, hang_board
    from ddp_lessons.recorded_run import load_run

    try:
        run = load_run(folder, attempt=attempt)
        if png is not None:
            figure = hang_board(run).get_figure(root=True)
            assert figure is not None
            figure.savefig(png, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        print(f"ddp-lessons explain: {error}", file=sys.stderr)
        return 2
    print(run, run.explain(), as_text(run), sep="\n\n")
    return 0 if run.ok else 1
