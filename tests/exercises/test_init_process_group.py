"""The checks of lesson 02: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.init_process_group import check_environment, check_join, check_waits
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Variables = Mapping[str, Any]


def environment(**changes: Callable[[int, int], Any] | None) -> Any:
    """A right environment but for these variables, each of rank and world size; None: left out."""

    def changed(rank: int, world_size: int, port: int) -> Variables:
        variables = variables_of(rank, world_size, port)
        new = {name: change and change(rank, world_size) for name, change in changes.items()}
        return {k: v for k, v in {**variables, **new}.items() if v is not None}

    return changed


def variables_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Environment:
    def __call__(self, rank: int, world_size: int, port: int) -> Variables:
        return MappingProxyType(variables_of(rank, world_size, port))


def zipped(*numbers: int) -> Variables:
    rank, world_size, port = map(str, numbers)
    names = ("MASTER_ADDR", "RANK", "WORLD_SIZE", "MASTER_PORT")
    return dict(zip(names, ("localhost", rank, world_size, port), strict=True))


def into_os_environ(rank: int, world_size: int, port: int) -> Variables:
    os.environ.update(variables_of(rank, world_size, port))
    return dict(os.environ)


def of_the_launcher(rank: int, world_size: int, port: int) -> Variables:
    return {name: os.environ[name] for name in variables_of(rank, world_size, port)}


def joins(
    url: str = "file://{folder}/{job}", rank: Callable[[int], int | None] = int, **more: Any
) -> Callable[..., None]:
    def join(job_rank: int, world_size: int, job: str, folder: str) -> None:
        where = {"rank": rank(job_rank), "world_size": world_size, **more}
        where = {name: value for name, value in where.items() if value is not None}
        dist.init_process_group("gloo", url.format(job=job, folder=folder, **where), **where)

    return join


def through_a_store(rank: int, world_size: int, job: str, folder: str) -> None:
    store = dist.PrefixStore(job, dist.FileStore(f"{folder}/of both", 2 * world_size))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def through_the_environment(rank: int, world_size: int, job: str, folder: str) -> None:
    port = int(os.environ["MASTER_PORT"])
    os.environ.update(variables_of(rank, world_size, port + 1 + (job == "b")))
    dist.init_process_group("gloo")


def of_a_path(rank: int, world_size: int, job: str, folder: str) -> None:
    place = Path(folder, job, "store")
    place.parent.mkdir(exist_ok=True)
    dist.init_process_group(init_method=place.as_uri(), rank=rank, world_size=world_size)


class Joins:
    def __call__(self, rank: int, world_size: int, job: str, folder: str) -> None:
        joins("file://{folder}/of-{job}")(rank, world_size, job, folder)


def only_rank_zero(rank: int, world_size: int, job: str, folder: str) -> None:
    if rank == 0:
        joins()(rank, world_size, job, folder)


def destroyed(rank: int, world_size: int, job: str, folder: str) -> None:
    joins()(rank, world_size, job, folder)
    dist.destroy_process_group()


def waits(delays: Sequence[float]) -> list[float]:
    return [max(delays) - delay for delay in delays]


def one_by_one(delays: Sequence[float]) -> Iterator[float]:
    for delay in delays:
        yield max(delays) - delay


RIGHT: list[tuple[Any, Any]] = [
    (check_environment, environment()),
    (check_environment, environment(LOCAL_RANK=lambda rank, n: "7", MASTER_ADDR=lambda *_: "::1")),
    (check_environment, Environment()),
    (check_environment, zipped),
    (check_environment, functools.partial(variables_of)),
    (check_environment, lambda rank, world_size, port: {**variables_of(rank, world_size, port)}),
    (check_join, joins()),
    (check_join, joins(timeout=timedelta(seconds=20))),
    (check_join, through_a_store),
    (check_join, through_the_environment),
    (check_join, of_a_path),
    (check_join, Joins()),
    (check_waits, waits),
    (check_waits, one_by_one),
    (check_waits, lambda delays: max(delays) - np.array(delays)),
    (check_waits, lambda delays: (torch.tensor(delays).max() - torch.tensor(delays))[..., :]),
    (check_waits, lambda delays: map(sorted(delays)[-1].__sub__, delays)),
    (check_waits, functools.partial(lambda much, delays: [*waits([*delays, -much])[:-1]], 9)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_environment, environment(MASTER_PORT=None), "found no MASTER_PORT.*four variables"),
    (check_environment, environment(MASTER_ADDR=None), "found no MASTER_ADDR.*four variables"),
    (check_environment, environment(RANK=lambda rank, n: rank), "str expected, not int.*text"),
    (check_environment, environment(RANK=lambda rank, n: "0"), "both opened .*RANK must differ"),
    (check_environment, environment(RANK=lambda rank, n: str(rank + 1)), "not find each other"),
    (check_environment, environment(WORLD_SIZE=lambda rank, n: str(n + 1)), "not find each other"),
    (check_environment, environment(WORLD_SIZE=lambda rank, n: "2"), "with 3 ranks, .*"),
    (
        check_environment,
        environment(WORLD_SIZE=lambda rank, n: "1", RANK=lambda rank, n: "0"),
        "both opened|groups had",
    ),
    (
        check_environment,
        environment(MASTER_PORT=lambda rank, n: "29500"),
        "given port 40123, MASTER_PORT is '29500'.*collides",
    ),
    (check_environment, lambda r, n, port: print(variables_of(r, n, port)), "returned None, not a"),
    (check_environment, lambda r, n, port: [*variables_of(r, n, port)], "'RANK', .*not a dict"),
    (check_environment, into_os_environ, "changed os.environ.*only return"),
    (check_environment, of_the_launcher, "raised KeyError: '.*taken away"),
    (check_environment, lambda rank, n: {}, "raised TypeError.*rank, world_size and port"),
    (check_environment, lambda rank, n, port: {"RANK": "rank " + rank}, "raised TypeError"),
    (check_environment, lambda r, n, port: variables_of(r, n, port + r), "not find each other"),
    (check_join, joins("tcp://127.0.0.1:29871"), "port taken.*belongs to one job|place of its own"),
    (check_join, joins("file://{folder}/store"), "place of its own"),
    (check_join, joins("env://", rank=lambda rank: None, world_size=None), "mixed.*22.0.*place of"),
    (check_join, lambda r, n, job, folder: job + folder, "must call"),
    (check_join, destroyed, "must call"),
    (check_join, lambda r, n, job: job, "itself failed: TypeError"),
    (check_join, joins(world_size=None), "itself failed: ValueError.*need rank="),
    (check_join, joins("{folder}/{job}"), "itself failed: RuntimeError.*full path"),
    (check_join, joins("file://{folder}/{job}-{rank}"), "did not come apart"),
    (check_join, joins(rank=lambda rank: 0), "apart"),
    (check_join, joins(rank=lambda rank: 1 + rank), "apart"),
    (check_join, joins(world_size=4), "apart"),
    (check_join, only_rank_zero, "must call"),
    (check_waits, lambda delays: [max(delays)] * len(delays), "you said 0.8 s.*at which all leave"),
    (check_waits, lambda delays: delays, "0 s and waited about 0.[789].*times at which they come"),
    (
        check_waits,
        lambda delays: [max(delays), *[0] * (len(delays) - 1)],
        "rank 2 came after 0.3 s and waited about 0.[456] s; you said 0 s.*rank 0 is no exception",
    ),
    (check_waits, lambda delays: [0.8, 0.0, 0.5], "3 numbers for 2 ranks"),
    (check_waits, lambda delays: [0.8, 0.0, 0.5][: len(delays)], "after 0.6 s .*you said 0.8 s"),
    (check_waits, lambda delays: [0], "1 number for 3 ranks"),
    (check_waits, lambda delays: max(delays), "raised TypeError.*returns one number for each"),
    (check_waits, lambda delays: print(waits(delays)), "raised TypeError.*returns one number"),
    (check_waits, lambda delays: [d - max(delays) for d in delays], "you said -0.8 s"),
    (check_waits, lambda delays: [1000 * wait for wait in waits(delays)], "you said 800 s"),
    (check_waits, lambda delays: [float("nan")] * len(delays), "you said nan s"),
    (check_waits, lambda delays: [delays[0] - d for d in delays], "rank 0 .*you said 0 s"),
    (check_waits, lambda delays: sorted(waits(delays)), "rank 0 .*you said 0 s"),
    (check_waits, lambda delays: delays.sort(), "raised AttributeError"),
    (check_waits, lambda: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


def test_a_check_leaves_the_environment_of_the_notebook_alone() -> None:
    before = dict(os.environ)
    check_environment(into_os_environ)
    assert dict(os.environ) == before
