"""Explains why ranks wait forever or lost each other, from calls and stacks. Runs in the parent.

It asks three questions in turn. Do the ranks' calls differ: at one sequence number of a group,
another function or tensor? If not, which rank is missing, and what does it do instead? If none is,
why do the ranks that came wait for each other?
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from ddp_lessons.diagnosis import advice, mismatch, rank_state, source_code
from ddp_lessons.diagnosis.calls import Call, Calls
from ddp_lessons.diagnosis.mismatch import Mismatch
from ddp_lessons.diagnosis.rank_state import (
    frame_of,
    frames_of,
    line_of,
    lost_partner,
    position,
    waits,
)
from ddp_lessons.diagnosis.source_code import Loop
from ddp_lessons.diagnosis.verdict import Kind, Verdict
from ddp_lessons.results import RankResult, RunRecord
from ddp_lessons.text import agree, at_head, count, listed, ranks_text
from ddp_lessons.wire import stacks
from ddp_lessons.wire.ops import (
    DDP,
    DDP_CALLS,
    FROM_ROOT,
    JOIN,
    JOINING,
    MAKES_GROUP,
    RECVS,
    SENDS,
)
from ddp_lessons.wire.owners import Owner, owner_of
from ddp_lessons.wire.records import Caught, Frame, Lane, Span

# The kind of verdict where several ranks are missing: the first of these wins.
_WORST: tuple[Kind, ...] = (
    "suspended",
    "computing",
    "blocked in Python",
    "not ended",
    "left the group",
    "never joined",
    "returned early",
    "unmatched recv",
    "unmatched send",
    "no answer",
)

# The kinds of verdict where some ranks may have made fewer training steps than the others.
_UNEVEN: tuple[Kind, ...] = (
    "skipped collective",
    "different collectives",
    "tensor mismatch",
    "returned early",
    "left the group",
    "waiting for each other",
)

# Those where it is not known whether a rank made a step less, or another call more.
_UNCLEAR: tuple[Kind, ...] = ("different collectives", "tensor mismatch")

# The kinds of verdict where an exception that a rank caught may be the reason.
_PARTED: tuple[Kind, ...] = (*_UNEVEN, "computing", "blocked in Python", "no answer")

# What makes calls in a rank's stead, by parts of its files' names, and the advice for it.
SYNC_BATCHNORM = "SyncBatchNorm"
_LIBRARIES = {
    "ddp_lessons/syncbn.py": advice.SYNC_BATCHNORM,
    "torch/nn/modules/_functions.py": advice.SYNC_BATCHNORM,
    "torch/distributed/pipelining/": advice.PIPELINE,
    "torch/distributed/fsdp/": advice.SHARDS,
    "torch/distributed/tensor/": advice.SHARDS,
    "torch/distributed/_functional_collectives.py": advice.SHARDS,
    "torch/distributed/checkpoint/": advice.SHARDS,
}

# Exceptions that are no failures.
_ENDS_LOOPS = ("StopIteration", "StopAsyncIteration", "GeneratorExit")

# Advice by what keeps a rank from ending, if it is not a thread.
_ENDING = {
    stacks.HANDLER: advice.HANDLERS,
    stacks.CHILD: advice.CHILDREN,
    stacks.PROCESS: advice.IN_C,
}


def explain(run: RunRecord) -> Verdict:
    """The verdict on a run in which ranks wait forever, or only lost each other."""
    return _Hang(run).verdict()


def may_go_on(run: RunRecord) -> bool:
    """Whether ranks whose record was read still lived, and nothing proves that they hang."""
    alive = [rank.rank for rank in run.ranks if rank.pid is not None]
    return bool(alive) and not Calls.of(run).stuck_for_good(alive)


def explain_sizes(run: RunRecord, ended: Sequence[int]) -> Verdict:
    """The verdict where gloo aborted ranks because they received data of another size."""
    hang = _Hang(run)
    if (verdict := hang.mismatched(ended)) is not None:
        return verdict
    # Some calls are not recorded, so any rank may be wrong.
    verdict = hang.verdict()
    return Verdict(
        "different collectives",
        tuple(range(run.world_size)),
        f"{ranks_text(ended)} got data of a size that {agree(ended, 'its', 'their')} call does not "
        "expect: the calls do not match",
        verdict.evidence,
        f"{advice.ORDER} {advice.DDP}",
        verdict.frame,
    )


def explain_mismatch(run: RunRecord) -> Verdict | None:
    """The verdict where ranks got what belongs to other calls than theirs; None if calls match."""
    return _Hang(run).mismatched([])


def explain_message(run: RunRecord, rank: int) -> Verdict | None:
    """The verdict where a rank raised in a recv that took an object for a tensor, or vice versa."""
    made = _harmful(Calls.of(run), [rank])
    failed = [m for m in made if m.why == "objects" and m.calls[1].state == "failed"]
    return _Hang(run).parted(failed[0]) if failed else None


def got_too_much(run: RunRecord, rank: int) -> bool:
    """Whether a rank received a message that was too long for its recv."""
    return any(message.too_much for message in _harmful(Calls.of(run), [rank]))


def _harmful(calls: Calls, ranks: Sequence[int]) -> list[Mismatch]:
    """The messages that may end these ranks: too long for their recv, or not to be decoded."""
    return [
        message
        for message in mismatch.messages(calls, ranks)
        if message.calls[1].rank in ranks and (message.too_much or message.why == "objects")
    ]


class Standstill:
    """The waiting and the other ranks of a run that hung or lost ranks.

    Attributes
    ----------
    run : RunRecord
        The run.
    calls : Calls
        The ranks' calls.
    waiting, away : list of RankResult
        The ranks that wait in a call of torch.distributed, or did until it failed; the others.
    standing : dict of int to calls.Call
        The call that a rank waits in, by rank, where it was recorded.
    """

    def __init__(self, run: RunRecord) -> None:
        self.run = run
        self.calls = Calls.of(run)
        self.waiting = [rank for rank in run.ranks if waits(rank)] or [
            rank
            for rank in run.ranks  # whose main threads wait for others that do
            if rank.status == "stopped" and rank.activity != "suspended"
            if any(map(self.calls.missing, self.calls.open(rank.rank)))
        ]
        self.away = [rank for rank in run.ranks if rank not in self.waiting]
        self.standing = {
            rank.rank: call
            for rank in self.waiting
            if (call := self.calls.standing(rank.rank)) is not None
        }

    def who_waits(self) -> str:
        """`ranks 0 and 2 wait in barrier`."""
        who = self.waiting
        calls = listed(sorted(set(map(self._call, who))))
        waits = agree(who, "waits", "wait") if any(r.status == "stopped" for r in who) else "waited"
        return f"{ranks_text([rank.rank for rank in who])} {waits} in {calls}"

    def _call(self, rank: RankResult) -> str:
        stands = self.standing.get(rank.rank)
        return position(rank).call or (stands.name if stands is not None else "a call")

    def frame(self) -> Frame | None:
        """The line where the first waiting rank is."""
        first = next(iter(self.waiting), None)
        return None if first is None else position(first).frame

    def ran_out(self) -> str:
        """Which timeout of torch's ran out, as a sentence; "" if none did."""
        own = next(filter(None, map(rank_state.own_timeout, self.waiting)), None)
        if own is None:
            return ""
        of = f" that {own.call} got at {line_of(own.site)}" if own.call else ""
        return f"The timeout of {own.seconds:g} s{of} ran out. "

    def training_loop(self) -> Loop | None:
        """The innermost loop in which a rank waits and an optimizer steps."""
        loops = filter(None, (source_code.training_loop(frames_of(rank)) for rank in self.waiting))
        return min(loops, key=lambda loop: loop.last - loop.first, default=None)

    def library(self, ranks: Iterable[int]) -> str:
        """Advice on the library by which ranks wait; "" if they call torch.distributed directly."""
        found = [_library(self.run.ranks[rank]) for rank in ranks if rank in self.standing]
        return next(filter(None, found), "")

    def steps(self) -> str:
        """`Rank 1 made 4 steps; ranks 0 and 2 began 5.`, or "" if it is not sure that it is so.

        The ranks that made fewer must have left the loop in which the others wait.
        """
        steps = {r.rank: list(filter(_is_whole_step, r.spans)) for r in self.run.ranks}
        loop = self.training_loop()
        if loop is None or self.run.lossy:
            return ""
        inside = [r.rank for r in self.waiting if any(map(loop.holds, frames_of(r)))]
        outside = [r for r in self.run.ranks if r.rank not in inside]
        left = all(
            rank.status == "returned" or _left(loop, rank) or self._died_after(loop, rank)
            for rank in outside
        )
        counts = {len(steps[r.rank]) for r in outside}, {len(steps[rank]) for rank in inside}
        if not left or any(len(each) != 1 for each in counts):
            return ""
        (fewer,), (most,) = counts
        before = {
            loop.is_before_step(frames_of(self.run.ranks[rank]), made[-1].site if made else None)
            for rank, made in steps.items()
            if rank in inside
        }
        in_a_step = before == {True}
        if len(before) != 1 or None in before or not 0 < fewer < most + in_a_step:
            return ""
        who = at_head(ranks_text([rank.rank for rank in outside]))
        others = f"began {most + 1}" if in_a_step else f"made {most}"
        return f"{who} made {count(fewer, 'step')}; {ranks_text(inside)} {others}."

    def _died_after(self, loop: Loop, rank: RankResult) -> bool:
        """Whether a rank died in a call that comes after a loop."""
        made = self.calls.of_rank[rank.rank]
        frame = frame_of(made[-1].site) if made and rank.status == "died" else None
        return frame is not None and loop.is_before(frame)

    def caught(self, missed: Frame | None) -> dict[int, Caught]:
        """By rank, an exception that it caught, and the waiting ranks did not, where they call on.

        That is in the `try` or `with` that caught it; `missed` is another line that they called at.
        """
        found = {}
        for rank in self.run.ranks:
            others = [other for other in self.waiting if other is not rank]
            if rank.status == "raised" and not lost_partner(rank):
                continue  # its traceback tells
            for what in reversed(rank.caught or ()):
                lines = source_code.guarded(what)
                if lines is None:
                    continue
                there = [other for other in others if any(map(lines.holds, frames_of(other)))]
                if missed is not None and lines.holds(missed):
                    there = others
                times = _times_caught(rank, what.handler)
                if any(times > _times_caught(other, what.handler) for other in there):
                    found[rank.rank] = what
                    break
        return found

    def errors(self) -> list[str]:
        """The traceback of a rank that raised its own error, or else gave up waiting."""
        raised = [r for r in self.run.ranks if r.error is not None and r.status == "raised"]
        own = [r for r in raised if not lost_partner(r)]
        own = own or [r for r in raised if rank_state.handled(r)] or raised
        return [*stacks.render(own[0].error).splitlines(), ""] if own and own[0].error else []

    def evidence(self) -> tuple[str, ...]:
        """The traceback, and where every rank is."""
        return (*self.errors(), *rank_state.lines(self.run.ranks))


