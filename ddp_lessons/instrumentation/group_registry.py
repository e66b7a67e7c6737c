"""Names the process groups of a worker, and numbers the calls in each.

Runs in workers, used by all modules that record calls. A group has the same name on all its ranks,
and equal (name, number) on two ranks is the same collective.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ddp_lessons.instrumentation import cuda_events, recording
from ddp_lessons.wire import losses
from ddp_lessons.wire.ops import OWN_WORLD

if TYPE_CHECKING:
    import torch.distributed as dist

LONGEST_DESCRIPTION = 50  # characters: the name stands in sentences and pictures


Pair = tuple[int, int, int]  # sender, receiver and tag


class Group:
    """What the recorder knows of one process group: its name, and how many calls it has seen."""

    def __init__(
        self, process_group: Callable[[], dist.ProcessGroup | None], name: str, ranks: Sequence[int]
    ) -> None:
        self.process_group = process_group  # a weak reference
        self.name = name
        self.ranks = ranks
        self.streamed = False  # calls on CUDA tensors return before the work is done
        self.collectives = itertools.count()  # next() of it is atomic
        self.pairs: defaultdict[Pair, Iterator[int]] = defaultdict(itertools.count)

    def next(self, pair: Pair | None = None) -> int:
        """The number of the next call; sends and recvs count for each pair."""
        return next(self.collectives if pair is None else self.pairs[pair])

    def take_back(self, seq: int, error: Exception, pair: Pair | None = None) -> None:
        """Give the number of a call that failed to the next one.

        Not if it failed as another rank did not come, or was gone: others count it, too.
        """
        if losses.is_loss(str(error)):
            return
        if pair is None:
            self.collectives = itertools.count(seq)
        else:
            self.pairs[pair] = itertools.count(seq)


class Groups:
    """The groups of this process. All members give a group the same name."""

    def __init__(self) -> None:
        self._known: dict[int, Group] = {}
        self._names: Counter[str] = Counter()
        self.any_streamed = False
        self.world: Group | None = None  # of the default group, while there is one

    def update_world(self) -> None:
        """Look up the default group again, after groups were made or left."""
        self.world = self.of(default_group())

    def of(self, group: object) -> Group | None:
        """The record of a process group; None if `group` is no group that this rank is in."""
        known = self._known.get(id(group))
        return known if known is not None and known.process_group() is group else self._add(group)

    def _add(self, group: object) -> Group | None:
        import torch.distributed as dist

        if not isinstance(group, dist.ProcessGroup):
            return None
        try:
            ranks = dist.get_process_group_ranks(group)
        except (KeyError, ValueError):  # it was destroyed
            return None
        if dist.get_rank() not in ranks:
            return None
        name = "world" if group is dist.GroupMember.WORLD else f"ranks {_ranges(ranks)}"
        description = getattr(group, "group_desc", "")[:LONGEST_DESCRIPTION]
        if name != "world" and description not in ("", "undefined"):
            name = f"{description}: {name}"
        if (own := _own_world()) is not None:
            name = own if name == "world" else f"{name} in {own}"
        self._names[name] += 1
        if self._names[name] > 1:
            name += f" #{self._names[name]}"
        known = self._known[id(group)] = Group(weakref.ref(group), name, ranks)
        known.streamed = cuda_events.is_streamed(group)
        self.any_streamed = self.any_streamed or known.streamed
        return known


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks as text: 0 2 5-7."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return " ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else " ".join(map(str, p)) for p in parts)


def _own_world() -> str | None:
    """The name of a default group that does not hold just the ranks that were started; else None.

    Such a group arises when, say, three ranks were started and two of them join with world_size=2.
    """
    import torch.distributed as dist

    recorder = recording.current()
    if recorder is None or (dist.get_rank(), dist.get_world_size()) == (
        recorder.rank,
        recorder.world_size,
    ):
        return None
    return f"{OWN_WORLD} {recorder.rank}"


def default_group() -> dist.ProcessGroup | None:
    """The group that a call without `group` means; None before there is one."""
    import torch.distributed as dist

    return dist.GroupMember.WORLD


groups = Groups()
