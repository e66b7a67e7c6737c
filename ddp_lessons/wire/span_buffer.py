"""The span buffer: shared memory into which a rank writes its spans, and which the parent reads.

Writing costs under a microsecond, because the rank sends nothing and wakes nobody. Spans stay
readable when the rank is killed, and the call that it was in stays open. One file in memory serves
all ranks of a run, a region for each:

    head: progress, spans dropped, bytes of text, whether caught exceptions are noted, whether the
        rank leaves all groups
    text: every text once, as its length and UTF-8; of a span's name the end may be cut off, of a
        site the start, and all others, such as a group's ranks, are whole or missing
    spans: RECORD by RECORD; t0_ns is 0 where nothing is written yet
    caught: the latest exceptions that the learner's code caught, each in CAUGHT bytes

The file is sparse. A rank that wrote to a page for which the system has no room would die of
SIGBUS, so it reserves room piece by piece before it uses it. If none is left, it drops and counts
later spans, as when the buffer is full. Readers use pread and map nothing, because SIGBUS could
end them, too.

Imported by both processes: the worker writes with `SpanWriter`, the parent reads with
`SpanBuffers`; recorded_run.py reads a .tape file of a script with `read_file`.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import mmap
import os
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ddp_lessons.system.memory import memory_file
from ddp_lessons.wire.ops import PAIRWISE
from ddp_lessons.wire.records import Caught, Kind, Lane, Span
from ddp_lessons.wire.run_folder import VERSION

MOST_SPANS = 200_000  # kept of one rank; later ones are counted and dropped
SPARE = 64  # extra slots for open spans, so that a hang stays visible when the buffer is full
LONGEST_NAME = 200  # bytes of a span's name, of which the start is kept
LONGEST_SITE = 1 << 13  # bytes of a site, of which the end is kept; a path has 4096 at most
LONGEST_TEXT = (1 << 16) - 1  # bytes; a longer one, such as a group's name, is not kept
KINDS = {kind.value: number for number, kind in enumerate(Kind)}

_WORD = struct.Struct("=q")
_PROGRESS, _DROPPED, _TEXT_USED, _NOTES_CAUGHT, _LEAVES = range(5)  # words of the head
_HEAD = "=qqqqqq"  # of a record: t0_ns, t1_ns, step, seq, cpu_ns, queued_ns
_T1, _STEP, _SEQ, _CPU, _QUEUED = 1, 2, 3, 4, 5  # words of it
# nbytes, bucket, peer, name, op, group, lane, tensor, site, kind, failed, tag
_TAIL = struct.Struct("=qiiIIIIIIBBxxi")
RECORD = struct.Struct(_HEAD + _TAIL.format[1:])
RECORD_2 = struct.Struct("=qqqq" + _TAIL.format[1:])  # in format 2, without the processor's time
_PEER_NUMBER, _OP, _GROUP, _LANE, _SITE = 8, 10, 11, 12, 14  # positions in an unpacked record
_TAIL_START = RECORD.size - _TAIL.size
_INT = struct.Struct("=i")
_PEER, _FAILED = _TAIL_START + 12, _TAIL_START + 41  # bytes of a record
FIRST_CHUNK, CHUNK = 1 << 6, 1 << 12  # records read at once: the last ones are mostly empty
LATEST = 64  # records among which calls that go on are looked for
_FIRST_PIECE, _LARGEST_PIECE = RECORD.size << 6, RECORD.size << 11  # bytes reserved at once
_LENGTH = struct.Struct("=H")
_TEXT_START = 64
_TEXT_PIECE = 1 << 12  # bytes of head and text that are reserved at first, then at once
_TEXT_END = 1 << 20
_SPANS_START = _TEXT_END
_PAGES = 1 << 16  # regions begin at a multiple: mmap's granularity everywhere
MOST_CAUGHT = 32  # exceptions of one rank that are kept, the latest
CAUGHT = 1 << 10  # bytes of each
_CAUGHT_HEAD = struct.Struct("=qH")  # t_ns, which is 0 where there is none, and the bytes of JSON


def _layout(record: struct.Struct) -> tuple[int, int, int]:
    """Where the extra slots of a region start and end, and the bytes of the region."""
    start = _SPANS_START + MOST_SPANS * record.size
    end = start + SPARE * record.size
    return start, end, -(-end // _PAGES) * _PAGES


_SPARE_START, _SPARE_END, REGION = _layout(RECORD)
_CAUGHT_END = _SPARE_END + MOST_CAUGHT * CAUGHT
assert _CAUGHT_END <= REGION  # they fill what was left over in it

Record = tuple[int, ...]
Slot = int  # the first byte of a span in the region; 0 if it was not kept


class CallFacts(NamedTuple):
    """The facts of a call that its span records; None and -1 mean unknown. See records.Span."""

    op: str | None = None
    group: str | None = None
    seq: int = -1
    nbytes: int = -1
    bucket: int = -1
    peer: int = -1
    tensor: str | None = None
    site: str | None = None
    tag: int = 0


NO_FACTS = CallFacts()


def prepare(descriptor: int, number: int = 0) -> None:
    """Reserve a region's head and its slots for open spans, which must work when room runs out.

    Raises OSError.
    """
    base = number * REGION
    reserve(descriptor, base, base + _TEXT_PIECE)
    reserve(descriptor, base + _SPARE_START, base + _SPARE_END)


def reserve(descriptor: int, start: int, end: int) -> None:
    """Have the system allocate these bytes of the file, where nothing is written yet.

    Raises OSError if there is none: the disk, the memory or the user's quota is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, end - start)
        return
    while start < end:  # macOS
        start += os.pwrite(descriptor, bytes(end - start), start)