def _times_caught(rank: RankResult, handler: str) -> int:
    return sum(what.handler == handler for what in rank.caught or ())


def _is_whole_step(span: Span) -> bool:
    return span.lane == Lane.STEPS and span.t1_ns is not None


def _comes_by(line: Frame | None, rank: RankResult) -> bool:
    return line is not None and any(
        (frame.filename, frame.lineno) == (line.filename, line.lineno) for frame in frames_of(rank)
    )


def _library(rank: RankResult) -> str:
    """Advice on the library in which a rank waits, below its own lines."""
    frames = frames_of(rank)
    own = stacks.learners(frames)
    below = frames[own[-1] + 1 if own else 0 :]
    names = (name for frame in below for name in _LIBRARIES if name in frame.filename)
    return next((_LIBRARIES[name] for name in names), "")


def _fork(one: Sequence[Frame], other: Sequence[Frame]) -> tuple[str, str] | None:
    """The two lines of a learner's function at which two stacks part; None if there are none."""
    for here, there in zip(one, other, strict=False):
        if (here.filename, here.function) != (there.filename, there.function):
            return None
        if here.lineno != there.lineno:
            own = owner_of(here.filename) is Owner.LEARNER or here.at_home
            sites = f"{here.filename}:{here.lineno}", f"{there.filename}:{there.lineno}"
            return sites if own else None
    return None


