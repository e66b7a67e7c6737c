"""The tape: shared memory in which a rank writes its spans while it works, read by the parent.

Nothing is sent and nobody is woken, so writing costs under a microsecond; and what is written stays
readable when the rank is killed, with the call that it was in still open. One file in memory
serves all ranks of a run, a region for each:

    head: progress, spans dropped, bytes of text
    text: every name once, as its length and UTF-8
    spans: RECORD by RECORD; t0_ns is 0 where nothing is written yet

Imported by both processes: `Tapes` is the parent's side, `Tape` the worker's.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ddp_lessons.messages import Span

MOST_SPANS = 200_000  # kept of one rank; later ones are counted and dropped
SPARE = 64  # records beyond them for what is open: a hang is seen also on a full tape
LONGEST_NAME = 200  # bytes
KINDS = {name: n for n, name in enumerate(("compute", "issue", "comm", "wait", "data", "mark"))}

_WORD = struct.Struct("=q")
_PROGRESS, _DROPPED, _TEXT_USED = range(3)  # words of the head
_HEAD = "=qqqq"  # of a record: t0_ns, t1_ns, step, seq
_T1, _STEP, _SEQ = 1, 2, 3  # words of it
# nbytes, bucket, peer, name, op, group, lane, tensor, site, kind, failed
_TAIL = struct.Struct("=qiiIIIIIIBBxxxxxx")
RECORD = struct.Struct(_HEAD + _TAIL.format[1:])
_TAIL_START = RECORD.size - _TAIL.size
_INT = struct.Struct("=i")
_PEER, _FAILED = _TAIL_START + 12, _TAIL_START + 41  # bytes of a record
CHUNK = RECORD.size << 14  # bytes read at once
_LENGTH = struct.Struct("=H")
_TEXT_START = 64
_TEXT_END = 1 << 20
_SPANS_START = _TEXT_END
_PAGES = 1 << 16  # regions begin at a multiple: mmap's granularity everywhere
_SPARE_START = _SPANS_START + MOST_SPANS * RECORD.size
_SPARE_END = _SPARE_START + SPARE * RECORD.size
REGION = -(-_SPARE_END // _PAGES) * _PAGES

Slot = int  # the first byte of a span in the region; 0 if it was not kept


class Facts(NamedTuple):
    """What a span says of a collective; None and -1 stand for unknown. See messages.Span."""

    op: str | None = None
    group: str | None = None
    seq: int = -1
    nbytes: int = -1
    bucket: int = -1
    peer: int = -1
    tensor: str | None = None
    site: str | None = None


NO_FACTS = Facts()


class Tape:
    """One rank's region, written by the rank. Safe to use from several threads."""

    def __init__(self, descriptor: int, rank: int) -> None:
        self._memory = mmap.mmap(descriptor, REGION, offset=rank * REGION)
        self._words = memoryview(self._memory).cast("q")  # quicker to write than packed
        self._lock = threading.Lock()
        self._slots = iter(range(_SPANS_START, _SPARE_START, RECORD.size))  # next() is atomic
        self._spare = [_SPARE_START + n * RECORD.size for n in range(SPARE)]
        self._dropped = 0
        self._progress = 0
        self._text_used = 0
        self._numbers: dict[str | None, int] = {None: 0}

    def begin(
        self,
        lane: str,
        kind: str,
        name: str,
        t0_ns: int,
        t1_ns: int = 0,
        step: int = -1,
        facts: Facts = NO_FACTS,
    ) -> Slot:
        """Write a span that goes on, or has ended where `t1_ns` is given."""
        slot = self.write(self.tail(lane, kind, name, facts), t0_ns, step, facts.seq)
        if t1_ns:
            self.end(slot, t1_ns)
        return slot

    def tail(self, lane: str, kind: str, name: str, facts: Facts) -> bytes:
        """The part of a record that stays the same when the call is made again."""
        op, group, _, nbytes, bucket, peer, tensor, site = facts
        numbers = self._numbers
        try:
            texts = (
                numbers[name], numbers[op], numbers[group], numbers[lane], numbers[tensor],
                numbers[site],
            )  # fmt: skip
        except KeyError:
            texts = tuple(map(self._add, (name, op, group, lane, tensor, site)))  # type: ignore[assignment]
        return _TAIL.pack(nbytes, bucket, peer, *texts, KINDS[kind], 0)

    def write(self, tail: bytes, t0_ns: int, step: int, seq: int) -> Slot:
        """Write a span that goes on, with a tail made before."""
        slot = next(self._slots, 0) or self._spare_slot()
        if slot:
            self._memory[slot + _TAIL_START : slot + RECORD.size] = tail
            words, place = self._words, slot >> 3
            words[place + _STEP] = step
            words[place + _SEQ] = seq
            words[place] = t0_ns  # at last: a record without it is none
        return slot

    def began(self, slot: Slot, t0_ns: int) -> None:
        """Correct when a span began, where that is known only later."""
        if slot:
            self._words[slot >> 3] = t0_ns

    def end(self, slot: Slot, t1_ns: int) -> None:
        """Note when a span ended."""
        if slot:
            words = self._words
            words[(slot >> 3) + _T1] = t1_ns
            self._progress += 1
            words[_PROGRESS] = self._progress
            if slot >= _SPARE_START:
                self._give_back(slot)

    def fail(self, slot: Slot) -> None:
        """Note that the call raised; `end` comes after it."""
        if slot:
            self._memory[slot + _FAILED] = 1

    def match(self, slot: Slot, seq: int, peer: int) -> None:
        """Note what a recv has met, which it did not know when it began."""
        if slot:
            self._words[(slot >> 3) + _SEQ] = seq
            _INT.pack_into(self._memory, slot + _PEER, peer)

    def moved(self) -> None:
        """Note that the rank goes on, where no span shows it."""
        self._progress += 1
        self._words[_PROGRESS] = self._progress

    def _give_back(self, slot: Slot) -> None:
        """Free a spare record: only what is open may stay there."""
        with self._lock:
            self._memory[slot : slot + RECORD.size] = bytes(RECORD.size)
            self._spare.append(slot)
            self._drop()

    def _spare_slot(self) -> Slot:
        with self._lock:
            if self._spare:
                return self._spare.pop()
            self._drop()
            return 0

    def _drop(self) -> None:
        self._dropped += 1
        self._words[_DROPPED] = self._dropped

    def _add(self, text: str | None) -> int:
        """The number of a text, which is written on the tape when it first occurs."""
        with self._lock:
            if text in self._numbers:
                return self._numbers[text]
            data = str(text).encode("utf-8", errors="replace")[:LONGEST_NAME]
            start = _TEXT_START + self._text_used
            end = start + _LENGTH.size + len(data)
            if end > _TEXT_END:
                return 0
            _LENGTH.pack_into(self._memory, start, len(data))
            self._memory[start + _LENGTH.size : end] = data
            self._text_used = end - _TEXT_START
            self._words[_TEXT_USED] = self._text_used
            return self._numbers.setdefault(text, len(self._numbers))


