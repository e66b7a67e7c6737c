"""The first mismatch of ranks' calls: hangs that it explains, and silently wrong numbers."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, WorkersHung, launch

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def hung(fn: Any, nprocs: int = 3) -> Run:
    with pytest.raises(WorkersHung) as caught:
        launch(fn, nprocs=nprocs, timeout=30)
    assert isinstance(caught.value.run, Run)
    return caught.value.run


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def source(run: Run) -> str:
    assert run.verdict is not None
    assert run.verdict.frame is not None
    return run.verdict.frame.source


def test_a_barrier_for_rank_zero_only() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()
        dist.all_reduce(torch.ones(1))

    run = hung(work)
    assert kind(run) == ("skipped collective", (0,))
    assert source(run) == "dist.barrier()"
    assert "rank 0 calls barrier at" in run.explain()
    assert "which ranks 1 and 2 skipped" in run.explain()


def test_a_barrier_that_one_rank_skips_in_a_loop() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(3):
            if (rank, step) != (1, 2):
                dist.all_reduce(torch.ones(1))
            dist.barrier()

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    assert source(run) == "dist.all_reduce(torch.ones(1))"


def test_branches_in_another_order() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        x = torch.ones(1)
        if rank == 1:
            dist.broadcast(x, 0)
            dist.all_reduce(x)
        else:
            dist.all_reduce(x)
            dist.broadcast(x, 0)

    run = hung(work)
    assert kind(run) == ("different collectives", (1,))
    assert "ranks 0 and 2 call all_reduce and rank 1 calls broadcast from rank 0" in run.explain()


def test_of_two_ranks_neither_is_blamed() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()
        else:
            dist.all_reduce(torch.ones(1))

    run = hung(work, 2)
    assert kind(run) == ("different collectives", (0, 1))
    assert run.error is not None
    assert run.error.rank is None


def test_roots_that_differ() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.broadcast(torch.ones(1), 1 if rank == 2 else 0)

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("different collectives", (2,))
    assert "rank 2 calls broadcast from rank 1" in run.explain()


def test_tensors_of_another_size() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(3 if rank == 1 else 2))
        dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("tensor mismatch", (1,))
    assert "float32 (2,) on ranks 0 and 2 and float32 (3,) on rank 1" in run.explain()
    assert "rank 1 calls all_reduce with float32 (3,): " in run.explain()


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tensors_of_other_bytes_where_a_rank_has_returned(odd: int, ranks: int) -> None:
    """The rank with more bytes is done with what it got; gloo aborts those that got too much."""

    def work(rank: int) -> Any:
        dist.init_process_group("gloo")
        x = torch.tensor(3) if rank == odd else torch.tensor(2.0)
        dist.all_reduce(x)
        dist.destroy_process_group()
        return x.item()

    for _ in range(3):  # who ends how is chance
        run = launch(work, nprocs=ranks, check=False)
        assert kind(run) == ("tensor mismatch", (0, 1) if ranks == 2 else (odd,))
        assert source(run) == "dist.all_reduce(x)"
        assert f"int64 () on rank {odd}" in run.explain()


def test_calls_that_changed_places_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> tuple[float, float]:
        dist.init_process_group("gloo")
        ones, hundreds = torch.ones(1), torch.full((1,), 100.0)
        if rank == 1:
            dist.all_reduce(hundreds)
            dist.all_reduce(ones)
        else:
            dist.all_reduce(ones)
            dist.all_reduce(hundreds)
        dist.destroy_process_group()
        return ones.item(), hundreds.item()

    run = launch(work, nprocs=3)
    assert run.values[0] == (102.0, 201.0)
    (warning,) = run.warnings
    assert (warning.kind, warning.ranks) == ("different collectives", (1,))
    assert str(warning).startswith("Warning: call 1 was not the same on all ranks")
    assert "dist.all_reduce(hundreds)" in warning.text
    assert capsys.readouterr().out == f"{warning}\n"
    assert run.explain().endswith(str(warning))


def test_dtypes_that_differ_are_warned_of() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(2, dtype=torch.int32 if rank else torch.float32))
        dist.destroy_process_group()

    (warning,) = launch(work).warnings
    assert "float32 (2,) on rank 0 and int32 (2,) on rank 1" in warning.text


def test_a_skip_that_shifts_all_later_calls() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(3):
            if (rank, step) != (0, 1):
                dist.all_reduce(torch.ones(1))
            dist.all_reduce(torch.zeros(1))

    run = launch(work, nprocs=3, check=False)  # rank 0 returns, one call short
    assert kind(run) == ("skipped collective", (0,))
    assert source(run) == "dist.all_reduce(torch.ones(1))"


def healthy_roles(rank: int) -> None:
    dist.init_process_group("gloo")
    x = torch.ones(2)
    for root in range(dist.get_world_size()):
        if rank == root:
            dist.broadcast(x, root)
        else:
            dist.broadcast(x.clone(), root)
    if rank == 0:
        dist.all_reduce(x)
    else:
        dist.all_reduce(x * 2)
    dist.all_reduce(x.view(1, 2) if rank else x)  # another shape of the same size is fine
    dist.destroy_process_group()


def healthy_turns(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(4):
        if (step + rank) % 2:
            dist.all_reduce(torch.ones(1))
        else:
            dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def healthy_helpers(rank: int) -> None:
    def mean(x: torch.Tensor) -> torch.Tensor:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return x / 2

    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    for _ in range(3):
        mean(torch.ones(3))
        if rank < 2:
            dist.barrier(pair)
    dist.all_gather_object([None] * dist.get_world_size(), "x" * rank)  # of several sizes
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [healthy_roles, healthy_turns, healthy_helpers])
def test_healthy_programs_give_no_warning(work: Any) -> None:
    run = launch(work, nprocs=3)
    assert run.ok
    assert run.warnings == []


def test_leaving_the_group_is_for_all() -> None:
    def work(rank: int, leavers: tuple[int, ...]) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank in leavers:
            dist.destroy_process_group()

    (warning,) = launch(work, ((0, 2),), nprocs=3).warnings
    assert "rank 1 returned without destroy_process_group" in warning.text
    assert launch(work, ((),), nprocs=3).warnings == []


def test_a_subgroup_may_be_left_by_some() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        pair = dist.new_group([0, 1])
        if rank == 1:
            dist.destroy_process_group(pair)
        dist.barrier()
        dist.destroy_process_group()

    assert launch(work, nprocs=3).warnings == []


def test_a_call_in_an_except_block_shows_what_is_handled_there() -> None:
    """The checkpoint of a rank that failed alone would hide why it failed."""

    def save() -> None:
        dist.all_gather_into_tensor(torch.ones(3), torch.ones(1))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            for step in range(3):
                save()  # now its line is known
                if (rank, step) == (1, 2):
                    raise ValueError("bad sample 17")
                dist.all_reduce(torch.ones(1))
        except ValueError:
            save()
            raise

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    text = run.explain()
    assert "rank 1 called it while handling ValueError: bad sample 17: " in text
    assert 'raise ValueError("bad sample 17")' in text
    assert "An exception that a rank handles alone" in text
    assert [rank.handling is None for rank in run.ranks] == [True, False, True]


def test_what_was_handled_before_is_no_evidence() -> None:
    """Every rank handles an exception on the way; the hang has another reason."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            raise FileNotFoundError("no checkpoint yet")
        except FileNotFoundError:
            dist.barrier()
        if rank == 0:
            dist.barrier()
        dist.all_reduce(torch.ones(1))

    run = hung(work)
    assert kind(run) == ("skipped collective", (0,))
    assert "FileNotFoundError" not in run.explain()
