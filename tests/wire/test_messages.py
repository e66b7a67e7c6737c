"""A worker's messages arrive whole, in pieces or several at once; errors in one line."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ddp_lessons.wire.messages import (
    Decoder,
    GivesUp,
    Handling,
    Message,
    Raised,
    Returned,
    Started,
    Unsendable,
    WrittenPages,
    encode,
)
from ddp_lessons.wire.parcels import Parcel
from ddp_lessons.wire.records import ErrorRecord, Frame, Span, Timeout
from ddp_lessons.wire.stacks import describe

ERROR = ErrorRecord("KeyError", "KeyError: 'x'", (Frame("/cell.py", 3, "work", "d['x']"),))
MESSAGES: list[Message] = [
    Started(5),
    GivesUp(Timeout(1.5, "barrier", "/cell.py:3")),
    Handling("/cell.py:3", ERROR, 6),
    Returned(7, Parcel(os.urandom(20_000))),
    Raised(8, ErrorRecord("E", "E: ä€😀", (), previous=ERROR, link="cause"), 1, b"pickle"),
    Unsendable(9, "generator", "cannot pickle"),
    WrittenPages(bytes(16)),
]


def written(message: Message) -> bytes:
    data, file = encode(message)
    assert file is None
    return data


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_messages_come_back_whole_and_in_order(size: int) -> None:
    decoder = Decoder()
    stream = b"".join(map(written, MESSAGES))
    assert [m for piece in pieces(stream, size) for m in decoder.feed(piece)] == MESSAGES


def test_a_message_is_given_out_by_its_last_byte() -> None:
    for message in MESSAGES:
        decoder, data = Decoder(), written(message)
        assert list(decoder.feed(data[:-1])) == []
        assert list(decoder.feed(data[-1:])) == [message]


def test_several_messages_at_once() -> None:
    decoder = Decoder()
    data = b"".join(map(written, MESSAGES))
    assert list(decoder.feed(data + data[:11])) == MESSAGES
    assert list(decoder.feed(data[11:])) == MESSAGES


def test_fields_of_a_span() -> None:
    fields = "rank lane kind name t0_ns t1_ns step op group seq nbytes bucket peer tensor "
    fields += "site failed tag cpu_ns queued_ns"
    assert Span._fields == tuple(fields.split())


class Odd(Exception):
    """An exception of the learner's own."""


def invalid_syntax() -> None:
    compile("1 +", "<cell>", "exec")


def missing_key() -> None:
    dict[str, float]()["lr"]


def own_class() -> None:
    raise Odd("strange:\nvery")


def two_lines_and_a_note() -> None:
    error = ValueError("no rank 7\nof 4: ValueError")
    error.add_note("ranks go from 0 to 3")
    raise error


def no_message() -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    ("fail", "summary"),
    [
        (invalid_syntax, "SyntaxError: invalid syntax"),
        (missing_key, "KeyError: 'lr'"),
        (own_class, "tests.wire.test_messages.Odd: strange:"),
        (two_lines_and_a_note, "ValueError: no rank 7"),
        (no_message, "RuntimeError"),
    ],
)
def test_summary_is_how_a_traceback_ends(fail: Callable[[], None], summary: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    assert describe(caught.value).summary == summary


def test_summary_without_text_is_the_type() -> None:
    assert ErrorRecord("Odd", "", ()).summary == "Odd"


def test_summary_where_the_quoted_line_names_the_type() -> None:
    with pytest.raises(SyntaxError) as caught:
        compile("raise SyntaxError(", "<cell>", "exec")
    assert describe(caught.value).summary == "SyntaxError: '(' was never closed"
