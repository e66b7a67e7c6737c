"""Trace files: their format, as Perfetto and HolisticTraceAnalysis read them."""

from __future__ import annotations

import errno
import functools
import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from hta.common.trace import Trace
from hta.trace_analysis import TraceAnalysis

from ddp_lessons import Run, launch, span
from ddp_lessons.analysis import chrome_trace
from ddp_lessons.results import RankResult
from ddp_lessons.wire.records import Span

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Json = dict[str, Any]
BEGAN = 5_000_000_000
MS = 1_000_000


def did(
    rank: int, lane: str, kind: str, name: str, t0: float, t1: float | None, **more: Any
) -> Span:
    """A span from `t0` to `t1` ms after the launch."""
    ends = None if t1 is None else BEGAN + round(t1 * MS)
    return Span(rank, lane, kind, name, BEGAN + round(t0 * MS), ends, **more)


def reduced(rank: int, t0: float, t1: float | None, seq: int = 0, **more: Any) -> Span:
    """An all_reduce of all ranks."""
    facts = {"op": "all_reduce", "group": "world", "seq": seq, "nbytes": 400, **more}
    return did(rank, facts.pop("lane", "main"), "comm", "all_reduce", t0, t1, **facts)


def made_up(ranks: int, *spans: Span, dropped: int = 0) -> Run:
    """A run of 100 ms with these spans; the last rank dropped some."""
    results = [
        RankResult(
            rank=rank,
            status="returned",
            value=None,
            output="",
            error=None,
            exitcode=0,
            spans=(
                did(rank, "process", "mark", "start-up", 0, 10),
                did(rank, "process", "mark", "train", 10, 100),
                *(s for s in spans if s.rank == rank),
            ),
            began_ns=BEGAN,
            started_ns=BEGAN + 10 * MS,
            ended_ns=BEGAN + 100 * MS,
            dropped=dropped if rank == ranks - 1 else 0,
        )
        for rank in range(ranks)
    ]
    return Run("train", results, begin_ns=BEGAN)


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., Json]:
    def save(*spans: Span, ranks: int = 1, dropped: int = 0) -> Json:
        """The merged file of a made-up run."""
        path = tmp_path / "trace.json"
        assert chrome_trace.save(made_up(ranks, *spans, dropped=dropped), path) == [path]
        return read(path)

    return save


def read(path: Path) -> Json:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = json.loads(content)
    assert isinstance(found, dict)
    return found


def slices(document: Json, name: str = "") -> list[Json]:
    """The events with a duration: those of one name, or all but the rank's life."""
    found = [e for e in document["traceEvents"] if e["ph"] == "X"]
    return [e for e in found if (e["name"] == name if name else e["args"]["kind"] != "mark")]


def names(document: Json, what: str) -> dict[int, str]:
    """The names of processes or threads, by number."""
    key = "pid" if what == "process_name" else "tid"
    found = [e for e in document["traceEvents"] if e["name"] == what]
    assert len({e[key] for e in found}) == len(found)
    return {e[key]: e["args"]["name"] for e in found}


def lanes(document: Json, name: str) -> list[str]:
    """The names of the threads of one name's slices."""
    threads = names(document, "thread_name")
    return [threads[e["tid"]] for e in slices(document, name)]


