"""Wraps torch.distributed's public functions, so that every call is recorded as spans.

Runs in workers. install.py replaces the functions where learners import them from, before the
learner's function is unpickled; without a recorder the wrappers only call through. A call's spans:

    sync           comm on the thread's lane
    asynchronous   issue on the thread's lane, comm on lane "comm" until it is done, and
                   wait on the lane of the thread that waits for it
    NCCL           issue on the thread's lane, comm on lane "cuda" with the device's times

`seq` counts the calls in a group, so equal (group, seq) on two ranks is one collective. Calls that
DDP makes in C++ count, too (ddp_traffic.py), and functional collectives (functional.py).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from sys import exception
from threading import get_ident
from time import perf_counter_ns
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_lessons.instrumentation import async_work, call_sites, recording
from ddp_lessons.instrumentation.async_work import AsyncWork
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.instrumentation.recording import Recorder, inside
from ddp_lessons.instrumentation.signatures import SAYS_NOTHING, Args, Kwargs, Signature, argument
from ddp_lessons.wire.ops import ISSUED
from ddp_lessons.wire.records import OVERLAPPING, Kind, Mistake
from ddp_lessons.wire.span_buffer import CallFacts

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# Function, line, shape, dtype and thread of a call.
PlanKey = tuple[str, tuple[int, int], "torch.Size", "torch.dtype", int]
MOST_PLANS = 10_000  # kept; code that is generated in a loop must not fill the memory


class Plan(NamedTuple):
    """Cached record of a call site: the fields that do not change when the same line calls again.

    For calls in the default group. Dropped when groups are made or left.
    """

    tail: bytes
    group: Group
    code: CodeType  # kept, so that no other code object gets its id


def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Note progress after an optimizer's step, which may end a training step."""
    from torch.compiler import is_dynamo_compiling

    recorder = recording.current()
    if recorder is not None and not is_dynamo_compiling():
        recorder.optimizer_stepped(optimizer)


def recorded(name: str, function: Callable[..., Any], tensor: str) -> Callable[..., Any]:
    """Wrap a collective, send or recv, whose parameter `tensor` gives the bytes."""
    from torch import Tensor
    from torch.compiler import is_dynamo_compiling

    call = Signature(name, function, tensor)
    place, fewest, most = call.tensor_place, call.fewest, call.most

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        # After a wait a rank's caches are cold, and each Python call here takes half a microsecond
        # or more. So this path makes few calls, and takes the record from a plan.
        if is_dynamo_compiling():  # torch.compile looks through here at torch's own function
            return function(*args, **kwargs)
        recorder = recording._recorder
        thread = get_ident()
        if recorder is None or thread in inside:
            return function(*args, **kwargs)
        t0_ns = perf_counter_ns()
        frame = sys._getframe().f_back  # None where C calls: a handler of atexit, say
        key = None
        if fewest <= len(args) <= most and (not kwargs or kwargs.keys() <= SAYS_NOTHING):
            measured = args[place]
            if isinstance(measured, Tensor) and frame is not None:
                line = id(frame.f_code), frame.f_lasti
                key = name, line, measured.shape, measured.dtype, thread
        plan = recorder.plans.get(key)
        if plan is None or exception() is not None:
            return unplanned(recorder, t0_ns, frame, key, args, kwargs)
        tail, group, _ = plan
        buffer = recorder.buffer
        seq = next(group.collectives)
        slot = buffer.write(tail, t0_ns, recorder.step, seq)
        if t0_ns >= recorder.metered_ns:
            recorder.meter(slot, t0_ns)
        inside.add(thread)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            recorder.fail(slot, error, met=call.of_objects)
            if isinstance(error, Exception):
                group.take_back(seq, error)
            raise
        finally:
            inside.remove(thread)
            buffer.end(slot, perf_counter_ns())

    def unplanned(
        recorder: Recorder,
        t0_ns: int,
        frame: FrameType | None,
        key: PlanKey | None,
        args: Args,
        kwargs: Kwargs,
    ) -> Any:
        group = call.group(args, kwargs)
        site = recorder.sites.of(frame)
        facts = call.facts(group, args, kwargs, recorder.rank, site)
        if (handled := exception()) is not None:
            recorder.handling(site, handled, t0_ns)
            key = None  # the next call at this line may be made for another exception
        if call.timeout_place is not None:
            recorder.gives_up(argument(args, kwargs, call.timeout_place, "timeout"), name)
        on = call.device(group, args, kwargs) if groups.any_streamed else None
        try:
            if call.is_asynchronous(args, kwargs) or on is not None:
                work = AsyncWork(recorder, t0_ns, facts, group, on)
                _watch_handle(call, work, frame, args, kwargs)
                result = async_work.issued(work, t0_ns, function, args, kwargs)
                _check_outputs(call, recorder, args, kwargs, site)
                return result
            if key is not None and frame is not None and call_sites.is_in(site, frame):
                _plan(recorder, key, group, facts, frame.f_code)
            thread = get_ident()
            slot = recorder.begin(Kind.COMM, name, t0_ns, facts)
            inside.add(thread)
            try:
                result = function(*args, **kwargs)
                if call.receives and facts.peer < 0 and group is not None:
                    async_work.received(recorder, group, result, facts.tag, slot)
                _check_outputs(call, recorder, args, kwargs, site)
                return result
            except BaseException as error:
                recorder.fail(slot, error, met=call.of_objects)
                raise
            finally:
                inside.remove(thread)
                recorder.end(slot)
        except Exception as error:
            call.take_back(group, facts, recorder.rank, error)
            raise

    return recorded


