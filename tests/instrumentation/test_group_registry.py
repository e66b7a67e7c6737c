"""Groups have the same name on all members, also after groups were left and made again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ddp_lessons import Run, launch
from ddp_lessons.instrumentation.group_registry import Group, groups
from ddp_lessons.wire.ops import GROUP_CALLS

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def seen(run: Run, rank: int = 0) -> list[tuple[str | None, int | None]]:
    """The group and number of every call of a rank, except for joining and leaving."""
    spans = run.ranks[rank].spans
    return [(s.group, s.seq) for s in spans if s.op not in (None, *GROUP_CALLS)]


def x() -> torch.Tensor:
    return torch.ones(1)


@pytest.mark.parametrize(
    ("ranks", "description", "name"),
    [
        ([0], None, "ranks 0"),
        ([3, 1, 0], None, "ranks 0 1 3"),
        ([0, 1, 2], None, "ranks 0-2"),
        ([0, 2, 3], "rows", "rows: ranks 0 2 3"),
        ([0, 1, 2, 3], "all: ranks 7 #2", "all: ranks 7 #2: ranks 0-3"),
        ([0, 1], "w" * 500, "w" * 50 + ": ranks 0 1"),
    ],
)
def test_a_group_is_named_by_its_ranks(ranks: list[int], description: Any, name: str) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        group = dist.new_group(ranks, group_desc=description)
        if rank in ranks:
            dist.all_reduce(x(), group=group)
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    for rank in range(4):
        assert seen(run, rank) == ([(name, 0)] if rank in ranks else [])
    assert {share.last_rank in ranks for share in run.waits()} == {True}


def test_a_group_that_is_destroyed_and_made_again_is_another() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for _ in range(30):  # so that an id is used again
            group = dist.new_group([0, 1])
            dist.all_reduce(x(), group=group)
            dist.all_reduce(x(), group=group)
            dist.destroy_process_group(group)
            del group
        dist.destroy_process_group()

    run = launch(work)
    names = ["ranks 0 1", *(f"ranks 0 1 #{number}" for number in range(2, 31))]
    assert seen(run, 0) == seen(run, 1) == [(name, seq) for name in names for seq in (0, 1)]


def test_a_world_that_is_left_and_joined_again(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        for number in range(3):
            # Over env:// a quick rank may find the store that rank 0 is about to close.
            place = f"file://{tmp_path}/{number}"
            dist.init_process_group("gloo", place, rank=rank, world_size=2)
            dist.all_reduce(x())
            dist.all_reduce(x(), group=dist.new_group([0, 1]))
            dist.all_reduce(x(), group=dist.group.WORLD)
            dist.destroy_process_group()

    run = launch(work)
    expected: list[tuple[str, int]] = []
    for again in ("", " #2", " #3"):
        expected += [(f"world{again}", 0), (f"ranks 0 1{again}", 0), (f"world{again}", 1)]
    assert seen(run, 0) == seen(run, 1) == expected
    assert all(share.last_rank is not None for share in run.waits())


def test_worlds_of_fewer_ranks_than_were_started_are_not_taken_for_one(tmp_path: Path) -> None:
    """Their ranks are unknown, so their calls are not matched with each other."""

    def work(rank: int) -> None:
        pair, place = divmod(rank, 2)
        where = f"file://{tmp_path}/{pair}"
        dist.init_process_group("gloo", where, rank=place, world_size=2)
        dist.all_reduce(torch.ones(1 + pair))
        dist.barrier(dist.new_group([0, 1]))
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    for rank in range(4):
        own = f"own world of rank {rank}"
        assert seen(run, rank) == [(own, 0), (f"ranks 0 1 in {own}", 0)]
    assert run.warnings == []
    assert all(share.wait_ns == 0 for share in run.waits())


def test_subgroups_of_equal_size() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        mine, _ = dist.new_subgroups(2)
        dist.barrier(mine)
        pairs = dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])
        dist.barrier(pairs[0])
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    assert seen(run, 0) == [("ranks 0 1", 0), ("ranks 0 3", 0)]
    found = [str(name).rpartition(": ")[2] for name, _ in seen(run, 2)]
    assert found == ["ranks 2 3", "ranks 1 2"]


def test_groups_of_a_mesh() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for name in ("tp", "dp", "tp"):
            dist.all_reduce(x(), group=mesh.get_group(name))
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    for rank, (row, column) in enumerate([("0 1", "0 2"), ("0 1", "1 3"), ("2 3", "0 2")]):
        found = [(str(name).partition(": ")[2], seq) for name, seq in seen(run, rank)]
        assert found == [(f"ranks {row}", 0), (f"ranks {column}", 0), (f"ranks {row}", 1)]


def test_what_is_no_group_or_no_more_gets_torch_s_own_answer() -> None:
    def work(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        new = torch.distributed.distributed_c10d._new_group_with_tag  # our wrapper never sees it
        never_named, named = new([0, 1], pg_tag="one"), dist.new_group([0, 1])
        for group in (never_named, named):
            dist.destroy_process_group(group)
        answers = [answer(group) for group in (never_named, named, "nonsense", 5)]
        left = new([0, 1], pg_tag="two")
        dist.destroy_process_group()
        return [*answers, answer(left), answer(None)]

    def answer(group: Any) -> str:
        plain = torch.distributed.all_reduce.__wrapped__
        said = []
        for call in (plain, dist.all_reduce):
            try:
                said.append(str(call(x(), group=group)))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        assert said[0] == said[1]
        return said[1].partition(":")[0]

    run = launch(work)
    assert run.values[0] == ["None", "None", "ValueError", "ValueError", "None", "ValueError"]


def test_a_number_that_is_taken_back_is_given_again() -> None:
    group = Group(lambda: None, "world", [0, 1])
    assert [group.next(), group.next(), group.next((0, 1, 0))] == [0, 1, 0]
    group.take_back(1, ValueError("no tensor"))
    group.take_back(0, ValueError("no tensor"), (0, 1, 0))
    assert [group.next(), group.next(), group.next((0, 1, 0)), group.next((1, 0, 0))] == [
        1,
        2,
        0,
        0,
    ]


def test_outside_a_worker_no_group_is_known() -> None:
    assert groups.of(None) is None
    assert groups.world is None


def test_the_number_of_a_call_that_lost_another_rank_is_kept() -> None:
    group = Group(lambda: None, "world", [0, 1])
    assert group.next() == 0
    group.take_back(0, RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:25675."))
    assert group.next() == 1
