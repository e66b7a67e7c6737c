"""The check of lesson 00: print once, not four times."""

from __future__ import annotations

from collections.abc import Callable

from ddp_lessons.exercises.checking import Wrong, exercise, run_quietly
from ddp_lessons.results import RankResult


@exercise(
    "Every rank runs the whole function. Which value differs from rank to rank?",
    "Let one rank print: `if rank == ...:`. Which rank is there in every run, even of one process?",
)
def check_greet(greet: Callable[[int, int], None]) -> str:
    """Check that `greet(rank, world_size)` prints "hello from N ranks" once in all."""
    for world_size in (4, 2, 1):
        run = run_quietly(greet, (world_size,), nprocs=world_size)
        run.raise_for_failure()
        _judge(world_size, {r.rank: _lines(r) for r in run.ranks if _lines(r)})
    return "once with 4 ranks, once with 2, once with 1."


def _lines(rank: RankResult) -> list[str]:
    return [line for line in rank.shown_lines if line.strip()]


def _judge(world_size: int, printed: dict[int, list[str]]) -> None:
    with_ranks = f"with {world_size} rank{'s' if world_size > 1 else ''}"
    lines = [line for lines in printed.values() for line in lines]
    if not lines:
        raise Wrong(
            f"{with_ranks} nothing was printed.",
            "Rank 0 is the only rank that every run has: ranks count from 0 to world_size - 1. "
            "(A value that is returned is not printed.)",
        )
    if len(lines) > 1:
        who = ", ".join(map(str, printed))
        zero = "" if 0 in printed else " Note that `if rank:` is true for every rank but 0."
        raise Wrong(
            f"{with_ranks} the line was printed {len(lines)} times, by rank {who}.",
            "Each rank is a process of its own that runs the whole function: whatever is not under "
            f"an `if` happens world_size times.{zero}",
        )
    expected = f"hello from {world_size} ranks"
    if lines != [expected] and ("{" in lines[0] or lines[0].lower().strip() == expected):
        raise Wrong(
            f"{with_ranks} the line was {lines[0]!r}, not {expected!r}.",
            "Compare letter by letter. If there are braces in it, the string lacks its f in front.",
        )
    if lines != [expected]:
        raise Wrong(
            f"{with_ranks} the line was {lines[0]!r}, not {expected!r}.",
            "The number of ranks is the launcher's choice: take it from world_size.",
        )