def _own(rank: RankResult) -> list[Frame]:
    return [f for f in frames_of(rank) if owner_of(f.filename) is Owner.LEARNER or f.at_home]


def _guarded_below(frames: Sequence[Frame], line: str) -> str | None:
    """The first of a learner's lines below `line` to which only some ranks come."""
    sites = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    below = [frames[number] for number in stacks.learners(frames) if number > sites.index(line)]
    found = next(filter(source_code.depends_on_rank, below), None)
    return None if found is None else f"{found.filename}:{found.lineno}"


def _left(loop: Loop, rank: RankResult) -> bool:
    """Whether a rank is in none of a loop's lines. Its whole stack must be known for that."""
    frames = frames_of(rank)
    known = any(frame.function for frame in frames) and position(rank).frame is not None
    return known and not any(loop.holds(frame) for frame in frames)


def _from_two(calls: Iterable[Call]) -> bool:
    """Whether calls come from the main thread and from another."""
    return len({call.thread is None for call in calls}) > 1


class _Hang(Standstill):
    def verdict(self) -> Verdict:
        """The verdict; unequal steps, or an exception that ended a thread, may be the reason."""
        verdict = self._with_reasons(self._verdict())
        if not any(rank.dead_threads for rank in self.run.ranks):
            return verdict
        return dataclasses.replace(verdict, advice=f"{verdict.advice} {advice.DEAD_THREAD}")

    def _with_reasons(self, verdict: Verdict) -> Verdict:
        """The verdict, with what the record tells about why the ranks went apart."""
        return self._with_steps(self._with_caught(verdict))

    def _with_caught(self, verdict: Verdict) -> Verdict:
        """The verdict, with an exception that some ranks caught where the others call on."""
        if verdict.kind not in _PARTED or verdict.advice == advice.HANDLED:
            return verdict
        found = self.caught(verdict.frame)
        if not found or len(found) == self.run.world_size:
            return self._with_swallowed(verdict)
        told: dict[str, list[int]] = {}
        for rank, what in found.items():
            text = f"caught {what.error}{rank_state.line(frame_of(what.raised))}"
            told.setdefault(text, []).append(rank)
        ended = all(what.error.startswith("StopIteration") for what in found.values())
        return dataclasses.replace(
            verdict,
            ranks=tuple(found) if verdict.kind in _UNEVEN else verdict.ranks,
            evidence=(
                *(f"{ranks_text(ranks)} {text}" for text, ranks in told.items()),
                "",
                *verdict.evidence,
            ),
            advice=verdict.advice if ended else advice.HANDLED,
        )

    def _with_swallowed(self, verdict: Verdict) -> Verdict:
        """The verdict, with an `except` that may have hidden why a call was left out.

        Where it is not known what ranks caught.
        """
        if any(rank.caught is not None for rank in self.run.ranks):
            return verdict
        for frame in reversed([frame for rank in self.waiting for frame in _own(rank)]):
            if (found := source_code.swallowed(frame)) is not None:
                lines, handler = found
                out = [r.rank for r in self.run.ranks if not any(map(lines.holds, frames_of(r)))]
                if out:
                    line, them = stacks.line_name(frame), ranks_text(out)
                    hint = advice.SWALLOWED.format(line=line, them=them, handler=handler)
                    return dataclasses.replace(verdict, evidence=(*verdict.evidence, "", hint))
        return verdict

    def _with_steps(self, verdict: Verdict) -> Verdict:
        """The verdict, with the steps that the ranks made if some made fewer."""
        loop = self.training_loop()
        if verdict.kind not in _UNEVEN or verdict.advice == advice.HANDLED or loop is None:
            return verdict
        outside = [r for r in self.run.ranks if not any(map(loop.holds, frames_of(r)))]
        if verdict.kind == "skipped collective" and any(
            _comes_by(verdict.frame, rank) for rank in outside
        ):
            return verdict  # these ranks make an extra call, such as rank 0 that saves
        if steps := self.steps():
            evidence = (steps, "", *verdict.evidence)
            against = self._uneven()
            if verdict.kind in _UNCLEAR and self._may_return_to(loop):
                against = f"{verdict.advice} {advice.OR_BATCHES.format(join=self._join())}"
            verdict = dataclasses.replace(verdict, evidence=evidence, advice=against)
        return verdict

    def _uneven(self) -> str:
        """Advice where some ranks made fewer steps.

        They have left the loop of the steps, or one around it, such as that over the epochs.
        """
        loop = self.training_loop()
        left = loop is not None and any(each.ends_by_decision for each in self._left_loops(loop))
        skips = loop is not None and loop.may_skip
        if not left and not skips:
            return advice.BATCHES.format(join=self._join())
        decided = advice.LEFT_OUT_STEP if not left else advice.LEFT_LOOP
        if left and skips:
            decided = advice.LEFT_EITHER
        return f"{decided} {advice.ONLY_BATCHES}" if self._join() else decided

    def _join(self) -> str:
        """Advice for DDP models with different numbers of batches."""
        of_ddp = any(call.owner == DDP for made in self.calls.of_rank for call in made)
        return advice.JOIN if of_ddp else ""

    def _left_loops(self, loop: Loop) -> list[Loop]:
        """The loop of the steps, and those around it that a rank has left."""
        inside = [rank for rank in self.waiting if any(map(loop.holds, frames_of(rank)))]
        outside = [rank for rank in self.run.ranks if rank not in inside]
        return [loop] + [
            each
            for each in source_code.loops_around(loop, _own(inside[0]))
            if any(rank.status == "returned" or _left(each, rank) for rank in outside)
        ]

    def _verdict(self) -> Verdict:
        parting = self._parting()
        if parting is not None:
            return self.parted(self._by_steps(self._by_stacks(parting)))
        awaited = self._awaited()
        if awaited:
            return self._missed(awaited)
        return _deadlock(self)

    # Calls that do not match

    def _parting(self) -> Mismatch | None:
        """The first mismatch in the groups in which ranks wait now."""
        last: dict[str, int] = {}
        for call in self.standing.values():
            if call.group is not None and call.seq is not None and not call.pairwise:
                last[call.group] = max(call.seq, last.get(call.group, 0))
        if not last and any(position(rank).call in DDP_CALLS for rank in self.waiting):
            last = self._latest()
        return self._first(last, [m for m in mismatch.messages(self.calls) if self._stands_at(m)])

    def _by_stacks(self, parting: Mismatch) -> Mismatch:
        """A mismatch with what only stacks tell: SyncBatchNorm made a call, or a line that calls.

        Where the calls are on lines of several functions, as in a model's forward, it is the
        function that has both on its stack that shows which rank went a way of its own.
        """
        if parting.why not in ("order", "tensors"):
            return parting
        at = [[self._stands_in(call) for call in side] for side in parting.sides]
        first = [next((rank for rank in side if rank is not None), None) for side in at]
        by_sync = [rank is not None and _library(rank) == advice.SYNC_BATCHNORM for rank in first]
        sides = [
            [call._replace(owner=SYNC_BATCHNORM) if by else call for call in side]
            for side, by in zip(parting.sides, by_sync, strict=True)
        ]
        told = parting._replace(calls=tuple(call for side in sides for call in side))
        if parting.why != "order" or len(sides) != 2 or None in first:
            return told
        here, there = (frames_of(rank) for rank in first if rank is not None)
        sites = [side[0].site for side in sides]
        lines = _fork(here, there)
        if lines is None or source_code.optional(*sites) is not None:
            return told
        conditional = source_code.optional(*lines, by_loops=False)
        chosen = [
            line if line == conditional else _guarded_below(frames, line)
            for frames, line in zip((here, there), lines, strict=True)
        ]
        if told.passed is not None and (conditional is None or None not in chosen):
            return told
        if (chosen[0] is None) == (chosen[1] is None):
            before = self._site_before(parting)
            then = dict(zip(sites, lines, strict=True)).get(before, before)
            following = source_code.next_of(*lines, then)
            return told._replace(passed=dict(zip(lines, sites, strict=True)).get(following or ""))
        calls = (
            call._replace(site=site or line)
            for side, site, line in zip(sides, chosen, lines, strict=True)
            for call in side
        )
        return told._replace(calls=tuple(calls), passed=chosen[0] or chosen[1])

    def _site_before(self, parting: Mismatch) -> str | None:
        """The line of the call before a mismatch in its group, if all ranks made it there."""
        before = self.calls.met[parting.group].get(parting.seq - 1, {})
        sites = {call.site for call in before.values()}
        return sites.pop() if len(sites) == 1 else None

    def _by_steps(self, parting: Mismatch) -> Mismatch:
        """A mismatch with the line skipped by ranks that left the loop of the steps for good."""
        if parting.why != "order" or not self.steps():
            return parting
        loop = self.training_loop()
        if loop is None or self._may_return_to(loop):
            return parting
        inside = {r.rank for r in self.waiting if any(map(loop.holds, frames_of(r)))}
        sites = {call.site for call in parting.calls if call.rank in inside}
        others = {call.site for call in parting.calls if call.rank not in inside}
        return parting._replace(passed=sites.pop()) if len(sites) == 1 and others else parting

    def _may_return_to(self, loop: Loop) -> bool:
        """Whether a rank outside a loop is in one around it."""
        inside = [rank for rank in self.waiting if any(map(loop.holds, frames_of(rank)))]
        around = source_code.loops_around(loop, _own(inside[0])) if inside else []
        return any(
            each.holds(frame)
            for rank in self.run.ranks
            if rank not in inside
            for frame in frames_of(rank)
            for each in around
        )

    def _stands_in(self, call: Call) -> RankResult | None:
        """The rank that made a call, if it is still in it."""
        stands = self.standing.get(call.rank)
        here = stands is not None and (stands.group, stands.seq) == (call.group, call.seq)
        return self.run.ranks[call.rank] if here else None

    def _stands_at(self, message: Mismatch) -> bool:
        """Whether a rank waits in a message, or in a later one after objects met a tensor."""
        pair = message.calls[0].pair
        for call in self.standing.values():
            if call.pair == pair and call.seq is not None and call.seq >= message.seq:
                return message.why == "objects" or call.seq == message.seq
        return False

    def mismatched(self, ended: Sequence[int]) -> Verdict | None:
        """The verdict on the first mismatch in any group, wherever the ranks are by now.

        Of messages only those count that may have ended the ranks `ended`.
        """
        parting = self._first(self._latest(), _harmful(self.calls, ended))
        if parting is None:
            return None
        return self._with_reasons(self.parted(self._by_steps(self._by_stacks(parting))))

    def _latest(self) -> dict[str, int]:
        return {group: max(numbers) for group, numbers in self.calls.met.items() if numbers}

    def _first(self, last: Mapping[str, int], messages: Sequence[Mismatch]) -> Mismatch | None:
        """The first mismatch in groups, each up to a number, or of messages."""
        found = [mismatch.first(self.calls, group, until) for group, until in last.items()]
        return min(
            (p for p in (*found, *messages) if p is not None),
            key=lambda p: min(call.t0_ns for call in p.calls),
            default=None,
        )

    def parted(self, parting: Mismatch) -> Verdict:
        """The verdict on calls that do not match."""
        lines = rank_state.lines(self.run.ranks)
        if any(self._stands_elsewhere(call) for call in parting.calls):
            lines = [f"{at_head(parting.place)}:", *parting.lines(), "", "Now:", *lines]
        against = {
            "order": _about_order(parting),
            "tensors": advice.TENSORS.format(op=parting.calls[0].name),
            "sent": advice.MESSAGES,
            "objects": advice.OBJECTS,
        }[parting.why]
        library = self.library(call.rank for side in parting.sides[::-1] for call in side)
        owners = {call.owner for call in parting.calls}
        if library:
            against += f" {library}"
        elif DDP in owners:
            against += f" {advice.DDP}"
        if parting.why in ("order", "tensors") and self._in_two_threads(parting):
            against = advice.TWO_THREADS
            parting = parting._replace(passed=None)  # nobody skipped it: their order is not fixed
        handled = filter(None, map(rank_state.handled, self.run.ranks))
        if any(error.type_name not in _ENDS_LOOPS for error in handled):
            against = advice.HANDLED
        died = any(rank.status == "died" for rank in self.run.ranks)  # the others only lost it
        return Verdict(
            parting.kind,
            parting.odd_ranks,
            parting.title(),
            (*(() if died else self.errors()), *lines),
            against,
            parting.frame,
        )

    def _in_two_threads(self, parting: Mismatch) -> bool:
        """Whether a rank calls in the group from its main thread and another, and waits in both.

        Or two ranks make the calls that part from different ones of these.
        """
        for made in self.calls.of_rank:
            there = [call for call in made if call.group == parting.group]
            waits = [call for call in there if call.state == "open"]
            if _from_two(there) and (_from_two(waits) or _from_two(parting.calls)):
                return True
        return False

    def _stands_elsewhere(self, call: Call) -> bool:
        stands = self.standing.get(call.rank)
        here = stands is not None and (
            stands.site == call.site or (stands.group, stands.seq) == (call.group, call.seq)
        )
        return not here

    # Missing ranks

    def _awaited(self) -> dict[int, Kind]:
        """Why each missing rank is away: the others wait for it, and it waits for none."""
        missing: dict[int, Call | None] = {}
        for call in self.standing.values():
            missing.update(dict.fromkeys(self._lacks(call), call))
        if len(self.standing) < len(self.waiting):  # unrecorded calls: any rank may be missing
            missing = {**{r.rank: None for r in self.away}, **missing}
        away = {rank.rank: rank for rank in self.away}
        found = {r: self._why_away(away[r], call) for r, call in missing.items() if r in away}
        if not found:
            lacks = {r: call for call in self.standing.values() for r in self.calls.may_lack(call)}
            if not any(map(self.calls.missing, self.standing.values())):
                found = {r: self._why_away(away[r], lacks[r]) for r in lacks if r in away}
        joining = any(call.op in JOINING for call in self.standing.values())
        if not found and (not self.standing or (joining and self.run.hung_after is None)):
            found = {r: self._why_away(rank, None) for r, rank in away.items()}
        return found

    def _lacks(self, call: Call) -> set[int]:
        """The ranks that a call lacks.

        A recv from any rank does not lack those that have returned, as long as others may send.
        """
        lacks = self.calls.missing(call)
        if call.peer is not None or not call.pairwise:
            return lacks
        return {rank for rank in lacks if self.run.ranks[rank].status != "returned"} or lacks

    def _why_away(self, rank: RankResult, call: Call | None) -> Kind:
        left = self._left(rank.rank)
        if rank.activity == "suspended":
            return "suspended"
        if call is not None and call.op == JOIN:
            return "never joined"
        if rank.kept_by is not None and not self.waiting:
            return "not ended"
        if rank.status == "returned" or (rank.kept_by is not None and self.waiting):
            return "returned early"
        if left is not None:
            return "left the group"
        if rank.activity == "busy":
            return "computing"
        if not rank.stack:
            return "no answer"
        return "blocked in Python"

    def _left(self, rank: int) -> Call | None:
        """The call by which a rank left a group that others wait in."""
        groups = {"world", *(call.group for call in self.standing.values() if call.group)}
        found = [self.calls.left(rank, group) for group in groups]
        return next((call for call in found if call is not None), None)

    def _missed(self, awaited: dict[int, Kind]) -> Verdict:
        kind = min(awaited.values(), key=_WORST.index)
        ranks = tuple(sorted(r for r, why in awaited.items() if why == kind))
        gone = listed(self._short(kind, ranks) for kind, ranks in _by_kind(awaited))
        title = f"{self.who_waits()}, but {gone}" if self.waiting else self._nobody_waits()
        if kind == "not ended":
            title = self._short(kind, ranks)
        frame = stacks.position(self.run.ranks[ranks[0]].stack).frame
        if frame is None and (call := self.calls.not_made(ranks[0])) is not None:
            frame = frame_of(call.site)
        if frame is None and kind == "returned early":
            frame = self.frame()
        return Verdict(
            kind,
            ranks,
            title,
            self.evidence(),
            self._against(kind, ranks),
            frame,
        )

    def _against(self, kind: Kind, ranks: Sequence[int]) -> str:
        """Advice where `ranks` are missing."""
        limit, slow = self._limit(ranks)
        match kind:
            case "computing":
                return limit + slow
            case "blocked in Python":
                return limit + advice.IDLE + slow
            case "no answer" if self.run.recorded:
                rank = self.run.ranks[ranks[0]]
                py_spy = advice.PY_SPY.format(rank=rank) if rank.pid else ""
                return self.ran_out() + advice.RECORD + py_spy
            case "no answer":
                return limit + advice.IN_C + slow
            case "suspended":
                return advice.SUSPENDED
            case "never joined":
                return self.ran_out() + advice.JOINING
            case "left the group":
                return advice.LEFT
            case "not ended":
                keeper = self.run.ranks[ranks[0]].kept_by
                return limit + _ENDING.get(str(keeper), advice.THREADS) + slow
        if 0 in ranks and self._need_the_store():
            return advice.STORE
        in_pairs = self.standing and all(call.pairwise for call in self.standing.values())
        against = advice.PAIRS if in_pairs else advice.MISSING
        library = self.library(self.standing)
        if not library and any(call.owner == DDP for call in self.standing.values()):
            library = advice.DDP
        return f"{against} {library}" if library else against

    def _need_the_store(self) -> bool:
        """Whether ranks only make groups that all others have made."""
        calls = self.standing.values()
        made = all(call.op in MAKES_GROUP and not self.calls.missing(call) for call in calls)
        return made and bool(calls)

    def _limit(self, ranks: Sequence[int]) -> tuple[str, str]:
        """Which timeout ran out, and what to do if `ranks` are only slow: two pieces of advice."""
        after = self.run.hung_after
        if after is not None:
            stood = f"No rank made progress for {after:g} s. "
            return stood, "" if self.run.recorded else advice.SLOW
        ran_out = self.ran_out()
        needs = agree(ranks, "needs", "need")
        return (
            ran_out,
            f"If {ranks_text(ranks)} just {needs} more time, raise it." if ran_out else "",
        )

    def _nobody_waits(self) -> str:
        if may_go_on(self.run):
            return "no rank waits in torch.distributed"
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
                at = f" at {line_of(call.site)}" if call and call.site else ""
                before = f" before {call.name}{at}" if call else ""
                gone = [self.run.ranks[number] for number in ranks]
                exits = all(one.status == "returned" and one.stack for one in gone)
                how = f"left by sys.exit(){where}" if exits else "returned"
                return f"{who} {has} {how}{before}"
            case "left the group":
                call = self._left(ranks[0])
                return f"{who} {has} left the group at {line_of(call.site if call else None)}"
            case "not ended":
                return f"{who} {has} returned, but {rank.kept_by} goes on{where}"
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


