"""Ranks of scripts as their records tell of them, made by hand: what became of each is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ddp_lessons import Run, recorded_run
from ddp_lessons.recorded_run import RankFiles
from ddp_lessons.wire.records import Span

SCRIPT = "/home/learner/train.py"
SECOND = 1_000_000_000
C10D = "/site-packages/torch/distributed/distributed_c10d.py"
CLOSED = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:25675."
TIMED_OUT = "RuntimeError: [unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"


def call(rank: int, op: str, seq: int, line: int = 7, **facts: Any) -> Span:
    """A collective in the world, a second long, or one that never ended (`open=True`)."""
    t0_ns = (seq + 1) * SECOND
    t1_ns = None if facts.pop("open", False) else t0_ns + SECOND
    site = f"{SCRIPT}:{line}"
    return Span(rank, "main", "comm", op, t0_ns, t1_ns, None, op, "world", seq, site=site, **facts)


def made(rank: int, *ops: str, open: bool = False) -> list[Span]:
    """So many collectives, one a line from line 7 on; of those that are open, the last."""
    last = len(ops) - 1
    return [call(rank, op, seq, 7 + seq, open=open and seq == last) for seq, op in enumerate(ops)]


def record(
    spans: Sequence[Span],
    rank: int,
    world_size: int,
    *,
    raised: dict[str, Any] | None = None,
    returned: bool = False,
    alive: bool = False,
    told: str = "",
    node: int = 0,
    host: str = "host0",
) -> RankFiles:
    """What a rank left: its spans, and how it ended, if it had time to write that."""
    began = {
        "script": "train.py",
        "rank": rank,
        "world_size": world_size,
        "group_rank": node,
        "host": host,
        "t_ns": 0,
        "pid": 100 + rank,
    }
    ended_ns = None if raised is None and not returned else 20 * SECOND
    return RankFiles(began, 0, raised, ended_ns, alive, list(spans), 0, told)


def error(text: str, line: int, op: str | None = None) -> dict[str, Any]:
    """An exception at a line of the script, or in a call of torch.distributed there."""
    frames = [frame(SCRIPT, line, "<module>"), *([frame(C10D, 1, op)] if op else [])]
    kind = text.partition(":")[0]
    return {"type_name": kind, "text": text, "frames": frames, "previous": None, "link": ""}


def frame(filename: str, lineno: int, function: str) -> dict[str, Any]:
    return {"filename": filename, "lineno": lineno, "function": function, "source": ""}


def lost(spans: Sequence[Span], rank: int, world_size: int, **facts: Any) -> RankFiles:
    """A rank whose last call failed because another rank was gone."""
    *before, last = spans
    broken = last._replace(failed=True)
    line = int((last.site or "").rpartition(":")[2])
    raised = error(CLOSED, line, last.op)
    return record([*before, broken], rank, world_size, raised=raised, **facts)


def run_of(records: Iterable[RankFiles]) -> Run:
    """What load_run makes of them."""
    return recorded_run._run(list(records))
