"""Runs a function as the only rank in the parent's own process, to step through it with a debugger.

Runs in the parent, called by `launch(..., in_process=True)`. The variables of a rank are set for as
long as the function runs; a group that it leaves behind is destroyed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ddp_lessons.errors import BadLaunch
from ddp_lessons.processes.packing import name_of
from ddp_lessons.results import RankResult
from ddp_lessons.run import Run
from ddp_lessons.system.host import reserve_port
from ddp_lessons.wire.records import Kind, Lane, Span
from ddp_lessons.wire.task import MasterAddress, places, variables


def run_here(
    fn: Callable[..., Any], args: tuple[Any, ...], env: Mapping[str, str], world_size: int
) -> Run:
    """Call ``fn(0, *args)`` here and return the record of the run; exceptions are fn's own.

    Raises BadLaunch if more than one rank is asked for, or this process is in a group already.
    """
    if world_size != 1:
        raise BadLaunch(
            f"in_process=True runs one rank, in this process, and not {world_size}. Step through "
            "one: launch(fn, args, nprocs=1, in_process=True)."
        )
    if _in_a_group():
        raise BadLaunch(
            "this process is in a process group already. Leave it first: "
            "torch.distributed.destroy_process_group()."
        )
    (place,) = places(1, 1)
    with reserve_port() as port:
        master = MasterAddress(port.getsockname()[1])
        with _environment({**variables(master), **place.variables(), **env}), _leaving_the_group():
            began_ns = time.perf_counter_ns()
            value = fn(0, *args)
            ended_ns = time.perf_counter_ns()
    rank = RankResult(
        rank=0,
        status="returned",
        value=value,
        output="",
        error=None,
        exitcode=None,
        spans=(Span(0, Lane.PROCESS, Kind.MARK, name_of(fn), began_ns, ended_ns),),
        began_ns=began_ns,
        started_ns=began_ns,
        ended_ns=ended_ns,
    )
    return Run(name_of(fn), [rank], begin_ns=began_ns)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _leaving_the_group() -> Iterator[None]:
    try:
        yield
    finally:
        if _in_a_group():
            import torch.distributed as dist

            dist.destroy_process_group()


def _in_a_group() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
