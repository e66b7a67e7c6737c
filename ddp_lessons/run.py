"""`Run`: what `launch` and `load_run` return, and how it looks as text and in a notebook.

Lives in the parent. The text has no timings, so a notebook's stored output is the same on every
run; plots show timings. Output of workers is escaped before it becomes HTML.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_lessons import text
from ddp_lessons.analysis import chrome_trace, metrics, stragglers, wait_states
from ddp_lessons.analysis.metrics import Link, Overlap, Total
from ddp_lessons.analysis.stragglers import Straggler
from ddp_lessons.analysis.wait_states import Arrival, Share
from ddp_lessons.diagnosis import diagnose, notes
from ddp_lessons.diagnosis.verdict import Verdict
from ddp_lessons.errors import LaunchError
from ddp_lessons.results import RankResult, RunRecord, Status
from ddp_lessons.system.notebook import in_kernel
from ddp_lessons.text import cut_lines

_NO_RANK = re.compile("^ranks? ")  # it stands at the head of the column
LINES_SHOWN = 1000  # of all ranks together
ROWS_SHOWN = 16  # of the table of ranks


class Run(RunRecord):
    """The record of one launch: every rank's value, output, error and spans.

    `launch` makes it, also for a run that failed; `explain` says why.

    Attributes
    ----------
    name : str
        The name of the function or script.
    ranks : list of RankResult
        The result of each rank, by rank.
    verdict : Verdict or None
        Why the run failed or hung; None if it did not.
    error : LaunchError or None
        The error that `launch` raises with ``check=True``.
    warnings : list of Finding
        Mistakes that raised nothing, such as swapped calls. Empty if a rank failed.
    notes : list of Finding
        What may be a mistake or meant, with ``launch(..., notes=True)``; the last says what was
        compared. Empty without it, or if a rank failed.
    hung_after : float or None
        Seconds without progress after which `launch` stopped the run; None if it did not.
    interrupted : bool
        True if an interrupt stopped it.
    begin_ns : int
        `time.perf_counter_ns()` when it began.
    """

    def __init__(self, name: str, ranks: Sequence[RankResult], **how: Any) -> None:
        super().__init__(name, ranks, **how)
        self.verdict: Verdict | None = diagnose.verdict(self)
        self.error: LaunchError | None = diagnose.error(self, self.verdict)
        self.warnings = diagnose.warnings(self)
        self.notes = notes.notes(self)

    def waits(self) -> list[Share]:
        """Every rank's part in every collective, split into waiting and transfer.

        Returns a list of named tuples with the fields of `Share`; `pandas.DataFrame(run.waits())`
        makes a table of it.
        """
        return list(wait_states.waits(self))

    def arrivals(self) -> list[Arrival]:
        """How late each rank came to each collective; see `Arrival`."""
        return wait_states.arrivals(self)

    def overlap(self) -> list[Overlap]:
        """Exposed and overlapped communication by step; see `Overlap`."""
        return metrics.overlap(self)

    def totals(self) -> list[Total]:
        """How each rank spent its time; see `Total`."""
        return metrics.totals(self)

    def straggler(self) -> Straggler:
        """The rank that keeps the others waiting, if it is always the same one, and why."""
        return stragglers.straggler(self)

    def bandwidth(self) -> list[Link]:
        """Latency and bandwidth of each collective that was called with several sizes."""
        return metrics.bandwidth(self)

    @property
    def reports(self) -> list[dict[str, float]]:
        """A dict for each `report` of a rank, by time.

        Each has `rank`, `seconds` since the run began, and the numbers by their names, so
        `pandas.DataFrame(run.reports)` is a table. `plots.reports` draws them.
        """
        found = [(report, rank.rank) for rank in self.ranks for report in rank.reports]
        return [
            {"rank": rank, "seconds": (report.t_ns - self.begin_ns) / 1e9, **report.values}
            for report, rank in sorted(found, key=lambda one: (one[0].t_ns, one[1]))
        ]

    def save_trace(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write a trace for Perfetto and HolisticTraceAnalysis; return the files.

        A name that ends in .json or .json.gz becomes one file of all ranks. Any other name is a
        folder: one file a rank, and merged/all_ranks.json. See `analysis.chrome_trace.save`.
        """
        return chrome_trace.save(self, path)

    def explain(self) -> str:
        """What failed or hung and why; one line if nothing did; and how many spans were dropped.

        In a notebook, long lines are broken between words.
        """
        if self.error is not None:
            runs = type(self.error) is LaunchError  # a job that has not failed, see `diagnose`
            kind = "" if runs else f"{type(self.error).__name__}: "
            parts = [f"{kind}{self.error}", *self._lost()]
            return _for_reader("\n\n".join(parts))
        lines = [
            f"{text.all_ranks(self.world_size)} returned.",
            *map(str, [*self.warnings, *self.notes]),
            *self._lost(),
        ]
        return _for_reader("\n".join(lines))

    def _lost(self) -> list[str]:
        if not self.lossy:
            return []
        lost = [f"rank {rank}: {self.ranks[rank].dropped:,}" for rank in self.lossy]
        return [f"The latest spans could not be kept: {', '.join(lost)}."]

    def raise_for_failure(self) -> None:
        """Raise the error of this run, if it has one."""
        if self.error is not None:
            cause = None if self.error.rank is None else self.ranks[self.error.rank].exception
            raise self.error from cause

    def output_lines(self) -> list[str]:
        """The ranks' output, grouped by rank and labelled, at most about 1,000 lines."""
        labelled = {
            r.rank: [f"[rank {r.rank}] {line}" for line in r.shown_lines] for r in self.ranks
        }
        if sum(map(len, labelled.values())) <= LINES_SHOWN:
            return [line for lines in labelled.values() for line in lines]
        fair = max(2, LINES_SHOWN // self.world_size)
        return [
            line if line.startswith("[rank") else f"[rank {rank}] {line}"
            for rank, lines in labelled.items()
            for line in cut_lines(lines, fair)
        ]

    def _rows(self) -> list[tuple[str, Status | None, str]]:
        """Ranks, status and outcome: a row a rank; of many, a row for those that ended alike."""
        alike: dict[tuple[Status, str], list[int]] = {}
        for rank in self.ranks:
            alike.setdefault((rank.status, rank.outcome()), []).append(rank.rank)
        if self.world_size <= ROWS_SHOWN:
            return [(f"rank {r.rank}", r.status, r.outcome()) for r in self.ranks]
        rows: list[tuple[str, Status | None, str]] = [
            (text.ranks_text(ranks), status, outcome) for (status, outcome), ranks in alike.items()
        ]
        half = ROWS_SHOWN // 2
        if (more := len(rows) - 2 * half) > 0:
            rows[half:-half] = [(f"[... {text.count(more, 'row')} left out ...]", None, "")]
        return rows

    def __repr__(self) -> str:
        head = f"Run of {self.name} on {text.count(self.world_size, 'rank')}"
        rows = [f"  {who} {outcome}".rstrip() for who, _, outcome in self._rows()]
        return "\n".join([f"{head}:", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:right'>{_NO_RANK.sub('', who)}</td>"
            f"<td style='text-align:left'>{'' if status is None else _mark(status)}</td>"
            f"<td style='text-align:left'><code>{html.escape(outcome)}</code></td></tr>"
            for who, status, outcome in self._rows()
        )
        head = f"{html.escape(self.name)} on {text.count(self.world_size, 'rank')}"
        return (
            f"<table><caption style='text-align:left'><b>{head}</b></caption>"
            f"<tr><th>rank</th><th></th><th style='text-align:left'>outcome</th></tr>{rows}</table>"
        )


def _for_reader(message: str) -> str:
    return text.wrapped(message) if in_kernel() else message


def _mark(status: Status) -> str:
    return {"returned": "✓", "stopped": "■"}.get(status, "✗")