# No rank is missing: the ranks wait for each other


def _deadlock(still: Standstill) -> Verdict:
    """The verdict on a standstill without a missing rank."""
    lines = still.evidence()
    frame = still.frame()
    calls = {position(rank).call for rank in still.waiting}
    everyone = tuple(rank.rank for rank in still.waiting)
    late = _late(still)
    if calls == {JOIN} and not late:
        title = f"{still.who_waits()} for ranks that never came"
        place = advice.PLACE.format(ranks=count(still.run.world_size, "rank"))
        return Verdict("never joined", everyone, title, lines, place, frame)
    if still.run.world_size == 1:
        title = f"{still.who_waits()}, and there is no other rank"
        return Verdict("waiting for each other", everyone, title, lines, advice.ALONE, frame)
    title = f"all ranks wait for each other: {still.who_waits()}"
    if may_go_on(still.run):
        title = still.who_waits()
        return Verdict("waiting for each other", everyone, title, lines, "", frame)
    if still.away:
        title = f"{still.who_waits()}, for each other"
    if late:
        op = still.standing[late[0]].name
        them = agree(late, "it", "them")
        title = f"{ranks_text(late)} came to {op} when others had given up waiting for {them}"
        raised = any(still.run.ranks[rank].status == "raised" for rank in late)
        why = advice.LATE.format(late=advice.FOUND_GONE if raised else "")
        return Verdict("gave up waiting", late, title, lines, still.ran_out() + why, frame)
    unmatched = [c for c in still.standing.values() if c.pairwise and still.calls.missing(c)]
    groups = {c.group for c in still.standing.values() if not c.pairwise and c.group}
    if (verdict := _other_tag(unmatched, lines)) is not None:
        return verdict
    if (verdict := _circle(still, unmatched)) is not None:
        return verdict
    if unmatched:
        waiting = {call.rank for call in unmatched}
        last = (call for call in unmatched if call.peer not in waiting)  # of a chain
        return _unmatched(next(last, unmatched[0]), lines)
    if len(groups) > 1 and (verdict := _came_too_soon(still, lines)) is not None:
        return verdict
    if len(groups) > 1:
        return Verdict(
            "groups in different order",
            _in_the_smallest_group(still) or everyone,
            f"{title}, in groups that they use in different orders",
            lines,
            advice.GROUPS,
            frame,
        )
    if len(calls) > 1:
        return _different(still, lines)
    if _across_machines(still):
        title = f"{title}, on several machines, but the call never ended"
        return Verdict("no route", everyone, title, lines, advice.NETWORK, frame)
    if any(map(rank_state.is_counted_apart, still.waiting)):
        title = f"torch's own check stopped ranks whose calls agree: {still.who_waits()}"
        return Verdict("gave up waiting", everyone, title, lines, advice.COUNTED, frame)
    if still.run.hung_after is None:
        return Verdict("gave up waiting", everyone, still.who_waits(), lines, advice.MISSING, frame)
    return Verdict("waiting for each other", everyone, title, lines, advice.SAME_CALL, frame)


