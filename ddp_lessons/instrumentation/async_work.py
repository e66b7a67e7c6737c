"""Records asynchronous work: the call that issues it, the work until it is done, and each wait.

Runs in workers. collectives.py calls it; install.py wraps `Work.wait` with `waiting`.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from ddp_lessons.instrumentation import cuda_events, recording
from ddp_lessons.instrumentation.group_registry import Group
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.records import Kind, Lane
from ddp_lessons.wire.span_buffer import NO_FACTS, CallFacts, Slot
from ddp_lessons.wire.stacks import WAIT

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")

# Calls that NCCL may coalesce. The future of their handle is then a null pointer, and using it ends
# the process (endCoalescing in ProcessGroupNCCL.cpp makes none).
NULL_FUTURES = ("isend", "irecv", "all_gather", "reduce_scatter")


class AsyncWork:
    """Asynchronous work between its issue and its end.

    `on` is the GPU whose stream does the work, if one does (cuda_events.py).
    """

    def __init__(
        self,
        recorder: Recorder,
        t0_ns: int,
        facts: CallFacts,
        group: Group | None,
        on: torch.device | None = None,
    ) -> None:
        self.recorder = recorder
        self.facts = facts
        self.group = group
        self._slot = 0
        self._stopwatch: cuda_events.Stopwatch | None = None
        name = facts.op or "work"
        if on is None:
            self._slot = recorder.begin(Kind.COMM, name, t0_ns, facts, Lane.COMM)
        else:
            self._stopwatch = cuda_events.Stopwatch(recorder, on, name, facts)

    def carry(self, work: dist.Work | torch.futures.Future[Any] | int | None) -> None:
        """Watch the work that a call returned."""
        if work is None or isinstance(work, int):
            # The call failed, this rank is not in the group, or the stream of a GPU does the work
            # of a call that returns no handle: recv returns the sender's rank.
            self.done()
            return
        _in_flight.setdefault(work, []).append(self)
        if self._stopwatch is not None and self.facts.op in NULL_FUTURES:
            return  # its span ends when it is waited for
        get_future = getattr(work, "get_future", None)
        try:
            # Coalesced calls return a Future instead of a Work.
            future = get_future() if callable(get_future) else work
        except (RuntimeError, NotImplementedError):
            return  # gloo has none for reduce_scatter, isend, irecv: the span ends when waited for
        if callable(getattr(future, "add_done_callback", None)):
            future.add_done_callback(self.done)
        else:  # torch has only queued the call, to coalesce it with others
            self.done()

    def arrived(self, work: dist.Work | None, waiting: Slot) -> None:
        """Note that a wait returned. The sender of a recv from any rank is known only now."""
        is_irecv = self.facts.op == "irecv" and self.facts.peer < 0
        if is_irecv and self.group is not None and work is not None:
            source = self.group.ranks[work._source_rank()]
            tag = self.facts.tag
            seq = received(self.recorder, self.group, source, tag, self._slot, waiting)
            self.facts = self.facts._replace(seq=seq, peer=source)
        self.done()

    def done(self, _: object = None) -> None:
        """Note the end, once."""
        slot, self._slot = self._slot, 0
        self.recorder.end(slot)
        if self._stopwatch is not None:
            self._stopwatch.stop()


# By the handle that the call returned; one of NCCL's may stand for a whole batch.
_in_flight: weakref.WeakKeyDictionary[dist.Work | torch.futures.Future[Any], list[AsyncWork]] = (
    weakref.WeakKeyDictionary()
)


def received(recorder: Recorder, group: Group, source: int, tag: int, *slots: Slot) -> int:
    """Number a recv from any rank, now that its sender is known; return the number."""
    seq = group.next((source, recorder.rank, tag))
    for slot in slots:
        recorder.buffer.match(slot, seq, source)
    return seq


def issued(
    recorder: Recorder,
    t0_ns: int,
    facts: CallFacts,
    group: Group | None,
    on: torch.device | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a function that only issues work; record the call, and the work until it is done."""
    issued_work = AsyncWork(recorder, t0_ns, facts, group, on)
    slot = recorder.begin(Kind.ISSUE, facts.op or "work", t0_ns, facts)
    work = None
    thread = get_ident()
    recording.inside.add(thread)
    try:
        work = function(*args, **kwargs)
        return work
    except BaseException as error:
        recorder.fail(slot, error)
        raise
    finally:
        recording.inside.remove(thread)
        issued_work.carry(work)
        recorder.end(slot)


def waiting(wait: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `Work.wait`: record the wait, and that the work is done."""
    from torch.compiler import is_dynamo_compiling

    @functools.wraps(wait)
    def waited(self: dist.Work, *args: Any, **kwargs: Any) -> bool:
        recorder = None if is_dynamo_compiling() else recording._recorder
        if recorder is None or get_ident() in recording.inside:  # synchronous calls wait inside
            return wait(self, *args, **kwargs)
        recorder.gives_up(args[0] if args else kwargs.get("timeout"), WAIT)
        site = recorder.sites.of(sys._getframe(1))
        works = _in_flight.get(self, [])
        return waited_for(recorder, works, site, lambda: wait(self, *args, **kwargs), self)

    return waited


def waited_for(
    recorder: Recorder,
    works: Sequence[AsyncWork],
    site: str | None,
    wait: Callable[[], T],
    handle: dist.Work | None = None,
) -> T:
    """Wait for work, which `handle` stands for; record the wait, and that the work is done."""
    facts = (works[0].facts if works else NO_FACTS)._replace(site=site)
    name = f"wait for {facts.op or 'work'}"
    slot = recorder.begin(Kind.WAIT, name, time.perf_counter_ns(), facts)
    try:
        result = wait()
        for work in works:
            work.arrived(handle, slot)
        return result
    except BaseException:
        recorder.buffer.fail(slot)
        raise
    finally:
        recorder.end(slot)
