"""Large values get to the ranks and back in a file in memory, and nothing of it is left."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import socket
import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from ddp_lessons import CannotSend, launch
from ddp_lessons.wire import parcels

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUMBER = parcels.LEAST_IN_FILE // 8 + 1  # of float64


def make(rank: int) -> dict[str, Any]:
    return {"tensor": torch.full((NUMBER,), rank + 0.5).double(), "array": np.full(NUMBER, rank)}


def mappings() -> int:
    """How many files in memory are open here."""
    gc.collect()
    paths = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum("memfd:ddp_lessons" in os.readlink(path) for path in paths if os.path.islink(path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_they_come_back(method: str) -> None:
    before = mappings()
    values = launch(make, nprocs=2, start_method=method).values
    assert mappings() == before + 2
    for rank, value in enumerate(values):
        assert torch.equal(value["tensor"], torch.full((NUMBER,), rank + 0.5).double())
        value["array"] += 1
        assert (value["array"] == rank + 1).all()
    del values, value
    assert mappings() == before


def last(rank: int, array: np.ndarray[Any, Any], expected: float) -> float:
    seen = float(array[-1])
    array[-1] = rank + 100  # its own: the others do not see it
    return seen == expected and float(array.sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_they_are_arguments_and_what_the_function_uses(method: str) -> None:
    before = mappings()
    array = np.zeros(NUMBER)
    array[-1] = 7.5
    assert launch(last, (array, 7.5), start_method=method).values == [100.0, 101.0]

    def closed_over(rank: int) -> float:
        return float(array[-1]) + rank

    assert launch(closed_over, start_method=method).values == [7.5, 8.5]
    assert array[-1] == 7.5
    assert mappings() == before


def too_large(rank: int) -> Any:
    if rank == 1:
        parcels.available_memory = lambda: 5 << 20  # type: ignore[attr-defined]
    return np.zeros(NUMBER)


def test_one_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(CannotSend) as caught:
        launch(too_large)
    said = str(caught.value)
    assert "rank 1 of 2 returned a value of type ndarray" in said
    assert "its copy takes 32 MB, and 5 MB of memory are left" in said
    assert "Save it to a file in the rank, or return less of it." in said


def test_one_that_comes_when_descriptors_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_files(reader: socket.socket, size: int, most: int) -> tuple[Any, ...]:
        return reader.recv(size), [], 0, None  # as the system has it then

    monkeypatch.setattr(socket, "recv_fds", without_files)
    run = launch(lambda rank: np.full(NUMBER, rank) if rank else 5, check=False)
    assert run.values == [5, None]
    said = run.explain()
    assert "rank 1 of 2 returned a value that cannot be loaded here: OSError: [Errno 24]" in said
    assert "ulimit -n" in said


def test_an_argument_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "available_memory", lambda: 5 << 20)
    with pytest.raises(CannotSend, match=r"args\[0\] .*'array'.* and 5 MB of memory are left"):
        launch(last, (np.zeros(NUMBER), 0.0))
    large = np.zeros(NUMBER)
    with pytest.raises(CannotSend, match=r"the variable 'large', .* and 5 MB of memory are left"):
        launch(lambda rank: large[rank])


def killed(rank: int) -> Any:
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)  # after its value was sent
    return np.zeros(NUMBER)


def test_a_rank_that_dies_leaves_nothing() -> None:
    before = mappings()
    assert launch(killed, check=False).ranks[1].exitcode == -signal.SIGKILL
    assert mappings() == before
