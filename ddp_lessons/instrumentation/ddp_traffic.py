"""What DistributedDataParallel sends by itself, recorded: buckets, buffers and its own checks.

Runs in workers. DDP communicates in C++, where no wrapper of a public function sees it. A model's
reducer therefore gets a process group of ours, which hands every call on to the real one and
writes down when. DDP sees no communication hook, and its arithmetic stays the same to the last bit.
Two functions in C++, which wait by themselves, are wrapped as the public ones are.

Not seen is what other backends than gloo do for DDP (but see `watch_ddp`), and what a learner's own
hook does other than by the public functions.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.instrumentation import cuda_events, recording
from ddp_lessons.instrumentation.backward import Backward, Turns
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.signatures import argument, describe_tensors
from ddp_lessons.wire.span_buffer import CallFacts


def record_ddp() -> None:
    """Have all models that this process will wrap in DDP record what they send."""
    # Not __init__ itself: what that warns of should name the learner's line, not one of ours.
    DistributedDataParallel._ddp_init_helper = _keeping(DistributedDataParallel._ddp_init_helper)
    # With `join`, a rank that has run out of data calls the group as the others' reducers do.
    unused = DistributedDataParallel._match_unused_params_allreduce
    DistributedDataParallel._match_unused_params_allreduce = _by_recorded_group(unused)
    _wrap("_verify_params_across_processes", "DistributedDataParallel")
    _wrap("_broadcast_coalesced", "broadcast")


def is_recorded(model: Any) -> bool:
    """Whether the buckets of a DDP model are recorded without a communication hook."""
    return _group_of(model) is not None


def release_groups(recorder: Recorder) -> None:
    """Give up the groups of DDP models at a script's end, before the interpreter shuts down.

    A thread of gloo that wants the interpreter's lock after that ends the process with SIGABRT. The
    reducers' shares go first, so that none of them is the last.
    """
    for model in filter(None, (known() for known in recorder.models)):
        for part in ("reducer", "logger"):  # the logger shares the reducer
            vars(model).pop(part, None)
    recorder.models.clear()
    recorder.groups.clear()


def _keeping(help_init: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_ddp_init_helper`, which makes the reducer: record its calls, and keep its group.

    The reducer, in C++, owns a share of its group. If the model is freed after
    destroy_process_group, as at the end of most functions, that share is the last: the group's
    destructor waits for gloo's threads while it holds the interpreter's lock, which such a thread
    may want. Plain torch 2.13 hung so in 7 of 40 runs (pytorch issue 56297). A share of ours keeps
    the reducer's from being the last, and is given up without the lock.
    """
    made_by_recorded_group = _by_recorded_group(help_init)

    @functools.wraps(help_init)
    def help_init_and_keep(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> None:
        if (recorder := recording.current()) is not None:
            recorder.groups.append(self.process_group)
            recorder.models.append(weakref.ref(self))
            group = groups.of(self.process_group)
            # NCCL's work goes on in a stream of the GPU; what waits for it there is not known here.
            if group is not None and set(cuda_events.backends_of(self.process_group)) == {"gloo"}:
                elements = sum(parameter.numel() for parameter in parameters)
                recorder.groups.append(RecordedGroup(self, group, recorder, elements))
        made_by_recorded_group(self, parameters, *args, **kwargs)

    return help_init_and_keep


def _by_recorded_group(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of DDP that uses the model's group: it uses the one that records."""

    @functools.wraps(method)
    def by_recorded_group(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorded = _group_of(self)
        if recorded is None:
            return method(self, *args, **kwargs)
        self.process_group = recorded
        try:
            return method(self, *args, **kwargs)
        finally:
            self.process_group = recorded.real

    return by_recorded_group


def _group_of(model: Any) -> RecordedGroup | None:
    recorder = recording.current()
    for group in recorder.groups if recorder is not None else ():
        if isinstance(group, RecordedGroup) and group.model() is model:
            return group
    return None


class RecordedGroup(dist.ProcessGroup):  # type: ignore[misc]
    """A process group as the reducer of one model sees it: `real`, with its calls written down.

    What is not overridden here goes to the same backends without being recorded. C++ keeps its own
    half of the object; ours must live as long, or nothing is recorded any more.
    """

    def __init__(self, model: Any, group: Group, recorder: Recorder, elements: int) -> None:
        self.real = real = model.process_group
        super().__init__(real.rank(), real.size())
        gloo = dist.ProcessGroup.BackendType.GLOO
        for kind in real._device_types:
            self._register_backend(kind, gloo, real._get_backend(kind))
        self._set_default_backend(gloo)
        self._set_group_name(real.group_name)
        self.model = weakref.ref(model)
        self._group = group
        self._backward = Backward(recorder)
        self._turns = Turns(elements)

    def getBackendName(self) -> str:
        """The name that DDP writes in its logging data."""
        return str(self.real.name())

    def allreduce(self, tensors: Any, *options: Any) -> Any:
        """Add up a bucket of gradients, or find out which parameters any rank has used.

        C++ calls it with a list of one tensor and options, Python with the tensor alone.
        """
        t0_ns = time.perf_counter_ns()
        recorder = recording.outermost()
        if recorder is None:
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

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        """Rank 0 tells the others how it orders its buckets; the reducer waits for that."""
        t0_ns = time.perf_counter_ns()
        recorder = recording.outermost()
        if recorder is None:
            return self.real.broadcast(tensors, options)
        facts = self._facts(recorder, "broadcast", tensors[0], options.rootRank)
        with recorder.call("order of buckets", t0_ns, facts):
            work = self.real.broadcast(tensors, options)
            work.wait()  # here, where the end is seen
        return work

    def _facts(
        self, recorder: Recorder, op: str, tensor: torch.Tensor, root: int | None = None
    ) -> CallFacts:
        return _facts(recorder, self._group, op, tensor, root, sys._getframe(2))


def _when_reducer_is_done(call: Callable[[], None]) -> None:
    """Call when the reducer has waited for all buckets, at the end of the backward that goes on.

    What tells that a bucket has come is another thread, which may get to it late. The reducer is
    about to queue its own end; what is queued when the engine comes to ours comes after that.
    """
    engine = torch.autograd.Variable._execution_engine
    if torch._C._current_graph_task_id() >= 0:  # not so for a rank that has joined
        engine.queue_callback(lambda: engine.queue_callback(call))


def _are_gradients(piece: torch.Tensor) -> bool:
    """Not the map of used parameters, which is of whole numbers."""
    return bool(piece.is_floating_point() or piece.is_complex())


def _handed_over(call: Callable[[], Any], end: Callable[[], None]) -> Any:
    """Start work by `call` and return it; `end` is called when it is done or has failed."""
    try:
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
    """Record a function of C++ that returns when its communication is done."""
    function = getattr(dist, name)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.outermost()
        group = groups.of(argument(args, kwargs, 0, "process_group")) if recorder else None
        if recorder is None or group is None or group.streamed:
            return function(*args, **kwargs)
        t0_ns = time.perf_counter_ns()
        root, sent = None, None
        if op == "broadcast":
            root = argument(args, kwargs, 3, "src") or 0
            sent = argument(args, kwargs, 1, "tensors")
        facts = _facts(recorder, group, op, sent, root, sys._getframe(1))
        name = "DDP's broadcast" if op == "broadcast" else op
        with recorder.call(name, t0_ns, facts):
            return function(*args, **kwargs)

    setattr(dist, name, recorded)


def _facts(
    recorder: Recorder, group: Group, op: str, tensor: Any, root: int | None, frame: FrameType
) -> CallFacts:
    """What the span of a call says; the call counts from here. `root` is a rank in the group."""
    nbytes, look = describe_tensors(tensor)
    peer = -1 if root is None else group.ranks[root]
    site = recorder.sites.of(frame)
    return CallFacts(op, group.name, group.next(), nbytes, -1, peer, look, site)
