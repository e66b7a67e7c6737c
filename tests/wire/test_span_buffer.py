"""The span buffer: readers get what a rank wrote, also if it was much, odd or killed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from ddp_lessons.wire.records import Caught, split_site
from ddp_lessons.wire.span_buffer import (
    CAUGHT,
    LONGEST_NAME,
    LONGEST_SITE,
    LONGEST_TEXT,
    MOST_CAUGHT,
    MOST_SPANS,
    RECORD,
    SPARE,
    CallFacts,
    SpanBuffers,
    SpanWriter,
)


@pytest.fixture
def buffers() -> Iterator[SpanBuffers]:
    with closing(SpanBuffers(2)) as buffers:
        yield buffers


def writer(buffers: SpanBuffers, rank: int = 0) -> SpanWriter:
    connection = buffers.sendable()
    try:
        return SpanWriter(connection.fileno(), rank)
    finally:
        connection.close()


def test_all_facts_of_a_span_come_back(buffers: SpanBuffers) -> None:
    facts = CallFacts(
        "all_reduce", "rows: ranks 0 1", 7, 2**40, 3, 1, "float32 (2, 3)", "cell.py:4"
    )
    writer(buffers, 1).begin("comm", "comm", "all_reduce", 100, 250, 0, facts)
    writer(buffers, 0).begin("main", "compute", "forward", 5)
    (reduced,) = buffers.spans(1)
    assert reduced[:7] == (1, "comm", "comm", "all_reduce", 100, 250, None)
    *seen, tag = facts
    assert reduced[7:] == (*seen, False, None, None, None)
    assert tag == 0
    (forward,) = buffers.spans(0)
    assert forward[:6] == (0, "main", "compute", "forward", 5, None)
    assert set(forward[6:-4]) == {None}


def test_a_span_has_the_processor_s_time_where_it_was_read(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    for t0_ns in (10, 20, 30):
        slot = buffer.begin("main", "compute", "forward", t0_ns)
        if t0_ns > 10:
            buffer.meter(slot, 7 * t0_ns, 30 - t0_ns)
    found = [(s.cpu_ns, s.queued_ns) for s in buffers.spans(0)]
    assert found == [(None, None), (140, 10), (210, 0)]


def test_a_send_has_its_tag(buffers: SpanBuffers) -> None:
    facts = CallFacts("send", "world", 0, 4, -1, 1, "float32 (1,)", "cell.py:4", 77)
    writer(buffers).begin("main", "comm", "send", 100, 250, facts=facts)
    assert buffers.spans(0)[0].tag == 77


def test_a_span_is_open_until_it_ends(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    slot = buffer.begin("main", "comm", "barrier", 10)
    assert buffers.spans(0)[0].t1_ns is None
    assert buffers.progress(0) == 0
    buffer.end(slot, 20)
    assert buffers.spans(0)[0].t1_ns == 20
    assert buffers.progress(0) == 1
    buffer.moved()
    assert buffers.progress(0) == 2


def test_a_call_that_raises_ends_but_is_no_progress(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    slot = buffer.begin("main", "comm", "barrier", 10)
    before = buffer.ended
    buffer.fail(slot)
    buffer.end(slot, 20)
    assert buffers.progress(0) == 0
    assert buffer.ended != before
    buffer.end(buffer.begin("main", "comm", "barrier", 30), 40)
    assert buffers.progress(0) == 1


def test_the_calls_that_go_on_are_found_without_reading_all_spans(buffers: SpanBuffers) -> None:
    buffer, reader = writer(buffers), buffers.of(0)
    assert reader.calls_now() == []
    for number in range(1, 1001):
        buffer.begin("main", "compute", "forward", number, number + 1)
    facts = CallFacts("barrier", "world", 0)
    done = buffer.begin("main", "comm", "barrier", 2000, facts=facts)
    assert reader.calls_now() == [("barrier", 2000)]
    buffer.begin("main", "compute", "forward", 2001)  # marked work, no call
    slot = buffer.begin("main", "comm", "all_reduce", 2002, facts=facts._replace(op="all_reduce"))
    assert reader.calls_now() == [("barrier", 2000), ("all_reduce", 2002)]
    buffer.end(done, 3000)
    buffer.end(slot, 3000)
    assert reader.calls_now() == []


def test_a_rank_sees_whether_the_others_leave(buffers: SpanBuffers) -> None:
    one, other = writer(buffers, 0), writer(buffers, 1)
    assert not one.others_leave(2)
    other.note_leaving(True)
    assert one.others_leave(2)
    assert not other.others_leave(2)
    other.note_leaving(False)
    assert not one.others_leave(2)


def test_where_the_others_cannot_be_seen_they_are_not_said_to_leave(buffers: SpanBuffers) -> None:
    writer(buffers, 1).note_leaving(True)
    with closing(buffers.sendable()) as connection:
        alone, descriptor_closed = SpanWriter(connection.fileno(), 0, 0), writer(buffers)
    with open(os.devnull) as another:
        os.dup2(another.fileno(), descriptor_closed._file.fileno())
    assert not descriptor_closed.others_leave(2)
    assert not alone.others_leave(2)


def test_spans_come_in_the_order_of_time(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    for t0 in (30, 10, 20):
        buffer.begin("main", "compute", str(t0), t0, t0 + 5)
    assert [s.t0_ns for s in buffers.spans(0)] == [10, 20, 30]


def test_steps_that_were_marked_count(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    buffer.begin("steps", "mark", "step 0", 10, 20, 0)
    buffer.begin("main", "compute", "in it", 12, 15, 0)
    buffer.begin("main", "compute", "after it", 22, 25, 1)
    assert [(s.name, s.step) for s in buffers.spans(0)] == [
        ("step 0", 0),
        ("in it", 0),
        ("after it", None),
    ]


@pytest.mark.parametrize("name", ["", "é" * 300, "\udcff broken", "🐢" * 90, "a\nb\0c"])
def test_odd_names(buffers: SpanBuffers, name: str) -> None:
    buffer = writer(buffers)
    buffer.begin("main", "compute", name, 10, 20)
    buffer.begin("main", "compute", "next", 30, 40)
    odd, following = buffers.spans(0)
    assert following.name == "next"
    readable = name.encode(errors="replace").decode()
    assert readable.startswith(odd.name)
    assert len(odd.name.encode()) == min(LONGEST_NAME, len(readable.encode()))


def test_a_long_name_is_cut_between_two_characters(buffers: SpanBuffers) -> None:
    writer(buffers).begin("main", "compute", "€" * 100, 10, 20)
    assert buffers.spans(0)[0].name == "€" * (LONGEST_NAME // 3)


@pytest.mark.parametrize(
    "folder", ["目录" * 33, "é" * 2000, "a/" * LONGEST_SITE, "目/" * LONGEST_SITE]
)
def test_a_site_has_its_line_however_long_the_path(buffers: SpanBuffers, folder: str) -> None:
    buffer = writer(buffers)
    path = f"/{folder}/train.py"
    for line in (7, 123456):
        facts = CallFacts("barrier", "world", site=f"{path}:{line}")
        buffer.begin("main", "comm", f"{path}:{line}", 10 + line, facts=facts)
    for span, line in zip(buffers.spans(0), (7, 123456), strict=True):
        filename, number = split_site(span.site or "")
        assert number == line
        assert path.endswith(filename)
        assert len(filename) == len(path) or len(path.encode()) > LONGEST_SITE - 10
        assert path.startswith(span.name)
        assert len(span.name.encode()) > LONGEST_NAME - 3


@pytest.mark.parametrize("size", [LONGEST_TEXT, LONGEST_TEXT + 1])
def test_the_name_of_a_group_is_kept_whole_or_not_at_all(buffers: SpanBuffers, size: int) -> None:
    name = "ranks" + " 1" * size
    group = name[:size]
    facts = CallFacts("barrier", group, 3)
    writer(buffers).begin("main", "comm", "barrier", 10, 20, facts=facts)
    assert buffers.spans(0)[0].group == (group if size <= LONGEST_TEXT else None)


def test_what_a_recv_has_met_is_noted_later(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    facts = CallFacts("recv", "world", -1, 2**40, 3)
    slot = buffer.begin("main", "comm", "recv", 10, step=0, facts=facts)
    buffer.match(slot, 7, 2)
    buffer.end(slot, 20)
    buffer.match(0, 8, 3)  # a span that was not kept
    (recv,) = buffers.spans(0)
    assert recv[:6] == (0, "main", "comm", "recv", 10, 20)
    assert recv[7:13] == ("recv", "world", 7, 2**40, 3, 2)


def test_a_call_that_raised_is_marked(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    slot = buffer.begin("main", "comm", "barrier", 10)
    buffer.fail(slot)
    buffer.end(slot, 20)
    buffer.fail(0)  # a span that was not kept
    (barrier,) = buffers.spans(0)
    assert (barrier.t1_ns, barrier.failed) == (20, True)


@pytest.mark.ranks
def test_names_beyond_the_room_for_them_are_admitted(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    for number in range(20_000):
        buffer.begin("main", "compute", f"{number:0>100}", 10 + number, 11 + number)
    spans = buffers.spans(0)
    assert len(spans) == 20_000
    assert spans[0].name == "0" * 100
    assert spans[-1].name == "(name not kept)"
    assert spans[-1].lane == "main"


@pytest.mark.slow
@pytest.mark.ranks
def test_a_full_buffer_counts_what_it_drops_and_still_shows_what_is_open(
    buffers: SpanBuffers,
) -> None:
    buffer = writer(buffers)
    for number in range(MOST_SPANS + 1000):
        buffer.end(buffer.begin("main", "compute", "work", 1 + number), 2 + number)
    assert (len(buffers.spans(0)), buffers.dropped(0)) == (MOST_SPANS, 1000)
    assert buffers.progress(0) == MOST_SPANS + 1000
    slot = buffer.begin("main", "comm", "barrier", 10**9)
    assert buffers.spans(0)[-1].name == "barrier"
    buffer.end(slot, 10**9 + 1)
    assert buffers.spans(0)[-1].name == "work"
    for number in range(SPARE + 5):
        buffer.begin("comm", "comm", "all_reduce", 2 * 10**9 + number)
    assert sum(s.t1_ns is None for s in buffers.spans(0)) == SPARE
    assert buffers.dropped(0) == 1000 + 1 + 5


def test_several_threads_write_at_once(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)

    def write(number: int) -> None:
        for n in range(2000):
            buffer.end(
                buffer.begin(f"thread {number}", "compute", f"{number} {n % 50}", 1 + n), 2 + n
            )

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = buffers.spans(0)
    assert len(spans) == 8000
    assert all(s.name.split()[0] == s.lane.split()[1] for s in spans)


@pytest.mark.parametrize("of", ["spans", "texts"])
def test_a_slow_thread_that_reserves_room_wipes_nothing_out(
    of: str, buffers: SpanBuffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS room is reserved by writing zeros."""
    slow, begun, pwrite = threading.Event(), threading.Event(), os.pwrite

    def write_slowly(*args: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            slow.wait(0.5)
        return pwrite(*args)

    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "pwrite", write_slowly)
    buffer = writer(buffers)
    names = [f"{number:0>190}" for number in range(24)]
    before = 20 if of == "texts" else 0  # they fill the first piece
    for name in names[:before]:
        buffer.begin("main", "compute", name, 10, 20)
    other = threading.Thread(target=buffer.begin, args=("main", "compute", names[-1], 30, 40))
    other.start()
    begun.wait()
    for name in names[before:-1]:
        buffer.begin("main", "compute", name, 20, 25)
    slow.set()
    other.join()
    assert [span.name for span in buffers.spans(0)] == names