def arrows(document: Json) -> list[tuple[int, int, str]]:
    """(from rank, to rank, name of the arrow), as Perfetto's importer would see them.

    It reads events by ts, in the file's order where that is equal, drops a slice that reaches
    beyond the one it began in, and binds an arrow to the slice that began last on its thread
    (slice_tracker.cc and flow_tracker.cc of its trace processor).
    """
    events = [e for e in document["traceEvents"] if e["ph"] != "M"]
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
    opened: dict[tuple[int, int], list[Json]] = defaultdict(list)
    flows: dict[tuple[int, str, str], Json] = {}
    found = []
    for event in events:
        stack = opened[event["pid"], event["tid"]]
        if event["ph"] == "X":
            start, end = event["ts"], event["ts"] + event["dur"]
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= start:
                stack.pop()
            assert not stack or end <= stack[-1]["ts"] + stack[-1]["dur"], f"{event} is dropped"
            stack.append(event)
            continue
        flow = event["id"], event["cat"], event["name"]
        assert (event["ph"] == "s") == (flow not in flows)
        assert event["ph"] in "stf"
        assert stack[-1]["args"]["kind"] == "comm"
        if flow in flows:
            found.append((flows[flow]["pid"], event["pid"], event["name"]))
        flows[flow] = stack[-1]
    return found


def test_a_span_becomes_a_slice_of_its_rank(merged: Callable[..., Json]) -> None:
    work = did(1, "main", "compute", "forward", 20, 25.5, step=3)
    document = merged(work, reduced(1, 30, 32, 7, bucket=2, step=3, peer=0), ranks=2)
    forward, reduce = slices(document)
    assert (forward["pid"], forward["ts"], forward["dur"]) == (1, 20_000, 5_500)
    assert forward["args"] == {"kind": "compute", "step": 3}
    assert (forward["cat"], reduce["cat"]) == ("user_annotation", "cpu_op")
    facts = {"op": "all_reduce", "group": "world", "seq": 7, "bytes": 400, "bucket": 2}
    assert facts.items() <= reduce["args"].items()
    assert (reduce["args"]["step"], reduce["args"]["peer"]) == (3, 0)
    assert "open" not in reduce["args"]


def test_the_head_and_the_names(merged: Callable[..., Json]) -> None:
    document = merged(did(0, "thread 10", "compute", "load", 1, 2), ranks=3)
    assert document["schemaVersion"] == 1
    assert document["distributedInfo"] == {"backend": "undefined", "world_size": 3}
    assert "droppedSpans" not in document
    assert names(document, "process_name") == {0: "rank 0", 1: "rank 1", 2: "rank 2"}
    assert list(names(document, "thread_name").values()).count("process") == 3
    joined = did(1, "main", "comm", "init_process_group", 1, 2, op="init_process_group")
    assert merged(joined, ranks=2)["distributedInfo"]["backend"] == "gloo"
    assert merged(reduced(0, 1, 2, lane="cuda"))["distributedInfo"]["backend"] == "nccl"


def test_threads_stand_in_the_order_of_the_lanes(merged: Callable[..., Json]) -> None:
    mixed = ["cuda", "thread 10", "buckets", "main", "gloo", "thread 2", "comm", "steps", "other"]
    document = merged(*[did(0, lane, "compute", "work", 20, 21, step=0) for lane in mixed])
    order = {
        e["tid"]: e["args"]["sort_index"]
        for e in document["traceEvents"]
        if e["name"] == "thread_sort_index"
    }
    threads = names(document, "thread_name")
    assert [threads[tid] for tid in sorted(order, key=order.__getitem__)] == [
        *("process", "steps", "main", "thread 2", "thread 10", "comm", "buckets", "gloo", "cuda"),
        "other",
    ]


def test_threads_have_numbers_that_are_nobody_elses(merged: Callable[..., Json]) -> None:
    document = merged(*[reduced(rank, 20, 30) for rank in range(4)], ranks=4)
    threads = names(document, "thread_name")
    assert len(threads) == 8
    assert not threads.keys() & names(document, "process_name").keys()


def test_dropped_spans_are_mentioned(merged: Callable[..., Json]) -> None:
    document = merged(ranks=2, dropped=7)
    assert document["droppedSpans"] == {"rank 1": 7}
    assert names(document, "process_name") == {0: "rank 0", 1: "rank 1 (7 spans dropped)"}


