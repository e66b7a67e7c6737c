"""Wraps the calls that make and end process groups: records them, and checks and waits around them.

Runs in workers; install.py replaces the public functions with these wrappers. Before a rank joins,
they refuse NCCL on a shared GPU; after it, they compare the clocks of several machines and wait for
the other ranks. Arguments that torch refuses reach it as they are, and at once. Without a recorder
they only call through.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ddp_lessons.instrumentation import clock_sync, gloo_threads, gpu_sharing, recording
from ddp_lessons.instrumentation.group_registry import groups
from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.instrumentation.rendezvous import await_others
from ddp_lessons.instrumentation.signatures import Args, Kwargs, argument
from ddp_lessons.instrumentation.torch_api import leaving_is_safe
from ddp_lessons.wire.ops import OWN_WORLD, SOME_RANKS
from ddp_lessons.wire.span_buffer import CallFacts

SOON = 0.01  # seconds that rank 0 waits for others that leave at the same time


def joining(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap init_process_group: check before it, compare clocks and wait after it."""
    import torch.distributed as dist

    @functools.wraps(function)
    def join(
        backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        recorder = recording.current() if not dist.is_initialized() else None  # else torch raises
        if recorder is not None:
            recorder.buffer.note_leaving(False)
            gpu_sharing.before_joining(recorder, backend, argument(args, kwargs, 1, "world_size"))
            if leaving_is_safe():
                recorder.groups.clear()
            recorder.models.clear()
            recorder.gives_up(kwargs.get("timeout", args[0] if args else None), name)
        function(backend, init_method, *args, **kwargs)
        if recorder is not None:
            clock = None if recorder.one_clock else clock_sync.against_rank_zero()
            if recorder.one_clock or clock is not None:  # else some ranks do not take part
                await_others()
            recorder.compare_clock(clock)

    return recorded(name, join)


def unrecorded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call by which a rank communicates, or begins to, without being recorded: say so."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (recorder := recording.outermost()) is not None:
            recorder.unseen(what)
        return function(*args, **kwargs)

    return call


def making(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap new_group and its like: name the group at once, as all ranks do in the same order."""
    places = {name: place for place, name in enumerate(inspect.signature(function).parameters)}

    @functools.wraps(function)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if (recorder := recording.current()) is not None:
            recorder.gives_up(argument(args, kwargs, places.get("timeout", 99), "timeout"), name)
            if name == "new_group":
                backend = argument(args, kwargs, 2, "backend")
                gpu_sharing.before_new_group(recorder, argument(args, kwargs, 0, "ranks"), backend)
        group = function(*args, **kwargs)
        if recording.in_worker():
            groups.of(group)
        return group

    return recorded(name, new_group)


def leaving(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap destroy_process_group: have gloo's threads leave at once.

    Rank 0 takes the store with it, which others may still need for a group of their own. So there
    only if all others leave, too. With older torch, keep the group from being freed (torch_api).
    """
    from torch.distributed import distributed_c10d

    keeps = not leaving_is_safe()

    @functools.wraps(function)
    def destroy(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.current()
        if recorder is None:
            return function(*args, **kwargs)
        if keeps:
            recorder.groups += distributed_c10d._world.pg_map
        at_once = _nobody_needs_the_store(recorder) if _subgroup(args, kwargs) is None else True
        with gloo_threads.woken() if at_once else contextlib.nullcontext():
            return function(*args, **kwargs)

    return recorded(name, destroy)


def _nobody_needs_the_store(recorder: Recorder) -> bool:
    """Note that this rank leaves. Whether nobody will need the store that ends with it, if any."""
    recorder.buffer.note_leaving(True)
    if recorder.rank != 0:
        return True
    deadline = time.monotonic() + SOON
    while not (all_leave := recorder.buffer.others_leave(recorder.world_size)):
        if time.monotonic() > deadline:
            break
        time.sleep(SOON / 20)
    return all_leave


def setting_a_timeout(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap set_timeout: tell the parent that later calls give up by themselves."""

    @functools.wraps(function)
    def set_timeout(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if (recorder := recording.current()) is not None:
            recorder.gives_up(argument(args, kwargs, 0, "timeout"), name)
        return result

    return set_timeout


def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Record a call that makes or ends groups."""

    @functools.wraps(function)
    def group_call(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.outermost()
        if recorder is None:
            return function(*args, **kwargs)
        t0_ns = time.perf_counter_ns()
        scope = _scope(recorder, name, args, kwargs)
        facts = CallFacts(name, scope, site=recorder.sites.of(sys._getframe().f_back))
        try:
            with recorder.call(name, t0_ns, facts):
                return function(*args, **kwargs)
        finally:
            recorder.joined()
            groups.update_world()

    return group_call


def _scope(recorder: Recorder, name: str, args: Args, kwargs: Kwargs) -> str | None:
    """None if all ranks make the call; else the subgroup's name, or SOME_RANKS if some may not."""
    if name == "destroy_process_group":
        return _subgroup(args, kwargs)
    if name == "init_process_group":
        place = _number(args, kwargs, 4, "rank"), _number(args, kwargs, 3, "world_size")
        return None if place == (recorder.rank, recorder.world_size) else SOME_RANKS
    by_all = groups.world is not None and OWN_WORLD not in groups.world.name
    return None if by_all and not kwargs.get("use_local_synchronization") else SOME_RANKS


def _number(args: Args, kwargs: Kwargs, place: int, name: str) -> int:
    """A number that init_process_group gets as an argument or from the environment; -1 if none."""
    number = argument(args, kwargs, place, name)
    try:
        return int(os.environ.get(name.upper(), -1) if number in (None, -1) else number)
    except (TypeError, ValueError):
        return -1


def _subgroup(args: Args, kwargs: Kwargs) -> str | None:
    """The name of the subgroup that destroy_process_group ends; None if it ends all groups."""
    group = groups.of(argument(args, kwargs, 0, "group"))
    return group.name if group is not None and group is not groups.world else None
