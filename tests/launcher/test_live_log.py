"""What the log of a run shows: the latest lines, by rank and by time, as a terminal would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ddp_lessons.launcher import live_log
from ddp_lessons.processes.output import OutputBuffer


def ranks(count: int) -> list[Any]:
    return [SimpleNamespace(rank=rank, output=OutputBuffer()) for rank in range(count)]


def test_by_rank_and_by_time() -> None:
    first, second = workers = ranks(2)
    log = live_log.Log(workers)
    for worker, data in ((second, b"b1\n"), (first, b"a1\na"), (second, b"b2\n"), (first, b"2\n")):
        worker.output.feed(data)
    assert log.lines() == (
        [(0, "a1"), (0, "a2"), (1, "b1"), (1, "b2")],
        [(1, "b1"), (0, "a1"), (1, "b2"), (0, "a2")],
    )


def test_a_progress_bar_is_one_line_as_it_stands_now() -> None:
    workers = ranks(1)
    log = live_log.Log(workers)
    for percent in range(0, 101, 10):
        workers[0].output.feed(f"\r{percent} %".encode())
        assert log.lines() == ([(0, f"{percent} %")],) * 2
    workers[0].output.feed(b"\n\x1b[32mgreen\x1b[0m\n")
    assert log.lines() == ([(0, "100 %"), (0, "green")],) * 2


def test_only_the_latest_lines_are_kept_and_each_rank_has_its_share() -> None:
    talks, other = workers = ranks(2)
    log = live_log.Log(workers)
    other.output.feed(b"once\n")
    for number in range(3000):
        talks.output.feed(f"{number} {'x' * 2000}\n".encode())
    by_rank, by_time = log.lines()
    assert len(by_rank) == live_log.MOST_LINES // 2 + 1
    assert by_rank[-1] == (1, "once")
    assert len(by_time) == live_log.MOST_LINES
    assert max(len(line) for _, line in by_time) == live_log.MOST
    assert by_time[-1][1].startswith("2999 ")


def test_a_line_without_an_end_takes_no_memory() -> None:
    workers = ranks(1)
    log = live_log.Log(workers)
    for _ in range(100):
        workers[0].output.feed(b"x" * 100_000)
    assert len(log._unfinished[0]) <= 4 * live_log.MOST


def test_text_is_escaped() -> None:
    assert "<script>" not in live_log._html([(0, "<script>alert(1)</script>")])
