"""Reads the arguments of torch.distributed's public calls: tensor, group, peer, async_op.

Runs in workers, called by collectives.py, process_groups.py and ddp_traffic.py.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_lessons.instrumentation import cuda_events
from ddp_lessons.instrumentation.group_registry import Group, Pair, default_group, groups
from ddp_lessons.wire.ops import FROM_ROOT, ISSUED, OUTPUTS, RECVS, SENDS, TO_ROOT
from ddp_lessons.wire.span_buffer import CallFacts

if TYPE_CHECKING:
    import torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_MOST = 4096  # descriptions kept; shapes that never repeat must not fill the memory
_known: dict[tuple[torch.Size, torch.dtype], tuple[int, str]] = {}

UNKNOWN = (-1, None)
SAYS_NOTHING = {"op"}  # arguments that no span records


def argument(args: Args, kwargs: Kwargs, place: int, name: str) -> Any:
    """The argument, passed by place or by name; None if it was not passed."""
    return args[place] if place < len(args) else kwargs.get(name)


def describe_tensors(tensors: Any) -> tuple[int, str | None]:
    """The bytes, and dtype and shape as text, of a tensor or of a list; else (-1, None)."""
    try:
        kind = tensors.shape, tensors.dtype
        known = _known.get(kind)
        if known is None:
            known = int(tensors.nbytes), f"{str(kind[1]).rpartition('.')[2]} {tuple(kind[0])}"
            if len(_known) < _MOST:
                _known[kind] = known
        return known
    except (AttributeError, TypeError, RuntimeError):
        pass
    if not isinstance(tensors, list | tuple):
        return UNKNOWN
    parts = [describe_tensors(tensor) for tensor in tensors]
    if not parts or min(nbytes for nbytes, _ in parts) < 0:
        return UNKNOWN
    return sum(nbytes for nbytes, _ in parts), f"{len(parts)} x {parts[0][1]}"


class Signature:
    """How to read the arguments of one public function."""

    def __init__(self, name: str, function: Callable[..., Any], tensor: str) -> None:
        places = {p: i for i, p in enumerate(inspect.signature(function).parameters)}
        self.name = name
        self.tensor, self.tensor_place = tensor, places.get(tensor, 99)
        self.group_place = places["group"]
        self.async_place = places.get("async_op", 99)
        self.peer = next((p for p in ("src", "dst") if p in places), "")
        self.peer_place = places.get(self.peer, 99)
        self.group_peer_place = places.get(f"group_{self.peer}", 99)
        self.tag_place = places.get("tag", 99)
        self.sends, self.receives = name in SENDS, name in RECVS
        self.pairwise = self.sends or self.receives
        self.always_asynchronous = name in ISSUED
        self.of_objects = "object" in name
        self.outputs = OUTPUTS.get(name, "")
        self.outputs_place = places.get(self.outputs, 99)
        self.timeout_place = places.get("timeout")
        # With so many positional arguments and no keyword but SAYS_NOTHING's, a synchronous call in
        # the default group is determined by its line and its tensor. (Never if it names a peer.)
        self.fewest = self.tensor_place + 1
        self.most = 0 if self.peer else min(self.group_place, self.async_place)

    def is_asynchronous(self, args: Args, kwargs: Kwargs) -> bool:
        if self.async_place < len(args):
            return bool(args[self.async_place])
        return self.always_asynchronous or bool(kwargs.get("async_op"))

    def needs_wait(self, peer: int, rank: int) -> bool:
        """Whether a rank must wait for the work: to use its result, or to reuse what it sends.

        A barrier, a root that sends and a rank that sends to the root need not: torch keeps their
        tensors until the work is done.
        """
        if self.name in TO_ROOT:
            return rank == peer
        return self.name != "barrier" and (self.name not in FROM_ROOT or rank != peer)

    def has_overlapping_outputs(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether two of the tensors that the call fills begin at the same place in memory."""
        outputs = argument(args, kwargs, self.outputs_place, self.outputs) or ()
        try:
            each = [t for part in outputs for t in (part if isinstance(part, list) else [part])]
            places = [place for tensor in each if tensor.numel() and (place := tensor.data_ptr())]
        except (AttributeError, TypeError, RuntimeError):  # tensors without memory of their own
            return False
        return len(set(places)) < len(places)

    def group(self, args: Args, kwargs: Kwargs) -> Group | None:
        """The group of the call; None if this rank is not in it."""
        process_group = argument(args, kwargs, self.group_place, "group")
        if process_group is None:
            return groups.world or groups.of(default_group())
        return groups.of(process_group)

    def facts(
        self, group: Group | None, args: Args, kwargs: Kwargs, rank: int, site: str | None
    ) -> CallFacts:
        """The facts that the spans of a call record. The call gets its number here."""
        nbytes, tensor = describe_tensors(argument(args, kwargs, self.tensor_place, self.tensor))
        if group is None:
            return CallFacts(self.name, nbytes=nbytes, tensor=tensor, site=site)
        peer = self._peer(group, args, kwargs) if self.peer else -1
        tag = self._tag(group, args, kwargs) if self.pairwise else 0
        if not self.pairwise:
            seq = next(group.collectives)
        elif peer < 0:  # a recv from whoever sends first
            seq = -1
        else:
            seq = group.next(self._pair(rank, peer, tag))
        return CallFacts(self.name, group.name, seq, nbytes, -1, peer, tensor, site, tag)

    def take_back(self, group: Group | None, facts: CallFacts, rank: int, error: Exception) -> None:
        """Free the number of a call that failed before it met another rank.

        Only an object collective may meet the others and then fail to unpickle what they sent.
        """
        if group is not None and facts.seq >= 0 and not self.of_objects:
            pair = self._pair(rank, facts.peer, facts.tag) if self.pairwise else None
            group.take_back(facts.seq, error, pair)

    def device(self, group: Group | None, args: Args, kwargs: Kwargs) -> torch.device | None:
        """The GPU whose stream will do the work; None if the call does it itself."""
        if group is None or not group.streamed:
            return None
        return cuda_events.of(argument(args, kwargs, self.tensor_place, self.tensor))

    def _peer(self, group: Group, args: Args, kwargs: Kwargs) -> int:
        peer = argument(args, kwargs, self.peer_place, self.peer)
        if peer is None:
            place = argument(args, kwargs, self.group_peer_place, f"group_{self.peer}")
            if isinstance(place, int) and 0 <= place < len(group.ranks):
                peer = group.ranks[place]
            elif not self.pairwise:
                peer = group.ranks[0]
        try:
            number = operator.index(peer)
        except TypeError:
            return -1
        return number if number in group.ranks else -1

    def _tag(self, group: Group, args: Args, kwargs: Kwargs) -> int:
        """The tag by which a send finds its recv; 0 where the backend has none, as NCCL."""
        tag = argument(args, kwargs, self.tag_place, "tag")
        return tag if isinstance(tag, int) and 0 <= tag < 1 << 31 and not group.streamed else 0

    def _pair(self, rank: int, peer: int, tag: int) -> Pair:
        return (rank, peer, tag) if self.sends else (peer, rank, tag)
