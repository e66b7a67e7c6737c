"""The checks of lesson 04: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
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
    time.sleep(2.0)
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


class ZeroFirst:
    """A manager without contextlib's help."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        if self.rank:
            dist.barrier()

    def __exit__(self, *error: object) -> None:
        if not self.rank:
            dist.barrier()


@contextmanager
def by_messages(rank: int) -> Iterator[None]:
    others, done = range(1, dist.get_world_size()), torch.zeros(1)
    if rank != 0:
        dist.recv(done, src=0)
    yield
    for other in others if rank == 0 else ():
        dist.send(done, dst=other)


@contextmanager
def by_broadcast(rank: int) -> Iterator[int]:
    with ExitStack() as stack:
        if rank == 0:
            stack.callback(dist.broadcast, torch.ones(1), src=0)
        else:
            dist.broadcast(torch.ones(1), src=0)
        yield rank


@contextmanager
def one_after_the_other(rank: int) -> Iterator[None]:
    for turn in range(dist.get_world_size()):
        if turn == rank:
            yield
        dist.barrier()


@contextmanager
def sleeps(rank: int) -> Iterator[None]:
    if rank != 0:
        time.sleep(1.0)
    yield


@contextmanager
def twice(rank: int) -> Iterator[None]:
    if rank == 0:
        yield
    dist.barrier()
    yield


@contextmanager
def fails_on_zero(rank: int) -> Iterator[None]:
    if rank != 0:
        dist.barrier()
    yield
    if rank == 0:
        dist.barier()


@contextmanager
def only_rank_1_waits(rank: int) -> Iterator[None]:
    with manager(lambda rank: rank == 1, is_zero)(rank):
        yield
    if rank > 1:
        dist.barrier()


@contextmanager
def early_at_zero(rank: int) -> Iterator[None]:
    with manager(everyone, everyone)(rank):
        yield


def returns_nothing(rank: int) -> None:
    if rank == 0:
        dist.barrier()


async def asynchronous(rank: int) -> None:
    dist.barrier()


def in_two_steps(rank: int, local_rank: int, path: str, download: Download) -> str:
    missing = not os.path.isfile(path)
    dist.barrier()
    if missing and local_rank == 0:
        half = Path(path).with_suffix(".half")
        download(str(half))
        half.rename(path)
    dist.all_reduce(torch.ones(1))
    with open(path) as file:
        return "".join(file)


def after_a_look(rank: int, local_rank: int, path: str, download: Download) -> str:
    """Polls, but for a file that has its name only when it is whole."""
    if local_rank == 0:
        whole(path, download)
    while not os.path.exists(path):
        time.sleep(0.01)
    return read(path)


def first_on_its_machine(rank: int, local_rank: int, path: str, download: Download) -> str:
    with ZeroFirst(local_rank):
        if not Path(path).exists():
            with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
                download(f"{folder}/part")
                shutil.move(f"{folder}/part", path)
    return read(path)


