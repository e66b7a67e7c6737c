"""Records what DistributedDataParallel sends by itself: buckets, buffers and its own checks.

Runs in workers; install.py puts it in place. DDP communicates in C++, where no wrapped public
function sees it. So a model's reducer gets a process group of ours, which passes every call on to
the real one and records it. DDP sees no communication hook, and its arithmetic stays the same to
the last bit. Two C++ functions that wait by themselves are wrapped like the public ones.

With NCCL a stream of the GPU does the work; CUDA events tell when (cuda_events.py). Not recorded:
DDP with other backends, and what a learner's own hook sends other than by public functions.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.instrumentation import async_work, cuda_events, recording
from ddp_lessons.instrumentation.async_work import AsyncWork
from ddp_lessons.instrumentation.backward import Backward, Turns
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.signatures import argument, describe_tensors
from ddp_lessons.instrumentation.torch_api import NCCL
from ddp_lessons.text import listed
from ddp_lessons.wire.span_buffer import CallFacts

_GLOO, _NCCL = dist.ProcessGroup.BackendType.GLOO, dist.ProcessGroup.BackendType.NCCL
_KINDS = {"gloo": _GLOO, **dict.fromkeys(NCCL, _NCCL)}  # of the backends that are recorded


def record_ddp() -> None:
    """Have all models that this process will wrap in DDP record what they send."""
    # Not __init__ itself: its warnings should name the learner's line, not one of ours.
    DistributedDataParallel._ddp_init_helper = _keeping(DistributedDataParallel._ddp_init_helper)
    # With `join`, a rank that has run out of data makes the same calls as the others' reducers.
    unused = DistributedDataParallel._match_unused_params_allreduce
    DistributedDataParallel._match_unused_params_allreduce = _by_recorded_group(unused)
    _wrap("_verify_params_across_processes", "DistributedDataParallel")
    _wrap("_broadcast_coalesced", "broadcast")


def release_groups(recorder: Recorder) -> None:
    """Release the groups of DDP models at a script's end, before the interpreter shuts down.

    A thread of gloo that wants the GIL after that ends the process with SIGABRT. The reducers'
    references go first, so that none of them is the last.
    """
    for model in filter(None, (known() for known in recorder.models)):
        for part in ("reducer", "logger"):  # the logger shares the reducer
            vars(model).pop(part, None)
    recorder.models.clear()
    recorder.groups.clear()


def _keeping(help_init: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_ddp_init_helper`, which makes the reducer: record its calls, and keep its group.

    The reducer, in C++, owns a reference to its group. If the model is freed after
    destroy_process_group, as at the end of most functions, that reference is the last: the group's
    destructor waits for gloo's threads while it holds the GIL, which such a thread may want. Plain
    torch 2.13 hung this way in 7 of 40 runs (pytorch issue 56297). A reference of ours keeps the
    reducer's from being the last, and is released without the GIL.
    """
    made_by_recorded_group = _by_recorded_group(help_init)

    @functools.wraps(help_init)
    def help_init_and_keep(
        self: DistributedDataParallel,
        parameters: Iterable[torch.nn.Parameter],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if (recorder := recording.current()) is not None:
            recorder.groups.append(self.process_group)
            recorder.models.append(weakref.ref(self))
            group = groups.of(self.process_group)
            backends = set(cuda_events.backends_of(self.process_group).values())
            if group is not None and not backends <= _KINDS.keys():
                recorder.unseen(f"DDP over {listed(sorted(backends - _KINDS.keys()))}")
            elif group is not None:
                elements = sum(parameter.numel() for parameter in parameters)
                recorder.groups.append(RecordedGroup(self, group, recorder, elements))
        made_by_recorded_group(self, parameters, *args, **kwargs)

    return help_init_and_keep


def _by_recorded_group(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of DDP so that it uses the group that records instead of the model's."""

    @functools.wraps(method)
    def by_recorded_group(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        recorded = _group_of(self)
        if recorded is None:
            return method(self, *args, **kwargs)
        self.process_group = recorded
        try:
            return method(self, *args, **kwargs)
        finally:
            self.process_group = recorded.real

    return by_recorded_group


def _group_of(model: DistributedDataParallel) -> RecordedGroup | None:
    recorder = recording.current()
    for group in recorder.groups if recorder is not None else ():
        if isinstance(group, RecordedGroup) and group.model() is model:
            return group
    return None


class RecordedGroup(dist.ProcessGroup):  # type: ignore[misc]
    """The process group that one model's reducer uses: passes calls on to `real` and records them.

    Methods that are not overridden here use the same backends unrecorded. C++ keeps only its half
    of the object; the Python half must live as long, or nothing more is recorded.
    """

    def __init__(
        self, model: DistributedDataParallel, group: Group, recorder: Recorder, elements: int
    ) -> None:
        self.real = real = model.process_group
        super().__init__(real.rank(), real.size())
        kinds = {kind: _KINDS[name] for kind, name in cuda_events.backends_of(real).items()}
        for device in real._device_types:
            self._register_backend(device, kinds[device.type], real._get_backend(device))
        # As torch chooses it for a group of several backends.
        self._set_default_backend(_NCCL if _NCCL in kinds.values() else _GLOO)
        self._set_group_name(real.group_name)
        self.model = weakref.ref(model)
        self._group = group
        self._backward = Backward(recorder, group)
        self._turns = Turns(elements)

    def getBackendName(self) -> str:
        """The name that DDP writes in its logging data."""
        return str(self.real.name())

    def allreduce(
        self, tensors: torch.Tensor | list[torch.Tensor], *options: dist.AllreduceOptions
    ) -> dist.Work:
        """Sum a bucket of gradients, or find out which parameters any rank has used.

        C++ calls it with a list of one tensor and options, Python with the tensor alone.
        """
        t0_ns = time.perf_counter_ns()
        recorder = recording.outermost()
        if recorder is None or (self._group.streamed and cuda_events.is_capturing()):
            return self.real.allreduce(tensors, *options)
        piece = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
        index, is_last = -1, False
        if _are_gradients(piece):
            index, is_last = self._turns.next(piece.numel())
        facts = self._facts(recorder, "all_reduce", piece)._replace(bucket=index)
        end = self._backward.begin(index, piece, facts, t0_ns)
        work = _handed_over(lambda: self.real.allreduce(tensors, *options), end)
        if is_last:
            self._backward.all_handed_over()
            _when_reducer_is_done(self._backward.all_arrived)
        return work

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> dist.Work:
        """Rank 0 tells the others how it orders its buckets; the reducer waits for that."""
        t0_ns = time.perf_counter_ns()
        recorder = recording.outermost()
        if recorder is None:
            return self.real.broadcast(tensors, options)
        facts = self._facts(recorder, "broadcast", tensors[0], options.rootRank)
        if (on := cuda_events.of(tensors) if self._group.streamed else None) is not None:
            issued = AsyncWork(recorder, t0_ns, facts, self._group, on)
            return async_work.issued(issued, t0_ns, self.real.broadcast, (tensors, options), {})
        with recorder.call("order of buckets", t0_ns, facts):
            work = self.real.broadcast(tensors, options)
            work.wait()  # here, so that the span ends with it
        return work

    def _facts(
        self, recorder: Recorder, op: str, tensor: torch.Tensor, root: int | None = None
    ) -> CallFacts:
        return _facts(recorder, self._group, op, tensor, root, sys._getframe(1).f_back)


def _when_reducer_is_done(call: Callable[[], None]) -> None:
    """Call when the reducer has waited for all buckets, at the end of the running backward.

    The buckets' own callbacks run in another thread, perhaps late. The reducer is about to queue
    its final callback; a callback that ours queues when it runs comes after that.
    """
    engine = torch.autograd.Variable._execution_engine
    if torch._C._current_graph_task_id() >= 0:  # a rank in `join` runs no backward
        engine.queue_callback(lambda: engine.queue_callback(call))


def _are_gradients(piece: torch.Tensor) -> bool:
    """True for gradients; False for the map of used parameters, which holds integers."""
    return bool(piece.is_floating_point() or piece.is_complex())


def _handed_over(call: Callable[[], dist.Work], end: Callable[[], None]) -> dist.Work:
    """Start work by `call` and return it; call `end` when it is done or has failed."""
    try:
        with recording.within_call():
            work = call()
    except BaseException:
        end()
        raise
    try:
        work.get_future().add_done_callback(lambda _: end())
    except (RuntimeError, NotImplementedError):  # the backend does not tell when it is done
        end()
    return work


def _wrap(name: str, op: str) -> None:
    """Wrap a C++ function that waits for its communication by itself, to record it.

    With NCCL the host waits, too, where the ranks check that they have the same parameters. In a
    broadcast the stream waits, and the function returns at once.
    """
    function = getattr(dist, name)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.outermost()
        group = groups.of(argument(args, kwargs, 0, "process_group")) if recorder else None
        if recorder is None or group is None:
            return function(*args, **kwargs)
        t0_ns = time.perf_counter_ns()
        root, sent = None, None
        if op == "broadcast":
            root = argument(args, kwargs, 3, "src") or 0
            sent = argument(args, kwargs, 1, "tensors")
        facts = _facts(recorder, group, op, sent, root, sys._getframe().f_back)
        if (on := cuda_events.of(sent) if group.streamed else None) is not None:
            issued = AsyncWork(recorder, t0_ns, facts, group, on)
            return async_work.issued(issued, t0_ns, function, args, kwargs)
        name = "DDP's broadcast" if op == "broadcast" else op
        with recorder.call(name, t0_ns, facts):
            return function(*args, **kwargs)

    setattr(dist, name, recorded)


def _facts(
    recorder: Recorder,
    group: Group,
    op: str,
    tensor: torch.Tensor | list[torch.Tensor] | None,
    root: int | None,
    frame: FrameType | None,
) -> CallFacts:
    """The facts of a call, which gets its number here. `root` is a rank in the group."""
    nbytes, look = describe_tensors(tensor)
    peer = -1 if root is None else group.ranks[root]
    site = recorder.sites.of(frame)
    return CallFacts(op, group.name, group.next(), nbytes, -1, peer, look, site)
