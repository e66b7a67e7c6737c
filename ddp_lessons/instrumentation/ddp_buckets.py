"""`watch_ddp`: records DDP's gradient buckets where NCCL or a communication hook sends them.

The learner's function calls it in workers; elsewhere it records nothing. With gloo and no hook,
ddp_traffic.py records the buckets anyway. With NCCL `watch_ddp` registers a hook that does exactly
what DDP does without one. It wraps a learner's own hook in one that records each bucket.
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
RecordedHook = Callable[[Backward, Any, "dist.GradBucket"], "torch.futures.Future[torch.Tensor]"]


def watch_ddp(model: Model, hook: Hook | None = None, state: Any = None) -> Model:
    """Record the gradient buckets of a DDP model, and how long backward waits for them.

    With gloo a model without a hook is recorded anyway; `watch_ddp` serves for a hook of your own,
    and for NCCL. The weights come out the same, to the last bit. (Only with NCCL,
    `gradient_as_bucket_view=True`, `zero_grad(set_to_none=False)` and a number of ranks that is no
    power of 2 does DDP round the mean in another way.) Outside a launched worker nothing is
    recorded, so the same function runs under torchrun.

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
    if recorder is not None and (hook is not None or not _records_by_itself(model)):
        model.register_comm_hook(state, _recorded(Backward(recorder), model, hook))
    elif hook is not None:
        model.register_comm_hook(state, hook if inspect.isfunction(hook) else _function(hook))
    return model


def _function(hook: Hook) -> Hook:
    """A function that calls a hook of another kind; DDP reads a hook's name and its annotations."""

    def call(state, bucket):  # type: ignore[no-untyped-def]
        return hook(state, bucket)

    return call


def _records_by_itself(model: DistributedDataParallel) -> bool:
    from ddp_lessons.instrumentation import ddp_traffic

    return ddp_traffic.is_recorded(model)


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


def _recorded(backward: Backward, model: DistributedDataParallel, hook: Hook | None) -> Hook:
    """The hook to register: it records each bucket, and runs `hook` or does what DDP would do."""
    run = _as_ddp_does(model) if hook is None else _facts_of(hook)

    # DDP wants a parameter of this name, and checks its annotation.
    def recorded(state, bucket):  # type: ignore[no-untyped-def]
        return run(backward, state, bucket)

    recorded.__name__ = getattr(hook, "__name__", "all_reduce")  # DDP knows some hooks by name
    return recorded


def _as_ddp_does(model: DistributedDataParallel) -> RecordedHook:
    import torch.distributed as dist

    process_group = model.process_group
    group = groups.of(process_group)
    assert group is not None
    mean = 1.0 / dist.get_world_size(process_group)  # DDP multiplies; division rounds differently

    def all_reduce(
        backward: Backward, _: object, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        t0_ns = time.perf_counter_ns()
        gradients = bucket.buffer()
        facts = CallFacts("all_reduce", group.name, group.next(), gradients.nbytes, bucket.index())
        end = backward.begin(bucket.index(), bucket.buffer(), facts, t0_ns)

        def done(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            end()
            return future.value()[0]

        with recording.within_call():
            work = process_group.allreduce([gradients.mul_(mean)])
        future = work.get_future().then(done)
        if bucket.is_last():
            backward.all_handed_over()
        return future

    return all_reduce


def _facts_of(hook: Hook) -> RecordedHook:
    def run(
        backward: Backward, state: Any, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        t0_ns = time.perf_counter_ns()
        facts = CallFacts(nbytes=bucket.buffer().nbytes, bucket=bucket.index())
        end = backward.begin(bucket.index(), bucket.buffer(), facts, t0_ns)
        future = hook(state, bucket)
        if hasattr(future, "add_done_callback"):  # else DDP raises an error
            future.add_done_callback(lambda _: end())
        if bucket.is_last():
            backward.all_handed_over()
        return future

    return run
