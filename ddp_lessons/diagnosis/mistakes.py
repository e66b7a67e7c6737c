"""Warns of mistakes that raise nothing, one line a kind.

Runs in the parent, called by diagnose.py for runs in which no rank failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddp_lessons.diagnosis.rank_state import frame_of, line_of
from ddp_lessons.diagnosis.verdict import Finding
from ddp_lessons.text import count, ranks_text
from ddp_lessons.wire.records import CHANGED, MISTAKES, NOT_AWAITED, OVERLAPPING, Mistake

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

_TEXTS = {
    OVERLAPPING: (
        "passed {op} a list that holds the same tensor more than once, at {line}: each piece "
        "overwrites the one before. Make a tensor for each: "
        "[torch.empty_like(x) for _ in range(world_size)]."
    ),
    NOT_AWAITED: (
        "never waited for the {op} that began at {line}: the tensor may be used before it is "
        "done. Keep what the call returns, and call its wait() first."
    ),
    CHANGED: (
        "changed the tensor of the {op} at {line} before waiting for it: the other rank may get "
        "the new numbers. Call wait() first, or send a clone()."
    ),
}


def noticed(run: RunRecord) -> list[Finding]:
    """The mistakes that ranks noticed in their own calls."""
    ranks: dict[Mistake, list[int]] = {}
    for rank in run.ranks:
        for mistake in rank.mistakes:
            ranks.setdefault(mistake, []).append(rank.rank)
    kinds = ([mistake for mistake in ranks if mistake.kind == kind] for kind in MISTAKES)
    return [_finding(made, ranks) for made in kinds if made]


def _more(others: int) -> str:
    return f" The same at {count(others, 'other line')}." if others else ""


def _finding(made: list[Mistake], ranks: dict[Mistake, list[int]]) -> Finding:
    """One line for all mistakes of a kind: it shows the first, and counts the others."""
    first, *others = made
    told = _TEXTS[first.kind].format(op=first.op, line=line_of(first.site))
    everyone = tuple(sorted({rank for mistake in made for rank in ranks[mistake]}))
    text = f"{ranks_text(ranks[first])} {told}{_more(len(others))}"
    return Finding(first.kind, everyone, text, frame_of(first.site))