class SpanWriter:
    """One rank's region, written by the rank. Safe to use from several threads.

    Also from signal handlers: they may interrupt the thread that holds the lock, but only where
    Python calls something. So whoever holds it calls nothing between two lines that must agree.

    `number` is that of the region in the file, by default the rank.
    """

    def __init__(self, descriptor: int, rank: int, number: int | None = None) -> None:
        self._rank = rank
        self._has_others = number is None  # their regions are in the file, too
        self._base = (rank if number is None else number) * REGION
        self._file = Connection(os.dup(descriptor))  # see SpanBuffers.sendable
        self._identity = identity(descriptor)
        self._memory = mmap.mmap(descriptor, REGION, offset=self._base)
        self._words = memoryview(self._memory).cast("q")  # faster to write than struct.pack_into
        self._lock = threading.RLock()
        self._slots = iter(range(0))  # the reserved ones that are left; next() is atomic
        self._slots_end = _SPANS_START
        self._text_end = _TEXT_PIECE
        self._full = False  # there is no room for more
        self._reserving = threading.RLock()  # a signal handler may need room while it is made
        self._reserved: set[int] = set()  # where the pieces begin for which there is room
        self._spare = [_SPARE_START + n * RECORD.size for n in range(SPARE)]
        self._dropped = 0
        self._progress = 0
        self._failures = 0
        self._text_used = 0
        self._numbers: dict[str | None, int] = {None: 0}
        self._next_number = 1
        self._caught: list[Hashable] = []  # the keys of the exceptions kept, by their places
        self._next_caught = 0

    @property
    def ended(self) -> tuple[int, int]:
        """Two numbers, of which one grows with everything that ends."""
        return self._progress + self._failures, self._dropped

    def begin(
        self,
        lane: str,
        kind: str,
        name: str,
        t0_ns: int,
        t1_ns: int = 0,
        step: int = -1,
        facts: CallFacts = NO_FACTS,
    ) -> Slot:
        """Write a span and return its slot; it is open unless `t1_ns` is given."""
        slot = self.write(self.tail(lane, kind, name, facts), t0_ns, step, facts.seq)
        if t1_ns:
            self.end(slot, t1_ns)
        return slot

    def tail(self, lane: str, kind: str, name: str, facts: CallFacts) -> bytes:
        """Pack the part of a record that is the same each time that a line makes a call."""
        op, group, _, nbytes, bucket, peer, tensor, site, tag = facts
        numbers = self._numbers
        try:
            texts = (
                numbers[name], numbers[op], numbers[group], numbers[lane], numbers[tensor],
                numbers[site],
            )  # fmt: skip
        except KeyError:
            name, site = _start(name), _end(site)
            texts = tuple(map(self._add, (name, op, group, lane, tensor, site)))  # type: ignore[assignment]
        return _TAIL.pack(nbytes, bucket, peer, *texts, KINDS[kind], 0, tag)

    def write(self, tail: bytes, t0_ns: int, step: int, seq: int) -> Slot:
        """Write an open span, whose `tail` was packed before, and return its slot."""
        slot = next(self._slots, 0) or self._slot_in_new_piece() or self._spare_slot()
        if slot:
            self._memory[slot + _TAIL_START : slot + RECORD.size] = tail
            words, place = self._words, slot >> 3
            words[place + _STEP] = step
            words[place + _SEQ] = seq
            words[place] = t0_ns  # last, because a record without it does not count
        return slot

    def meter(self, slot: Slot, cpu_ns: int, queued_ns: int) -> None:
        """Note how long the main thread had used a processor, and had queued for one, by then."""
        if slot:
            words, place = self._words, slot >> 3
            words[place + _CPU] = cpu_ns
            words[place + _QUEUED] = queued_ns

    def began(self, slot: Slot, t0_ns: int) -> None:
        """Correct the time at which a span began, known only now."""
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
        """Note that the call raised; call `end` after it, which then is no progress."""
        if slot:
            self._memory[slot + _FAILED] = 1
            self._progress -= 1
            self._failures += 1

    def match(self, slot: Slot, seq: int, peer: int) -> None:
        """Note the number and the sender of a recv from any rank, known only now."""
        if slot:
            self._words[(slot >> 3) + _SEQ] = seq
            _INT.pack_into(self._memory, slot + _PEER, peer)

    def kept(self, slot: Slot) -> Slot:
        """The slot of a span that keeps it when it ends; 0 for one that another span then gets."""
        return slot if slot < _SPARE_START else 0

    def moved(self) -> None:
        """Note progress that no span shows."""
        self._progress += 1
        self._words[_PROGRESS] = self._progress

    def note_leaving(self, leaves: bool) -> None:
        """Note whether the rank leaves all groups, or has left them and joins no other."""
        self._words[_LEAVES] = leaves

    def others_leave(self, world_size: int) -> bool:
        """Whether all other ranks have noted that they leave; False if that is unknown."""
        if not self._has_others:
            return False
        try:
            file = self._own_file()
        except OSError:
            return False
        others = (rank for rank in range(world_size) if rank != self._rank)
        return all(SpanReader(file, rank * REGION, rank).leaves() for rank in others)

    def note_caught(self) -> None:
        """Note that exceptions that the learner's code catches are told from now on."""
        self._words[_NOTES_CAUGHT] = 1

    def caught(self, key: Hashable, what: Caught) -> None:
        """Keep an exception that was caught, instead of the oldest one if there are many.

        Its `key` may be that of an earlier one, which is gone by now.
        """
        t_ns, *texts = what
        data = json.dumps(texts).encode()
        with self._lock:
            number = self._next_caught
            is_new = number == len(self._caught)
            start = _SPARE_END + number * CAUGHT
        if _CAUGHT_HEAD.size + len(data) > CAUGHT or (
            is_new and not self._has_room(start, start + CAUGHT)
        ):
            return
        with self._lock:
            self._caught = [None if kept == key else kept for kept in self._caught]
            self._caught[number : number + 1] = [key]
            self._next_caught = (number + 1) % MOST_CAUGHT
            self._words[start >> 3] = 0
            _CAUGHT_HEAD.pack_into(self._memory, start, 0, len(data))
            begin = start + _CAUGHT_HEAD.size
            self._memory[begin : begin + len(data)] = data
            self._words[start >> 3] = t_ns  # last, because one without it does not count

    def raised_again(self, key: Hashable) -> None:
        """Drop an exception that went on after all: what handled it was a `finally`, say."""
        with self._lock:
            if key in self._caught:
                number = self._caught.index(key)
                self._caught[number] = None
                self._words[(_SPARE_END + number * CAUGHT) >> 3] = 0

    def _give_back(self, slot: Slot) -> None:
        """Free a spare slot, which only an open span may hold; its span counts as dropped."""
        with self._lock:
            self._memory[slot : slot + RECORD.size] = bytes(RECORD.size)
            self._spare.append(slot)
            self._drop()

    def _slot_in_new_piece(self) -> Slot:
        """Reserve the next piece and return a slot in it; 0 if there is no room."""
        start = self._slots_end
        if slot := next(self._slots, 0):  # another thread was quicker: its piece must not be lost
            return slot
        piece = min(max(start - _SPANS_START, _FIRST_PIECE), _LARGEST_PIECE)
        end = min(start + piece, _SPARE_START)
        if start == end or not self._has_room(start, end):
            return 0
        slots = iter(range(start, end, RECORD.size))
        with self._lock:
            if self._slots_end == start:  # else another thread was quicker
                self._slots = slots  # first: see above
                self._slots_end = end
        return next(self._slots, 0) or self._slot_in_new_piece()

    def _has_room(self, start: int, end: int) -> bool:
        """Reserve a piece of the region; False without room. Too slow to hold the lock.

        Once: `reserve` may write zeros, and another thread may have written there since.
        """
        with self._reserving:
            if start in self._reserved:
                return True
            if self._full:
                return False
            try:
                reserve(self._own_file(), self._base + start, self._base + end)
            except OSError as error:
                self._stop(error)
                return False
            self._reserved.add(start)
            return True

    def _own_file(self) -> int:
        """The descriptor of the file. Raises OSError if os.closerange closed it, say."""
        file = self._file.fileno()
        if identity(file) != self._identity:  # now another's
            raise OSError(errno.EBADF, "its file was closed")
        return file

    def _stop(self, error: OSError) -> None:
        """Record only open spans from now on, and say so, once."""
        with self._lock:
            was_full, self._full = self._full, True
        if not was_full:
            say(f"rank {self._rank} is recorded no further: {error.strerror}")

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
        """The number of a text; writes the text when it first occurs. 0 if it is not kept."""
        data = str(text).encode("utf-8", errors="replace")
        if len(data) > LONGEST_TEXT:
            return 0
        data = _LENGTH.pack(len(data)) + data
        size = len(data)
        while True:
            with self._lock:
                if text in self._numbers:
                    return self._numbers[text]
                start = _TEXT_START + self._text_used
                end = start + size
                if end > _TEXT_END:
                    return 0
                reserved = self._text_end
                if end <= reserved:
                    self._text_used, number = end - _TEXT_START, self._next_number
                    self._next_number = number + 1
                    self._memory[start:end] = data
                    self._words[_TEXT_USED] = self._text_used
                    self._numbers[text] = number
                    return number
            if not self._has_room(reserved, reserved + _TEXT_PIECE):
                return 0
            self._text_end = reserved + _TEXT_PIECE