@pytest.mark.system
def test_what_a_killed_process_wrote_stays_readable(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    child = os.fork()
    if child == 0:
        buffer.begin("main", "compute", "before", 10, 20)
        buffer.begin("main", "comm", "barrier", 30)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [(s.name, s.t1_ns) for s in buffers.spans(0)] == [("before", 20), ("barrier", None)]


@pytest.mark.system
def test_it_can_be_killed_and_read_at_any_moment(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    child = os.fork()
    if child == 0:
        for number in range(1, MOST_SPANS):
            buffer.begin("main", "compute", f"span {number % 1000}", number, number + 1)
        os._exit(0)
    counts = [0]
    try:
        while counts[-1] < 20_000:
            counts.append(len(buffers.spans(0)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    *spans, last = buffers.spans(0)
    assert counts == sorted(counts)
    assert all((s.name, s.t1_ns) == (f"span {s.t0_ns % 1000}", s.t0_ns + 1) for s in spans)
    assert last.name in (f"span {last.t0_ns % 1000}", "(name not kept)")  # it may be half written


def test_it_takes_memory_only_where_it_is_written() -> None:
    with closing(SpanBuffers(256)) as many:
        assert os.fstat(many._file).st_blocks == 0
        writer(many, 200).begin("main", "compute", "work", 1, 2)
        assert os.fstat(many._file).st_blocks * 512 < 64_000


def test_without_memfd_a_file_without_a_name_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with closing(SpanBuffers(1)) as buffers:
        writer(buffers).begin("main", "compute", "work", 1, 2)
        assert [s.name for s in buffers.spans(0)] == ["work"]


def test_a_thread_that_comes_late_to_a_new_piece_leaves_no_hole(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    buffer.begin("main", "compute", "first", 1, 2)
    # Between its look at the slots, of which none was left, and here, another thread got a piece.
    slot = buffer._slot_in_new_piece()
    assert slot == buffer.begin("main", "compute", "third", 3, 4) - RECORD.size


def caught(number: int, text: str = "ValueError: bad") -> Caught:
    return Caught(number, f"{text} {number}", "a.py:1", "b.py:2", "b.py:3")


def test_exceptions_that_were_caught_come_back(buffers: SpanBuffers) -> None:
    buffer = writer(buffers, 1)
    assert buffers.caught(1) is None
    buffer.note_caught()
    assert buffers.caught(1) == []
    for number in range(1, 4):
        buffer.caught(number, caught(number))
    buffer.raised_again(2)
    buffer.raised_again(7)
    assert buffers.caught(1) == [caught(1), caught(3)]
    assert buffers.caught(0) is None
    assert buffers.spans(1) == []


def test_of_many_caught_exceptions_the_latest_are_kept(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    buffer.note_caught()
    for number in range(1, 3 * MOST_CAUGHT):
        buffer.caught(number, caught(number))
    kept = list(range(2 * MOST_CAUGHT, 3 * MOST_CAUGHT))
    assert buffers.caught(0) == [caught(number) for number in kept]
    buffer.raised_again(kept[-1])
    buffer.raised_again(1)  # no longer kept
    assert buffers.caught(0) == [caught(number) for number in kept[:-1]]


def test_an_exception_with_the_identity_of_one_that_is_gone(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    buffer.note_caught()
    buffer.caught(5, caught(1))
    buffer.caught(5, caught(2))
    buffer.raised_again(5)
    assert buffers.caught(0) == [caught(1)]


def test_a_caught_exception_that_does_not_fit_is_left_out(buffers: SpanBuffers) -> None:
    buffer = writer(buffers)
    buffer.note_caught()
    buffer.caught(1, caught(1, "x" * CAUGHT))
    buffer.caught(2, caught(2, "Fehler: ungültig \N{SNOWMAN}"))
    assert buffers.caught(0) == [caught(2, "Fehler: ungültig \N{SNOWMAN}")]
    assert buffers.spans(1) == []
