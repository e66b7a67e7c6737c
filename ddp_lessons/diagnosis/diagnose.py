"""Diagnoses a finished run: a verdict, the error to raise, and warnings.

Runs in the parent, called by `Run`. failures.py explains ranks that failed, hangs.py ranks that
wait forever, mistakes.py what ranks did wrong though none failed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ddp_lessons.diagnosis import advice, failures, hangs, mismatch, mistakes, rank_state
from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.diagnosis.mismatch import Mismatch
from ddp_lessons.diagnosis.verdict import Finding, Verdict
from ddp_lessons.errors import CannotSend, LaunchError, WorkerDied, WorkerFailed, WorkersHung
from ddp_lessons.text import ranks_text
from ddp_lessons.wire.ops import GROUP_CALLS

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord


def verdict(run: RunRecord) -> Verdict | None:
    """Why a run failed or hung; None if every rank returned or the run was interrupted."""
    if run.ok:
        return None
    if run.hung_after is None:
        return failures.explain(run)
    found = hangs.explain(run)
    if not hangs.may_go_on(run):
        return found
    since = f", nothing has begun for {run.hung_after:g} s" if run.hung_after >= 1 else ""
    title, against = f"the job still runs{since}: {found.title}", f"{advice.MOMENT} {found.advice}"
    return dataclasses.replace(found, title=title, advice=against.rstrip())


def warnings(run: RunRecord) -> list[Finding]:
    """Silent mistakes of a run in which no rank failed."""
    if not run.ok:
        return []
    noticed = [
        *(Finding("thread died", *died) for died in rank_state.dead_threads(run.ranks)),
        *mistakes.noticed(run),
    ]
    if _all_did_the_same(run):
        return noticed
    calls = Calls.of(run)
    partings = [mismatch.first(calls, group) for group in calls.met]
    partings.append(next(iter(mismatch.messages(calls)), None))
    silent = [_silent(parting) for parting in partings if parting is not None]
    return [*silent, *_forgotten(calls), *noticed]


def _all_did_the_same(run: RunRecord) -> bool:
    """Shortcut for the usual case: every rank made the same calls at the same lines."""
    if not run.ranks:
        return True
    first, *others = (
        [(s.op, s.group, s.peer, s.tag, s.nbytes, s.tensor, s.site) for s in rank.spans if s.op]
        for rank in run.ranks
    )
    return all(other == first for other in others)


def _silent(parting: Mismatch) -> Finding:
    kind: str = parting.kind
    ranks = parting.odd_ranks
    consequence = "the numbers are mixed up, and nothing failed"
    if parting.why == "tensors":
        text = f"{parting.title()}, so {consequence}."
    else:
        if parting.why == "sent":
            where = parting.title()
            sent, taken = parting.calls
            if sent.dtype == taken.dtype and not parting.too_much:
                kind, ranks = "partly filled", (taken.rank,)
                consequence = "the rest of that tensor keeps its old values, and nothing failed"
        else:
            where = f"{parting.place} was not the same on all ranks"
        text = f"{where}, so {consequence}: {'; '.join(parting.lines())}"
    return Finding(kind, ranks, text, parting.frame)


def _forgotten(calls: Calls) -> list[Finding]:
    """A warning if only some ranks called destroy_process_group; if none did, no rank waits."""
    joined = [r for r, made in enumerate(calls.of_rank) if any(c.op in GROUP_CALLS for c in made)]
    stayed = [rank for rank in joined if calls.left(rank, "world") is None]
    if not stayed or len(stayed) == len(joined):
        return []
    stayed = [rank for rank in stayed if rank not in calls.lossy]
    if not stayed:
        return []
    who = ranks_text(stayed)
    text = f"{who} returned without destroy_process_group, which the others called."
    return [Finding("left the group", tuple(stayed), text)]


def error(run: RunRecord, found: Verdict | None) -> LaunchError | None:
    """The error to raise for a run with this verdict; None without a verdict."""
    if found is None:
        return None
    return _class(run, found)(
        found.text(), run=run, rank=found.ranks[0] if len(found.ranks) == 1 else None
    )


def _class(run: RunRecord, found: Verdict) -> type[LaunchError]:
    if run.hung_after is not None:
        return LaunchError if hangs.may_go_on(run) else WorkersHung
    if found.kind == "unsendable":
        return CannotSend
    return WorkerFailed if found.kind == "raised" or not _someone_died(run) else WorkerDied


def _someone_died(run: RunRecord) -> bool:
    return any(rank.status == "died" for rank in run.ranks)