def _across_machines(still: Standstill) -> bool:
    """All ranks of a call came, on several machines, but it never ended."""
    hosts = {rank.host for rank in still.waiting}
    calls = still.standing.values()
    return len(hosts) > 1 and any(not still.calls.missing(call) for call in calls)


def _different(still: Standstill, lines: tuple[str, ...]) -> Verdict:
    """The verdict where ranks wait in different calls, some of them not recorded."""
    by_call: dict[str | None, list[int]] = {}
    for rank in still.waiting:
        by_call.setdefault(position(rank).call, []).append(rank.rank)
    few, *_, many = sorted(by_call.values(), key=len)
    sides = [
        f"{ranks_text(ranks)} {agree(ranks, 'waits', 'wait')} in {call}"
        for call, ranks in by_call.items()
    ]
    return Verdict(
        "different collectives",
        tuple(few if len(few) < len(many) else sorted(few + many)),
        f"the ranks wait for each other in different calls: {listed(sides)}",
        lines,
        advice.DDP if DDP_CALLS & by_call.keys() else advice.ORDER,
        position(still.run.ranks[few[0]]).frame,
    )


def _about_order(parting: Mismatch) -> str:
    """What to look for where calls do not match: only in their roots, or in any way."""
    first, *others = parting.calls
    if any((call.op, call.site) != (first.op, first.site) for call in others):
        return advice.ORDER
    return advice.ROOTS.format(root="src" if first.op in FROM_ROOT else "dst")