def test_what_never_ended_lasts_until_the_rank_ends(merged: Callable[..., Json]) -> None:
    document = merged(reduced(0, 30, None), did(0, "main", "compute", "late", 120, None))
    (reduce,) = slices(document, "all_reduce")
    assert (reduce["ts"], reduce["dur"], reduce["args"]["open"]) == (30_000, 70_000, True)
    (late,) = slices(document, "late")
    assert (late["ts"], late["dur"]) == (120_000, 0)


def test_steps_have_the_profilers_name_for_them(merged: Callable[..., Json]) -> None:
    steps = [
        did(rank, "steps", "mark", f"step {n}", 20 + 10 * n, 30 + 10 * n, step=n)
        for rank in (0, 1)
        for n in range(3)
    ]
    document = merged(*steps, ranks=2)
    found = [e for e in slices(document, "ProfilerStep#2") if e["cat"] == "user_annotation"]
    assert [(e["pid"], e["ts"], e["dur"]) for e in found] == [
        (0, 40_000, 10_000),
        (1, 40_000, 10_000),
    ]
    assert lanes(document, "ProfilerStep#1") == ["steps", "steps"]


def test_nested_spans_share_a_thread(merged: Callable[..., Json]) -> None:
    document = merged(
        did(0, "main", "compute", "step", 20, 40),
        did(0, "main", "compute", "forward", 20, 30),
        did(0, "main", "compute", "layer", 25, 30),
        did(0, "main", "compute", "backward", 30, 40),
    )
    assert {lanes(document, e["name"])[0] for e in slices(document)} == {"main"}
    assert [e["name"] for e in slices(document)] == ["step", "forward", "layer", "backward"]
    assert arrows(document) == []


def test_what_overlaps_without_nesting_gets_a_further_thread(merged: Callable[..., Json]) -> None:
    document = merged(
        did(0, "main", "compute", "a", 20, 30),
        did(0, "main", "compute", "b", 25, 35),
        did(0, "main", "compute", "c", 28, 40),
        did(0, "main", "compute", "d", 32, 34),
    )
    assert [lanes(document, name) for name in "abcd"] == [
        ["main"], ["main (2)"], ["main (3)"], ["main"],
    ]  # fmt: skip
    arrows(document)


def test_collectives_in_flight_never_nest(merged: Callable[..., Json]) -> None:
    times = [(20, 40), (25, 30), (30, 35), (40, 50)]
    flights = [reduced(0, *t, seq, lane="comm") for seq, t in enumerate(times)]
    buckets = [did(0, "buckets", "comm", "bucket", *t) for t in times]
    document = merged(*flights, *buckets)
    assert lanes(document, "all_reduce") == ["comm", "comm (2)", "comm (2)", "comm"]
    assert lanes(document, "bucket") == ["buckets", "buckets (2)", "buckets (2)", "buckets"]


def test_no_slice_is_lost_to_rounding(merged: Callable[..., Json]) -> None:
    edges = [20 + n * 0.000_737 for n in range(300)]
    spans = [did(0, "main", "compute", f"{n}", *edges[n : n + 2]) for n in range(299)]
    spans += [did(0, "main", "compute", "within", t, t + 0.0001) for t in edges[:-1]]
    document = merged(*spans, did(0, "main", "compute", "around", edges[0], edges[-1]))
    arrows(document)
    assert len(names(document, "thread_name")) == 2
    assert min(e["dur"] for e in slices(document)) >= 0
    # Perfetto counts nanoseconds and cuts off the rest: of a fraction, sometimes one too many.
    assert {type(e[key]) for e in slices(document) for key in ("ts", "dur")} == {int}


