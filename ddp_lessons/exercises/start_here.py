"""The check of lesson 00: print once, not four times."""

from __future__ import annotations

from collections.abc import Callable

from ddp_lessons.exercises.framework import exercise, judge, run_ranks
from ddp_lessons.text import count


@exercise(
    "Every rank runs the whole function. Which value differs from rank to rank?",
    "Let one rank print: `if rank == ...:`. Which rank is there in every run, even of one process?",
)
def check_greet(greet: Callable[[int, int], None]) -> str:
    """Check that `greet(rank, world_size)` prints "hello from N ranks" once in all."""
    for world_size in (4, 2, 1):
        run = run_ranks(greet, (world_size,), nprocs=world_size)
        _judge(world_size, [(r.rank, line) for r in run.ranks for line in r.shown_lines])
    return "once with 4 ranks, once with 2, once with 1."


def _judge(world_size: int, output: list[tuple[int, str]]) -> None:
    printed = [(rank, line) for rank, line in output if line.strip()]
    ranks = sorted({rank for rank, _ in printed})
    line = printed[0][1] if printed else ""
    expected = f"hello from {world_size} ranks"
    zero = "" if 0 in ranks else " Note that `if rank:` is true for every rank but 0."
    mistakes = {
        "nothing was printed.\n"
        "Rank 0 is the only rank that every run has: ranks count from 0 to world_size - 1. (A "
        "value that is returned is not printed.)": not printed,
        f"the line was printed {len(printed)} times, by rank {', '.join(map(str, ranks))}.\n"
        "Each rank is a process of its own that runs the whole function: whatever is not under an "
        f"`if` happens world_size times.{zero}": len(printed) > 1,
        f"the line was {line!r}, not {expected!r}.\n"
        "Compare letter by letter. If there are braces in it, the string lacks its f in "
        "front.": line != expected and ("{" in line or line.lower().strip() == expected),
        f"the line was {line!r}, not {expected!r}.\n"
        "The number of ranks is the launcher's choice: take it from world_size.": line != expected,
    }
    judge(f"with {count(world_size, 'rank')} ", mistakes)
