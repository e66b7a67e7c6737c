"""`load_run`: makes a `Run` of what the ranks of a script recorded (worker/torchrun.py).

Runs in the parent, in a notebook, after the job or while it still runs or hangs. It converts all
stamps to rank 0's clock. A rank whose recording ends without an exit status was killed, or it still
lives and locks its file. A folder may come from anybody: facts.py and span_buffer.py check what
they read, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import linecache
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.diagnosis.rank_state import lost_partner
from ddp_lessons.results import RankResult, Status
from ddp_lessons.run import Run
from ddp_lessons.system import regular_files
from ddp_lessons.text import agree, count, ranks_text
from ddp_lessons.wire import facts, span_buffer, stacks
from ddp_lessons.wire.facts import Fields, Sources
from ddp_lessons.wire.messages import Told
from ddp_lessons.wire.ops import WAIT_FOR_BUCKETS
from ddp_lessons.wire.records import Caught, Frame, Kind, Lane, Span, split_site
from ddp_lessons.wire.run_folder import READABLE, VARIABLE, VERSION

MOST_RANKS = 1 << 16
MOST_OF_A_START = 1 << 16  # bytes of the fact that tells how a rank began
_RECORD = re.compile(r"rank_(\d{1,9})\.(\d{1,19})\.jsonl", re.ASCII)
_NUMBERS = re.compile(r"\d+")
INTERRUPTED, TOLD_TO_END = -int(signal.SIGINT), -int(signal.SIGTERM)  # exit codes
# Stand-ins for frames of a rank that cannot be asked: stacks.position finds its call in them.
_DISTRIBUTED = "/site-packages/torch/distributed/distributed_c10d.py"
_AUTOGRAD = "/site-packages/torch/autograd/__init__.py"


def load_run(folder: str | os.PathLike[str], attempt: int = -1) -> Run:
    """Read the record of a script's ranks: a `Run` with spans, errors and a verdict.

    A script records if it imports ddp_lessons and the environment variable DDP_LESSONS_RECORD names
    a folder: ``DDP_LESSONS_RECORD=record torchrun --nproc-per-node 2 train.py``. On several
    machines, copy all folders into one. The job may still run, or hang.

    Parameters
    ----------
    folder : str or path-like
        The folder that DDP_LESSONS_RECORD named.
    attempt : int, optional
        The start of the script, where torchrun restarted it or the folder holds several jobs: 0 is
        the first, 1 the second; by default, -1, the latest.

    Returns
    -------
    Run
        `values` and `output` are not recorded, so they are empty. All spans are on rank 0's clock.
        A rank that "returned" reached the end of its script; torchrun's log has its exit code.
        Lines of the script are shown if its file is here, unchanged since the run.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If there is no record, no such attempt, or no record of some rank.
    ValueError
        If files are damaged, of more than one job, or not regular files.
    """
    linecache.checkcache()  # files that have changed since are read anew
    place = Path(folder).expanduser()
    files = _files(place, attempt)
    return _run(_complete(place, [_read(files[rank]) for rank in sorted(files)]))


@dataclass(frozen=True)
class RankFiles:
    """The files of one rank. Stamps are ns of its clock, which is `behind_ns` behind rank 0's."""

    began: Mapping[str, Any]
    behind_ns: int
    raised: Mapping[str, Any] | None
    ended_ns: int | None
    alive: bool
    spans: list[Span]
    dropped: int
    told: str  # what faulthandler printed on SIGTERM, else empty
    sources: Sources = field(default_factory=lambda: Sources({}))
    itself: Told = field(default_factory=Told)  # what the rank told of itself
    caught: list[Caught] | None = None
    seen_ns: int | None = None  # when it was read, if it lives on this machine

    @property
    def rank(self) -> int:
        return int(self.began["rank"])

    @property
    def last_ns(self) -> int:
        """The last known moment of the rank."""
        stamps = [stamp for span in self.spans for stamp in (span.t0_ns, span.t1_ns or 0)]
        return self.ended_ns or self.seen_ns or max(stamps, default=int(self.began["t_ns"]))


def _files(folder: Path, attempt: int) -> dict[int, Path]:
    """The files of one attempt by rank."""
    if not isinstance(attempt, int):
        raise TypeError(f"attempt is {attempt!r}, not a number: 0 is the first, -1 the last")
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give the folder that {VARIABLE} named.")
    attempts = _attempts(folder.iterdir() if folder.is_dir() else ())
    if not attempts:
        raise FileNotFoundError(
            f"{folder} holds no record. A script makes one if it imports ddp_lessons and is "
            f"started with {VARIABLE}={folder} in its environment."
        )
    try:
        return attempts[attempt]
    except IndexError:
        made = count(len(attempts), "attempt")
        raise FileNotFoundError(f"{folder} holds {made}: there is no {attempt}.") from None


