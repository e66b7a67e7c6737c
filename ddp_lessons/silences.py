"""What became of ranks of a script whose record just stops: a rank, a machine, or all of them.

Runs in the parent, for failures.py: launch's own ranks always leave a word, their exit code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddp_lessons import evidence, whereabouts
from ddp_lessons.verdict import Verdict
from ddp_lessons.wording import at_head, ranks_text

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, Run

_RANK = (
    "Its record just stops: it was killed (for want of memory, say), it left by os._exit, or its "
    "machine is gone. The log of torchrun tells which."
)
_NODE = "Its agent (torchrun) was killed and its ranks with it, or the machine is gone."
_ALL = "The agent (torchrun) was killed and its ranks with it, or the machine stopped."


def explain(run: Run, first: RankResult) -> Verdict:
    """The verdict on a run in which a rank died without a word; `first` is the earliest."""
    silent = [rank for rank in run.ranks if rank.status == "died" and rank.exitcode is None]
    ranks = tuple(rank.rank for rank in silent)
    if len(silent) == run.world_size:
        who = f"all {run.world_size} ranks" if run.world_size > 1 else "the rank"
        lines = (_ALL, "", *whereabouts.lines(silent))
        return Verdict("killed", ranks, f"{who} ended without a word", lines)
    if (node := _gone_node(run, first)) is not None:
        return _node(run, node, first)
    title = f"rank {first.rank} of {run.world_size} ended without a word"
    lines = (_RANK, *evidence.last_call(run, first), *evidence.others(run, [first.rank]))
    return Verdict("killed", (first.rank,), title, lines)


def _gone_node(run: Run, first: RankResult) -> list[RankResult] | None:
    """The ranks of the first one's machine, if all of them and no others are silent."""
    there = [rank for rank in run.ranks if rank.group_rank == first.group_rank]
    silent = [rank for rank in run.ranks if rank.status == "died"]
    return there if silent == there else None


def _node(run: Run, there: list[RankResult], first: RankResult) -> Verdict:
    ranks = tuple(rank.rank for rank in there)
    others = {rank.host for rank in run.ranks if rank.group_rank != first.group_rank}
    host = f" ({first.host})" if first.host not in others else ""
    title = (
        f"node {first.group_rank}{host} is gone: {ranks_text(ranks)} of {run.world_size} ended "
        "without a word"
    )
    now = map(at_head, whereabouts.lines(there))
    lines = (_NODE, "", *now, *evidence.others(run, ranks))
    return Verdict("killed", ranks, title, lines)
