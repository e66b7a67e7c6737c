"""The checks of lesson 04: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons.exercises.barriers import check_load, check_rank_zero_first, check_waits
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Download = Callable[[str], None]


def manager(before: Callable[[int], bool], after: Callable[[int], bool]) -> Any:
    """A rank_zero_first in which these ranks call a barrier before and after the body."""

    @contextmanager
    def rank_zero_first(rank: int) -> Iterator[None]:
        if before(rank):
            dist.barrier()
        try:
            yield
        finally:
            if after(rank):
                dist.barrier()

    return rank_zero_first


def is_zero(rank: int) -> bool:
    return rank == 0


def everyone(rank: int) -> bool:
    return True


def nobody(rank: int) -> bool:
    return False


def undecorated(rank: int) -> Iterator[None]:
    if rank != 0:
        dist.barrier()
    yield
    if rank == 0:
        dist.barrier()


@contextmanager
def only_zero_has_a_body(rank: int) -> Iterator[None]:
    if rank == 0:
        yield
    dist.barrier()


@contextmanager
def and_all_wait_at_the_end(rank: int) -> Iterator[None]:
    with manager(bool, is_zero)(rank):
        yield
    dist.barrier()


def read(path: str) -> str:
    return Path(path).read_text()


def whole(path: str, download: Download) -> None:
    if not os.path.exists(path):
        download(f"{path}.part")
        os.replace(f"{path}.part", path)


def load(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        whole(path, download)
    dist.barrier()
    return read(path)


def load_with_manager(rank: int, local_rank: int, path: str, download: Download) -> str:
    with manager(bool, is_zero)(local_rank):
        whole(path, download)
        return read(path)


def everyone_downloads(rank: int, local_rank: int, path: str, download: Download) -> str:
    download(f"{path}.{rank}")
    return read(f"{path}.{rank}")


def without_barrier(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        whole(path, download)
    return read(path)


def barrier_too_soon(rank: int, local_rank: int, path: str, download: Download) -> str:
    dist.barrier()
    return without_barrier(rank, local_rank, path, download)


def barrier_inside(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        whole(path, download)
        dist.barrier()
        return read(path)
    time.sleep(1.0)
    return read(path)


def by_global_rank(rank: int, local_rank: int, path: str, download: Download) -> str:
    return load(rank, rank, path, download)


def by_global_rank_with_manager(rank: int, local_rank: int, path: str, download: Download) -> str:
    with manager(bool, is_zero)(rank):
        if not os.path.exists(path):
            download(f"{path}.{rank}")
            os.replace(f"{path}.{rank}", path)
        return read(path)


def polls(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        download(path)
    while not os.path.exists(path):
        time.sleep(0.01)
    time.sleep(0.05)
    return read(path)


def no_rename(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0 and not os.path.exists(path):
        download(path)
    dist.barrier()
    return read(path)


def always(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        download(path)
    dist.barrier()
    return read(path)


def never(rank: int, local_rank: int, path: str, download: Download) -> str:
    dist.barrier()
    return read(path)


def returns_on_zero_only(rank: int, local_rank: int, path: str, download: Download) -> str | None:
    content = load(rank, local_rank, path, download)
    return content if rank == 0 else None


def swallows(rank: int, local_rank: int, path: str, download: Download) -> str | None:
    if local_rank == 0:
        with suppress(OSError):
            whole(path, download)
    dist.barrier()
    return read(path) if os.path.exists(path) else None


def waits(work: Sequence[Sequence[float]]) -> list[float]:
    by_step = [[max(step) - seconds for seconds in step] for step in work]
    return [sum(rank) for rank in zip(*by_step, strict=True)]


def worked(work: Sequence[Sequence[float]]) -> list[float]:
    return [sum(seconds) for seconds in zip(*work, strict=True)]


RIGHT: list[tuple[Any, Any]] = [
    (check_rank_zero_first, manager(bool, is_zero)),
    (check_rank_zero_first, and_all_wait_at_the_end),
    (check_load, load),
    (check_load, load_with_manager),
    (check_waits, waits),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_rank_zero_first, manager(nobody, nobody), "rank 1 began.*no barrier on any rank"),
    (check_rank_zero_first, manager(is_zero, bool), "rank 1 began.*Rank 0 went last"),
    (check_rank_zero_first, manager(everyone, nobody), "rank 1 began.*lets all begin at once"),
    (check_rank_zero_first, manager(nobody, everyone), "rank 1 began.*comes too late"),
    (check_rank_zero_first, manager(bool, nobody), "barrier 0 times, rank 1 1 time.*as many"),
    (check_rank_zero_first, manager(nobody, is_zero), "called barrier 1 time, rank 1 0 times"),
    (check_rank_zero_first, undecorated, "`with` does not take.*contextlib"),
    (check_rank_zero_first, only_zero_has_a_body, "without a `yield`.*every rank needs it"),
    (check_rank_zero_first, lambda: 1, "failed on real ranks.*TypeError"),
    (check_load, everyone_downloads, "called by rank .*let one rank download"),
    (check_load, without_barrier, "rank [1-3] found no file.*before the download was over"),
    (check_load, barrier_too_soon, "rank [1-3] found no file.*before the download was over"),
    (check_load, barrier_inside, "rank 0 called barrier 1 time, rank 1 0 times.*as many"),
    (check_load, by_global_rank, "rank [23] found no file. Nobody downloaded on its.*local_rank"),
    (check_load, by_global_rank_with_manager, "2 machines.*called by rank 0, [23], [23].*One down"),
    (check_load, polls, r"rank [1-3] returned 'first half\\n'.*not look for the file"),
    (check_load, no_rename, r"a second job.*That is half the file.*os.replace"),
    (check_load, always, "is there already: `download` was called by rank 0.*again"),
    (check_load, never, "1 rank: rank 0 found no file. Nobody called"),
    (check_load, returns_on_zero_only, "rank 1 returned None.*Every rank returns"),
    (check_load, swallows, r"fails halfway: nobody noticed; .*None"),
    (check_load, lambda: 1, "failed on real ranks.*TypeError"),
    (check_waits, worked, "rank 0 worked 0 s, .* about 0.[345] s .*the time that they work"),
    (check_waits, lambda work: [sum(map(max, work))] * len(work[0]), "at which all leave"),
    (
        check_waits,
        lambda work: [max(worked(work)) - seconds for seconds in worked(work)],
        "2 ranks; rank 0 worked 0.4 s, then 0 s, .*you said 0 s.*single barrier at the end",
    ),
    (check_waits, lambda work: waits(work[-1:]), "one of the steps only"),
    (check_waits, lambda work: [0.0], "1 number for 3 ranks"),
    (check_waits, lambda: 1, "raised TypeError"),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    verdict = check(answer)
    assert verdict.passed, verdict
    assert verdict.because == ""


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