def _attempts(files: Iterable[Path]) -> list[dict[int, Path]]:
    """The files of every attempt by rank, the earliest first.

    When a rank fails, torchrun restarts all ranks, so a rank that begins again begins an attempt.
    So does one whose agent has restarted its ranks since the attempt began. (The agents of two
    machines may count differently, pytorch issue 108158.)
    """
    names = ((_RECORD.fullmatch(file.name), file) for file in files)
    begun = sorted((int(name[2]), int(name[1]), file) for name, file in names if name)
    attempts: list[dict[int, Path]] = []
    known: dict[tuple[str, int] | None, int] = {}  # restarts by agent, in the last attempt
    for _, rank, file in begun:
        agent, restarts = _started_by(file)
        if not attempts or rank in attempts[-1] or known.get(agent, restarts) != restarts:
            attempts.append({})
            known.clear()
        attempts[-1][rank] = file
        known[agent] = restarts
    return attempts


def _started_by(file: Path) -> tuple[tuple[str, int] | None, int]:
    """The agent that started a rank, and how often it had restarted its ranks; None if unknown."""
    with contextlib.suppress(OSError, ValueError), regular_files.opened(file) as opened:
        first, _, _ = os.read(opened, MOST_OF_A_START).partition(b"\n")
        began = facts.parse(first)[0].within("began")
        if began is not None:
            return (began.text("host"), began.number("agent")), began.number("restarts")
    return None, 0


def _read(file: Path) -> RankFiles:
    with facts.of_file(file), regular_files.opened(file) as opened:
        alive = _is_held(opened)
        found, sources = facts.parse(regular_files.read(opened, facts.MOST_BYTES))
        began = _began(found, file)
        clock, raised, ended = map(found.within, ("clock", "raised", "ended"))
        behind_ns = clock.number("behind_ns", -facts.LARGEST) if clock else 0
        last = raised or ended
        ended_ns = last.number("t_ns", began["t_ns"]) if last else None
        if raised:
            facts.error(raised, sources)  # parsed here so that an error names this file
        itself = Told()
        for message in facts.messages(found, sources):
            itself.take(message)
    path = file.with_suffix(".tape")
    with facts.of_file(path), regular_files.opened(path) as opened:
        highest = began["world_size"] - 1
        spans, dropped, caught = span_buffer.read_file(
            opened,
            began["rank"],
            highest,
            lambda group: _check_group(group, highest),
            lambda site: facts.named(site, sources),
            began["version"],
        )
    path = file.with_suffix(".stack")
    with facts.of_file(path), regular_files.opened(path) as opened:
        told = facts.stack_text(regular_files.read(opened, facts.MOST_BYTES))
    return RankFiles(
        began, behind_ns, raised.data if raised else None, ended_ns, alive, spans, dropped, told,
        sources, itself, caught, time.perf_counter_ns() if alive and _is_here(began) else None,
    )  # fmt: skip


def _is_here(began: Mapping[str, Any]) -> bool:
    """Whether a rank began on this machine, whose processes have one clock."""
    return sys.platform == "linux" and str(began["host"]) == platform.node()


def _began(found: Fields, file: Path) -> dict[str, Any]:
    """The checked facts of a rank's start."""
    began = found.within("began")
    name = _RECORD.fullmatch(file.name)
    if name is None or began is None:
        raise ValueError("is no record of a rank.")
    if began.number("version") not in READABLE:
        raise ValueError(
            f"is in format {began.number('version')}, and this ddp_lessons reads format {VERSION}: "
            "load it with the version that recorded it."
        )
    rank = began.number("rank", int(name[1]), int(name[1]))
    return {
        "version": began.number("version"),
        "script": began.text("script"),
        "rank": rank,
        "world_size": began.number("world_size", rank + 1, MOST_RANKS),
        "group_rank": began.number("group_rank"),
        "host": began.text("host"),
        "pid": began.number("pid"),
        "t_ns": began.number("t_ns"),
    }


def _check_group(group: str, highest: int) -> None:
    """Raise ValueError if a group's name has a rank beyond `highest`."""
    _, _, ranks = group.rpartition("ranks ")
    numbers = _NUMBERS.findall(ranks.partition(" #")[0])
    if max(map(int, numbers), default=0) > highest:
        raise ValueError(f"is damaged: a group has a rank beyond {highest}")


