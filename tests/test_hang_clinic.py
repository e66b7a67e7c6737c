"""What is said of the harder patients of lesson 10."""

from __future__ import annotations

import re
import sys
import time
from datetime import timedelta

import cloudpickle
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch, plots

matplotlib.use("agg")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def evaluates(rank: int, norm: bool, through_ddp: bool) -> None:
    dist.init_process_group("gloo")
    layers = [nn.Linear(4, 8), *[nn.BatchNorm1d(8)] * norm, nn.Linear(8, 1)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    model(torch.randn(16, 4)).sum().backward()
    if rank == 0:
        model.eval()
        with torch.no_grad():
            (model if through_ddp else model.module)(torch.randn(16, 4))
    dist.barrier()
    dist.destroy_process_group()


def one_more(rank: int) -> None:
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def swapped(rank: int) -> None:
    dist.init_process_group("gloo")
    x = torch.ones(1)
    if rank == 1:
        dist.broadcast(x, src=0)
        dist.all_reduce(x)
    else:
        dist.all_reduce(x)
        dist.broadcast(x, src=0)
    dist.destroy_process_group()


def unlike(rank: int) -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(12 if rank else 20))  # gloo aborts
    dist.destroy_process_group()


def late(rank: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    time.sleep(2 if rank == 1 else 0)
    dist.barrier()
    dist.destroy_process_group()


def test_a_rank_alone_in_ddps_forward_is_told_of_its_collectives() -> None:
    run = launch(evaluates, (True, True), timeout=2, check=False)
    assert run.verdict is not None
    assert "ranks 0 and 1 wait in DistributedDataParallel and barrier" in run.verdict.title
    assert "model.module" in run.verdict.advice


@pytest.mark.parametrize(("norm", "through_ddp"), [(True, False), (False, True)])
def test_a_validation_without_buffers_or_ddp_goes_through(norm: bool, through_ddp: bool) -> None:
    assert launch(evaluates, (norm, through_ddp), timeout=5, check=False).ok


@pytest.mark.parametrize(
    ("fn", "kind", "odd"),
    [(swapped, "different collectives", 1), (unlike, "unlike tensors", 0),
     (one_more, "skipped collective", 0)],
)  # fmt: skip
def test_what_detail_notices_is_the_same_as_without_it(fn: object, kind: str, odd: int) -> None:
    run = launch(fn, nprocs=3, check=False, env=DETAIL)  # type: ignore[arg-type]
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == (kind, (odd,))
    assert "Detected mismatch between collectives" in run.verdict.text()


def test_unlike_tensors_are_shown_where_the_calls_are() -> None:
    run = launch(unlike, nprocs=3, check=False)
    text = run.explain()
    assert re.search(r"rank 0 calls all_reduce with float32 \(20,\): .*line \d+", text)
    assert re.search(r"ranks 1 and 2 call all_reduce with float32 \(12,\): .*line \d+", text)


@pytest.mark.parametrize("nprocs", [2, 3])
def test_the_late_rank_is_named_not_those_who_gave_up(nprocs: int) -> None:
    run = launch(late, nprocs=nprocs, check=False)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("gave up waiting", (1,))
    assert "rank 1 came to barrier when others had given up" in run.verdict.title


def test_the_board_compares_tensors_of_the_same_function_only() -> None:
    ax = plots.hang_board(launch(one_more, nprocs=3, check=False))
    written = {text.get_text() for text in ax.texts}
    assert {"barrier", "all_reduce"} <= written
    assert not any("float32" in text for text in written)
    plt.close(ax.figure)