def test_arrows_link_a_collective_in_the_order_of_arrival(merged: Callable[..., Json]) -> None:
    document = merged(
        *[reduced(rank, t0, 50) for rank, t0 in enumerate((40, 20, 30))],
        *[reduced(rank, 60, 61, seq=1) for rank in range(3)],
        did(
            1, "main", "wait", "wait for all_reduce", 60, 61, op="all_reduce", group="world", seq=2
        ),
        reduced(2, 70, 71, seq=2),
        reduced(0, 72, 73, group="ranks 0 1"),
        reduced(1, 72, 73, group="ranks 0 1"),
        ranks=3,
    )
    assert arrows(document) == [
        *[(1, 2, "world #0"), (2, 0, "world #0")],
        *[(0, 1, "world #1"), (1, 2, "world #1")],
        (0, 1, "ranks 0 1 #0"),
    ]


def test_arrows_link_a_send_and_its_recv(merged: Callable[..., Json]) -> None:
    def passed(rank: int, op: str, peer: int, t0: float, seq: int = 0, lane: str = "main") -> Span:
        facts = {"op": op, "group": "world", "seq": seq, "peer": peer}
        return did(rank, lane, "comm", op, t0, t0 + 5, **facts)

    document = merged(
        *[passed(0, "send", 1, 20), passed(1, "recv", 0, 22)],
        *[passed(2, "irecv", 0, 30, lane="comm"), passed(0, "isend", 2, 33, lane="comm")],
        *[passed(1, "send", 0, 40), passed(0, "send", 1, 40, seq=1)],
        did(2, "main", "comm", "recv", 50, 51, op="recv", group="world"),
        ranks=3,
    )
    assert [arrow[:2] for arrow in arrows(document)] == [(0, 1), (2, 0)]


def test_waiting_is_told_apart_from_transfer(merged: Callable[..., Json]) -> None:
    issue = did(0, "main", "issue", "issue", 20, 21, op="all_reduce", group="world", seq=0)
    document = merged(reduced(0, 20, 52, lane="comm"), issue, reduced(1, 50, 52), ranks=2)
    early, late = (e["args"] for e in slices(document, "all_reduce"))
    assert (early["wait_ms"], early["transfer_ms"], early["last_rank"]) == (30, 2, 1)
    assert (late["wait_ms"], late["transfer_ms"], late["last_rank"]) == (0, 2, 1)
    assert "wait_ms" not in slices(document, "issue")[0]["args"]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_up(2, *[reduced(rank, 20 + rank, 30, n) for rank in (0, 1) for n in range(3)])
    for name in ("one.json", "two.json", "one.json.gz", "two.json.gz"):
        chrome_trace.save(run, tmp_path / name)
    one, two = (tmp_path / "one.json").read_bytes(), (tmp_path / "two.json").read_bytes()
    assert one == two
    assert gzip.decompress((tmp_path / "one.json.gz").read_bytes()) == one
    packed = (tmp_path / "one.json.gz").read_bytes()
    assert packed == (tmp_path / "two.json.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # when it was written
    assert str(tmp_path).encode() not in one


def test_a_folder_has_a_file_a_rank_and_the_merged_one(tmp_path: Path) -> None:
    folder = tmp_path / "trace of Jürgen, 1. run 📈"
    run = made_up(3, *[reduced(rank, 20, 30) for rank in range(3)])
    ranks = [folder / f"rank_{rank}.json" for rank in range(3)]
    assert chrome_trace.save(run, str(folder)) == [*ranks, folder / "merged" / "all_ranks.json"]
    for rank, file in enumerate(ranks):
        document = read(file)
        assert document["distributedInfo"]["rank"] == rank
        assert {e["pid"] for e in document["traceEvents"]} == {rank}
        assert arrows(document) == []
    assert len(arrows(read(folder / "merged" / "all_ranks.json"))) == 2
    assert sorted(Trace(trace_dir=str(folder)).trace_files) == [0, 1, 2]


def test_names_in_any_script_survive(merged: Callable[..., Json]) -> None:
    odd = 'vorwärts "→" \\ \n \ud800 "rank": 5'
    assert slices(merged(did(0, "main", "compute", odd, 1, 2)))[0]["name"] == odd


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    chrome_trace.save(made_up(4), tmp_path / "traces")
    (tmp_path / "traces" / "notes.txt").write_text("mine")
    chrome_trace.save(made_up(2), tmp_path / "traces")
    found = {path.name for path in (tmp_path / "traces").iterdir()}
    assert found == {"rank_0.json", "rank_1.json", "merged", "notes.txt"}
    assert read(tmp_path / "traces" / "rank_1.json")["distributedInfo"]["world_size"] == 2


@pytest.mark.parametrize("name", ["rank_7.json", "settings.json", "old.json.gz", ".hidden.gz"])
def test_a_stranger_that_would_pass_for_a_rank_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=re.escape(f"{name} is in the way")):
        chrome_trace.save(made_up(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("no folder/trace.json", errno.ENOENT),
        ("no folder/traces", errno.ENOENT),
        ("file/trace.json", errno.ENOTDIR),
        ("file/traces", errno.ENOTDIR),
        ("file", errno.EEXIST),
        ("folder.json", errno.EISDIR),
        ("x" * 300 + ".json", errno.ENAMETOOLONG),
    ],
)
def test_where_nothing_can_be_written(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match="the trace cannot be saved") as caught:
        chrome_trace.save(made_up(2), tmp_path / name)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder.json"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_is_half_a_packed_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.json\.gz, got 'trace\.gz'"):
        chrome_trace.save(made_up(1), tmp_path / "trace.gz")


