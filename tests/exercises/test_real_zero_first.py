"""The checks of real_5: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import fcntl
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.real_zero_first import check_fetch_once, check_first
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Fetch = Callable[[str], str]


@contextmanager
def by_flag(rank: int) -> Iterator[None]:
    ok = torch.zeros(1)
    if rank > 0:
        dist.broadcast(ok, src=0)
        if not ok:
            raise RuntimeError("rank 0 failed")
    try:
        yield
        ok += 1
    finally:
        if rank == 0:
            dist.broadcast(ok, src=0)


class ByObject:
    """A manager without contextlib's help, that sends the error's text."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        if self.rank > 0:
            said = [None]
            dist.broadcast_object_list(said, src=0)
            if said[0]:
                raise OSError(said[0])

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self.rank == 0:
            dist.broadcast_object_list([repr(error) if error else None], src=0)


@contextmanager
def by_all_reduce(rank: int) -> Iterator[None]:
    failed = torch.zeros(1)
    if rank > 0:
        dist.all_reduce(failed)
        if failed.item():
            raise SystemError
    with ExitStack() as stack:
        if rank == 0:
            stack.callback(dist.all_reduce, failed)
        failed += 1
        yield
        failed -= 1


@contextmanager
def by_messages(rank: int) -> Iterator[None]:
    if rank < 0 or not dist.is_initialized():
        yield
        return
    word = torch.zeros(1)
    if rank:
        dist.recv(word, src=0)
        assert word
        yield
        return
    try:
        yield
    except BaseException:
        for other in range(1, dist.get_world_size()):
            dist.send(word, dst=other)
        raise
    for other in range(1, dist.get_world_size()):
        dist.send(word + 1, dst=other)


@contextmanager
def two_barriers(rank: int) -> Iterator[None]:
    """All pass a scatter, whether it went well or not, and a barrier after it."""
    if rank == -1:
        yield
        return
    mine = torch.zeros(1)
    if rank == 0:
        try:
            yield
            mine += 1
        finally:
            dist.scatter(mine.clone(), [mine] * dist.get_world_size())
            dist.barrier()
    else:
        dist.scatter(mine, src=0)
        dist.barrier()
        if not mine:
            raise KeyError("no data")
        yield


@contextmanager
def usual(rank: int) -> Iterator[None]:
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0:
        dist.barrier()


@contextmanager
def with_finally(rank: int) -> Iterator[None]:
    if rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank == 0:
            dist.barrier()


@contextmanager
def swallows(rank: int) -> Iterator[None]:
    if rank > 0:
        with by_flag(rank):
            yield
        return
    with suppress(ConnectionError), by_flag(rank):
        yield


@contextmanager
def off_as_zero(rank: int) -> Iterator[None]:
    with by_flag(max(rank, 0)):
        yield


@contextmanager
def off_as_other(rank: int) -> Iterator[None]:
    with by_flag(rank % 99):
        yield


@contextmanager
def swallows_off(rank: int) -> Iterator[None]:
    if rank == -1:
        with suppress(Exception):
            yield
    else:
        with by_flag(rank):
            yield


@contextmanager
def another_error(rank: int) -> Iterator[None]:
    try:
        with by_flag(rank):
            yield
    except ConnectionError as error:
        raise RuntimeError("rank 0 failed") from error


@contextmanager
def tells_too_late(rank: int) -> Iterator[None]:
    ok = torch.zeros(1)
    try:
        yield
        ok += 1
    finally:
        if rank >= 0:
            dist.broadcast(ok, src=0)
    if not ok:
        raise RuntimeError


@contextmanager
def skips_body(rank: int) -> Iterator[None]:
    if rank > 0:
        dist.barrier()
        return
    with with_finally(rank):
        yield


@contextmanager
def yields_twice(rank: int) -> Iterator[None]:
    with by_flag(rank):
        yield
    yield


@contextmanager
def sleeps(rank: int) -> Iterator[None]:
    time.sleep(0.1 if rank > 0 else 0)
    yield


@contextmanager
def once_only(rank: int, failed: list[int] = []) -> Iterator[None]:  # noqa: B006
    if failed:
        raise RuntimeError("it failed before")
    try:
        with by_flag(rank):
            yield
    except Exception:
        failed.append(1)
        raise


def undecorated(rank: int) -> Iterator[None]:
    yield


