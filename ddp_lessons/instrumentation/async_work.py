"""Records asynchronous work: the call that issues it, the work until it is done, and each wait.

Runs in workers. collectives.py calls it; install.py wraps `Work.wait` with `waiting`, the other
methods of `Work` with `using`.
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
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.records import CHANGED, NOT_AWAITED, Kind, Lane, Mistake
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
        self.handle_must_be_used = False
        self._unused: Mistake | None = None  # told at the end unless the learner uses the handle
        self._sent: tuple[torch.Tensor, int, tuple[int, int]] | None = None
        self._slot = 0
        self.issue_slot = 0  # of the span of the call itself, which ends first
        self._stopwatch: cuda_events.Stopwatch | None = None
        name = facts.op or "work"
        if on is None:
            self._slot = recorder.begin(Kind.COMM, name, t0_ns, facts, Lane.COMM)
        else:
            self._stopwatch = cuda_events.Stopwatch(recorder, on, name, facts)

    @property
    def on_gpu_stream(self) -> bool:
        """Whether a stream of a GPU does the work."""
        return self._stopwatch is not None

    def sends(self, tensor: Any) -> None:
        """Note the tensor of an isend, to see later whether it was changed before it was sent.

        Only a tensor that fills its memory: the version of a part counts changes elsewhere, too.
        """
        try:
            if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
                self._sent = tensor, tensor._version, self.recorder.heard()
        except (AttributeError, RuntimeError):  # no tensor, or one of inference mode
            return

    def use(self) -> None:
        """Note that the learner uses the work's handle."""
        unused, self._unused = self._unused, None
        if unused is not None:
            next(self.recorder.used_handles[unused])
            if self._was_changed():
                self.recorder.notice(unused._replace(kind=CHANGED))
            self._sent = None

    def _was_changed(self) -> bool:
        """Whether what an isend sends was changed, and no other rank can have told that it came."""
        if self._sent is None:
            return False
        tensor, version, heard = self._sent
        return tensor._version != version and self.recorder.heard() == heard

    def carry(self, work: dist.Work | torch.futures.Future[Any] | int | None) -> None:
        """Watch the work that a call returned."""
        if work is None or isinstance(work, int):
            # The call failed, this rank is not in the group, or the stream of a GPU does the work
            # of a call that returns no handle: recv returns the sender's rank.
            self.done()
            return
        _in_flight.setdefault(work, []).append(self)
        self._end_with(work)
        op, site = self.facts.op, self.facts.site
        if self.handle_must_be_used and op and site and _is_plain(work):
            self._unused = Mistake(NOT_AWAITED, op, site)
            next(self.recorder.handles[self._unused])

    def _end_with(self, work: dist.Work | torch.futures.Future[Any]) -> None:
        """Have the span end when the work is done."""
        if self._stopwatch is not None and self.facts.op in NULL_FUTURES:
            return  # its span ends when it is waited for
        if groups.any_streamed and cuda_events.is_capturing():
            self.done()
            return
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
            slots = self._slot, self.issue_slot, waiting
            seq = received(self.recorder, self.group, source, tag, *slots)
            self.facts = self.facts._replace(seq=seq, peer=source)
        self.done()

    def done(self, _: object = None) -> None:
        """Note the end, once."""
        slot, self._slot = self._slot, 0
        self.recorder.end(slot)
        if self._stopwatch is not None:
            self._stopwatch.stop()


def _is_plain(work: object) -> bool:
    """Whether all uses of a handle are seen: not those of a Future or of a backend's own class."""
    import torch.distributed as dist

    return type(work) is dist.Work


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
    issued_work: AsyncWork,
    t0_ns: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a function that only issues work; record the call, and the work until it is done."""
    recorder, facts = issued_work.recorder, issued_work.facts
    slot = recorder.begin(Kind.ISSUE, facts.op or "work", t0_ns, facts)
    issued_work.issue_slot = recorder.buffer.kept(slot)
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
        recorder.end_issue(slot)


def using(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of `Work` other than `wait`: note that its handle is used."""

    @functools.wraps(method)
    def used(self: dist.Work, *args: Any, **kwargs: Any) -> Any:
        for work in _in_flight.get(self, ()):
            work.use()
        return method(self, *args, **kwargs)

    return used


def waiting(wait: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `Work.wait`: record the wait, and that the work is done."""
    from torch.compiler import is_dynamo_compiling

    @functools.wraps(wait)
    def waited(self: dist.Work, *args: Any, **kwargs: Any) -> bool:
        recorder = None if is_dynamo_compiling() else recording._recorder
        if recorder is None or get_ident() in recording.inside:  # synchronous calls wait inside
            return wait(self, *args, **kwargs)
        recorder.gives_up(args[0] if args else kwargs.get("timeout"), WAIT)
        site = recorder.sites.of(sys._getframe().f_back)
        works = _in_flight.get(self, [])
        for work in works:
            work.use()
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
