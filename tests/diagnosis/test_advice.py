"""What torch refuses comes with what to do instead."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ddp_lessons import launch
from ddp_lessons.diagnosis import advice
from tests.support.checkout import ROOT

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def joined(fn: Callable[[int], Any]) -> Callable[[int], Any]:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        fn(rank)

    return work


@joined
def root_by_place_in_group(rank: int) -> None:
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    dist.broadcast(torch.ones(1), src=0, group=pair)
    dist.barrier()


@joined
def joins_twice(rank: int) -> None:
    dist.init_process_group("gloo")


def joins_never(rank: int) -> None:
    dist.barrier()


@joined
def communicates_after_leaving(rank: int) -> None:
    dist.destroy_process_group()
    dist.barrier()


def gives_seconds(rank: int) -> None:
    dist.init_process_group("gloo", timeout=30)  # type: ignore[arg-type, unused-ignore]


@joined
def goes_to_the_gpu(rank: int) -> None:
    torch.ones(1).cuda()


@joined
def chooses_a_gpu(rank: int) -> None:
    torch.cuda.set_device(rank)


@joined
def names_devices(rank: int) -> None:
    DistributedDataParallel(nn.Linear(2, 2), device_ids=[rank])


@joined
def synchronises_on_the_cpu(rank: int) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(2))
    model(torch.ones(3, 2))


@joined
def has_one_sample(rank: int) -> None:
    DistributedDataParallel(nn.BatchNorm1d(2))(torch.ones(1, 2))


class Killer:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def loses_a_worker(rank: int) -> None:
    for _ in DataLoader(Killer(), num_workers=1):
        pass


CASES: list[tuple[Callable[[int], Any], str]] = [
    (root_by_place_in_group, "group_src="),
    (joins_twice, "dist.is_initialized()"),
    (joins_never, "Every rank calls dist.init_process_group before"),
    (communicates_after_leaving, "after dist.destroy_process_group"),
    (gives_seconds, "datetime.timedelta(seconds="),
    (goes_to_the_gpu, "no .cuda()"),
    (chooses_a_gpu, "no torch.cuda.set_device"),
    (names_devices, "without device_ids"),
    (synchronises_on_the_cpu, "ddp_lessons.syncbn"),
    (has_one_sample, "drop_last=True"),
    (loses_a_worker, "num_workers=0"),
]


@pytest.mark.parametrize(("fn", "said"), CASES, ids=[said for _, said in CASES])
def test_a_refusal_comes_with_the_remedy(fn: Callable[[int], Any], said: str) -> None:
    if "cuda" in said and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    verdict = launch(fn, nprocs=4 if fn is root_by_place_in_group else 1, check=False).verdict
    assert verdict is not None
    assert verdict.kind == "raised"
    assert said in verdict.advice


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_in_use(taken_port: int) -> None:
    env = {"MASTER_PORT": str(taken_port)}
    verdict = launch(joins_twice, nprocs=1, env=env, check=False).verdict
    assert verdict is not None
    assert "Leave MASTER_PORT to launch()" in verdict.advice


def test_the_faq_has_each_error_in_its_own_words() -> None:
    faq = (ROOT / "notebooks" / "faq.md").read_text()
    assert [text for text in advice.REMEDIES if text not in faq] == []


def test_no_remedy_hides_another() -> None:
    texts = list(advice.REMEDIES)
    assert not [(a, b) for a in texts for b in texts if a != b and a in b]