def _in_the_smallest_group(still: Standstill) -> tuple[int, ...]:
    """The ranks in the group with the fewest waiting ranks; () on a tie."""
    by_group: dict[str | None, list[int]] = {}
    for rank, call in still.standing.items():
        by_group.setdefault(call.group, []).append(rank)
    few, *_, many = sorted(by_group.values(), key=len)
    return tuple(few) if len(few) < len(many) else ()


def _came_too_soon(still: Standstill, lines: tuple[str, ...]) -> Verdict | None:
    """The verdict where ranks skipped a line that all others called before the call they are in.

    The others called it in groups of their own, so no number of a group tells.
    """
    calls = still.calls
    for call in still.standing.values():
        odd = {rank for rank in calls.missing(call) if rank in still.standing}
        stands = {(c.group, c.seq): c for rank in odd if (c := still.standing[rank])}
        if len(stands) != 1 or call.site is None:
            continue
        (place, stand), *_ = stands.items()
        came = calls.met.get(place[0] or "", {}).get(-1 if place[1] is None else place[1], {})
        made = {rank: calls.count_before(there, call) for rank, there in came.items()}
        others = {*made} - odd
        if others and max(made[r] for r in odd) < min(made[r] for r in others):
            who = sorted({*others, call.rank})
            title = (
                f"{ranks_text(who)} {agree(who, 'calls', 'call')} {call.name} at "
                f"{line_of(call.site)} before {stand.name}, and {ranks_text(sorted(odd))} "
                f"{agree(odd, 'does', 'do')} not"
            )
            ranks = tuple(sorted(odd))
            frame = frame_of(call.site)
            return Verdict("skipped collective", ranks, title, lines, advice.ORDER, frame)
    return None


