"""`watch_ddp`: records DDP's gradient buckets where a learner's communication hook sends them.

The learner's function calls it in workers; elsewhere it records nothing. Without a hook
ddp_traffic.py records the buckets anyway. A hook is wrapped in one that records each bucket.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ddp_lessons.instrumentation import recording
from ddp_lessons.instrumentation.backward import Backward
from ddp_lessons.instrumentation.group_registry import groups
from ddp_lessons.wire.span_buffer import CallFacts

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

Model = TypeVar("Model", bound="DistributedDataParallel")
Hook = Callable[[Any, "dist.GradBucket"], "torch.futures.Future[torch.Tensor]"]


def watch_ddp(model: Model, hook: Hook | None = None, state: Any = None) -> Model:
    """Record the gradient buckets of a DDP model, and how long backward waits for them.

    A model without a hook is recorded anyway; `watch_ddp` serves for a hook of your own. The
    weights come out the same, to the last bit. Outside a launched worker nothing is recorded, so
    the same function runs under torchrun.

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
    if hook is None:
        return model
    if (recorder := recording.current()) is not None:
        hook = _recorded(Backward(recorder, groups.of(model.process_group)), hook)
    elif not inspect.isfunction(hook):
        hook = _function(hook)
    model.register_comm_hook(state, hook)
    return model


def _function(hook: Hook) -> Hook:
    """A function that calls a hook of another kind; DDP reads a hook's name and its annotations."""

    def call(state, bucket):  # type: ignore[no-untyped-def]
        return hook(state, bucket)

    return call


def _refuse_nonsense(model: object) -> None:
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


def _recorded(backward: Backward, hook: Hook) -> Hook:
    """The hook to register: it records each bucket, and runs the learner's."""

    # DDP wants a parameter of this name, and checks its annotation.
    def recorded(state, bucket):  # type: ignore[no-untyped-def]
        t0_ns = time.perf_counter_ns()
        facts = CallFacts(nbytes=bucket.buffer().nbytes, bucket=bucket.index())
        end = backward.begin(bucket.index(), bucket.buffer(), facts, t0_ns)
        future = hook(state, bucket)
        if hasattr(future, "add_done_callback"):  # else DDP raises an error
            future.add_done_callback(lambda _: end())
        if bucket.is_last():
            backward.all_handed_over()
        return future

    recorded.__name__ = getattr(hook, "__name__", "recorded")  # DDP knows some hooks by name
    return recorded
