"""Verdicts on ranks that failed or died: real processes, without a GPU."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, WorkerDied, WorkerFailed, WorkersHung, launch
from ddp_lessons.diagnosis.failures import last_call, other_ranks
from ddp_lessons.recorded_run import INTERRUPTED
from tests.support.by_hand import SECOND, error, lost, made, record, run_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Output of a kernel, NCCL's watchdog and the C++ runtime on an H100 (torch 2.11), shortened.
OF_A_GPU = """\
/src/native/cuda/IndexKernel.cu:111: operator(): block: [0,0,0], thread: [0,0,0] Assertion \
`index < sizes[i] && "index out of bounds"` failed.
/src/native/cuda/IndexKernel.cu:111: operator(): block: [0,0,0], thread: [1,0,0] Assertion \
`index < sizes[i] && "index out of bounds"` failed.
[rank0]: Process group watchdog thread terminated with exception: CUDA error: device-side \
assert triggered
Search for `cudaErrorAssert' in the documentation for more information.

Exception raised from query at /src/c10/cuda/CUDAEvent.h:111 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7fb6 in libc10.so)
frame #1: <unknown function> + 0xc114 (0x7fb6 in libc10_cuda.so)
frame #2: <unknown function> + 0x129ecc (0x7fb6 in libc.so.6)

"""


def writes_and_aborts(rank: int, text: str) -> None:
    os.write(2, text.encode())
    os.abort()


@pytest.mark.ranks
def test_an_error_of_the_gpu_that_ends_the_process_is_told_without_cpp_stacks() -> None:
    text = launch(writes_and_aborts, (OF_A_GPU,), nprocs=1, check=False).explain()
    assert "NCCL's watchdog ended the process" in text
    assert "index out of bounds" in text
    assert "device-side assert" in text
    assert "CUDA_LAUNCH_BLOCKING" in text
    assert text.count("Assertion") == 1
    assert "frame #" not in text


@pytest.mark.ranks
def test_a_cpp_stack_hides_nothing_of_what_was_said_before_it() -> None:
    said = "terminate called after throwing an instance of 'Oops'\n"
    frames = "".join(f"frame #{n}: <unknown function> + 0x{n}\n" for n in range(20))
    text = launch(writes_and_aborts, (said + frames,), nprocs=1, check=False).explain()
    assert "instance of 'Oops'" in text
    assert "frame #" not in text
    assert "CUDA" not in text


@pytest.mark.ranks
def test_an_error_of_the_gpu_that_python_raises_is_told_with_what_the_kernel_said() -> None:
    def work(rank: int) -> None:
        os.write(2, OF_A_GPU.encode())
        raise RuntimeError("CUDA error: device-side assert triggered")

    text = launch(work, nprocs=1, check=False).explain()
    assert 'raise RuntimeError("CUDA error' in text
    assert "index out of bounds" in text
    assert "CUDA_LAUNCH_BLOCKING" in text


@pytest.mark.ranks
def test_of_a_long_chain_both_ends_are_shown_and_the_rest_is_counted() -> None:
    def work(rank: int) -> None:
        last: Exception | None = None
        for number in range(2000):
            try:
                raise ValueError(f"try {number}") from last
            except ValueError as error:
                last = error
        assert last is not None
        raise last

    run = launch(work, nprocs=1, check=False)
    text = run.explain()
    assert run.verdict is not None
    assert run.verdict.kind == "raised"
    shown = [number for number in range(2000) if f"ValueError: try {number}\n" in text + "\n"]
    assert shown == [*range(5), *range(1995, 2000)]
    assert "[... 1990 exceptions left out ...]" in text
    assert text.count("---->") == 11  # the newest has two frames


@pytest.mark.ranks
def test_exceptions_that_cause_each_other_in_a_circle() -> None:
    def work(rank: int) -> None:
        one, other = ValueError("one"), ValueError("other")
        one.__cause__, other.__cause__ = other, one
        raise one

    text = launch(work, nprocs=1, check=False).explain()
    assert text.count("ValueError: other") == 1


@pytest.mark.ranks
def test_a_task_group_is_shown_with_its_parts_their_lines_and_causes() -> None:
    async def read(name: str) -> None:
        try:
            os.environ[name]
        except KeyError as error:
            raise OSError(f"no {name}") from error

    async def write() -> None:
        raise TypeError("not text")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(read("shard 7"))
            group.create_task(write())

    text = launch(lambda rank: asyncio.run(both()), nprocs=1, check=False).explain()
    assert "raised ExceptionGroup: unhandled errors in a TaskGroup (2 sub-exceptions)" in text
    first, second = text.index("Part 1 of 2:"), text.index("Part 2 of 2:")
    assert "KeyError: 'shard 7'" in text[first:second]
    assert "That caused the next exception:" in text[first:second]
    assert 'raise OSError(f"no {name}") from error' in text[first:second]
    assert 'raise TypeError("not text")' in text[second:]


class MeetsAtTheEnd:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        dist.barrier()


def train_and_meet(rank: int, how: str, patience: dict[int, float]) -> None:
    """Rank 1's exception is on its way when it meets rank 0, which does not come."""
    timeout = datetime.timedelta(seconds=patience.get(rank, 5))
    dist.init_process_group("gloo", timeout=timeout)
    if rank != 1:
        dist.all_reduce(torch.ones(1))

    def train() -> None:
        raise ValueError("bad sample 17")

    if how == "finally":
        try:
            train()
        finally:
            dist.barrier()
    elif how == "with":
        with MeetsAtTheEnd():
            train()
    elif how == "raise":
        try:
            train()
        except Exception:
            dist.barrier()
            raise
    else:
        try:
            train()
        except Exception:
            dist.barrier()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["finally", "with", "raise", "handled"])
@pytest.mark.parametrize("patience", [{1: 1}, {0: 1}], ids=["it", "other"])
def test_an_exception_on_its_way_is_told_though_a_barrier_failed_later(
    how: str, patience: dict[int, float]
) -> None:
    """It was raised before the other rank gave up, whichever gives up first."""
    run = launch(train_and_meet, (how, patience), nprocs=2, check=False)
    assert run.verdict is not None
    text = run.explain()
    assert "ValueError: bad sample 17" in text
    assert run.verdict.frame is not None
    if how == "handled":
        assert "rank 1 called it while handling ValueError: bad sample 17" in text
        assert "An exception that a rank handles alone" in text
        return
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", (1,))
    assert run.verdict.title == "rank 1 of 2 raised ValueError: bad sample 17"
    assert run.verdict.frame.source == 'raise ValueError("bad sample 17")'
    assert "Rank 0 then lost its partner" in text


def give_up_and_meet(rank: int) -> None:
    """Rank 0 gives up in an all_reduce; then rank 1 fails, whom rank 0 still wants to meet."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5 if rank else 1))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["gave up"])
        raise ValueError("bad sample 17")
    try:
        dist.all_reduce(torch.ones(1))
    finally:
        store.set("gave up", "")
        dist.barrier()


@pytest.mark.ranks
def test_a_rank_gave_up_where_it_first_lost_the_others() -> None:
    run = launch(give_up_and_meet, nprocs=2, check=False)
    assert run.ranks[0].error is not None
    assert run.ranks[0].error.previous is not None
    assert run.verdict is not None
    assert run.verdict.title == "rank 1 of 2 raised ValueError: bad sample 17"
    assert "Rank 0 had given up before, waiting in all_reduce" in run.explain()


@pytest.mark.ranks
def test_groups_that_are_wide_or_deep_stay_readable() -> None:
    def wide(rank: int) -> None:
        raise ExceptionGroup("wide", [ValueError(f"part {n}") for n in range(10_000)])

    def deep(rank: int) -> None:
        error: Exception = ValueError("innermost")
        for n in range(5000):
            error = ExceptionGroup(f"level {n}", [error])
        try:
            raise error
        finally:
            error = ValueError()  # freeing all levels would overflow the C stack: a bug in Python

    text = launch(wide, nprocs=1, check=False).explain()
    assert "Part 5 of 10000:" in text
    assert "[... 9995 parts left out ...]" in text
    run = launch(deep, nprocs=1, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "raised"
    assert "[... 1 part left out ...]" in run.explain()
    assert len(run.explain()) < 10_000


class Unspeakable(Exception):
    def __str__(self) -> str:
        sys.exit("in str")

    __repr__ = __str__

    def __reduce__(self) -> Any:
        sys.exit("in reduce")


class ExitsWhenLoaded(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, (5,)


class Enormous(Exception):
    def __str__(self) -> str:
        return "x" * 100_000_000


def raises(error: Callable[[], BaseException]) -> Callable[[int], None]:
    def work(rank: int) -> None:
        raise error()

    return work


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Unspeakable, "Unspeakable: <exception str() failed>"),
        (ExitsWhenLoaded, "ExitsWhenLoaded"),
        (Enormous, "Enormous: xxx"),
        (lambda: ValueError("x" * 100_000_000), "raised ValueError: xxx"),
        (lambda: SyntaxError("bad", ("model.txt", 3, 1, "x = (", 3, 2)), "raised SyntaxError: bad"),
        (lambda: KeyboardInterrupt("own"), "raised KeyboardInterrupt: own"),
        (lambda: GeneratorExit("own"), "raised GeneratorExit: own"),
        (lambda: SystemExit(2**70), f"raised SystemExit: {2**70}"),
    ],
    ids=range(8),
)
def test_odd_exceptions_are_shown_with_their_line(
    error: Callable[[], BaseException], said: str
) -> None:
    run = launch(raises(error), nprocs=1, check=False)
    text = run.explain()
    assert said in text
    assert "---->" in text
    assert "raise error()" in text
    assert len(text) < 22_000
    assert run.verdict is not None
    assert run.verdict.kind == "raised"


class ExitsInWorkers:
    """An object that ends the process that loads it."""

    def __reduce__(self) -> Any:
        return sys.exit, (0,)


@pytest.mark.ranks
def test_sys_exit_while_an_argument_is_loaded_is_a_failure() -> None:
    run = launch(print, (ExitsInWorkers(),), nprocs=1, check=False)
    assert not run.ok
    assert "raised SystemExit: 0" in run.explain()
    assert "before print was called" in run.explain()


@pytest.mark.ranks
def test_sys_exit_in_a_module_that_the_function_needs_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text(
        "import sys, os\nif 'RANK' in os.environ:\n    sys.exit()\ndef work(rank): return rank\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("leaves").work
    run = launch(work, nprocs=1, check=False)
    assert not run.ok
    assert "raised SystemExit" in run.explain()
    assert "leaves.py, line 3" in run.explain()
    assert "before work was called" in run.explain()


@pytest.mark.ranks
def test_a_value_that_exits_when_it_is_pickled_or_loaded_is_named() -> None:
    class Pickled:
        def __reduce__(self) -> Any:
            sys.exit("while pickled")

    assert "SystemExit: while pickled" in launch(lambda rank: Pickled(), check=False).explain()
    assert "SystemExit: 0" in launch(lambda rank: ExitsInWorkers(), check=False).explain()


# Ranks of a script that ended without an exit status; records are made by hand


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def statuses(run: Run) -> list[str]:
    return [rank.status for rank in run.ranks]


def two_nodes(*, hosts: tuple[str, str]) -> Run:
    """Both ranks of node 1 have no exit status, and those of node 0 lost them."""
    first = [lost(made(r, "barrier", "all_reduce"), r, 4, host=hosts[0]) for r in (0, 1)]
    gone = [record(made(r, "barrier"), r, 4, node=1, host=hosts[1]) for r in (2, 3)]
    return run_of([*first, *gone])


def test_one_rank_that_is_gone_is_the_cause() -> None:
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(made(1, "barrier"), 1, 2)])
    assert statuses(run) == ["raised", "died"]
    assert kind(run) == ("killed", (1,))
    assert isinstance(run.error, WorkerDied)
    text = run.explain()
    assert "rank 1 of 2 ended without an exit status" in text
    assert "Its last call was barrier: /home/learner/train.py, line 7" in text
    assert "Rank 0 then lost its partner, waiting in all_reduce" in text


def test_a_rank_that_was_killed_in_a_call() -> None:
    calls = made(1, "barrier", "all_reduce", open=True)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(calls, 1, 2)])
    assert kind(run) == ("killed", (1,))
    assert "It was in all_reduce: /home/learner/train.py, line 8" in run.explain()


def test_a_rank_that_was_killed_when_it_was_ahead() -> None:
    ahead = made(1, "barrier", "all_reduce", "barrier", open=True)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(ahead, 1, 2)])
    assert statuses(run) == ["raised", "died"]  # its call could not complete, but this is no hang
    assert kind(run) == ("killed", (1,))


def test_the_earliest_of_two_silent_ranks_on_two_nodes_is_the_cause() -> None:
    first = [lost(made(0, "barrier", "all_reduce", "barrier"), 0, 4), record(made(1), 1, 4)]
    second = [
        record(made(2, "barrier", "all_reduce"), 2, 4, node=1, host="host1"),
        lost(made(3, "barrier", "all_reduce", "barrier"), 3, 4, node=1, host="host1"),
    ]
    run = run_of([*first, *second])
    assert kind(run) == ("killed", (1,))
    assert "rank 1 of 4 ended without an exit status" in run.explain()
    assert "rank 2 failed: " in run.explain()  # when is not known


def test_all_ranks_of_a_node_are_told_as_one() -> None:
    run = two_nodes(hosts=("host0", "host1"))
    assert kind(run) == ("killed", (2, 3))
    text = run.explain()
    assert "node 1 (host1) is gone: ranks 2 and 3 of 4 ended without an exit status" in text
    assert "its agent (torchrun)" in text.lower()
    assert "after barrier at /home/learner/train.py, line 7" in text
    assert "Ranks 0 and 1 then lost their partner, waiting in all_reduce" in text


def test_a_host_that_has_two_nodes_does_not_tell_them_apart() -> None:
    text = two_nodes(hosts=("host0", "host0")).explain()
    assert "node 1 is gone" in text
    assert "host0" not in text


def test_all_ranks_of_all_nodes() -> None:
    where = [(0, "host0"), (0, "host0"), (1, "host1"), (1, "host1")]
    run = run_of(
        record(made(rank, "barrier"), rank, 4, node=node, host=host)
        for rank, (node, host) in enumerate(where)
    )
    assert statuses(run) == ["died"] * 4
    assert kind(run) == ("killed", (0, 1, 2, 3))
    assert "all 4 ranks ended without an exit status" in run.explain()
    assert "ranks 0, 1, 2 and 3 ended outside torch.distributed, after barrier" in run.explain()
    assert "node 1" not in run.explain()


def test_the_only_rank() -> None:
    run = run_of([record(made(0, "barrier"), 0, 1)])
    assert kind(run) == ("killed", (0,))
    assert "the rank ended without an exit status" in run.explain()


def test_beside_a_rank_that_raised_its_own_error_it_was_stopped() -> None:
    raised = error("ValueError: a bad batch", 9)
    run = run_of([record(made(0, "barrier"), 0, 2), record([], 1, 2, raised=raised)])
    assert statuses(run) == ["stopped", "raised"]
    assert kind(run) == ("raised", (1,))
    assert isinstance(run.error, WorkerFailed)
    assert "rank 1 of 2 raised ValueError: a bad batch" in run.explain()
    assert "rank 0 was stopped" in run.explain()


def test_beside_an_interrupted_rank_it_was_stopped() -> None:
    raised = error("KeyboardInterrupt", 9)
    run = run_of([record(made(r, "barrier"), r, 2, raised=raised if r else None) for r in (0, 1)])
    assert statuses(run) == ["stopped", "stopped"]
    assert [rank.exitcode for rank in run.ranks] == [None, INTERRUPTED]
    assert isinstance(run.error, WorkersHung)
    assert "rank 0 is outside torch.distributed, after barrier at" in run.explain()
    assert "rank 1 is idle: /home/learner/train.py, line 9" in run.explain()


def test_calls_that_can_never_be_met_are_a_hang_that_was_killed() -> None:
    run = run_of(
        [
            record(made(0, "barrier", "all_reduce", open=True), 0, 2),
            record(made(1, "barrier", "broadcast", open=True), 1, 2),
        ]
    )
    assert statuses(run) == ["stopped", "stopped"]
    assert kind(run)[0] == "different collectives"
    assert isinstance(run.error, WorkersHung)
    assert "rank 0 waits in all_reduce: /home/learner/train.py, line 8" in run.explain()
    assert "rank 1 waits in broadcast: /home/learner/train.py, line 8" in run.explain()


def test_a_rank_that_returned_while_another_waits_is_a_hang_that_was_killed() -> None:
    waits = record(made(0, "barrier", "all_reduce", open=True), 0, 2)
    run = run_of([waits, record(made(1, "barrier"), 1, 2, returned=True)])
    assert statuses(run) == ["stopped", "returned"]
    assert kind(run) == ("returned early", (1,))


def test_calls_that_were_being_met_are_no_hang() -> None:
    run = run_of(record(made(r, "barrier", "all_reduce", open=True), r, 2) for r in (0, 1))
    assert statuses(run) == ["died", "died"]
    assert kind(run) == ("killed", (0, 1))
    assert "ranks 0 and 1 ended in all_reduce" in run.explain()


def test_a_job_that_still_hangs_tells_how_to_look_into_the_awaited_rank() -> None:
    waits = record(made(0, "barrier", open=True), 0, 2, alive=True)
    away = record([], 1, 2, alive=True)
    run = run_of([waits, away])
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("no answer", (1,))
    assert "rank 0 still runs, waiting in barrier" in repr(run)
    assert "`py-spy dump --pid 101` on host0 shows where rank 1 is now" in run.explain()


# Evidence beside the cause


BAD = error("ValueError: a bad batch", 9)


@pytest.mark.parametrize(
    ("open", "line"),
    [
        (True, "It was in all_reduce: /home/learner/train.py, line 8"),
        (False, "Its last call was all_reduce: /home/learner/train.py, line 8"),
    ],
)
def test_the_last_call(open: bool, line: str) -> None:
    calls = made(1, "barrier", "all_reduce", open=open)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(calls, 1, 2)])
    assert last_call(run, run.ranks[1]) == [line]


def test_a_rank_that_called_nothing() -> None:
    run = run_of([record(made(0, "barrier"), 0, 2), record([], 1, 2)])
    assert last_call(run, run.ranks[1]) == []


def test_nobody_else() -> None:
    run = run_of([record([], 0, 1, raised=BAD)])
    assert other_ranks(run, [0]) == []


def test_those_that_returned_are_not_told_of() -> None:
    records = [record([], 0, 2, raised=BAD), record([], 1, 2, returned=True)]
    assert other_ranks(run_of(records), [0]) == []


def test_ranks_that_lost_their_partner_at_one_line_share_a_line() -> None:
    at_one_line = [lost(made(r, "barrier"), r, 4) for r in (0, 1)]
    elsewhere = lost(made(2, "barrier", "all_reduce"), 2, 4)
    run = run_of([*at_one_line, elsewhere, record([], 3, 4, raised=BAD)])
    at = "/home/learner/train.py, line"
    assert other_ranks(run, [3]) == [
        "",
        f"Ranks 0 and 1 then lost their partner, waiting in barrier, {at} 7.",
        f"Rank 2 then lost its partner, waiting in all_reduce, {at} 8.",
    ]


def test_an_error_of_its_own_came_later() -> None:
    other = error("KeyError: 'labels'", 12)
    first, second = record([], 0, 2, raised=BAD), record([], 1, 2, raised=other)
    for later, when in ((0, ""), (1, " later")):
        run = run_of([first, replace(second, ended_ns=20 * SECOND + later)])
        assert other_ranks(run, [0]) == ["", f"rank 1 failed{when}: raised KeyError: 'labels'"]


def test_of_many_that_were_stopped_four_are_named() -> None:
    calls = {rank: made(rank, "barrier", open=True) for rank in range(7)}
    run = run_of(record(calls[r], r, 7) if r else record([], 0, 7, raised=BAD) for r in range(7))
    first, *named, rest = other_ranks(run, [0])
    assert first == ""
    where = "waiting in barrier, /home/learner/train.py, line 7"
    assert named == [f"rank {r} was stopped, {where}" for r in (1, 2, 3, 4)]
    assert rest == "... and 2 more ranks were stopped"


def test_the_exception_behind_an_exit_in_an_except_is_the_one_to_tell() -> None:
    def work(rank: int) -> None:
        try:
            assert rank, "no data"
        except AssertionError:
            raise SystemExit(1)  # noqa: B904

    run = launch(work, check=False)
    assert run.verdict is not None
    assert "rank 0 of 2 raised AssertionError: no data" in run.verdict.title
    assert run.verdict.frame is not None
    assert run.verdict.frame.source.startswith("assert rank")