class Reader:
    """One rank's region as others read it, also while it is written."""

    def __init__(self, memory: mmap.mmap, base: int, rank: int) -> None:
        self._memory = memory
        self._base = base
        self._rank = rank

    def progress(self) -> int:
        """A number that grows with everything that the rank finishes."""
        return self._word(_PROGRESS)

    def dropped(self) -> int:
        """How many spans were not kept."""
        return self._word(_DROPPED)

    def spans(self) -> list[Span]:
        """The spans in the order in which they began; `t1_ns` None: never ended."""
        records = self._records()  # before the texts, to which they refer
        texts = self._texts(self._base + _TEXT_START, self._word(_TEXT_USED))
        return sorted(_spans(self._rank, records, texts), key=lambda span: span.t0_ns)

    def _word(self, place: int) -> int:
        return int(_WORD.unpack_from(self._memory, self._base + place * _WORD.size)[0])

    def _records(self) -> list[tuple[int, ...]]:
        """All records but the empty ones."""
        base = self._base
        spare = self._memory[base + _SPARE_START : base + _SPARE_END]
        records = [record for record in RECORD.iter_unpack(spare) if record[0]]
        for start in range(base + _SPANS_START, base + _SPARE_START, CHUNK):  # written in order
            data = self._memory[start : min(start + CHUNK, base + _SPARE_START)]
            found = [record for record in RECORD.iter_unpack(data) if record[0]]
            if not found:
                break
            records += found
        return records

    def _texts(self, start: int, used: int) -> list[str | None]:
        texts: list[str | None] = [None]
        end = start + used
        while start < end:
            (length,) = _LENGTH.unpack_from(self._memory, start)
            start += _LENGTH.size
            data = self._memory[start : start + length]
            texts.append(data.decode("utf-8", errors="ignore"))  # the last character may be cut
            start += length
        return texts