def three_turns(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    for turn in (rank, local_rank, None):
        if turn in (0, None):
            text = fetch(path)
        if rank != -1:
            dist.barrier()
    return text


def nested(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    with usual(rank), usual(local_rank):
        return fetch(path)


def one_by_one(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    if not dist.is_initialized():
        return fetch(path)
    for turn in range(dist.get_world_size()):
        if turn == rank:
            text = fetch(path)
        dist.barrier()
    return text


def locked(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return fetch(path)


def machine_by_machine(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    if rank != -1:
        machines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(machines, local_rank)
        for turn, of_machine in enumerate(machines):
            if of_machine == 0:
                if turn == rank:
                    fetch(path)
                dist.all_reduce(torch.ones(1))
    return fetch(path)


def by(who: str) -> Any:
    def fetch_once(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
        with usual({"rank": rank, "local": local_rank}[who]):
            return fetch(path)

    return fetch_once


def all_at_once(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    return fetch(path)


def inner_first(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    with usual(local_rank), usual(rank):
        return fetch(path)


def always_barrier(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    for turn in (rank, local_rank):
        if turn <= 0:
            fetch(path)
        dist.barrier()
    return fetch(path)


def sends_text(rank: int, local_rank: int, path: str, fetch: Fetch) -> Any:
    said = [fetch(path) if rank <= 0 else None]
    if rank >= 0:
        dist.broadcast_object_list(said, src=0)
    return said[0]


def on_zero_only(rank: int, local_rank: int, path: str, fetch: Fetch) -> str | None:
    text = three_turns(rank, local_rank, path, fetch)
    return text if rank <= 0 else None


def barrier_inside(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    if local_rank == 0:
        fetch(path)
        dist.barrier()
    return fetch(path)


def waits_a_bit(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    time.sleep(0.1 * max(rank, 0))
    return fetch(path)


def nothing_when_off(rank: int, local_rank: int, path: str, fetch: Fetch) -> str | None:
    return None if rank == -1 else three_turns(rank, local_rank, path, fetch)


def returns_path(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    three_turns(rank, local_rank, path, fetch)
    return path


def takes_rank_one(rank: int, local_rank: int, path: str, fetch: Fetch) -> str:
    with usual(rank), usual(local_rank - 1 if rank > 0 else rank):
        return fetch(path)


RIGHT: list[tuple[Any, Any]] = [
    *((check_first, a) for a in (by_flag, ByObject, by_all_reduce, by_messages, two_barriers)),
    (check_first, functools.partial(by_flag)),
    *((check_fetch_once, a) for a in (three_turns, nested, inner_first, locked)),
    (check_fetch_once, machine_by_machine),
    (check_fetch_once, one_by_one),
    (check_fetch_once, answers.Called(three_turns)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_first, usual, "body fails: they hang.*unless in an `except`"),
    (check_first, with_finally, "body fails: rank 1 ran its body, too.*not how it went"),
    (check_first, swallows, "body fails: no error left the `with` on rank 0.*raise"),
    (check_first, off_as_zero, "-1, without a group: ValueError.*plain process"),
    (check_first, off_as_other, "-1, without a group: ValueError.*plain process"),
    (check_first, swallows_off, "-1, without a group.*nothing left the `with`"),
    (check_first, another_error, "rank 0 raised RuntimeError.*own error has to leave"),
    (check_first, tells_too_late, "all goes well: rank 1 began its body before.*wait before"),
    (check_first, skips_body, "raised RuntimeError: generator didn't yield.*runs at the `yield`"),
    (check_first, yields_twice, "raised RuntimeError: generator didn't stop.*one `yield`"),
    (check_first, sleeps, "all goes well: rank 1 began its body before.*A sleep ends"),
    (check_first, once_only, "failed on real ranks.*it failed before"),
    (check_first, undecorated, "context manager.*contextlib"),
    (check_first, lambda: 1, "failed on real ranks.*TypeError"),
    (check_fetch_once, by("rank"), "a disk on each.*ranks 2 and 3 downloaded on the second"),
    (check_fetch_once, by("local"), "one disk for all.*ranks 0 and 2 downloaded to the same"),
    (check_fetch_once, all_at_once, "a disk on each.*ranks 0 and 1 downloaded to the same disk"),
    (check_fetch_once, always_barrier, "raised ValueError.*without a group no barrier"),
    (check_fetch_once, sends_text, "a disk on each.*no file on machine 1.*on each disk"),
    (check_fetch_once, on_zero_only, "rank 1 returned None.*`return` missing"),
    (check_fetch_once, barrier_inside, "they hang.*same calls|downloaded"),
    (check_fetch_once, waits_a_bit, "a disk on each.*ranks 0 and 1 downloaded to the same disk"),
    (check_fetch_once, nothing_when_off, "without a group: it returned None"),
    (check_fetch_once, returns_path, "rank 0 returned '.*as it is"),
    (check_fetch_once, takes_rank_one, "they hang|downloaded"),
    (check_fetch_once, lambda: 1, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
