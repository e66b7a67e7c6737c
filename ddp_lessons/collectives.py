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
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from time import perf_counter_ns
from types import CodeType, FrameType
from typing import Any, NamedTuple

from ddp_lessons import flights, joining, recording, sites
from ddp_lessons.arguments import Args, Kwargs, argument
from ddp_lessons.flights import Flight
from ddp_lessons.groups import Group, groups
from ddp_lessons.recording import Recorder, inside
from ddp_lessons.signatures import COLLECTIVES, ISSUED, RECVS, SAYS_NOTHING, SENDS, Call
from ddp_lessons.tape import Facts
from ddp_lessons.torch_api import public

MOST_PLANS = 10_000  # kept; code that is made in a loop must not fill the memory


class Plan(NamedTuple):
    """What a call in the default group writes when the same line makes it again.

    Forgotten when groups are made or left.
    """

    tail: bytes
    group: Group
    code: CodeType  # kept, so that its id stays its own


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
    _replace("destroy_process_group", joining.leaving)
    _replace("set_timeout", joining.setting_a_timeout)
    for name, tensor in {**COLLECTIVES, **SENDS, **RECVS}.items():
        _replace(name, functools.partial(_recorded, tensor=tensor))
    _replace("batch_isend_irecv", _batched)
    dist.Work.wait = flights.waiting(dist.Work.wait)


def _replace(name: str, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public function where learners import it from, and where torch defines it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if (function := public(name)) is None:
        return
    wrapped = make(name, function)
    for module in (dist, distributed_c10d):
        if getattr(module, name, None) is function:
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
    from torch import Tensor

    call = Call(name, function, tensor)
    place, fewest, most = call.tensor_place, call.fewest, call.most

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        # A rank that has waited for others has cold caches, so each function that is called on the
        # way takes half a microsecond and more. Hence few of them, and what is planned before.
        recorder = recording._recorder
        thread = get_ident()
        if recorder is None or thread in inside:
            return function(*args, **kwargs)
        t0_ns = perf_counter_ns()
        frame = sys._getframe(1)
        key = None
        if fewest <= len(args) <= most and (not kwargs or kwargs.keys() <= SAYS_NOTHING):
            measured = args[place]
            if isinstance(measured, Tensor):
                line = id(frame.f_code), frame.f_lasti
                key = name, line, measured.shape, measured.dtype, thread
        plan = recorder.plans.get(key)
        if plan is None:
            return unplanned(recorder, t0_ns, frame, key, args, kwargs)
        tail, group, _ = plan
        tape = recorder.tape
        seq = next(group.collectives)
        slot = tape.write(tail, t0_ns, recorder.step, seq)
        inside.add(thread)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            tape.fail(slot)
            if isinstance(error, Exception):
                group.take_back(seq)
            raise
        finally:
            inside.remove(thread)
            tape.end(slot, perf_counter_ns())

    def unplanned(
        recorder: Recorder, t0_ns: int, frame: FrameType, key: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        group = call.group(args, kwargs)
        site = recorder.sites.of(frame)
        facts = call.facts(group, args, kwargs, recorder.rank, site)
        if call.timeout_place is not None:
            recorder.gives_up(argument(args, kwargs, call.timeout_place, "timeout"))
        on = call.device(group, args, kwargs) if groups.any_streamed else None
        try:
            if call.is_asynchronous(args, kwargs) or on is not None:
                return flights.issued(recorder, t0_ns, facts, group, on, function, args, kwargs)
            if key is not None and sites.is_in(site, frame):
                _plan(recorder, key, group, facts, frame.f_code)
            thread = get_ident()
            slot = recorder.begin("comm", name, t0_ns, facts)
            inside.add(thread)
            try:
                result = function(*args, **kwargs)
                if call.receives and facts.peer < 0 and group is not None:
                    flights.received(recorder, group, result, slot)
                return result
            except BaseException:
                recorder.tape.fail(slot)
                raise
            finally:
                inside.remove(thread)
                recorder.end(slot)
        except Exception:
            call.take_back(group, facts, recorder.rank)
            raise

    return recorded


def _plan(recorder: Recorder, key: Any, group: Group | None, facts: Facts, code: CodeType) -> None:
    """Keep what a synchronous call will write when the same line makes it again."""
    if group is not None and not group.streamed and len(recorder.plans) < MOST_PLANS:
        tail = recorder.tape.tail(recorder.lane(), "comm", facts.op or "", facts)
        recorder.plans[key] = Plan(tail, group, code)


def _batched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def batched(p2p_op_list: Any) -> Any:
        recorder = recording.outermost()
        if recorder is None:
            return function(p2p_op_list)
        t0_ns = time.perf_counter_ns()
        site = recorder.sites.of(sys._getframe(1))
        slot = recorder.begin("issue", name, t0_ns, Facts(name, site=site))
        started = [_start(recorder, t0_ns, op, site) for op in _p2p_ops(p2p_op_list)]
        works: Sequence[Any] = ()
        thread = get_ident()
        inside.add(thread)
        try:
            works = function(p2p_op_list)
            return works
        except Exception:
            for flight in reversed(started):
                calls[flight.facts.op].take_back(flight.group, flight.facts, recorder.rank)
            raise
        finally:
            inside.remove(thread)
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