def _late(still: Standstill) -> tuple[int, ...]:
    """The ranks that came to a call only after others had failed in it."""
    standing = still.standing.values()
    if still.run.hung_after is not None or len({(c.group, c.seq) for c in standing}) != 1:
        return ()
    ended = (rank.ended_ns for rank in still.waiting if rank.status == "raised")
    first = min(ended, default=None)
    return tuple(c.rank for c in standing if first is not None and c.t0_ns > first)


def _other_tag(calls: Iterable[Call], lines: tuple[str, ...]) -> Verdict | None:
    """The verdict where a send and a recv name each other's ranks, but not the same tag."""
    for send, recv in itertools.permutations(calls, 2):
        meant = (send.rank, send.peer) == (recv.peer, recv.rank) and send.group == recv.group
        if meant and send.op in SENDS and recv.op in RECVS and send.tag != recv.tag:
            title = (
                f"rank {send.rank} sends to rank {recv.rank} with tag {send.tag}, and rank "
                f"{recv.rank} receives from rank {send.rank} with tag {recv.tag}"
            )
            pair = tuple(sorted((send.rank, recv.rank)))
            frame = frame_of(send.site)
            return Verdict("unmatched send", pair, title, lines, advice.PAIRS, frame)
    return None


def _circle(still: Standstill, unmatched: Iterable[Call]) -> Verdict | None:
    """The verdict where sends and recvs wait for each other in a circle."""
    calls = {call.rank: call for call in unmatched}
    circle = _circle_in({rank: call.peer for rank, call in calls.items()})
    if not circle:
        return None
    there = [calls[rank] for rank in circle]
    sent = [_handed_on(still.calls, call) for call in there]
    sends = all(call.side == "send" for call in there)
    kind: Kind = "unmatched send" if sends else "unmatched recv"
    if sends and not any(sent):
        against = advice.SENDS_FIRST
    elif not any(sent) and all(call.side == "recv" for call in there):
        against = advice.RECEIVES_FIRST
    else:
        against = f"{advice.CIRCLE} {advice.STAGES}"
    if library := still.library(circle):
        against = f"{library} {advice.CIRCLE}"
    waiting = [_waits_for(call, done) for call, done in zip(there, sent, strict=True)]
    title = f"{ranks_text(sorted(circle))} wait for each other"
    return Verdict(
        kind,
        tuple(sorted(circle)),
        f"{title}, in a circle" if len(circle) > 2 else title,
        (*waiting, "", *still.evidence()),
        against,
        frame_of(there[0].site),
    )


