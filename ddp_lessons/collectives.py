"""The calls of torch.distributed mark themselves: each becomes spans with group, number and bytes.

Runs in workers. The public functions are replaced where learners import them from, before the
learner's function is unpickled; without a recorder the replacements only call. A call's spans:

    sync           comm on the thread's lane
    asynchronous   issue on the thread's lane, comm on lane "comm" until it is done, and
                   wait on the lane of the thread that waits for it
    NCCL           issue on the thread's lane, comm on lane "cuda" with the device's times

`seq` counts the calls in a group, so equal (group, seq) on two ranks is one collective. What C++
calls by itself is not seen: DDP's all_reduces (but see buckets.py) and functional collectives.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ddp_lessons import device, flights, joining, recording, sites, tensors
from ddp_lessons.arguments import Args, Kwargs, argument
from ddp_lessons.flights import Flight
from ddp_lessons.groups import Group, default_group, groups
from ddp_lessons.recording import Recorder, inside
from ddp_lessons.tape import Facts

# The public functions, and the parameter whose bytes count as one rank's piece.
COLLECTIVES = {
    "all_gather": "tensor",
    "all_gather_coalesced": "input_tensor_list",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_object": "",
    "all_gather_single": "input_tensor",
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "barrier": "",
    "broadcast": "tensor",
    "broadcast_object_list": "",
    "gather": "tensor",
    "gather_object": "",
    "monitored_barrier": "",
    "reduce": "tensor",
    "reduce_scatter": "output",
    "reduce_scatter_single": "output",
    "reduce_scatter_tensor": "output",
    "scatter": "tensor",
    "scatter_object_list": "",
}
SENDS = {"send": "tensor", "isend": "tensor", "send_object_list": ""}
RECVS = {"recv": "tensor", "irecv": "tensor", "recv_object_list": ""}
ISSUED = ("irecv", "isend")  # they return before the work is done


class Call:
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
        self.sends, self.receives = name in SENDS, name in RECVS
        self.pairwise = self.sends or self.receives
        self.always_asynchronous = name in ISSUED
        self.of_objects = "object" in name
        self.timeout_place = places.get("timeout")

    def is_asynchronous(self, args: Args, kwargs: Kwargs) -> bool:
        if self.async_place < len(args):
            return bool(args[self.async_place])
        return self.always_asynchronous or bool(kwargs.get("async_op"))

    def group(self, args: Args, kwargs: Kwargs) -> Group | None:
        """The group in which it is called; None if this rank is not in it."""
        process_group = argument(args, kwargs, self.group_place, "group")
        if process_group is None:
            return groups.world or groups.of(default_group())
        return groups.of(process_group)

    def facts(
        self, group: Group | None, args: Args, kwargs: Kwargs, rank: int, site: str | None
    ) -> Facts:
        """What the spans of this call say. It counts from here."""
        nbytes, tensor = tensors.look(argument(args, kwargs, self.tensor_place, self.tensor))
        if group is None:
            return Facts(self.name, nbytes=nbytes, tensor=tensor, site=site)
        peer = self._peer(group, args, kwargs) if self.peer else -1
        if not self.pairwise:
            seq = next(group.collectives)
        elif peer < 0:  # a recv from whoever sends first
            seq = -1
        else:
            seq = group.next(self._pair(rank, peer))
        return Facts(self.name, group.name, seq, nbytes, -1, peer, tensor, site)

    def take_back(self, group: Group | None, facts: Facts, rank: int) -> None:
        """It failed and does not count: it has not met the others, or broken the group for good.

        Only a call of objects may meet the others and then fail to unpickle what they sent.
        """
        if group is not None and facts.seq >= 0 and not self.of_objects:
            group.take_back(facts.seq, self._pair(rank, facts.peer) if self.pairwise else None)

    def device(self, group: Group | None, args: Args, kwargs: Kwargs) -> Any:
        """The GPU in whose stream the work will be done; None if the call does it itself."""
        if group is None or not group.streamed:
            return None
        return device.of(argument(args, kwargs, self.tensor_place, self.tensor))

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

    def _pair(self, rank: int, peer: int) -> tuple[int, int]:
        """Sender and receiver."""
        return (rank, peer) if self.sends else (peer, rank)


@functools.cache
def wrap_torch() -> None:
    """Wrap the public calls of torch.distributed, once in a process.

    The forkserver does it for all workers that it forks; without a recorder the wrappers only call.
    """
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_post_hook

    # DDP's own all-reduces are C++ calls that nothing here sees; a step of the optimizer is seen.
    register_optimizer_step_post_hook(_stepped)
    keep_groups_of_ddp()
    _replace("init_process_group", joining.joining)
    for name in joining.MAKES_GROUP:
        _replace(name, joining.making)
    _replace("destroy_process_group", joining.recorded)
    for name, tensor in {**COLLECTIVES, **SENDS, **RECVS}.items():
        _replace(name, functools.partial(_recorded, tensor=tensor))
    _replace("batch_isend_irecv", _batched)
    dist.Work.wait = flights.waiting(dist.Work.wait)


def _replace(name: str, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public function where learners import it from, and where torch defines it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if hasattr(distributed_c10d, name):
        wrapped = make(name, getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, wrapped)


def replace_in(names: dict[str, Any]) -> None:
    """Replace what a script has imported by name before us, from torch.distributed."""
    import torch.distributed as dist

    for name, function in list(names.items()):
        wrapped = getattr(dist, getattr(function, "__name__", ""), None)
        if wrapped is not None and getattr(wrapped, "__wrapped__", None) is function:
            names[name] = wrapped


def _stepped(optimizer: Any, *_: Any) -> None:
    if (recorder := recording.current()) is not None:
        recorder.optimizer_stepped(optimizer)


def keep_groups_of_ddp() -> None:
    """Keep the process group of a DDP model until the worker ends or joins anew.

    DDP's reducer, in C++, owns a share of its group. If the model is freed after
    destroy_process_group, as at the end of most functions, that share is the last: the group's
    destructor waits for gloo's threads while it holds the interpreter's lock, which such a thread
    may want. Plain torch 2.13 hung so in 7 of 40 runs (pytorch issue 56297). A share of ours keeps
    the reducer's from being the last, and is given up without the lock.
    """
    from torch.nn.parallel import DistributedDataParallel

    # Not __init__ itself: what that warns of should name the learner's line, not one of ours.
    help_init = DistributedDataParallel._ddp_init_helper

    @functools.wraps(help_init)
    def help_init_and_keep(self: Any, *args: Any, **kwargs: Any) -> None:
        help_init(self, *args, **kwargs)
        if (recorder := recording.current()) is not None:
            recorder.groups.append(self.process_group)
            recorder.models.append(weakref.ref(self))

    DistributedDataParallel._ddp_init_helper = help_init_and_keep


def release_groups_of_ddp(recorder: Recorder) -> None:
    """Give up those groups at the end of a script, before the interpreter shuts down.

    A thread of gloo that wants the interpreter's lock after that ends the process with SIGABRT. The
    reducers' shares go first, so that none of them is the last.
    """
    for model in filter(None, (known() for known in recorder.models)):
        for part in ("reducer", "logger"):  # the logger shares the reducer
            vars(model).pop(part, None)
    recorder.models.clear()
    recorder.groups.clear()


def _recorded(name: str, function: Callable[..., Any], tensor: str) -> Callable[..., Any]:
    call = Call(name, function, tensor)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.outermost()
        if recorder is None:
            return function(*args, **kwargs)
        t0_ns = time.perf_counter_ns()
        group = call.group(args, kwargs)
        site = sites.of(sys._getframe(1))
        facts = call.facts(group, args, kwargs, recorder.rank, site)
        if call.timeout_place is not None:
            recorder.gives_up(argument(args, kwargs, call.timeout_place, "timeout"))
        on = call.device(group, args, kwargs) if groups.any_streamed else None
        try:
            if call.is_asynchronous(args, kwargs) or on is not None:
                return flights.issued(recorder, t0_ns, facts, group, on, function, args, kwargs)
            slot = recorder.begin("comm", name, t0_ns, facts)
            inside.call = True
            try:
                result = function(*args, **kwargs)
                if call.receives and facts.peer < 0 and group is not None:
                    flights.received(recorder, group, result, slot)
                return result
            except BaseException:
                recorder.tape.fail(slot)
                raise
            finally:
                inside.call = False
                recorder.end(slot)
        except Exception:
            call.take_back(group, facts, recorder.rank)
            raise

    return recorded


def _batched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def batched(p2p_op_list: Any) -> Any:
        recorder = recording.outermost()
        if recorder is None:
            return function(p2p_op_list)
        t0_ns = time.perf_counter_ns()
        site = sites.of(sys._getframe(1))
        slot = recorder.begin("issue", name, t0_ns, Facts(name, site=site))
        started = [_start(recorder, t0_ns, op, site) for op in _p2p_ops(p2p_op_list)]
        works: Sequence[Any] = ()
        inside.call = True
        try:
            works = function(p2p_op_list)
            return works
        except Exception:
            for flight in reversed(started):
                calls[flight.facts.op].take_back(flight.group, flight.facts, recorder.rank)
            raise
        finally:
            inside.call = False
            for place, flight in enumerate(started):  # NCCL returns one work for all of them
                flight.carry(works[min(place, len(works) - 1)] if works else None)
            recorder.end(slot)

    def _start(recorder: Recorder, t0_ns: int, op: Any, site: str | None) -> Flight:
        call = calls[op.op.__name__]
        arguments = {"tensor": op.tensor, "group": op.group, call.peer: op.peer}
        group = call.group((), arguments)
        facts = call.facts(group, (), arguments, recorder.rank, site)
        on = call.device(group, (), arguments) if groups.any_streamed else None
        return Flight(recorder, t0_ns, facts, group, on)

    import torch.distributed as dist

    calls: dict[str | None, Call] = {
        name: Call(name, getattr(dist, name), "tensor") for name in ISSUED
    }
    return batched


def _p2p_ops(ops: Any) -> Iterable[Any]:
    import torch.distributed as dist

    known = [op for op in ops if isinstance(op, dist.P2POp)] if isinstance(ops, list) else []
    return [op for op in known if getattr(op.op, "__name__", "") in ISSUED]