def _plan(
    recorder: Recorder, key: PlanKey, group: Group | None, facts: CallFacts, code: CodeType
) -> None:
    """Cache the record of a synchronous call, for when the same line makes it again."""
    if group is not None and not group.streamed and len(recorder.plans) < MOST_PLANS:
        tail = recorder.buffer.tail(recorder.lane(), Kind.COMM, facts.op or "", facts)
        recorder.plans[key] = Plan(tail, group, code)


def _check_outputs(
    call: Signature, recorder: Recorder, args: Args, kwargs: Kwargs, site: str | None
) -> None:
    """Notice that one tensor is to hold the results of several ranks."""
    if call.outputs and site is not None and call.has_overlapping_outputs(args, kwargs):
        recorder.notice(Mistake(OVERLAPPING, call.name, site))


def _watch_handle(
    call: Signature, work: AsyncWork, frame: FrameType | None, args: Args, kwargs: Kwargs
) -> None:
    """Have the handle of asynchronous work watched, if it is a mistake never to use it.

    Not if a library made the call, which may wait for it in C++, or where a stream of a GPU does
    the work, for which `torch.cuda.synchronize` waits, too.
    """
    work.handle_must_be_used = (
        not work.on_gpu_stream
        and work.group is not None
        and call.needs_wait(work.facts.peer, work.recorder.rank)
        and frame is not None
        and call_sites.is_in(work.facts.site, frame)
    )
    if call.sends and work.handle_must_be_used:
        work.sends(argument(args, kwargs, call.tensor_place, call.tensor))


def batched(
    name: str, function: Callable[..., Sequence[dist.Work]]
) -> Callable[..., Sequence[dist.Work]]:
    """Wrap batch_isend_irecv."""

    @functools.wraps(function)
    def batched(p2p_op_list: list[dist.P2POp]) -> Sequence[dist.Work]:
        recorder = recording.outermost()
        if recorder is None:
            return function(p2p_op_list)
        t0_ns = time.perf_counter_ns()
        frame = sys._getframe().f_back
        site = recorder.sites.of(frame)
        slot = recorder.begin(Kind.ISSUE, name, t0_ns, CallFacts(name, site=site))
        started = [_start(recorder, t0_ns, op, site, frame) for op in _p2p_ops(p2p_op_list)]
        works: Sequence[dist.Work] = ()
        thread = get_ident()
        inside.add(thread)
        try:
            works = function(p2p_op_list)
            return works
        except Exception as error:
            for issued in reversed(started):
                calls[issued.facts.op].take_back(issued.group, issued.facts, recorder.rank, error)
            raise
        finally:
            inside.remove(thread)
            for place, issued in enumerate(started):  # NCCL returns one work for all of them
                issued.carry(works[min(place, len(works) - 1)] if works else None)
            recorder.end_issue(slot)

    def _start(
        recorder: Recorder, t0_ns: int, op: dist.P2POp, site: str | None, frame: FrameType | None
    ) -> AsyncWork:
        call = calls[op.op.__name__]
        arguments = {"tensor": op.tensor, "group": op.group, call.peer: op.peer, "tag": op.tag}
        group = call.group((), arguments)
        facts = call.facts(group, (), arguments, recorder.rank, site)
        on = call.device(group, (), arguments) if groups.any_streamed else None
        work = AsyncWork(recorder, t0_ns, facts, group, on)
        _watch_handle(call, work, frame, (), arguments)
        return work

    import torch.distributed as dist

    calls: dict[str | None, Signature] = {
        name: Signature(name, getattr(dist, name), "tensor") for name in ISSUED
    }
    return batched


def _p2p_ops(ops: object) -> Iterable[dist.P2POp]:
    import torch.distributed as dist

    known = [op for op in ops if isinstance(op, dist.P2POp)] if isinstance(ops, list) else []
    return [op for op in known if getattr(op.op, "__name__", "") in ISSUED]
