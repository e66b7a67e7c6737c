"""The facts that a rank under torchrun writes down: what its messages become, and reading them.

worker/torchrun.py writes them, in ranks; recorded_run.py reads them, in the parent. The folder may
come from anybody, and its files may be truncated or half overwritten. So every fact is checked for
type and size before it is used, and each error names its file. Facts also name source files: the
lines of one are shown only if the file here is the one that ran, or is installed here. The names of
the others are marked, so that nobody opens them.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddp_lessons.system import regular_files
from ddp_lessons.wire import owners
from ddp_lessons.wire.messages import (
    Clock,
    GivesUp,
    Handling,
    Message,
    ThreadCalls,
    ThreadDied,
    Unseen,
)
from ddp_lessons.wire.records import (
    MISTAKES,
    Batches,
    ErrorRecord,
    Frame,
    Mistake,
    Noted,
    Report,
    Timeout,
    split_site,
)

MOST_BYTES = 20 << 20  # of a file of facts or stacks; 50,000 reports of a number take 5 to 16 MB
MOST_FILES = 1000  # source files whose digests are read
LARGEST = (1 << 63) - 1
LONGEST_PATH = 4096  # characters
MOST_CAUSES = 100  # exceptions kept of a chain
DEEPEST_GROUP = 20
MOST_TOLD = 1000  # facts of one kind that are read
# A rank writes several of these.
REPEATED = ("file", "gives_up", "mistake", "report", "thread_calls", "thread_died", "unseen")
SINCE_LATER = ("left_out", "parts_left_out", "t0_ns")  # numbers that older records lack
_SITE = re.compile(r".*:\d{1,9}", re.ASCII | re.DOTALL)


class Fields:
    """The fields of one fact. Each method raises ValueError if one is missing or mistyped."""

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

    def seconds(self, name: str) -> float:
        """A positive number."""
        value: Any = self.data.get(name)
        if type(value) not in (int, float) or not 0 <= value < LARGEST:
            raise ValueError(f"is damaged: {name!r} is no number of seconds")
        return float(value)

    def text(self, name: str) -> str:
        """A string; characters that UTF-8 cannot encode are replaced."""
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
        """The members of a list; none if the record lacks the list, as an older one may."""
        return map(Fields, self._list(name))

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        return [Fields({name: value}).text(name) for value in self._list(name)]

    def numbers(self) -> dict[str, int]:
        """All fields, which are numbers, by their names."""
        return {name.encode(errors="replace").decode(): self.number(name) for name in self.data}

    def floats(self) -> dict[str, float]:
        """All fields, which are numbers of any kind, by their names."""
        if not all(type(value) in (int, float) for value in self.data.values()):
            raise ValueError("is damaged: what was reported is no number")
        try:
            return {
                name.encode(errors="replace").decode(): float(value)
                for name, value in self.data.items()
            }
        except OverflowError:
            raise ValueError("is damaged: a number that was reported is too large") from None

    def _list(self, name: str) -> list[Any]:
        value = self.data.get(name, [])
        if not isinstance(value, list):
            raise ValueError(f"is damaged: {name!r} is no list")
        return value

    def first(self, name: str) -> Iterator[Fields]:
        """The first members of a list, as many as are read at most."""
        return itertools.islice(self.each(name), MOST_TOLD)

    def within(self, name: str) -> Fields | None:
        """The fields of a nested fact; None if there is none."""
        value = self.data.get(name)
        return None if value is None else Fields(value)


class Sources:
    """The source files that a rank's record names. `digests`: SHA-256 of those it ran, by name."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests
        self.name = functools.cache(self._name)

    def _name(self, filename: str) -> str:
        """The name of a file, marked as recorded unless its lines here may be shown."""
        ran = self._digests.get(filename)
        if ran is not None and ran == regular_files.digest(filename):
            return filename
        return filename if owners.is_installed_here(filename) else owners.recorded(filename)