class Tapes:
    """The tapes of all ranks of a run, in memory; a reader for each by its rank."""

    def __init__(self, world_size: int) -> None:
        self._file = _memory_file()
        os.ftruncate(self._file, world_size * REGION)  # takes no memory until it is written
        self._memory = mmap.mmap(self._file, world_size * REGION, prot=mmap.PROT_READ)

    def sendable(self) -> Connection:
        """The file, as something that multiprocessing passes on to a new process.

        It is no pipe: a Connection is only what the library can carry a descriptor in. It closes
        its descriptor when it is let go.
        """
        return Connection(os.dup(self._file))

    def of(self, rank: int) -> Reader:
        """The reader of one rank's tape."""
        return Reader(self._memory, rank * REGION, rank)

    def progress(self, rank: int) -> int:
        """A number that grows with everything that the rank finishes."""
        return self.of(rank).progress()

    def dropped(self, rank: int) -> int:
        """How many spans were not kept."""
        return self.of(rank).dropped()

    def spans(self, rank: int) -> list[Span]:
        """The spans of a rank in the order in which they began; `t1_ns` None: never ended."""
        return self.of(rank).spans()

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self._file)


def read_file(path: str | os.PathLike[str], rank: int) -> tuple[list[Span], int]:
    """The spans on a tape that is a file of its own, and how many were not kept.

    Raises ValueError if it is no whole tape.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size != REGION:
            raise ValueError(f"{path} is no whole tape: it has not {REGION:,} bytes")
        with mmap.mmap(file.fileno(), REGION, prot=mmap.PROT_READ) as memory:
            reader = Reader(memory, 0, rank)
            return reader.spans(), reader.dropped()


def _spans(
    rank: int, records: Sequence[tuple[int, ...]], texts: list[str | None]
) -> Iterator[Span]:
    """The records as spans. What comes after the last step that is marked belongs to none."""
    kinds = list(KINDS)
    steps = sum(texts[record[10]] == "steps" for record in records)
    for (
        t0, t1, step, seq, nbytes, bucket, peer, name, op, group, lane, tensor, site, kind, failed
    ) in records:  # fmt: skip
        yield Span(
            rank,
            texts[lane] or "",
            kinds[kind],
            "(name not kept)" if (text := texts[name]) is None else text,
            t0,
            t1 or None,
            step if 0 <= step < steps else None,
            texts[op],
            texts[group],
            _known(seq),
            _known(nbytes),
            _known(bucket),
            _known(peer),
            texts[tensor],
            texts[site],
            bool(failed),
        )


def _known(number: int) -> Any:
    return None if number < 0 else number


def _memory_file() -> int:
    """The descriptor of a file that is nowhere in the file system."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ddp_lessons")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
