"""A rank's output is bounded: first and last lines stay whole, the rest is counted exactly."""

from __future__ import annotations

import random
import re
import tracemalloc

import pytest

from ddp_lessons.processes.output import OutputBuffer
from ddp_lessons.text import cut_lines

COUNTED = re.compile(r"^\[\.\.\. ([\d,]+) bytes left out \.\.\.\]$", re.MULTILINE)


def filled(*pieces: bytes, limit: int = 100) -> OutputBuffer:
    buffer = OutputBuffer(limit)
    for piece in pieces:
        buffer.feed(piece)
    return buffer


def parts(buffer: OutputBuffer) -> tuple[str, int, str]:
    """Head, number of bytes left out, tail."""
    head, count, tail = COUNTED.split(buffer.text())
    return head, int(count.replace(",", "")), tail.removeprefix("\n")


def test_all_is_kept_up_to_the_limit() -> None:
    data = b"".join(b"line %d\n" % n for n in range(10, 22)) + b"tail"
    assert len(data) == 100
    assert filled(data).text() == data.decode()
    assert filled(*[data[i : i + 7] for i in range(0, 100, 7)]).text() == data.decode()
    assert "left out" in filled(data, b"!").text()
    assert filled().text() == ""


@pytest.mark.parametrize("size", [1, 3, 64, 5000])
def test_first_and_last_lines_stay_whole_and_the_rest_is_counted(size: int) -> None:
    lines = [b"line %d %s\n" % (n, b"x" * (n % 7)) for n in range(1000)]
    data = b"".join(lines)
    buffer = filled(*[data[i : i + size] for i in range(0, len(data), size)])
    head, left_out, tail = parts(buffer)
    assert data.startswith(head.encode())
    assert data.endswith(tail.encode())
    assert {f"{line}\n".encode() for line in (head + tail).splitlines()} <= set(lines)
    assert head.startswith("line 0 ")
    assert tail.endswith("line 999 xxxxx\n")
    assert len(head) + left_out + len(tail) == len(data) == buffer.total
    assert len(head) + len(tail) <= 100


def test_memory_stays_bounded() -> None:
    piece = b"0123456789abcde\n" * 10
    tracemalloc.start()
    try:
        buffer = OutputBuffer(1000)
        for _ in range(10_000):
            buffer.feed(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000
    assert buffer.total == 1_600_000
    assert len(buffer.text()) <= 1000 + len("[... 1,600,000 bytes left out ...]\n")


def test_a_first_line_longer_than_the_head_is_counted_exactly() -> None:
    head, left_out, tail = parts(filled(b"x" * 300, b"\nend\n"))
    assert head == "x" * 50 + "\n"
    assert tail == "end\n"
    assert 50 + left_out + 4 == 305


def test_of_a_last_line_longer_than_the_tail_the_end_is_kept() -> None:
    _, _, tail = parts(filled(b"first\n", b"x" * 300 + b" the reason\n"))
    assert tail.endswith("the reason\n")


def test_lines_are_as_a_terminal_leaves_them() -> None:
    assert filled(b"\r10%\r50%\r100%\r\nend\n").text() == "100%\nend\n"
    assert filled(b"windows\r\nunix\n").text() == "windows\nunix\n"
    assert filled(b"now 7%\r").text() == "now 7%"


def test_bytes_that_are_not_utf8_are_escaped() -> None:
    assert filled(b"caf\xe9 \xff\n").text() == "caf\\xe9 \\xff\n"


def test_characters_may_be_split_anywhere() -> None:
    text = "ä€😀 ünï\n" * 3
    data = text.encode()
    assert filled(*[data[i : i + 1] for i in range(len(data))]).text() == text
    generator = random.Random(7)
    long = text.encode() * 50
    pieces = []
    while long:
        size = generator.randrange(1, 9)
        pieces.append(long[:size])
        long = long[size:]
    head, _, tail = parts(filled(*pieces, limit=300))
    assert set((head + tail).splitlines()) == {"ä€😀 ünï"}


def test_last_line_is_the_last_that_says_something() -> None:
    assert filled(b"one\ntwo\n\n  \n").last_line() == "two"
    assert filled(b"10%\r20%\r").last_line() == "20%"
    assert filled(b"begun\nhalf a li").last_line() == "half a li"
    assert filled(b"\n \n").last_line() == ""
    assert filled().last_line() == ""
    assert filled(b"x\n" * 500, b"the end\n").last_line() == "the end"


def test_last_line_where_head_and_tail_meet() -> None:
    assert filled(b"0123456789", b"\n", limit=20).last_line() == "0123456789"
    assert filled(b"123456", b"abcdefg\n", limit=20).last_line() == "123456abcdefg"


@pytest.mark.parametrize("most", [2, 3, 10, 333])
def test_cut_lines_keeps_both_ends_and_counts_the_rest(most: int) -> None:
    lines = [f"line {n}" for n in range(1500)]
    cut = cut_lines(lines, most)
    half = most // 2
    assert cut[:half] == lines[:half]
    assert cut[-half:] == lines[-half:]
    assert cut[half] == f"[... {1500 - 2 * half:,} lines left out ...]"
    assert len(cut) == 2 * half + 1


def test_cut_lines_leaves_few_lines_alone() -> None:
    assert cut_lines(["a", "b"], 2) == ["a", "b"]
    assert cut_lines([], 2) == []
