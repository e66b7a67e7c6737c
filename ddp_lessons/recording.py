"""Spans: what a worker did when. Runs in workers; does nothing anywhere else.

`span` marks work by hand. In a launched worker the calls of torch.distributed mark themselves:
their public names are wrapped before the learner's function is unpickled. Spans travel to the
parent in batches over the worker's pipe.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ddp_lessons.messages import Joining, Message, Moved, Span, Spans
from ddp_lessons.rendezvous import await_store, rank_of

BATCH = 50  # spans sent together
FLUSH_NS = 20_000_000  # a rank that moves is heard at least this often
MOST_SPANS = 200_000  # recorded on one rank; later ones are counted and dropped

GROUP_CALLS = ("init_process_group", "new_group", "destroy_process_group")
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
)

ISSUED = ("batch_isend_irecv", "irecv", "isend")  # they return before the work is done


class Recorder:
    """Collects the spans of one worker and hands them to `send` in batches."""

    def __init__(self, rank: int, send: Callable[[Message], None]) -> None:
        self.rank = rank
        self.send = send
        self._batch: list[Span] = []
        self._recorded = 0
        self._dropped = 0
        self._flushed_ns = time.perf_counter_ns()
        self._inside = threading.local()
        self._lock = threading.Lock()
        self.groups: list[Any] = []  # of DDP models, see _keep_groups_of_ddp

    def add(self, kind: str, name: str, t0_ns: int, op: str | None = None) -> None:
        """Record a span that ends now."""
        t1_ns = time.perf_counter_ns()
        made = Span(self.rank, "main", kind, name, t0_ns, t1_ns, op=op)
        with self._lock:
            if self._recorded >= MOST_SPANS:
                self._dropped += 1
            else:
                self._recorded += 1
                self._batch.append(made)
        if len(self._batch) >= BATCH or t1_ns - self._flushed_ns > FLUSH_NS:
            self.flush(t1_ns)

    def flush(self, now_ns: int | None = None) -> None:
        """Send what was recorded since the last time."""
        with self._lock:
            batch, self._batch = self._batch, []
        self._flushed_ns = now_ns or time.perf_counter_ns()
        self.send(Spans(batch, self._dropped))

    def moved(self) -> None:
        """Tell the parent now and then that this rank is not stuck."""
        now_ns = time.perf_counter_ns()
        if now_ns - self._flushed_ns > FLUSH_NS:
            self._flushed_ns = now_ns
            self.send(Moved())

    def enter_call(self) -> bool:
        """True if no recorded call of torch.distributed is running in this thread yet."""
        outermost = not getattr(self._inside, "call", False)
        self._inside.call = True
        return outermost

    def leave_call(self) -> None:
        self._inside.call = False


_recorder: Recorder | None = None  # this process's one recorder; None outside workers


def install(recorder: Recorder) -> None:
    """Make `recorder` this process's, and see to it that torch.distributed is wrapped."""
    global _recorder
    wrap_torch()
    _recorder = recorder


@functools.cache
def wrap_torch() -> None:
    """Wrap the public calls of torch.distributed, once in a process.

    The forkserver does it for all workers that it forks; without a recorder the wrappers only call.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    os.register_at_fork(after_in_child=_forget)  # a DataLoader's worker must not write to our pipe
    # DDP's own all-reduces are C++ calls that nothing here sees; a step of the optimizer is seen.
    register_optimizer_step_post_hook(_moved)
    _keep_groups_of_ddp()
    _wrap("init_process_group", _joining)
    for name in (*GROUP_CALLS[1:], *COLLECTIVES):
        _wrap(name, _recorded)


def in_worker() -> bool:
    """True in a process that launch() started."""
    return _recorder is not None


class span:
    """Mark a piece of work in a worker, so that the timeline shows it.

    Use as a context manager: ``with span("forward"): ...``. Outside a launched worker it does
    nothing, so the same function runs under torchrun.
    """

    __slots__ = ("_name", "_t0_ns")

    def __init__(self, name: str) -> None:
        self._name = name
        self._t0_ns = 0

    def __enter__(self) -> span:
        self._t0_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _recorder is not None:
            _recorder.add("compute", self._name, self._t0_ns)


def _forget() -> None:
    global _recorder
    _recorder = None


def _moved(*_: Any) -> None:
    if _recorder is not None:
        _recorder.moved()


def _keep_groups_of_ddp() -> None:
    """Keep the process group of a DDP model until the worker ends or joins anew.

    DDP's reducer, in C++, owns a share of its group. If the model is freed after
    destroy_process_group, as at the end of most functions, that share is the last: the group's
    destructor waits for gloo's threads while it holds the interpreter's lock, which such a thread
    may want. Plain torch 2.13 hung so in 7 of 40 runs (pytorch issue 56297). A share of ours keeps
    the reducer's from being the last, and is given up without the lock.
    """
    from torch.nn.parallel import DistributedDataParallel

    init = DistributedDataParallel.__init__

    @functools.wraps(init)
    def init_and_keep(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _recorder is not None:
            _recorder.groups.append(self.process_group)

    DistributedDataParallel.__init__ = init_and_keep


def _wrap(name: str, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public function where learners import it from, and where torch defines it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    wrapped = make(name, getattr(dist, name))
    for module in (dist, distributed_c10d):
        setattr(module, name, wrapped)


def _recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    parameters = list(inspect.signature(call).parameters)
    place = parameters.index("async_op") if "async_op" in parameters else len(parameters)

    @functools.wraps(call)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder = _recorder
        # Object collectives call tensor collectives: only the one that the learner wrote counts.
        if recorder is None or not recorder.enter_call():
            return call(*args, **kwargs)
        t0_ns = time.perf_counter_ns()
        try:
            return call(*args, **kwargs)
        finally:
            recorder.leave_call()
            kind = (
                "issue"
                if name in ISSUED or kwargs.get("async_op") or any(args[place : place + 1])
                else "comm"
            )
            recorder.add(kind, name, t0_ns, op=name)

    return recorded


def _joining(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def join(
        backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        timeout = kwargs.get("timeout", args[0] if args else None)
        seconds = timeout.total_seconds() if timeout is not None else None
        if _recorder is not None:
            _recorder.groups.clear()
            _recorder.send(Joining(seconds))
            if kwargs.get("store") is None:
                await_store(init_method, rank_of(init_method, kwargs), seconds or 1800.0)
        return call(backend, init_method, *args, **kwargs)

    return _recorded(name, join)
