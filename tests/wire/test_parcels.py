"""Large values travel in a file in memory, arrive as they were, and leave nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddp_lessons.wire import parcels
from ddp_lessons.wire.parcels import Packer, Parcel, pack


@pytest.fixture(params=["in the pickle", "in a file"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in a file":
        monkeypatch.setattr(parcels, "LEAST_IN_FILE", 1)
        monkeypatch.setattr(parcels, "_LEAST_BUFFER", 1)
    return str(request.param)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.strides == b.strides and (a == b).all())
    return bool(a == b)


VALUES = [
    None,
    {"text": "ä" * 100, "bytes": b"b" * 1000},
    torch.arange(12.0),
    torch.arange(12).reshape(3, 4).t(),
    torch.arange(12)[3:7],
    torch.tensor(2.5),
    torch.empty(0),
    torch.randn(5).bfloat16(),
    torch.randn(4, dtype=torch.complex64).conj(),
    torch.tensor([True, False]),
    np.arange(12.0).reshape(3, 4),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(12)[::3],
    np.array("x"),
    np.empty((0, 3)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_arrives_as_it_was(value: Any, where: str) -> None:
    assert same(pickle.loads(pickle.dumps(value)), pack(value).load())


def test_where_it_cannot_take_its_file_along_it_is_whole(where: str) -> None:
    value = [torch.arange(9), np.arange(4.0), b"bytes" * 99]
    first, second, third = pickle.loads(pickle.dumps(pack(value))).load()
    assert same(first, value[0])
    assert same(second, value[1])
    assert third == value[2]


def test_what_arrived_can_be_changed_and_is_the_receivers_own(where: str) -> None:
    parcel = pack([torch.zeros(10_000), np.zeros(10_000)])
    for _ in range(2):
        for numbers in parcel.load():
            assert numbers.sum() == 0
            numbers += 1


def test_an_array_that_cannot_be_changed_stays_so(where: str) -> None:
    array = np.arange(10_000)
    array.flags.writeable = False
    assert not pack(array).load().flags.writeable


def test_tensors_that_share_memory_share_it_afterwards(where: str) -> None:
    whole = torch.zeros(10_000)
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False))
    model[1].weight = model[0].weight
    whole, part, model = pack((whole, whole[10:], model)).load()
    part[0] = 7
    assert whole[10] == 7
    assert model[0].weight is model[1].weight


def test_kinds_of_tensors_that_torch_pickles_in_its_own_way(where: str) -> None:
    sparse = torch.eye(4).to_sparse()
    assert torch.equal(pack(sparse).load().to_dense(), torch.eye(4))
    assert pack(torch.empty(3, device="meta")).load().device.type == "meta"
    shared = torch.ones(3).share_memory_()
    assert torch.equal(pack(shared).load(), torch.ones(3))
    kept = pack(nn.Parameter(torch.ones(3), requires_grad=False)).load()
    assert isinstance(kept, nn.Parameter)
    assert not kept.requires_grad


def test_only_what_is_large_gets_a_file() -> None:
    small = np.zeros(parcels.LEAST_IN_FILE // 2, np.uint8)
    assert pack([small]).file is None
    large = pack([small, small.copy(), small[:9].copy()])
    assert large.file is not None
    assert large.sizes == (small.nbytes, small.nbytes)
    assert pack([small, small.copy()], by_file=False).file is None


def test_ranks_share_what_lies_in_the_file() -> None:
    packer, array = Packer(), np.zeros(parcels.LEAST_IN_FILE, np.uint8)
    first, second = packer.pack([0, array]), packer.pack([1, array])
    assert first.file is second.file
    assert [first.load()[0], second.load()[0]] == [0, 1]


@pytest.mark.slow
def test_the_file_is_free_when_nobody_needs_it() -> None:
    gc.collect()
    open_before = len(os.listdir("/dev/fd"))
    value = pack(np.ones(parcels.LEAST_IN_FILE, np.uint8)).load()
    gc.collect()
    assert len(os.listdir("/dev/fd")) > open_before
    assert value.all()
    del value
    gc.collect()
    assert len(os.listdir("/dev/fd")) == open_before


def test_too_large_a_value_is_refused_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "available_memory", lambda: 9 << 20)
    with pytest.raises(MemoryError, match="its copy takes 32 MB, and 9 MB of memory are left"):
        pack(np.zeros(parcels.LEAST_IN_FILE, np.uint8))


def test_memory_that_others_fill_meanwhile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([100 << 20, 70 << 20, 9 << 20])
    monkeypatch.setattr(parcels, "available_memory", lambda: next(left))
    monkeypatch.setattr(parcels, "_PIECE", 16 << 20)
    open_before = len(os.listdir("/dev/fd"))
    with pytest.raises(MemoryError, match="takes 64 MB, and 45 MB of memory are left for it"):
        pack([np.zeros(20 << 20, np.uint8), np.zeros(44 << 20, np.uint8)])
    assert len(os.listdir("/dev/fd")) == open_before


def _sum(parcel: Parcel, pipe: Any) -> None:
    pipe.send(int(parcel.load().sum()))


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_file_travels_with_a_new_process(method: str) -> None:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    parcel = pack(np.ones(parcels.LEAST_IN_FILE, np.uint8))
    process: Any = context.Process(target=_sum, args=(parcel, there))  # type: ignore[attr-defined]
    process.start()
    there.close()
    assert here.recv() == parcels.LEAST_IN_FILE
    process.join()
    here.close()