def test_a_disk_that_fills_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Iterator[str]:
        yield "{"
        raise OSError(errno.ENOSPC, "No space left on device")

    chrome_trace.save(made_up(1), tmp_path / "old.json")
    before = (tmp_path / "old.json").read_bytes()
    monkeypatch.setattr(chrome_trace, "_document", full)
    for name in ("old.json", "new.json.gz", "folder"):
        with pytest.raises(OSError, match="the trace cannot be saved: No space left on device"):
            chrome_trace.save(made_up(1), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_bytes() == before


def train(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        with span("forward"):
            loss = model(torch.ones(2, 8) * rank).sum()
        with span("backward"):
            loss.backward()
        works = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
        for work in works:
            work.wait()
        optimizer.step()
    if rank < 2:
        (dist.send if rank == 0 else dist.recv)(torch.ones(1), 1 - rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained() -> Run:
    return launch(train, nprocs=3)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore::DeprecationWarning:hta")
def test_holistic_trace_analysis_finds_every_rank_and_step(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chrome_trace.save(trained, tmp_path)
    alone = functools.partialmethod(Trace.load_traces, use_multiprocessing=False)
    monkeypatch.setattr(Trace, "load_traces", alone)
    analysis = TraceAnalysis(trace_dir=str(tmp_path), include_last_profiler_step=True)
    assert analysis.get_profiler_steps() == [0, 1, 2, 3]
    assert analysis.t.get_ranks() == [0, 1, 2]
    analysis.t.decode_symbol_ids()
    for rank in range(3):
        assert analysis.t.get_iterations(rank) == [0, 1, 2, 3]
        assert analysis.t.meta_data[rank]["distributedInfo"]["rank"] == rank
        events = analysis.t.get_trace(rank)
        steps = events[events.s_name.eq("forward")].iteration
        assert steps.tolist() == [0, 1, 2, 3]
        sizes = events[events.s_name.eq("all_reduce") & events.iteration.eq(2)].bytes
        assert sorted(sizes.tolist()) == [16, 16, 128, 128]  # issued, and in flight


@pytest.mark.ranks
def test_perfetto_loses_no_slice_and_no_arrow_of_a_real_run(trained: Run, tmp_path: Path) -> None:
    (file,) = chrome_trace.save(trained, tmp_path / "trace.json.gz")
    document = read(file)
    assert sum(e["ph"] == "X" for e in document["traceEvents"]) == len(trained.spans())
    found = arrows(document)
    assert len({name for *_, name in found}) == 8
    assert len(found) == 8 * 2 + 1
