"""Wording that messages, runs and pictures share: counts, lists, ranks, signals."""

from __future__ import annotations

import html
import itertools
import re
import reprlib
import signal
import textwrap
from collections.abc import Iterable, Sized

WIDTH = 88
MOST_PARTS = 16  # of a list of ranks
INSTALL = "pip install git+https://github.com/ddp-lessons/ddp-lessons"  # as in pyproject.toml


_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def without_colours(line: str) -> str:
    """A line without a terminal's colours, which HTML does not know."""
    return _ANSI.sub("", line)


def count(number: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Short(reprlib.Repr):
    """reprlib's short texts, a little longer."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200  # characters
        self.maxlist = self.maxtuple = self.maxdict = 12  # items

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python does not write so many digits
            return f"an int of {count(x.bit_length(), 'bit')}"


short_repr = _Short().repr


def size_text(size: int) -> str:
    """Bytes of memory: `512 MB`, `1.2 GB`."""
    return f"{size / 2**20:.0f} MB" if size < 2**30 else f"{size / 2**30:.1f} GB"


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 1 and 2`; more than four in a row are `ranks 0 to 7 and 9`.

    Of very many, `ranks 0, 2, 4, 6, 8, 10, 12, 14 and 24 more`.
    """
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        row = [number for _, number in run]
        parts += [f"{row[0]} to {row[-1]}"] if len(row) > 4 else map(str, row)
    if len(parts) > MOST_PARTS:
        told = numbers[: MOST_PARTS // 2]
        return f"ranks {', '.join(map(str, told))} and {len(numbers) - len(told)} more"
    return f"ranks {listed(parts)}"


def at_head(text: str) -> str:
    """The text with a capital first letter, to begin a sentence."""
    return text[:1].upper() + text[1:]


def as_html(text: str) -> str:
    """The text for HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text))


def all_ranks(world_size: int) -> str:
    """`All 4 ranks`, at the head of a sentence."""
    few = {1: "The rank", 2: "Both ranks"}
    return few.get(world_size, f"All {world_size} ranks")


def agree(subjects: Sized, one: str, many: str) -> str:
    """The form of a word that agrees with so many subjects: `one` or `many`."""
    return one if len(subjects) == 1 else many


def exit_name(exitcode: int | None) -> str:
    """`SIGKILL` for -9, `exit code 7` for 7, `no exit status` for None."""
    if exitcode is None:
        return "no exit status"
    if exitcode < 0:
        try:
            return signal.Signals(-exitcode).name
        except ValueError:
            return f"signal {-exitcode}"
    return f"exit code {exitcode}"


def wrapped(text: str) -> str:
    """The text with lines of at most 88 characters, broken between words, indented as they were.

    A notebook would break longer lines in the middle of words. A line of code at the end, which two
    spaces set off, stays whole and goes below.
    """
    lines = [part for line in text.split("\n") for part in _wrap(line)]
    return "\n".join(lines)


def _wrap(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= WIDTH or len(indent) > WIDTH // 2:
        return [line]
    before, set_off, code = line.partition(":  ")
    if set_off and ":  " not in code:
        return [*_wrap(f"{before}:"), f"{indent}    {code}"]
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


def cut_lines(lines: list[str], most: int) -> list[str]:
    """At most about `most` lines: the first and last half, with a line that counts the rest."""
    if len(lines) <= most:
        return lines
    half = max(1, most // 2)
    left_out = len(lines) - 2 * half
    return [*lines[:half], f"[... {left_out:,} lines left out ...]", *lines[-half:]]
