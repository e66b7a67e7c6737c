"""The facts that a rank of a script wrote down (torchrun.py), read back as from a stranger.

Runs in the parent, for recorded_run.py. A folder may come from anybody, be cut off or half
overwritten: every fact is checked for its type and size before it is used, and an error says in
which file. Files that a record names are told apart: the lines of one are shown only if it is the
one that ran, or is installed here. The others keep their names, marked so that nobody opens them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddp_lessons.system import regular_files
from ddp_lessons.wire import owners
from ddp_lessons.wire.records import ErrorRecord, Frame

MOST_BYTES = 1 << 22  # of a file of facts, or of a stack
MOST_FILES = 1000  # whose content is noted
LARGEST = (1 << 63) - 1
LONGEST_PATH = 4096  # characters
MOST_CAUSES = 100  # exceptions that are kept of those that led to one
DEEPEST_GROUP = 20
SINCE_LATER = ("left_out", "parts_left_out")  # numbers that older records have not


class Fields:
    """The fields of one fact. All raise ValueError where one is missing or of another type."""

    def __init__(self, data: Any) -> None:
        if not isinstance(data, dict):
            raise ValueError("is damaged: a fact has no fields")
        self.data: dict[str, Any] = data

    def number(self, name: str, least: int = 0, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self.data.get(name, 0 if name in SINCE_LATER else None)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"is damaged: {name!r} is no number from {least} to {most}")
        return value

    def text(self, name: str) -> str:
        """A text; what UTF-8 cannot say in it is replaced."""
        value = self.data.get(name)
        if not isinstance(value, str):
            raise ValueError(f"is damaged: {name!r} is no text")
        return value.encode(errors="replace").decode()

    def path(self, name: str) -> str:
        """The name of a file."""
        text = self.text(name)
        if "\0" in text or len(text) > LONGEST_PATH:
            raise ValueError(f"is damaged: {name!r} names no file")
        return text

    def each(self, name: str) -> Iterator[Fields]:
        """The members of a list; none where it is not there, as in an older record."""
        value = self.data.get(name, [])
        if not isinstance(value, list):
            raise ValueError(f"is damaged: {name!r} is no list")
        return map(Fields, value)

    def within(self, name: str) -> Fields | None:
        """The fields of what is named; None where it is not there."""
        value = self.data.get(name)
        return None if value is None else Fields(value)


class Sources:
    """The files that a rank's record names. `digests`: SHA-256 of those that it ran, by name."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests
        self.name = functools.cache(self._name)

    def _name(self, filename: str) -> str:
        """The name of a file; marked as recorded if its lines must not be shown from here."""
        ran = self._digests.get(filename)
        if ran is not None and ran == regular_files.digest(filename):
            return filename
        return filename if owners.is_installed_here(filename) else owners.recorded(filename)


@contextmanager
def of_file(file: Path) -> Iterator[None]:
    """Have errors say in which file they are: all are ValueErrors then."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error


def parse(data: bytes) -> tuple[Fields, Sources]:
    """The facts of a rank by their names, and the files that it ran."""
    found: dict[str, Any] = {}
    noted: list[Fields] = []
    for line in _before_zeros(data).decode(errors="replace").split("\n"):
        try:
            fact = json.loads(line)
        except (ValueError, RecursionError):
            break  # the last line of a rank that was killed while it wrote it
        if not isinstance(fact, dict):
            raise ValueError("is damaged: a line is no fact")
        if "file" in fact:
            noted.append(Fields(fact["file"]))
        found.update(fact)
    first = itertools.islice(noted, MOST_FILES)
    return Fields(found), Sources({file.path("name"): file.text("sha256") for file in first})


def told(data: bytes) -> str:
    """What faulthandler printed into a file."""
    return _before_zeros(data).decode(errors="replace")


def _before_zeros(data: bytes) -> bytes:
    """What was written, without the room that was reserved for more."""
    return data.partition(b"\0")[0]


def error(raised: Fields, sources: Sources, depth: int = 0) -> ErrorRecord:
    """An exception with the latest of those that led to it, and the parts of groups."""
    if depth > DEEPEST_GROUP:
        raise ValueError("is damaged: groups of exceptions in groups without end")
    chain = [raised]
    while len(chain) <= MOST_CAUSES and (before := chain[-1].within("previous")) is not None:
        chain.append(before)
    record: ErrorRecord | None = None
    for fields in reversed(chain):
        record = ErrorRecord(
            fields.text("type_name"),
            fields.text("text"),
            tuple(_frame(frame, sources) for frame in fields.each("frames")),
            record,
            fields.text("link") if record is not None else "",
            fields.number("left_out"),
            tuple(error(part, sources, depth + 1) for part in fields.each("parts")),
            fields.number("parts_left_out"),
        )
    assert record is not None
    return record


def _frame(frame: Fields, sources: Sources) -> Frame:
    return Frame(
        sources.name(frame.path("filename")),
        frame.number("lineno"),
        frame.text("function"),
        frame.text("source"),
    )