def _circle_in(peers: Mapping[int, int | None]) -> list[int]:
    """Ranks each of which waits for the next, and the last one for the first; [] without any."""
    for rank in sorted(peers):
        way: list[int] = []
        at: int | None = rank
        while at is not None and at not in way:
            way.append(at)
            at = peers.get(at)
        if at == rank:
            return way
    return []


def _handed_on(calls: Calls, call: Call) -> int:
    """How many messages the other rank has sent to a recv's rank, or received from a send's."""
    other = "send" if call.side == "recv" else "recv"
    numbers = calls.messages.get(call.pair, {}) if call.pair is not None else {}
    return sum(other in sides for sides in numbers.values())


def _waits_for(call: Call, done: int) -> str:
    """`rank 1 waits for message 2 from rank 0, which has sent 1`."""
    number, tag = (call.seq or 0) + 1, f" with tag {call.tag}" if call.tag else ""
    if call.side == "recv":
        what, did = f"waits for message {number}{tag} from", "sent"
    else:
        what, did = f"waits until message {number}{tag} is received by", "received"
    return f"rank {call.rank} {what} rank {call.peer}, which has {did} {done or 'none'}"


def _unmatched(call: Call, lines: tuple[str, ...]) -> Verdict:
    sends = call.op in SENDS
    other = "any rank" if call.peer is None else f"rank {call.peer}"
    tag = f" (tag {call.tag})" if call.tag else ""
    title = f"rank {call.rank} waits in {call.op} {'to' if sends else 'from'} {other}{tag}, "
    if call.peer is None:
        title += "but no rank sends to it: those that could are waiting, too"
    else:
        title += f"which does not {'receive' if sends else 'send'}: it waits, too"
    kind: Kind = "unmatched send" if sends else "unmatched recv"
    return Verdict(kind, (call.rank,), title, lines, advice.PAIRS, frame_of(call.site))
