"""A run that came to a standstill: which ranks wait, in which calls, and in what words to say so.

Runs in the parent, for hangs.py and deadlocks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddp_lessons import stacks, whereabouts
from ddp_lessons.calls import Calls
from ddp_lessons.losses import lost_partner
from ddp_lessons.messages import Frame
from ddp_lessons.whereabouts import position, waits
from ddp_lessons.wording import agree, listed, ranks_text

if TYPE_CHECKING:
    from ddp_lessons.results import Run

JOIN = "init_process_group"
DDP_CALLS = {"backward", "DistributedDataParallel"}  # in which DDP makes its own collectives


class Standstill:
    """What is known of the ranks of such a run.

    Attributes
    ----------
    run : Run
        The run.
    calls : Calls
        What every rank called.
    waiting, away : list of RankResult
        The ranks that wait in a call of torch.distributed, or did until it failed; the others.
    standing : dict of int to calls.Call
        The call in which a rank waits, by rank; DDP's own calls are not recorded.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.calls = Calls([rank.spans for rank in run.ranks])
        self.waiting = [rank for rank in run.ranks if waits(rank)]
        self.away = [rank for rank in run.ranks if rank not in self.waiting]
        self.standing = {
            rank.rank: call
            for rank in self.waiting
            if (call := self.calls.standing(rank.rank)) is not None
        }

    def who_waits(self) -> str:
        """`ranks 0 and 2 wait in barrier`."""
        who = self.waiting
        calls = listed(sorted({str(position(rank).call) for rank in who}))
        waits = agree(who, "waits", "wait") if any(r.status == "stopped" for r in who) else "waited"
        return f"{ranks_text([rank.rank for rank in who])} {waits} in {calls}"

    def frame(self) -> Frame | None:
        """The line where the first rank waits."""
        first = next(iter(self.waiting), None)
        return None if first is None else position(first).frame

    def errors(self) -> list[str]:
        """The traceback of a rank that raised something of its own, or gave up waiting."""
        raised = [r for r in self.run.ranks if r.error is not None and r.status == "raised"]
        own = [r for r in raised if not lost_partner(r)] or raised
        return [*stacks.render(own[0].error).splitlines(), ""] if own and own[0].error else []

    def evidence(self) -> tuple[str, ...]:
        """That traceback, and where every rank is."""
        return (*self.errors(), *whereabouts.lines(self.run.ranks))
