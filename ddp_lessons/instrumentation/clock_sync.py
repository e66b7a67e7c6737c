"""Measures by how much the clock of each machine is behind rank 0's.

Runs in workers, called by process_groups.py when they join. `time.perf_counter_ns` counts from
another moment on every machine. Rank 0 exchanges small messages with one rank of each other clock,
through the store of the group. The other rank reads its clock within the exchange, near its middle;
so the quickest exchange gives the offset, and its length bounds the error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_lessons.instrumentation.rendezvous import store_of_the_group
from ddp_lessons.system.host import clock_id
from ddp_lessons.wire.messages import Clock

if TYPE_CHECKING:
    import torch.distributed as dist

EXCHANGES = 20  # with each clock; the quickest counts


def against_rank_zero() -> Clock | None:
    """Compare this rank's clock with rank 0's. All ranks of the default group must call it.

    Returns None if they do not within 10 seconds, for example because some ranks do not record.
    """
    import torch.distributed as dist

    try:
        with store_of_the_group("clock") as store:
            return _measured(store, dist.get_rank(), dist.get_world_size())
    except (dist.DistStoreError, RuntimeError):
        return None


def _measured(store: dist.Store, rank: int, world_size: int) -> Clock:
    own = clock_id()
    store.set(f"id/{rank}", own)
    if rank == 0:
        ids = [store.get(f"id/{other}").decode() for other in range(world_size)]
        store.set("ids", json.dumps(ids))
    ids = json.loads(store.get("ids"))
    first = ids.index(own)  # one rank answers for all that share its clock
    if rank == 0:
        for other in _firsts(ids)[1:]:
            store.set(f"clock/{other}", json.dumps(_exchange(store, other)))
    elif rank == first:
        _answer(store, rank)
    return Clock(*json.loads(store.get(f"clock/{first}"))) if first else Clock(0, 0)


def _firsts(ids: Sequence[str]) -> list[int]:
    """The lowest rank of each clock."""
    return [rank for rank, name in enumerate(ids) if ids.index(name) == rank]


def _exchange(store: dist.Store, other: int) -> tuple[int, int]:
    """Rank 0's part: by how many ns the other clock is behind, and the error in ns."""
    tries = []
    for number in range(EXCHANGES):
        before_ns = time.perf_counter_ns()
        store.set(f"ask/{other}/{number}", "")
        other_ns = int(store.get(f"answer/{other}/{number}"))
        after_ns = time.perf_counter_ns()
        tries.append((after_ns - before_ns, (before_ns + after_ns) // 2 - other_ns))
    took_ns, behind_ns = min(tries)
    return behind_ns, took_ns // 2


def _answer(store: dist.Store, rank: int) -> None:
    for number in range(EXCHANGES):
        store.get(f"ask/{rank}/{number}")
        store.set(f"answer/{rank}/{number}", str(time.perf_counter_ns()))
