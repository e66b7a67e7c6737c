"""Warns of mistakes that raise nothing, one line a kind.

Runs in the parent, called by diagnose.py for runs in which no rank failed.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from ddp_lessons.diagnosis.mismatch import frame_of, line_of
from ddp_lessons.diagnosis.verdict import Finding
from ddp_lessons.text import count, ranks_text
from ddp_lessons.wire.ops import RECVS, SENDS
from ddp_lessons.wire.records import (
    CHANGED,
    MISTAKES,
    NOT_AWAITED,
    OVERLAPPING,
    Kind,
    Mistake,
    Span,
)

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

PARTLY_FILLED = "partly filled"
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


def partly_filled(run: RunRecord) -> list[Finding]:
    """Messages that were shorter than the tensor that received them: its end was not written."""
    sent, received = _messages(run, SENDS), _messages(run, RECVS)
    found: dict[str | None, tuple[Span, Span]] = {}  # the first of each line
    for pair in sent.keys() & received.keys():
        for seq, got in received[pair].items():
            message = sent[pair].get(seq)
            if message is not None and (message.nbytes or 0) < (got.nbytes or 0):
                found.setdefault(got.site, (message, got))
    if not found:
        return []
    message, got = min(found.values(), key=lambda each: each[1].t0_ns)
    text = (
        f"rank {got.rank} received {message.tensor} from rank {message.rank} into {got.tensor} at "
        f"{line_of(got.site)}: the rest of that tensor was not written. Make it as large as what "
        f"the other rank sends.{_more(len(found) - 1)}"
    )
    ranks = tuple(sorted({got.rank for _, got in found.values()}))
    return [Finding(PARTLY_FILLED, ranks, text, frame_of(got.site))]


_Pair = tuple[str | None, int | None, int | None, int | None]  # group, sender, receiver and tag


def _messages(run: RunRecord, ops: Container[str | None]) -> dict[_Pair, dict[int, Span]]:
    """The messages of each pair of ranks by number, where their numbers are certain.

    A recv from any rank gets its number when it is done: if it overtook others, or if nobody waited
    for it, the numbers of its pair, or of its rank, may be wrong.
    """
    found: dict[_Pair, dict[int, Span]] = {}
    for rank in run.ranks:
        calls = [s for s in rank.spans if s.op in ops and s.kind == Kind.COMM and not s.failed]
        numbered = [(s.seq, s) for s in calls if s.seq is not None]
        for seq, s in numbered if len(numbered) == len(calls) else ():
            pair = (s.rank, s.peer) if s.op in SENDS else (s.peer, s.rank)
            found.setdefault((s.group, *pair, s.tag), {})[seq] = s
    return {pair: numbers for pair, numbers in found.items() if list(numbers) == sorted(numbers)}


def _more(others: int) -> str:
    return f" The same at {count(others, 'other line')}." if others else ""


def _finding(made: list[Mistake], ranks: dict[Mistake, list[int]]) -> Finding:
    """One line for all mistakes of a kind: it shows the first, and counts the others."""
    first, *others = made
    told = _TEXTS[first.kind].format(op=first.op, line=line_of(first.site))
    everyone = tuple(sorted({rank for mistake in made for rank in ranks[mistake]}))
    text = f"{ranks_text(ranks[first])} {told}{_more(len(others))}"
    return Finding(first.kind, everyone, text, frame_of(first.site))
