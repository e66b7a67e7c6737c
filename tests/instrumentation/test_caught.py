"""What is told of exceptions that a rank's own code catches, on Python 3.12 and later."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.instrumentation.caught import ROUTINE
from ddp_lessons.wire.records import Caught
from ddp_lessons.wire.span_buffer import MOST_CAUGHT

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

needs_monitoring = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="Python 3.12 and later tell of caught exceptions"
)
HERE = os.path.basename(__file__)


def told(fn: Any) -> tuple[Caught, ...]:
    (rank,) = launch(fn, nprocs=1, check=False).ranks
    assert rank.caught is not None
    return rank.caught


def errors(fn: Any) -> list[str]:
    return [what.error for what in told(fn)]


def read(number: int) -> None:
    raise ValueError(f"bad sample {number}")


class Sample(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="later Pythons tell")
def test_before_python_3_12_it_is_unknown() -> None:
    def work(_: int) -> None:
        with contextlib.suppress(ValueError):
            read(1)

    assert launch(work, nprocs=1).ranks[0].caught is None


@needs_monitoring
def test_the_lines_of_an_exception_that_was_caught() -> None:
    def work(_: int) -> None:
        try:
            x = 1
            read(x)
        except (KeyError, ValueError):
            pass

    (what,) = told(work)
    first = work.__code__.co_firstlineno
    file = what.passed.rpartition(":")[0]
    assert file.endswith(HERE)
    assert what.error == "ValueError: bad sample 1"
    assert what.raised == f"{file}:{read.__code__.co_firstlineno + 1}"
    assert what.passed == f"{file}:{first + 3}"
    assert what.handler == f"{file}:{first + 4}"


@needs_monitoring
def test_every_way_to_catch() -> None:
    def work(_: int) -> None:
        with contextlib.suppress(ValueError):
            read(1)
        try:
            try:
                read(2)
            finally:
                pass
        except ValueError:
            pass
        try:
            read(3)
        except ValueError as error:
            with contextlib.suppress(KeyError):
                raise KeyError("4") from error
        for number in (5, 6):
            try:
                read(number)
            except Exception:
                continue
        try:
            raise Sample
        except Sample:
            pass
        try:
            raise ExceptionGroup("7", [ValueError("8")])
        except ExceptionGroup:
            pass

    assert errors(work) == [
        "ValueError: bad sample 1",
        "ValueError: bad sample 2",
        "ValueError: bad sample 3",
        "KeyError: '4'",
        "ValueError: bad sample 5",
        "ValueError: bad sample 6",
        "Sample: <its message cannot be shown>",
        "ExceptionGroup: 7 (1 sub-exception)",
    ]


@needs_monitoring
def test_an_exception_that_goes_on_was_not_caught() -> None:
    def work(_: int) -> None:
        try:
            with contextlib.suppress(KeyError):
                try:
                    read(1)
                except KeyError:
                    pass
                finally:
                    sys.stdout.flush()
        except ValueError:
            raise

    assert errors(work) == []


@needs_monitoring
def test_what_libraries_catch_is_not_told() -> None:
    def numbers() -> Iterator[int]:
        yield from range(3)

    def work(_: int) -> None:
        import json

        dist.init_process_group("gloo")
        json.loads("[1, 2]")
        assert not hasattr(sys, "no such thing")
        assert sum(numbers()) == 3
        assert getattr(os, "nothing", None) is None
        dist.destroy_process_group()

    assert errors(work) == []


@needs_monitoring
def test_the_latest_are_kept_but_not_those_of_a_handler_that_is_routine() -> None:
    def work(_: int) -> None:
        for number in range(ROUTINE + 100):
            with contextlib.suppress(ValueError):
                read(number)
        with contextlib.suppress(ValueError):
            read(-1)

    assert errors(work) == [
        *(f"ValueError: bad sample {n}" for n in range(ROUTINE - MOST_CAUGHT + 1, ROUTINE)),
        "ValueError: bad sample -1",
    ]


@needs_monitoring
def test_a_full_stack_stays_the_learners_own_affair() -> None:
    def deeper(depth: int) -> int:
        try:
            return deeper(depth + 1)
        except RecursionError:
            return depth

    def work(_: int) -> int:
        return deeper(0)

    (rank,) = launch(work, nprocs=1).ranks
    assert rank.value > 100
    assert all(what.error.startswith("RecursionError") for what in rank.caught or ())


@needs_monitoring
def test_a_rank_that_hangs_and_one_that_dies() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        with contextlib.suppress(ValueError):
            read(rank)
        if rank == 2:
            os._exit(1)
        dist.barrier()

    run = launch(work, nprocs=3, check=False)
    found = [[what.error for what in rank.caught or ()] for rank in run.ranks]
    assert found[2] == ["ValueError: bad sample 2"]
    assert [each[0] for each in found] == [f"ValueError: bad sample {rank}" for rank in range(3)]


@needs_monitoring
def test_a_tool_of_the_learner_s_has_its_number() -> None:
    def work(_: int) -> list[str]:
        monitoring: Any = vars(sys)["monitoring"]
        tools = [monitoring.get_tool(number) for number in range(6)]
        monitoring.use_tool_id(3, "mine")
        return [tool for tool in tools if tool is not None]

    assert launch(work, nprocs=1).values == [["ddp_lessons"]]