class SpanReader:
    """Reads one rank's region, also while the rank writes it."""

    def __init__(
        self, descriptor: int, base: int, rank: int, record: struct.Struct = RECORD
    ) -> None:
        self._file = descriptor
        self._base = base
        self._rank = rank
        self._record = record

    def progress(self) -> int:
        """A number that grows with everything that the rank finishes."""
        return self._word(_PROGRESS)

    def dropped(self) -> int:
        """How many spans were not kept."""
        return self._word(_DROPPED)

    def caught(self) -> list[Caught] | None:
        """The latest exceptions that the learner's code caught; None if that is unknown."""
        if self._record is not RECORD or not self._word(_NOTES_CAUGHT):
            return None
        data = self._bytes(_SPARE_END, MOST_CAUGHT * CAUGHT)
        found = []
        for start in range(0, len(data), CAUGHT):
            t_ns, size = _CAUGHT_HEAD.unpack_from(data, start)
            start += _CAUGHT_HEAD.size
            if t_ns:
                with contextlib.suppress(ValueError, TypeError):  # being written
                    found.append(Caught(t_ns, *map(str, json.loads(data[start : start + size]))))
        return sorted(found)

    def leaves(self) -> bool:
        """Whether the rank leaves all groups, or has left them and joins no other."""
        return bool(self._word(_LEAVES))

    def calls_now(self) -> list[tuple[str, int]]:
        """The calls of torch.distributed that go on, and when each began; of the latest spans."""
        size, end = self._record.size, self._slots_used()
        start = max(0, end - LATEST)
        data = self._bytes(_SPANS_START + start * size, (end - start) * size)
        open_ = [r for r in self._record.iter_unpack(data) if r[0] and not r[_T1] and r[_OP]]
        texts = self._texts() if open_ else []
        return [(texts[record[_OP]] or "", record[0]) for record in open_]

    def _slots_used(self) -> int:
        """How many spans were begun, as far as there is room: they are written in order."""
        return bisect.bisect_left(
            range(MOST_SPANS),
            True,
            key=lambda n: (
                not _WORD.unpack(self._bytes(_SPANS_START + n * self._record.size, _WORD.size))[0]
            ),
        )

    def spans(self) -> list[Span]:
        """The spans in the order in which they began; `t1_ns` is None if one never ended."""
        records, texts = self.read()
        return _spans(self._rank, records, texts, texts)

    def read(self) -> tuple[list[Record], list[str | None]]:
        """The records, and the texts to which they refer by number."""
        records = self._records()  # before the texts, which are only ever added
        return records, self._texts()

    def _word(self, place: int) -> int:
        return int(_WORD.unpack(self._bytes(place * _WORD.size, _WORD.size))[0])

    def _bytes(self, start: int, size: int) -> bytes:
        data = os.pread(self._file, size, self._base + start)
        if len(data) != size:
            raise ValueError("is damaged: it has become shorter")
        return data

    def _records(self) -> list[Record]:
        """All records but the empty ones."""
        size, unpack = self._record.size, self._record.iter_unpack
        spare_start, spare_end, _ = _layout(self._record)
        spare = self._bytes(spare_start, spare_end - spare_start)
        records = [record for record in unpack(spare) if record[0]]
        start, number = _SPANS_START, FIRST_CHUNK
        while start < spare_start:  # written in order
            data = self._bytes(start, min(number * size, spare_start - start))
            found = [record for record in unpack(data) if record[0]]
            if not found:
                break
            records += found
            start, number = start + number * size, min(2 * number, CHUNK)
        if self._record is RECORD_2:
            return [(*record[:_CPU], 0, 0, *record[_CPU:]) for record in records]
        return records

    def _texts(self) -> list[str | None]:
        used = self._word(_TEXT_USED)
        if not 0 <= used <= _TEXT_END - _TEXT_START:
            raise ValueError("is damaged: its texts have no right size")
        data = self._bytes(_TEXT_START, used)
        texts: list[str | None] = [None]
        start = 0
        while start < used:
            (length,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            texts.append(data[start : start + length].decode("utf-8", errors="ignore"))
            start += length
        return texts


class SpanBuffers:
    """The span buffers of all ranks of a run, in one file in memory; the parent holds and reads it.

    Raises OSError if there is no room for them.
    """

    def __init__(self, world_size: int) -> None:
        self._file = memory_file()
        try:
            os.ftruncate(self._file, world_size * REGION)  # takes no memory until it is used
        except OSError:
            os.close(self._file)
            raise

    def prepare(self, rank: int) -> None:
        """Reserve what a rank's buffer needs at the start. Raises OSError."""
        prepare(self._file, rank)

    def sendable(self) -> Connection:
        """The file's descriptor in a Connection, which multiprocessing can pass to a new process.

        It is no pipe. The Connection closes the descriptor when it is garbage-collected.
        """
        return Connection(os.dup(self._file))

    def of(self, rank: int) -> SpanReader:
        """The reader of one rank's buffer."""
        return SpanReader(self._file, rank * REGION, rank)

    def progress(self, rank: int) -> int:
        """A number that grows with everything that the rank finishes."""
        return self.of(rank).progress()

    def dropped(self, rank: int) -> int:
        """How many spans were not kept."""
        return self.of(rank).dropped()

    def spans(self, rank: int) -> list[Span]:
        """The spans of a rank in the order in which they began; see SpanReader.spans."""
        return self.of(rank).spans()

    def caught(self, rank: int) -> list[Caught] | None:
        """The latest exceptions that a rank caught; see SpanReader.caught."""
        return self.of(rank).caught()

    def close(self) -> None:
        """Free the memory."""
        os.close(self._file)


def read_file(
    descriptor: int,
    rank: int,
    highest: int,
    check_group: Callable[[str], None],
    site_of: Callable[[str], str],
    version: int = VERSION,
) -> tuple[list[Span], int, list[Caught] | None]:
    """The spans in a .tape file, how many were not kept, and the exceptions that were caught.

    `highest` is the highest rank, `version` the file's format. `check_group` is called with the
    name of each group; `site_of` maps each site to the name to show. Raises ValueError if the file
    is not a whole span buffer, or not one that a rank has written.
    """
    record = RECORD_2 if version == 2 else RECORD
    *_, region = _layout(record)
    if os.fstat(descriptor).st_size != region:
        raise ValueError(f"is not a whole span buffer: it has not {region:,} bytes")
    reader = SpanReader(descriptor, 0, rank, record)
    try:
        records, texts = reader.read()
        dropped = reader.dropped()
        groups, sites = ({texts[record[n]] for record in records} for n in (_GROUP, _SITE))
        named = {site: None if site is None else site_of(site) for site in sites}
        spans = _spans(rank, records, texts, [named.get(text) for text in texts])
        caught = reader.caught()
    except (IndexError, struct.error) as error:
        raise ValueError("is damaged") from error
    for group in groups - {None}:
        check_group(str(group))
    if any(record[_PEER_NUMBER] > highest for record in records):
        raise ValueError(f"is damaged: it names a rank beyond {highest}")
    if dropped < 0 or any(t0 < 0 or (t1 and t1 < t0) for t0, t1, *_ in records):
        raise ValueError("is damaged: its times make no sense")
    if caught is not None:
        caught = [Caught(t_ns, text, *map(site_of, sites)) for t_ns, text, *sites in caught]
    return spans, dropped, caught


def _start(name: object) -> str:
    """The start of a span's name, which the learner may have made of anything."""
    data = str(name).encode("utf-8", errors="replace")
    return data[:LONGEST_NAME].decode("utf-8", errors="ignore")


def _end(site: str | None) -> str | None:
    """The end of a site, with the number of the line."""
    if site is None:
        return None
    data = site.encode("utf-8", errors="replace")
    return data[-LONGEST_SITE:].decode("utf-8", errors="ignore")


def say(text: str) -> None:
    """Write a line to stderr; it is lost if stderr is a file on the same full disk."""
    with contextlib.suppress(OSError):
        os.write(2, f"ddp_lessons: {text}\n".encode(errors="replace"))


def identity(descriptor: int) -> tuple[int, int]:
    """The device and inode of an open file. Raises OSError if the descriptor is closed."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _spans(
    rank: int,
    records: Sequence[Record],
    texts: list[str | None],
    sites: list[str | None],
) -> list[Span]:
    """The records as spans, in the order in which they began."""
    return sorted(_each(rank, records, texts, sites), key=lambda span: span.t0_ns)


def _each(
    rank: int,
    records: Sequence[Record],
    texts: list[str | None],
    sites: list[str | None],
) -> Iterator[Span]:
    """The records as spans. Spans after the last marked step belong to no step."""
    kinds = list(KINDS)
    steps = sum(texts[record[_LANE]] == Lane.STEPS for record in records)
    for (
        t0, t1, step, seq, cpu, queued, nbytes, bucket, peer, name, op, group, lane, tensor, site,
        kind, failed, tag,
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
            sites[site],
            bool(failed),
            tag if texts[op] in PAIRWISE else None,
            cpu or None,
            queued if cpu else None,
        )


def _known(number: int) -> Any:
    return None if number < 0 else number
