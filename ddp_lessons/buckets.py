"""DDP's gradient buckets, seen: `watch_ddp` records each from its all_reduce to its end.

Runs in workers; elsewhere it does nothing. DDP all-reduces its buckets in C++, where no wrapper
sees it, but it lets a communication hook do it instead (`register_comm_hook`). Ours does exactly
what DDP does without one, or what the learner's own hook does, and writes down when.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ddp_lessons import device, recording
from ddp_lessons.groups import groups
from ddp_lessons.recording import Recorder
from ddp_lessons.tape import Facts

Model = TypeVar("Model")
Hook = Callable[[Any, Any], Any]
WAIT_FOR_BUCKETS = "wait for buckets"  # the span of it


def watch_ddp(model: Model, hook: Hook | None = None, state: Any = None) -> Model:
    """Record the gradient buckets of a DDP model, and how long backward waits for them.

    The weights come out the same, to the last bit. (Only with `gradient_as_bucket_view=True`,
    `zero_grad(set_to_none=False)` and a number of ranks that is no power of 2 does DDP round the
    mean in another way.) Outside a launched worker nothing is recorded, so the same function runs
    under torchrun.

    Parameters
    ----------
    model : DistributedDataParallel
        A model without a communication hook: it can have only one.
    hook : callable, optional
        Your own communication hook, ``hook(state, bucket)``, to be registered and recorded.
    state : object, optional
        What your hook gets as its first argument.

    Returns
    -------
    DistributedDataParallel
        The same model.

    Raises
    ------
    TypeError
        If the model is not wrapped in DistributedDataParallel.
    RuntimeError
        If it has a hook already.
    """
    _refuse_nonsense(model)
    recorder = recording.current()
    if recorder is not None:
        model.register_comm_hook(state, _recorded(Backward(recorder), model, hook))  # type: ignore[attr-defined]
    elif hook is not None:
        model.register_comm_hook(state, hook)  # type: ignore[attr-defined]
    return model


def _refuse_nonsense(model: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"watch_ddp needs a model in DistributedDataParallel, got {type(model).__name__}. "
            "Wrap it first: watch_ddp(DistributedDataParallel(model))."
        )
    if getattr(model, "_comm_hooks", None):
        raise RuntimeError(
            "the model has a communication hook already, and DDP takes only one. Pass yours to "
            "watch_ddp(model, hook, state) instead of registering it."
        )


class Backward:
    """The buckets in flight, and whether backward has nothing left but to wait for them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._in_flight = 0
        self._waiting = 0  # the open span, if there is one

    def begin(self, bucket: Any, facts: Facts, t0_ns: int) -> Callable[[], None]:
        """A bucket is handed over. Call what this returns when its gradients are there."""
        name = f"bucket {bucket.index()}"
        on = device.of(bucket.buffer()) if groups.any_streamed else None
        if on is not None:
            return device.Stopwatch(self._recorder, on, name, facts, "buckets").stop
        with self._lock:
            self._in_flight += 1
        slot = self._recorder.begin("comm", name, t0_ns, facts, "buckets")
        return functools.partial(self._end, slot)

    def handed_over(self, bucket: Any) -> None:
        """After the last bucket, backward has only to wait for those that are in flight."""
        if bucket.is_last():
            with self._lock:
                if self._in_flight:
                    now_ns = time.perf_counter_ns()
                    self._waiting = self._recorder.begin("wait", WAIT_FOR_BUCKETS, now_ns)

    def _end(self, slot: int) -> None:
        """A bucket's gradients are there, or it failed. Called from a thread of the backend."""
        self._recorder.end(slot)
        with self._lock:
            self._in_flight -= 1
            if self._waiting and not self._in_flight:
                self._recorder.end(self._waiting)
                self._waiting = 0


def _recorded(backward: Backward, model: Any, hook: Hook | None) -> Hook:
    """The hook to register: the learner's, or DDP's own doing, between two notes of the time."""
    run = _as_ddp_does(model) if hook is None else _facts_of(hook)

    # DDP looks for a parameter of this name, and at its annotation.
    def recorded(state, bucket):  # type: ignore[no-untyped-def]
        return run(backward, state, bucket)

    recorded.__name__ = getattr(hook, "__name__", "all_reduce")  # DDP knows some hooks by name
    return recorded


def _as_ddp_does(model: Any) -> Callable[[Backward, Any, Any], Any]:
    import torch.distributed as dist

    process_group = model.process_group
    group = groups.of(process_group)
    assert group is not None
    mean = 1.0 / dist.get_world_size(process_group)  # DDP multiplies; dividing rounds otherwise

    def all_reduce(backward: Backward, _: Any, bucket: Any) -> Any:
        t0_ns = time.perf_counter_ns()
        gradients = bucket.buffer()
        facts = Facts("all_reduce", group.name, group.next(), gradients.nbytes, bucket.index())
        end = backward.begin(bucket, facts, t0_ns)

        def done(future: Any) -> Any:
            end()
            return future.value()[0]

        work = process_group.allreduce([gradients.mul_(mean)])
        future = work.get_future().then(done)
        backward.handed_over(bucket)
        return future

    return all_reduce


def _facts_of(hook: Hook) -> Callable[[Backward, Any, Any], Any]:
    def run(backward: Backward, state: Any, bucket: Any) -> Any:
        t0_ns = time.perf_counter_ns()
        facts = Facts(nbytes=bucket.buffer().nbytes, bucket=bucket.index())
        end = backward.begin(bucket, facts, t0_ns)
        future = hook(state, bucket)
        if hasattr(future, "add_done_callback"):  # else DDP says what is wrong
            future.add_done_callback(lambda _: end())
        backward.handed_over(bucket)
        return future

    return run
