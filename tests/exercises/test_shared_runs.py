"""Answers that are judged together: each hears what it hears alone, whatever the others do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import Run, launch
from ddp_lessons.exercises import framework
from ddp_lessons.exercises.barriers import check_load
from ddp_lessons.exercises.collectives import check_mean_over_ranks, check_ring_all_gather
from ddp_lessons.exercises.start_here import check_greet
from tests.support import answers, shared_runs
from tests.support.shared_runs import judged

pytestmark = pytest.mark.ranks
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as functions from a cell are


def mean(x: Any) -> Any:
    total = x.clone().float()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def total_in_place(x: Any) -> Any:
    dist.all_reduce(x)
    return x


def raises_on_rank_1(x: Any) -> Any:
    return mean(x) if dist.get_rank() == 0 else [][x[0]]


def raises_everywhere(x: Any) -> Any:
    return mean(x).no_such_name


def dies(x: Any) -> Any:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return mean(x)


def leaves(x: Any) -> Any:
    raise SystemExit(3)


def sets_variables(x: Any) -> Any:
    os.environ["MASTER_PORT"] = os.environ["WORLD_SIZE"] = "1"
    os.chdir("/")
    return mean(x)


def leaves_a_thread(x: Any) -> Any:
    threading.Thread(target=time.sleep, args=(0.5,)).start()
    return mean(x)


def leaves_the_group(x: Any) -> Any:
    result = mean(x)
    dist.barrier()
    dist.destroy_process_group()
    return result


def makes_a_group(x: Any) -> Any:
    dist.new_group([0])
    return mean(x)


def returns_a_lock(x: Any) -> Any:
    return threading.Lock()


def passes_on(pieces: list[Any]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(size - 1):
        sent = dist.isend(pieces[(rank - step) % size], (rank + 1) % size)
        dist.recv(pieces[(rank - step - 1) % size], (rank - 1) % size)
        sent.wait()


def receives_first(pieces: list[Any]) -> None:
    """Every rank waits for a message that none sends."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1:
        dist.recv(pieces[(rank - 1) % size], (rank - 1) % size)


def sends_too_much(pieces: list[Any]) -> None:
    """A message is left over, which nobody receives."""
    passes_on(pieces)
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1:
        dist.isend(pieces[rank], (rank + 1) % size)


def uses_the_library(pieces: list[Any]) -> None:
    dist.all_gather(pieces, pieces[dist.get_rank()].clone())


def load(rank: int, local_rank: int, path: str, download: Any) -> str:
    if local_rank == 0 and not os.path.exists(path):
        download(f"{path}.part")
        os.replace(f"{path}.part", path)
    dist.barrier()
    return Path(path).read_text()


def looks_before_it_is_there(rank: int, local_rank: int, path: str, download: Any) -> str:
    """Rank 0 leaves the file behind, where a second try would find it."""
    if local_rank == 0 and not os.path.exists(path):
        download(path)
    return Path(path).read_text()


def greets(rank: int, world_size: int) -> None:
    if rank == 0:
        print(f"hello from {world_size} ranks")


def greets_everywhere(rank: int, world_size: int) -> None:
    greets(0, world_size)


def greets_below_python(rank: int, world_size: int) -> None:
    if rank == 0:
        os.write(1, f"hello from {world_size} ranks\n".encode())


def ends_no_line(rank: int, world_size: int) -> None:
    sys.stderr.write("hello")


def is_silent(rank: int, world_size: int) -> None:
    greets(1, world_size)


ANSWERS: dict[Any, list[Any]] = {
    check_mean_over_ranks: [
        mean,
        total_in_place,
        raises_on_rank_1,
        mean,
        raises_everywhere,
        dies,
        leaves,
        sets_variables,
        leaves_a_thread,
        leaves_the_group,
        makes_a_group,
        returns_a_lock,
        answers.prints(mean),
        answers.Called(mean),
    ],
    check_ring_all_gather: [
        passes_on,
        receives_first,
        sends_too_much,
        passes_on,
        uses_the_library,
        lambda pieces: len(pieces),
    ],
    check_load: [load, looks_before_it_is_there, looks_before_it_is_there, load],
    check_greet: [greets, greets_everywhere, greets_below_python, ends_no_line, is_silent, greets],
}


@pytest.mark.slow
@pytest.mark.parametrize("check", ANSWERS, ids=lambda check: check.__name__)
def test_each_hears_what_it_hears_alone(check: Any) -> None:
    alone = [check(answer) for answer in ANSWERS[check]]
    assert judged(check, ANSWERS[check]) == alone
    assert {verdict.passed for verdict in alone} == {True, False}


def test_those_that_return_share_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []

    def counted(fn: Any, args: Any, nprocs: int, **how: Any) -> Run:
        ranks.append(nprocs)
        run: Run = launch(fn, args, nprocs, **how)
        return run

    for module in (shared_runs, framework):
        monkeypatch.setattr(module, "launch", counted)
    verdicts = judged(check_mean_over_ranks, [mean, answers.Called(mean), answers.decorated(mean)])
    assert [verdict.passed for verdict in verdicts] == [True] * 3
    assert ranks == [2, 3, 1]  # as for one of them