def last_on_its_machine(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        whole(path, download)
    dist.barrier()
    return read(path)


class Loader:
    def __call__(self, rank: int, local_rank: int, path: str, download: Download) -> str:
        return load(rank, local_rank, path, download)


def sleeps_then_reads(rank: int, local_rank: int, path: str, download: Download) -> str:
    if local_rank == 0:
        whole(path, download)
    else:
        time.sleep(1.0)
    return read(path)


def shown(rank: int, local_rank: int, path: str, download: Download) -> None:
    print(load(rank, local_rank, path, download))


def as_bytes(rank: int, local_rank: int, path: str, download: Download) -> bytes:
    return load(rank, local_rank, path, download).encode()


def first_line(rank: int, local_rank: int, path: str, download: Download) -> str:
    return load(rank, local_rank, path, download).splitlines()[0]


def barrier_if_missing(rank: int, local_rank: int, path: str, download: Download) -> str:
    if not os.path.exists(path):
        if local_rank == 0:
            whole(path, download)
        dist.barrier()
    return read(path)


def local_rank_1(rank: int, local_rank: int, path: str, download: Download) -> str:
    return load(rank, local_rank - 1, path, download)


def waits(work: Sequence[Sequence[float]]) -> list[float]:
    by_step = [[max(step) - seconds for seconds in step] for step in work]
    return [sum(rank) for rank in zip(*by_step, strict=True)]


def worked(work: Sequence[Sequence[float]]) -> list[float]:
    return [sum(seconds) for seconds in zip(*work, strict=True)]


RIGHT: list[tuple[Any, Any]] = [
    (check_rank_zero_first, manager(bool, is_zero)),
    (check_rank_zero_first, and_all_wait_at_the_end),
    (check_rank_zero_first, ZeroFirst),
    (check_rank_zero_first, by_messages),
    (check_rank_zero_first, by_broadcast),
    (check_rank_zero_first, one_after_the_other),
    (check_rank_zero_first, functools.partial(manager(bool, is_zero))),
    (check_load, load),
    (check_load, load_with_manager),
    (check_load, in_two_steps),
    (check_load, after_a_look),
    (check_load, first_on_its_machine),
    (check_load, last_on_its_machine),
    (check_load, Loader()),
    (check_waits, waits),
    (check_waits, lambda work: np.max(work, axis=1).sum() - np.sum(work, axis=0)),
    (check_waits, lambda work: sum(t.max() - t for t in map(torch.tensor, work))[..., :]),
    (check_waits, lambda work: (sum(map(max, work)) - seconds for seconds in worked(work))),
    (check_waits, functools.partial(lambda start, work: [start + wait for wait in waits(work)], 0)),
    (check_waits, lambda work: tuple(map(str, waits(list(reversed(work)))))),
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
    (check_rank_zero_first, sleeps, "rank 0 comes late: rank 1 began.*A sleep ends when"),
    (check_rank_zero_first, twice, "more than one `yield`.*runs once"),
    (check_rank_zero_first, fails_on_zero, "failed on real ranks.*AttributeError.*barier"),
    (check_rank_zero_first, only_rank_1_waits, "4 ranks, .*: rank 2 began"),
    (check_rank_zero_first, early_at_zero, "rank 1 began.*lets all begin at once"),
    (check_rank_zero_first, returns_nothing, "returned None.*`return` or `yield` missing"),
    (check_rank_zero_first, asynchronous, "`with` does not take"),
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
    (check_load, sleeps_then_reads, "rank 0 comes late: rank [1-3] found no file.*have to wait"),
    (check_load, shown, "rank 0 returned None.*`return` missing"),
    (check_load, as_bytes, "rank 0 returned b'first.*as it is, a `str`"),
    (check_load, first_line, "rank 0 returned 'first half'.*all of the file's text"),
    (
        check_load,
        barrier_if_missing,
        "rank 3 comes late: rank 0 called barrier 1 time, rank 3 0 times",
    ),
    (check_load, local_rank_1, "1 rank: rank 0 found no file. Nobody called"),
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
    (check_waits, lambda work: print(waits(work)), "raised TypeError.*one number for each"),
    (check_waits, lambda work: max(waits(work)), "raised TypeError.*one number for each rank"),
    (check_waits, lambda work: [-wait for wait in waits(work)], "you said -0.4 s"),
    (check_waits, lambda work: waits(work[:1]), "2 ranks; rank 0 .*you said 0 s"),
    (check_waits, lambda work: [wait / len(work) for wait in waits(work)], "you said 0.2 s"),
    (check_waits, lambda work: [0.4, 0.0, 0.2][: len(work[0])], "2 ranks; rank 1 .*you said 0 s"),
    (check_waits, lambda work: [1e3 * wait for wait in waits(work)], "you said 400 s"),
    (check_waits, lambda work: [float("nan")] * len(work[0]), "you said nan s"),
    (check_waits, lambda work: work.pop(), "raised AttributeError"),
    (check_waits, lambda work: [max(step) - min(step) for step in work], "1 number for 3 ranks"),
    (check_waits, lambda: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
