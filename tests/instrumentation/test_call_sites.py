"""The learner's line that makes a call, and the dtype and shape of the call's tensor."""

from __future__ import annotations

import sys
from concurrent import futures
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.instrumentation.call_sites import Sites
from ddp_lessons.instrumentation.signatures import describe_tensors
from ddp_lessons.wire.records import split_site

cloudpickle.register_pickle_by_value(sys.modules[__name__])

HERE = __file__
KNOWN = Sites()


def here() -> str | None:
    return KNOWN.of(sys._getframe(1))


def test_the_line_of_the_caller() -> None:
    found = [here() for _ in range(2)]
    assert found[0] == found[1]  # the second comes from the cache
    filename, line = split_site(str(found[0]))
    assert filename == HERE
    assert open(HERE).readlines()[line - 1].strip().startswith("found = [here()")


def test_code_of_libraries_is_passed_over() -> None:
    found: list[str | None] = []
    future = futures.Future[int]()
    future.add_done_callback(lambda _: found.append(KNOWN.of(sys._getframe(1))))
    future.set_result(0)  # the frame above the callback is the library's
    filename, line = split_site(str(found[0]))
    assert filename == HERE
    assert "set_result" in open(HERE).readlines()[line - 1]
    assert KNOWN.of(None) is None


@pytest.mark.ranks
def test_each_kind_of_call_has_its_line() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(2, 3))
        waited = dist.broadcast(torch.ones(1), 0, async_op=True)
        waited.wait()
        dist.destroy_process_group()

    run = launch(work)
    lines = open(HERE).readlines()
    found: dict[str, str] = {}
    for span in run.spans():
        if span.site is not None:
            found[span.name] = lines[split_site(span.site)[1] - 1].strip()
    assert found["init_process_group"] == 'dist.init_process_group("gloo")'
    assert found["all_reduce"] == "dist.all_reduce(torch.ones(2, 3))"
    assert found["broadcast"].startswith("waited = dist.broadcast")
    assert found["wait for broadcast"] == "waited.wait()"
    assert found["destroy_process_group"] == "dist.destroy_process_group()"
    (look,) = {span.tensor for span in run.spans() if span.op == "all_reduce"}
    assert look == "float32 (2, 3)"


@pytest.mark.ranks
def test_a_call_that_raises_is_marked_as_failed() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            dist.all_reduce("no tensor")
        except TypeError:
            dist.barrier()
        dist.destroy_process_group()

    run = launch(work)
    failed = {(span.name, span.failed) for span in run.spans() if span.kind == "comm"}
    assert ("all_reduce", True) in failed
    assert ("barrier", False) in failed


@pytest.mark.parametrize(
    ("value", "look"),
    [
        (torch.ones(2, 3), (24, "float32 (2, 3)")),
        (torch.ones((), dtype=torch.int64), (8, "int64 ()")),
        ([torch.ones(2), torch.ones(2)], (16, "2 x float32 (2,)")),
        ([], (-1, None)),
        ([torch.ones(2), "x"], (-1, None)),
        ("text", (-1, None)),
        (None, (-1, None)),
    ],
)
def test_looks(value: Any, look: tuple[int, str | None]) -> None:
    assert describe_tensors(value) == look
    assert describe_tensors(value) == look
