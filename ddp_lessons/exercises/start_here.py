"""The check of lesson 00: print once, not four times."""

from __future__ import annotations

import re
from collections.abc import Callable

from ddp_lessons.exercises.framework import exercise, judge, run_ranks
from ddp_lessons.text import count, ranks_text


@exercise(
    "Every rank runs the whole function. Which value differs from rank to rank?",
    "Let one rank print. Which one is there in every run, even of one process?",
    "`if rank == 0:`, and in it one `print` with `world_size` in an f-string.",
)
def check_greet(greet: Callable[[int, int], None]) -> str:
    """Check that `greet(rank, world_size)` prints "hello from N ranks" once in all."""
    for world_size in (4, 2, 1):
        run = run_ranks(greet, (world_size,), nprocs=world_size)
        _judge(world_size, [(r.rank, line) for r in run.ranks for line in r.shown_lines])
    return "once with 4 ranks, once with 2, once with 1."


def _letters(line: str) -> str:
    return re.sub(r"[\W_]", "", line).lower()


def _judge(world_size: int, output: list[tuple[int, str]]) -> None:
    printed = [(rank, line.strip()) for rank, line in output if line.strip()]
    expected = f"hello from {world_size} ranks"
    right = (expected, f"hello from {count(world_size, 'rank')}")
    greeted = [rank for rank, line in printed if line in right]
    others = [(rank, line) for rank, line in printed if line not in right]
    if len(greeted) == 1 and not others:
        return
    ranks = sorted({rank for rank, _ in printed})
    greeting = sorted(set(greeted))
    by = f"by {ranks_text(greeting)}" if greeted else ""
    other, line = others[0] if others else (0, "")
    everywhere = (
        "Each rank is a process of its own that runs the whole function: whatever is not under an "
        "`if` happens world_size times."
        if len(ranks) == world_size
        else "More than one rank comes past your `if`. Take a condition that holds on one rank; "
        "`if rank:` is true for every rank but 0."
    )
    mistakes = {
        "nothing was printed.\n"
        "Rank 0 is the only rank that every run has: ranks count from 0 to world_size - 1. (A "
        "value that is returned is not printed.)": not printed,
        f"the line was printed {len(greeted)} times, {by}.\n{everywhere}": (len(greeting) > 1),
        f"the line was printed {len(greeted)} times, {by} alone.\n"
        "No loop over the ranks is needed: each rank is a process of its own, and one of them "
        "prints one line.": len(greeted) > 1,
        f"the line was printed once, {by}, but rank {other} also printed {line!r}.\n"
        "The line should be all that is printed: take out what you printed to have a "
        "look.": greeted,
        f"there were {len(printed)} lines, from {ranks_text(ranks or [0])}, the first of them "
        f"{line!r}; there should be one, {expected!r}.\n{everywhere}": len(ranks) > 1,
        f"rank {other} printed {len(printed)} lines, the first of them {line!r}; there should be "
        f"one, {expected!r}.\n"
        "Each `print` ends its line: put all of it into one.": len(printed) > 1,
        f"the line was {line!r}, not {expected!r}.\n"
        "Compare letter by letter. If there are braces in it, the string lacks its f in "
        "front.": "{" in line or _letters(line) == _letters(expected),
        f"the line was {line!r}, not {expected!r}.\n"
        "The number is right; the words are not.": re.findall(r"\d+", line) == [str(world_size)],
        f"the line was {line!r}, not {expected!r}.\n"
        "The number of ranks is the launcher's choice: take it from world_size.": True,
    }
    judge(f"with {count(world_size, 'rank')} ", mistakes)
