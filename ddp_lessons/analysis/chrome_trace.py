"""Writes a run as a trace file: Chrome's JSON, in the form that torch.profiler writes.

Runs in the parent, behind `Run.save_trace`. Perfetto (ui.perfetto.dev) draws the merged file, in
which arrows link a collective over its ranks. HolisticTraceAnalysis reads a folder with one file a
rank. A process of the trace is a rank and a thread a lane; spans of one lane that overlap without
nesting, and collectives in flight together, get further threads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_lessons.analysis.wait_states import Share, key_of, waits
from ddp_lessons.system.atomic_files import write_files
from ddp_lessons.wire.ops import JOIN
from ddp_lessons.wire.records import IN_FLIGHT, Kind, Lane, Span

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult, RunRecord

# In a folder of its own: HolisticTraceAnalysis takes every file beside the ranks for a rank.
MERGED = "merged/all_ranks.json"
GENERATOR = "ddp_lessons"
# From the top.
LANES = (
    *(Lane.PROCESS, Lane.STEPS, Lane.MAIN, "thread", Lane.COMM, Lane.BUCKETS),
    *(Lane.GLOO, Lane.NCCL, Lane.CUDA),
)
# In Perfetto a thread with its process's number is the main thread, and 0 is the idle one.
FIRST_THREAD = 1000

Json = dict[str, Any]
Links = dict[int, Json]  # arrows, by the number of their event
Shares = dict[tuple[int, str, str, int, int], Share]


def save(run: RunRecord, path: str | os.PathLike[str]) -> list[Path]:
    """Write a run's spans to a file or a folder.

    Parameters
    ----------
    run : RunRecord
        What `launch` returned, also of a run that failed.
    path : str or path-like
        A name that ends in .json or .json.gz becomes one file of all ranks, for Perfetto. Any
        other name is a folder, made if need be, for HolisticTraceAnalysis: rank_0.json and so on,
        and the file of all ranks as merged/all_ranks.json. HolisticTraceAnalysis leaves out the
        last step unless called with `include_last_profiler_step=True`.

    Returns
    -------
    list of Path
        The files written. Files of an earlier save under the same names are replaced.

    Raises
    ------
    OSError
        If a file cannot be written; none is then left half-written. FileExistsError if the folder
        has other files that HolisticTraceAnalysis would take for ranks of this run.
    """
    target = Path(path).expanduser()
    timelines = _timelines(run)
    if target.name.endswith((".json", ".json.gz")):
        with _explained():
            return _write({target: _document(run, timelines)})
    if target.suffix == ".gz":
        raise ValueError(f"a packed trace's name ends in .json.gz, got {target.name!r}")
    files = {target / f"rank_{t.rank.rank}.json": _document(run, [t]) for t in timelines}
    files[target / MERGED] = _document(run, timelines)
    stale = _stale(target, files)
    with _explained(), _folders(target, (target / MERGED).parent):
        written = _write(files)
    for file in stale:
        file.unlink()
    return written


class Event(NamedTuple):
    """A span, its end (the rank's, if it is open), its trace thread and its collective share."""

    span: Span
    t1_ns: int
    thread: int
    share: Share | None


class Timeline(NamedTuple):
    """One rank's thread names, by number, and its events."""

    rank: RankResult
    threads: dict[int, str]
    events: list[Event]


class Tracks:
    """Spreads the events of one lane of a rank over trace threads."""

    def __init__(self, name: str, numbers: Iterator[int]) -> None:
        self._name = name
        self._numbers = numbers
        self._nests = name not in IN_FLIGHT
        self._ends: dict[int, list[int]] = {}  # of the open events by thread, the innermost last

    def place(self, event: Event) -> Event:
        """The event on the first thread where it follows the earlier events or nests in one."""
        thread = next((n for n, ends in self._ends.items() if self._fits(event, ends)), None)
        if thread is None:
            thread = next(self._numbers)
            self._ends[thread] = []
        self._ends[thread].append(event.t1_ns)
        return event._replace(thread=thread)

    def _fits(self, event: Event, ends: list[int]) -> bool:
        while ends and ends[-1] <= event.span.t0_ns:
            ends.pop()
        return not ends or (self._nests and event.t1_ns <= ends[-1])

    def threads(self) -> dict[int, str]:
        """The names of the threads, by number."""
        names = itertools.chain([self._name], (f"{self._name} ({n})" for n in itertools.count(2)))
        return dict(zip(self._ends, names, strict=False))


def _timelines(run: RunRecord) -> list[Timeline]:
    shares = {(s.rank, s.op, s.group, s.seq, s.t0_ns): s for s in waits(run)}
    numbers = itertools.count(FIRST_THREAD)
    return [_timeline(rank, shares, numbers) for rank in run.ranks]


def _timeline(rank: RankResult, shares: Shares, numbers: Iterator[int]) -> Timeline:
    by_lane: dict[str, list[Event]] = {}
    for event in sorted((_event(span, rank, shares) for span in rank.spans), key=_start):
        by_lane.setdefault(event.span.lane, []).append(event)
    threads: dict[int, str] = {}
    events: list[Event] = []
    for name in sorted(by_lane, key=_lane_order):
        tracks = Tracks(name, numbers)
        events += map(tracks.place, by_lane[name])
        threads.update(tracks.threads())
    return Timeline(rank, threads, events)


def _event(span: Span, rank: RankResult, shares: Shares) -> Event:
    end = rank.ended_ns if span.t1_ns is None else span.t1_ns
    share = None
    if span.kind == Kind.COMM and span.seq is not None:
        key = (span.rank, span.op or span.name, span.group or "", span.seq, span.t0_ns)
        share = shares.get(key)
    return Event(span, max(end, span.t0_ns), 0, share)


def _start(event: Event) -> tuple[int, int]:
    """Sort key: by start, enclosing events first."""
    return event.span.t0_ns, -event.t1_ns


def _lane_order(lane: str) -> tuple[int, int, str]:
    name, _, number = lane.partition(" ")
    place = LANES.index(name) if name in LANES else len(LANES)
    return place, int(number) if number.isdecimal() else 0, lane


def _document(run: RunRecord, timelines: Sequence[Timeline]) -> Iterator[str]:
    """The text of a file, line by line: a run can have a million events."""
    events = sorted((event for timeline in timelines for event in timeline.events), key=_start)
    names = itertools.chain.from_iterable(map(_names, timelines))
    yield "{\n"
    for key, value in _head(run, [timeline.rank for timeline in timelines]).items():
        yield f"{json.dumps(key)}: {json.dumps(value)},\n"
    yield '"traceEvents": ['
    for number, event in enumerate(itertools.chain(names, _spans(run, events))):
        yield f"{',' if number else ''}\n{json.dumps(event)}"
    yield "\n]\n}\n"


def _head(run: RunRecord, ranks: Sequence[RankResult]) -> Json:
    """The file's metadata; HolisticTraceAnalysis searches it for the rank line by line."""
    rank = {"rank": ranks[0].rank} if len(ranks) == 1 else {}
    head: Json = {
        "schemaVersion": 1,
        "generator": GENERATOR,
        "distributedInfo": {"backend": _backend(run), **rank, "world_size": run.world_size},
        "displayTimeUnit": "ms",
        "traceName": run.name,
    }
    dropped = {f"rank {rank.rank}": rank.dropped for rank in ranks if rank.dropped}
    return {**head, "droppedSpans": dropped} if dropped else head


def _backend(run: RunRecord) -> str:
    """The backend, inferred from spans: only NCCL's collectives have times on the device."""
    spans = [span for rank in run.ranks for span in rank.spans]
    if any(span.lane in (Lane.CUDA, Lane.NCCL) and span.kind == Kind.COMM for span in spans):
        return "nccl"
    return "gloo" if any(span.op == JOIN for span in spans) else "undefined"


def _names(timeline: Timeline) -> Iterator[Json]:
    """Metadata events: names and order of a rank and its threads."""
    rank = timeline.rank.rank
    dropped = timeline.rank.dropped
    name = f"rank {rank} ({dropped} spans dropped)" if dropped else f"rank {rank}"
    process: Json = {"ph": "M", "pid": rank, "ts": 0}
    yield {**process, "name": "process_name", "args": {"name": name}}
    yield {**process, "name": "process_sort_index", "args": {"sort_index": rank}}
    for number, lane in timeline.threads.items():
        thread = {**process, "tid": number}
        yield {**thread, "name": "thread_name", "args": {"name": lane}}
        yield {**thread, "name": "thread_sort_index", "args": {"sort_index": number}}


def _spans(run: RunRecord, events: Sequence[Event]) -> Iterator[Json]:
    links = _links(events)
    for number, event in enumerate(events):
        span = event.span
        # Rounding down keeps spans nested or apart; Perfetto drops a span that overlaps another by
        # a nanosecond.
        ts, end = ((t - run.begin_ns) // 1000 for t in (span.t0_ns, event.t1_ns))
        place = {"pid": span.rank, "tid": event.thread, "ts": ts}
        category = (
            "user_annotation" if span.kind in (Kind.MARK, Kind.COMPUTE, Kind.DATA) else "cpu_op"
        )
        # Other tools recognise a step by this name.
        name = span.name if span.lane != Lane.STEPS else f"ProfilerStep#{span.step}"
        what = {"cat": category, "name": name}
        yield {"ph": "X", **what, **place, "dur": end - ts, "args": _args(event)}
        if number in links:
            yield {**links[number], **place}  # Perfetto binds it to the latest span


def _args(event: Event) -> Json:
    span, share = event.span, event.share
    args: Json = {
        "kind": span.kind,
        "op": span.op,
        "group": span.group,
        "seq": span.seq,
        "bytes": span.nbytes,
        "bucket": span.bucket,
        "step": span.step,
        "peer": span.peer,
        "open": True if span.t1_ns is None else None,
    }
    if share is not None:
        args["wait_ms"] = share.wait_ns / 1e6
        args["transfer_ms"] = share.transfer_ns / 1e6
        args["last_rank"] = share.last_rank
    return {name: value for name, value in args.items() if value is not None}


def _links(events: Sequence[Event]) -> Links:
    """The merged file's arrows: from the first rank of a collective to the last."""
    meetings: dict[tuple[Any, ...], dict[int, int]] = {}
    for number, event in enumerate(events):
        span = event.span
        if span.kind == Kind.COMM and span.seq is not None:
            meetings.setdefault(key_of(span), {}).setdefault(span.rank, number)
    links: Links = {}
    several = (by_rank for by_rank in meetings.values() if len(by_rank) > 1)
    for flow, by_rank in enumerate(several, start=1):
        first, *between, last = by_rank.values()
        span = events[first].span
        link = {"cat": "collective", "name": f"{span.group} #{span.seq}", "id": flow}
        links[first] = {"ph": "s", **link}
        links.update((number, {"ph": "t", **link}) for number in between)
        links[last] = {"ph": "f", "bp": "e", **link}
    return links


def _stale(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Files of an earlier run with more ranks. Raises FileExistsError if other files are there."""
    if not folder.is_dir():
        return []
    others = {f for f in folder.iterdir() if f.name.endswith((".json", ".gz"))} - set(files)
    stale = sorted(file for file in others if _is_ours(file))
    if strangers := sorted(others.difference(stale)):
        raise FileExistsError(
            f"{strangers[0]} is in the way: HolisticTraceAnalysis takes every .json and .gz file "
            f"in a folder for a rank. Save the trace in a folder of its own."
        )
    return stale


def _is_ours(file: Path) -> bool:
    if not re.fullmatch(r"rank_\d+\.json", file.name) or not file.is_file():
        return False
    with open(file, "rb") as content:
        return f'"generator": "{GENERATOR}"'.encode() in content.read(200)


@contextlib.contextmanager
def _folders(*folders: Path) -> Iterator[None]:
    """Make folders, and remove those that stay empty."""
    made = [folder for folder in folders if not folder.is_dir()]
    try:
        for folder in made:
            folder.mkdir()
        yield
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _write(files: dict[Path, Iterator[str]]) -> list[Path]:
    pieces = {file: (line.encode() for line in lines) for file, lines in files.items()}
    write_files({f: _packed(p) if f.suffix == ".gz" else p for f, p in pieces.items()})
    return list(files)


def _packed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    # No name and no time in the packed file: the same run gives the same bytes.
    packer = zlib.compressobj(level=6, wbits=16 + zlib.MAX_WBITS)  # 16: gzip's format
    yield from map(packer.compress, pieces)
    yield packer.flush()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the trace cannot be saved: {error.strerror}"
        raise OSError(error.errno, what, str(error.filename)) from error
