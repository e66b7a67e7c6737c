"""Records functional collectives: those of DTensor, tensor parallelism and compiled regions.

Runs in workers; install.py puts it in place. They are operators, torch.ops._c10d_functional.*, that
return new tensors at once; wait_tensor waits for the work. What Python calls when it calls an
operator is wrapped, so calls of generated Python code are seen, too; those that a compiler puts
into C++ are not.

A call has the spans of asynchronous work (async_work.py). Nothing tells when such work is done: it
counts as in flight until its rank has waited for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch
from torch.distributed.distributed_c10d import _resolve_process_group

from ddp_lessons.instrumentation import async_work, cuda_events, recording
from ddp_lessons.instrumentation.async_work import AsyncWork
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.instrumentation.signatures import Args, Kwargs, argument, describe_tensors
from ddp_lessons.wire.records import Kind
from ddp_lessons.wire.span_buffer import CallFacts

_ISSUED = (
    "all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_gather_into_tensor_out",
    "all_reduce", "all_reduce_", "all_reduce_coalesced", "all_reduce_coalesced_",
    "all_to_all_single", "broadcast", "broadcast_",
    "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced", "reduce_scatter_tensor_out",
)  # fmt: skip
# Work that was not waited for, by the storage of its result, as torch itself finds it.
_in_flight: dict[int, AsyncWork] = {}


def record_functional() -> None:
    """Have all functional collectives recorded that this process will call from Python."""
    for operators in (torch.ops._c10d_functional, torch.ops._c10d_functional_autograd):
        for name in _ISSUED:
            _wrap(operators, name, _issuing)
    _wrap(torch.ops._dtensor, "shard_dim_alltoall", _returning_when_done)
    _wrap(torch.ops._c10d_functional, "wait_tensor", _waiting)


def _wrap(operators: Any, name: str, recorded: Callable[..., Any]) -> None:
    """Wrap what `operators.NAME` and `operators.NAME.default` call, if this release has them."""
    if (packet := getattr(operators, name, None)) is not None:
        facts_of = _Facts(packet)
        for handle in (packet, packet.default):
            handle._op = recorded(handle._op, facts_of)


def _issuing(operator: Callable[..., Any], facts_of: _Facts) -> Callable[..., Any]:
    """Wrap an operator that returns before its work is done."""

    def issued(*args: Any, **kwargs: Any) -> Any:
        t0_ns = perf_counter_ns()
        recorder = recording.outermost()
        group = facts_of.group(args, kwargs) if recorder is not None else None
        if recorder is None or group is None:
            return operator(*args, **kwargs)
        facts = facts_of(group, args, kwargs, recorder.sites.of(sys._getframe().f_back))
        on = cuda_events.of(facts_of.tensors(args, kwargs)) if group.streamed else None
        work = AsyncWork(recorder, t0_ns, facts, group, on)
        slot = recorder.begin(Kind.ISSUE, facts.op or "work", t0_ns, facts)
        try:
            result = operator(*args, **kwargs)
        except BaseException as error:
            recorder.fail(slot, error)
            work.done()
            if isinstance(error, Exception):
                group.take_back(facts.seq, error)
            raise
        finally:
            recorder.end(slot)
        for tensor in _list(result):
            _in_flight[_storage(tensor)] = work
        return result

    return issued


def _waiting(operator: Callable[..., Any], facts_of: _Facts) -> Callable[..., Any]:
    """Wrap wait_tensor: record the wait, and that the work is done."""

    def waited(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.outermost()
        tensors = facts_of.tensors(args, kwargs) if recorder is not None else []
        work = _in_flight.pop(_storage(tensors[0]), None) if tensors else None
        if recorder is None or work is None:
            return operator(*args, **kwargs)
        site = recorder.sites.of(sys._getframe().f_back)
        return async_work.waited_for(recorder, [work], site, lambda: operator(*args, **kwargs))

    return waited


def _returning_when_done(operator: Callable[..., Any], facts_of: _Facts) -> Callable[..., Any]:
    """Wrap an operator that waits for its own work."""

    def done(*args: Any, **kwargs: Any) -> Any:
        t0_ns = perf_counter_ns()
        recorder = recording.outermost()
        group = facts_of.group(args, kwargs) if recorder is not None else None
        if recorder is None or group is None or group.streamed:
            return operator(*args, **kwargs)
        facts = facts_of(group, args, kwargs, recorder.sites.of(sys._getframe().f_back))
        with recorder.call(facts.op or "work", t0_ns, facts):
            return operator(*args, **kwargs)

    return done


class _Facts:
    """Reads the arguments of one operator. Called, it gives the facts of a call, and its number."""

    def __init__(self, operator: Any) -> None:
        # all_reduce_ writes into its input, and the ones that end in _out into another tensor.
        self._op = operator.__name__.removesuffix("_out").rstrip("_")
        names = [argument.name for argument in operator.default._schema.arguments]
        self._places = {name: place for place, name in enumerate(names)}
        self._tensor = names[0]

    def __call__(self, group: Group, args: Args, kwargs: Kwargs, site: str | None) -> CallFacts:
        tensors = self.tensors(args, kwargs)
        nbytes, look = describe_tensors(tensors if len(tensors) > 1 else tensors[0])
        if self._op.startswith("reduce_scatter"):
            nbytes //= len(group.ranks)  # one rank's piece
        root = self._argument(args, kwargs, "src")
        peer = -1 if root is None else group.ranks[root]
        return CallFacts(self._op, group.name, group.next(), nbytes, -1, peer, look, site)

    def group(self, args: Args, kwargs: Kwargs) -> Group | None:
        """The group of a call; None if this rank only traces it, or torch will refuse it."""
        given = self._argument(args, kwargs, "group_name")
        if not self.tensors(args, kwargs):
            return None
        if isinstance(given, str):
            try:
                given = _resolve_process_group(given)
            except (LookupError, RuntimeError):
                return None
        return groups.of(given)

    def tensors(self, args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
        """The tensors that are sent; none while a compiler or a subclass traces the call."""
        tensors = _list(self._argument(args, kwargs, self._tensor))
        traced = torch._C._len_torch_dispatch_stack() or not all(map(_is_plain, tensors))
        return [] if traced else tensors

    def _argument(self, args: Args, kwargs: Kwargs, name: str) -> Any:
        return argument(args, kwargs, self._places.get(name, len(args)), name)


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(
        tensor
    )


def _list(tensors: Any) -> list[Any]:
    return list(tensors) if isinstance(tensors, list | tuple) else [tensors]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
