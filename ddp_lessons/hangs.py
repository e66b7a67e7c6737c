"""Why ranks wait for ever, or lost each other, from their calls and stacks. Runs in the parent.

Three questions, in this order. Did the ranks' calls part: at one number in a group, other functions
or tensors? If not, who is awaited and did not come, and what does it do instead? If nobody, why do
those that came wait (deadlocks.py)?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ddp_lessons import advice, deadlocks, partings, stacks, whereabouts
from ddp_lessons.calls import Call
from ddp_lessons.joining import JOINING
from ddp_lessons.partings import Parting, frame_of, line_of
from ddp_lessons.standstill import DDP_CALLS, JOIN, Standstill
from ddp_lessons.verdict import Kind, Verdict
from ddp_lessons.whereabouts import position
from ddp_lessons.wording import agree, at_head, listed, ranks_text

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, Run

# Of several that are awaited, the kind that says most.
_WORST: tuple[Kind, ...] = (
    "suspended",
    "computing",
    "blocked in Python",
    "left the group",
    "never joined",
    "returned early",
    "unmatched recv",
    "unmatched send",
    "no answer",
)


def explain(run: Run) -> Verdict:
    """The verdict on a run in which ranks wait for ever, or lost each other and nothing else."""
    return _Hang(run).verdict()


def explain_sizes(run: Run, ended: Sequence[int]) -> Verdict:
    """The verdict on a run in which gloo ended ranks that got data of another size."""
    hang = _Hang(run)
    verdict = hang.verdict()
    if verdict.kind in ("unlike tensors", "skipped collective", "different collectives"):
        return verdict
    # Calls that are not recorded, such as DDP's own: it cannot be told which rank is wrong.
    return Verdict(
        "different collectives",
        tuple(range(run.world_size)),
        f"{ranks_text(ended)} got data of another size than {agree(ended, 'its', 'their')} call "
        "expects: the calls do not match",
        verdict.evidence,
        f"{advice.ORDER} {advice.DDP}",
        verdict.frame,
    )


class _Hang(Standstill):
    def verdict(self) -> Verdict:
        parting = self._parting()
        if parting is not None:
            return self._parted(parting)
        awaited = self._awaited()
        if awaited:
            return self._missed(awaited)
        return deadlocks.explain(self)

    # Calls that do not fit

    def _parting(self) -> Parting | None:
        """The first call at which ranks parted, in the groups where some wait now."""
        last: dict[str, int] = {}
        for call in self.standing.values():
            if call.group is not None and call.seq is not None and not call.pairwise:
                last[call.group] = max(call.seq, last.get(call.group, 0))
        if not last and any(position(rank).call in DDP_CALLS for rank in self.waiting):
            last = {group: max(numbers) for group, numbers in self.calls.met.items()}
        found = [partings.first(self.calls, group, until) for group, until in last.items()]
        return min(
            (p for p in found if p is not None),
            key=lambda p: min(call.t0_ns for call in p.calls),
            default=None,
        )

    def _parted(self, parting: Parting) -> Verdict:
        lines = whereabouts.lines(self.run.ranks)
        if any(self._stands_elsewhere(call) for call in parting.calls):
            lines = [f"{at_head(parting.place)}:", *parting.lines(), "", "Now:", *lines]
        op = parting.calls[0].op
        against = advice.ORDER if parting.why == "order" else advice.TENSORS.format(op=op)
        return Verdict(
            parting.kind,
            parting.odd_ranks,
            parting.title(),
            (*self.errors(), *lines),
            against,
            parting.frame,
        )

    def _stands_elsewhere(self, call: Call) -> bool:
        stands = self.standing.get(call.rank)
        return stands is None or stands.site != call.site

    # Ranks that do not come

    def _awaited(self) -> dict[int, Kind]:
        """The ranks that others wait for and that do not wait themselves, and why."""
        missing: dict[int, Call | None] = {}
        for call in self.standing.values():
            missing.update(dict.fromkeys(self.calls.missing(call), call))
        if len(self.standing) < len(self.waiting):  # DDP's own calls: all may be awaited
            missing = {**{r.rank: None for r in self.away}, **missing}
        away = {rank.rank: rank for rank in self.away}
        found = {r: self._why_away(away[r], call) for r, call in missing.items() if r in away}
        joining = any(call.op in JOINING for call in self.standing.values())
        if not found and (not self.standing or (joining and self.run.hung_after is None)):
            found = {r: self._why_away(rank, None) for r, rank in away.items()}
        return found

    def _why_away(self, rank: RankResult, call: Call | None) -> Kind:
        left = self._left(rank.rank)
        if call is not None and call.op == JOIN:
            return "never joined"
        if rank.status == "returned":
            return "returned early"
        if left is not None:
            return "left the group"
        match rank.activity:
            case "suspended":
                return "suspended"
            case "busy":
                return "computing"
        if not rank.stack:
            return "no answer"
        return "blocked in Python"

    def _left(self, rank: int) -> Call | None:
        """The call by which a rank left a group in which others wait."""
        groups = {"world", *(call.group for call in self.standing.values() if call.group)}
        found = [self.calls.left(rank, group) for group in groups]
        return next((call for call in found if call is not None), None)

    def _missed(self, awaited: dict[int, Kind]) -> Verdict:
        kind = min(awaited.values(), key=_WORST.index)
        ranks = tuple(sorted(r for r, why in awaited.items() if why == kind))
        gone = listed(self._short(kind, ranks) for kind, ranks in _by_kind(awaited))
        title = f"{self.who_waits()}, but {gone}" if self.waiting else self._nobody_waits()
        frame = stacks.position(self.run.ranks[ranks[0]].stack).frame
        if frame is None and (call := self.calls.not_made(ranks[0])) is not None:
            frame = frame_of(call.site)
        return Verdict(
            kind,
            ranks,
            title,
            self.evidence(),
            self._against(kind, ranks),
            frame,
        )

    def _against(self, kind: Kind, ranks: Sequence[int]) -> str:
        """What to try where `ranks` did not come."""
        after = self.run.hung_after
        limit = "" if after is None else f"No rank made progress for {after:g} s. "
        slow = "" if self.run.recorded else advice.SLOW
        match kind:
            case "computing":
                return limit + slow
            case "blocked in Python":
                return limit + advice.IDLE + slow
            case "no answer" if self.run.recorded:
                rank = self.run.ranks[ranks[0]]
                return advice.RECORD + (advice.PY_SPY.format(rank=rank) if rank.pid else "")
            case "no answer":
                return advice.IN_C + advice.SLOW
            case "suspended":
                return advice.SUSPENDED
            case "never joined":
                return advice.JOINING
            case "left the group":
                return advice.LEFT
        return advice.MISSING

    def _nobody_waits(self) -> str:
        after = self.run.hung_after
        return f"no rank made progress for {after:g} s" if after is not None else "no rank goes on"

    def _short(self, kind: Kind, ranks: Sequence[int]) -> str:
        who, rank = ranks_text(ranks), self.run.ranks[ranks[0]]
        has, is_ = agree(ranks, "has", "have"), agree(ranks, "is", "are")
        frame = stacks.position(rank.stack).frame
        where = f" at {stacks.line_name(frame)}" if frame else ""
        match kind:
            case "never joined" if rank.status == "returned":
                return f"{who} {has} returned"
            case "never joined" if rank.activity is not None:
                return f"{who} {is_} {rank.activity}{where}"
            case "returned early":
                call = self.calls.not_made(ranks[0])
                before = f" before {call.op} at {line_of(call.site)}" if call else ""
                return f"{who} {has} returned{before}"
            case "left the group":
                call = self._left(ranks[0])
                return f"{who} {has} left the group at {line_of(call.site if call else None)}"
            case "computing":
                return f"{who} {is_} busy{where}"
            case "suspended":
                return f"{who} {is_} suspended{where}"
            case "no answer" if self.run.recorded:
                return f"{who} did not come"
            case "no answer":
                return f"{who} did not answer"
            case _:
                return f"{who} {is_} idle{where}"


def _by_kind(awaited: dict[int, Kind]) -> Iterable[tuple[Kind, list[int]]]:
    for kind in sorted(set(awaited.values()), key=_WORST.index):
        yield kind, sorted(rank for rank, why in awaited.items() if why == kind)