def _is_held(facts_file: int) -> bool:
    """Whether the rank still lives and locks its file; never true for a copy."""
    try:
        fcntl.flock(facts_file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _complete(place: Path, records: Sequence[RankFiles]) -> list[RankFiles]:
    """The records by rank. Raises if they are not one complete job."""
    sizes = {int(record.began["world_size"]) for record in records}
    if len(sizes) != 1:
        raise ValueError(
            f"{place} holds records of jobs with {sorted(sizes)} ranks. "
            f"Name a new folder in {VARIABLE} for each job."
        )
    by_rank = {record.rank: record for record in records}
    missing = [rank for rank in range(sizes.pop()) if rank not in by_rank]
    if missing:
        raise FileNotFoundError(
            f"{place} has no record of {ranks_text(missing)}. If "
            f"{agree(missing, 'it', 'they')} ran on another machine, copy its folder here."
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


def _run(records: Sequence[RankFiles]) -> Run:
    records = [_on_one_clock(record) for record in records]
    ranks = _with_fates([_result(record) for record in records])
    hangs = {rank.status for rank in ranks} in ({"stopped"}, {"stopped", "returned"})
    return Run(
        str(records[0].began["script"]),
        ranks,
        begin_ns=min(rank.began_ns for rank in ranks),
        hung_after=_quiet(ranks) if hangs else None,
        recorded=True,
    )


def _on_one_clock(record: RankFiles) -> RankFiles:
    """The record with all stamps on rank 0's clock."""
    behind = record.behind_ns

    def shifted(t_ns: int | None) -> int | None:
        return None if t_ns is None else t_ns + behind

    return replace(
        record,
        began={**record.began, "t_ns": record.began["t_ns"] + behind},
        ended_ns=shifted(record.ended_ns),
        seen_ns=shifted(record.seen_ns),
        spans=[s._replace(t0_ns=s.t0_ns + behind, t1_ns=shifted(s.t1_ns)) for s in record.spans],
        itself=replace(
            record.itself,
            reports=[r._replace(t_ns=r.t_ns + behind) for r in record.itself.reports],
        ),
    )


def _result(record: RankFiles) -> RankResult:
    began_ns, last_ns = int(record.began["t_ns"]), record.last_ns
    error = facts.error(Fields(record.raised), record.sources) if record.raised else None
    status: Status = "stopped" if record.alive else "died"
    exitcode, stack = None, _where(record.spans)
    if error is not None and error.type_name == "KeyboardInterrupt":
        status, exitcode, stack, error = "stopped", INTERRUPTED, error.frames, None
    elif error is not None:
        status, exitcode, stack = "raised", 1, ()
    elif record.ended_ns:
        status, exitcode, stack = "returned", 0, ()
    elif record.told:
        exitcode = None if record.alive else TOLD_TO_END
        there = stacks.parse(record.told, script=True, name=record.sources.name)
        status, stack = "stopped", there or stack
    ended = last_ns if record.ended_ns else None
    life = Span(record.rank, Lane.PROCESS, Kind.MARK, str(record.began["script"]), began_ns, ended)
    return RankResult(
        rank=record.rank,
        status=status,
        value=None,
        output="",
        error=error,
        exitcode=exitcode,
        spans=(life, *record.spans),
        began_ns=began_ns,
        started_ns=began_ns,
        ended_ns=last_ns,
        stack=stack,
        dropped=record.dropped,
        caught=None if record.caught is None else tuple(record.caught),
        group_rank=int(record.began["group_rank"]),
        host=str(record.began["host"]),
        pid=int(record.began["pid"]) if record.alive else None,
        **vars(record.itself),
    )


def _where(spans: Sequence[Span]) -> tuple[Frame, ...]:
    """The position of a rank that cannot be asked: its open call of torch.distributed, if any."""
    for span in spans:
        if span.t1_ns is None and span.name == WAIT_FOR_BUCKETS:
            return (Frame(_AUTOGRAD, 0, "backward"),)
        if span.t1_ns is None and span.op and span.site and span.kind in (Kind.COMM, Kind.WAIT):
            return stacks.frame_at(*split_site(span.site)), Frame(_DISTRIBUTED, 0, span.op)
    return ()


def _with_fates(ranks: list[RankResult]) -> list[RankResult]:
    """The ranks; those without an exit status count as stopped where the others show that.

    An agent stops the other ranks when one fails, and all of them when it is interrupted. A person
    stops a job that hangs. But if other ranks received SIGTERM, a rank without an exit status died
    before them.
    """
    silent = {rank.rank: rank for rank in ranks if rank.status == "died"}
    own = any(rank.status == "raised" and not lost_partner(rank) for rank in ranks)
    interrupted = any(rank.exitcode == INTERRUPTED for rank in ranks)
    if silent and (own or interrupted or _hung(ranks, silent)):
        return [replace(r, status="stopped") if r.rank in silent else r for r in ranks]
    return ranks


def _hung(ranks: Sequence[RankResult], silent: Mapping[int, RankResult]) -> bool:
    if any(rank.exitcode == TOLD_TO_END or lost_partner(rank) for rank in ranks):
        return False
    dropped = (rank.rank for rank in ranks if rank.dropped)
    return Calls([rank.spans for rank in ranks], dropped).stuck_for_good(silent)


def _quiet(ranks: Sequence[RankResult]) -> float:
    """The seconds from the last span's start to the last known moment of any rank."""
    begun = max(span.t0_ns for rank in ranks for span in rank.spans)
    return round((max(rank.ended_ns for rank in ranks) - begun) / 1e9, 1)
