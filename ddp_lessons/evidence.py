"""Lines that a verdict on a failure adds: its last call, and what became of the other ranks.

Runs in the parent, for failures.py and silences.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_lessons import stacks
from ddp_lessons.calls import Calls
from ddp_lessons.losses import lost_partner
from ddp_lessons.partings import frame_of
from ddp_lessons.whereabouts import line
from ddp_lessons.wording import agree, at_head, ranks_text

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, Run

FAILED = ("raised", "died", "unsendable")


def last_call(run: Run, rank: RankResult) -> list[str]:
    """Where a rank was that can no longer tell: the tape stays readable."""
    calls = Calls([rank.spans for rank in run.ranks])
    made = calls.of_rank[rank.rank]
    if not made:
        return []
    call = calls.standing(rank.rank) or made[-1]
    what = "Its last call was" if call.state == "done" else "It was in"
    return [f"{what} {call.op}{line(frame_of(call.site))}"]


def others(run: Run, told: Sequence[int]) -> list[str]:
    """One line for each kind of collateral damage."""
    rest = [r for r in run.ranks if r.rank not in told]
    lost = [r for r in rest if lost_partner(r)]
    stopped = [r for r in rest if r.status == "stopped"]
    own = [r for r in rest if r.status in FAILED and r not in lost]
    lines = [f"rank {r.rank} failed later: {r.outcome()}" for r in own]
    for where in dict.fromkeys(_lost_where(r) for r in lost):
        there = [r.rank for r in lost if _lost_where(r) == where]
        partner = agree(there, "its partner", "their partner")
        lines.append(f"{at_head(ranks_text(there))} lost {partner} by that{where}.")
    lines += [f"rank {r.rank} {'' if r.pid else 'was '}{r.outcome()}" for r in stopped[:4]]
    if len(stopped) > 4:
        lines.append(f"... and {len(stopped) - 4} more ranks were stopped")
    return ["", *lines] if lines else []


def _lost_where(rank: RankResult) -> str:
    return stacks.waiting_where(rank.error.frames) if rank.error is not None else ""