@contextmanager
def of_file(file: Path) -> Iterator[None]:
    """Turn an OSError or ValueError of the block into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error


def parse(data: bytes) -> tuple[Fields, Sources]:
    """The facts of a rank by their names, those of REPEATED as lists, and the files that it ran."""
    facts: dict[str, Any] = {}
    for line in _before_zeros(data).decode(errors="replace").split("\n"):
        try:
            fact = json.loads(line)
        except (ValueError, RecursionError):
            break  # the last line: the rank was killed while it wrote it
        if not isinstance(fact, dict):
            raise ValueError("is damaged: a line is no fact")
        for name, value in fact.items():
            if name in REPEATED:
                facts.setdefault(name, []).append(value)
            else:
                facts[name] = value
    found = Fields(facts)
    files = itertools.islice(found.each("file"), MOST_FILES)
    return found, Sources({file.path("name"): file.text("sha256") for file in files})


def of_message(message: Message) -> dict[str, Any]:
    """The fact, by its name, that a message becomes in the record of a script; none for others."""
    match message:
        case Clock():
            return {"clock": asdict(message)}
        case Handling(site, error, t0_ns):
            return {"handling": {"site": site, "t0_ns": t0_ns, **asdict(error)}}
        case ThreadDied(thread, error):
            return {"thread_died": {"thread": thread, **asdict(error)}}
        case ThreadCalls():
            return {"thread_calls": asdict(message)}
        case GivesUp(timeout):
            return {"gives_up": timeout._asdict()}
        case Unseen():
            return {"unseen": asdict(message)}
        case Mistake():
            return {"mistake": message._asdict()}
        case Report():
            return {"report": message._asdict()}
        case Noted():
            batches = [batches._asdict() for batches in message.batches]
            return {"noted": {**message._asdict(), "batches": batches}}
    return {}


def messages(found: Fields, sources: Sources) -> Iterator[Message]:
    """The messages that became these facts, but for the rank's clock."""
    if (handled := found.within("handling")) is not None:
        site = named(handled.text("site"), sources)
        yield Handling(site, error(handled, sources), handled.number("t0_ns"))
    for own in found.first("gives_up"):
        yield GivesUp(Timeout(own.seconds("seconds"), own.text("call"), _site(own, sources)))
    for calls in found.first("thread_calls"):
        yield ThreadCalls(calls.text("lane"), calls.text("thread"))
    for died in found.first("thread_died"):
        yield ThreadDied(died.text("thread"), error(died, sources))
    for unseen in found.first("unseen"):
        yield Unseen(unseen.text("what"))
    for mistake in found.first("mistake"):
        if (kind := mistake.text("kind")) in MISTAKES:  # a later version may know more
            yield Mistake(kind, mistake.text("op"), named(mistake.text("site"), sources))
    for report in found.each("report"):
        values = report.within("values")
        yield Report(report.number("t_ns"), {} if values is None else values.floats())
    if (noted := found.within("noted")) is not None:
        batches = [
            Batches(named(line.text("site"), sources), *map(line.number, Batches._fields[1:]))
            for line in noted.each("batches")
        ]
        weights = [model.numbers() for model in noted.each("weights")]
        yield Noted(tuple(weights), tuple(noted.texts("rates")), tuple(batches))


def named(site: str, sources: Sources) -> str:
    """A checked line, `FILE:LINE`, with the name under which its file may be shown."""
    if not _SITE.fullmatch(site) or "\0" in site:
        raise ValueError("is damaged: a line of code has no number")
    filename, line = split_site(site)
    return f"{sources.name(filename)}:{line}"


def _site(fact: Fields, sources: Sources) -> str | None:
    return None if fact.data.get("site") is None else named(fact.text("site"), sources)


def stack_text(data: bytes) -> str:
    """What faulthandler printed into a file."""
    return _before_zeros(data).decode(errors="replace")


def _before_zeros(data: bytes) -> bytes:
    """The data without the zeros that reserve room after it."""
    return data.partition(b"\0")[0]


def error(raised: Fields, sources: Sources, depth: int = 0) -> ErrorRecord:
    """An exception with its latest causes and, if it is a group, its parts."""
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
