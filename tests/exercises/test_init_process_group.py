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

from ddp_lessons.exercises.init_process_group import (
    check_environment,
    check_join,
    check_meet,
    check_waits,
)
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Variables = Mapping[str, Any]


def environment(**changes: Callable[[int, int], Any] | None) -> Any:
    """A right environment but for these variables, each of rank and world size; None: left out."""

    def changed(*given: Any) -> Variables:
        variables = variables_of(*given)
        rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        new = {name: change and change(rank, world_size) for name, change in changes.items()}
        return {k: v for k, v in {**variables, **new}.items() if v is not None}

    return changed


def ranked(rank: Callable[[int, int, int, int], int]) -> Any:
    """An environment whose RANK is this function of the place."""
    return lambda *given: {**variables_of(*given), "RANK": str(rank(*given[:4]))}


def sized(world_size: Callable[[int, int], int]) -> Any:
    """An environment whose WORLD_SIZE is this function of nnodes and nprocs."""
    return lambda *given: {**variables_of(*given), "WORLD_SIZE": str(world_size(*given[2:4]))}


def variables_of(
    group_rank: int, local_rank: int, nnodes: int, nprocs: int, address: str, port: int
) -> dict[str, str]:
    return {
        "RANK": str(group_rank * nprocs + local_rank),
        "WORLD_SIZE": str(nnodes * nprocs),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def zipped(group_rank: int, local_rank: int, *rest: Any) -> Variables:
    nnodes, nprocs, *where = rest
    numbers = (range(group_rank * nprocs, nnodes * nprocs)[local_rank], nnodes * nprocs)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return MappingProxyType(dict(zip(names, map(str, (*numbers, *where)), strict=True)))


def row_by_row(g: int, loc: int, nnodes: int, nprocs: int, address: str, port: int) -> Variables:
    ranks = np.arange(nnodes * nprocs).reshape(nnodes, nprocs)
    numbers = {"RANK": ranks[g, loc], "WORLD_SIZE": ranks.size, "MASTER_PORT": port}
    return {"MASTER_ADDR": address} | {name: f"{n}" for name, n in numbers.items()}


def into_os_environ(*given: Any) -> Variables:
    os.environ.update(variables_of(*given))
    return dict(os.environ)


def of_the_launcher(*given: Any) -> Variables:
    return {name: os.environ[name] for name in variables_of(*given)}


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
    # Halved, it is below the ports that the system gives to whoever asks: nobody else has it.
    port = int(os.environ["MASTER_PORT"]) // 2 + (job == "b")
    os.environ.update(variables_of(0, rank, 1, world_size, "localhost", port))
    dist.init_process_group("gloo")


def of_a_path(rank: int, world_size: int, job: str, folder: str) -> None:
    place = Path(folder, job, "store")
    place.parent.mkdir(exist_ok=True)
    dist.init_process_group(init_method=place.as_uri(), rank=rank, world_size=world_size)


def by_a_port_of_the_name(rank: int, world_size: int, job: str, folder: str) -> None:
    joins(f"tcp://127.0.0.1:{29871 + ord(job)}")(rank, world_size, job, folder)


class Joins:
    def __call__(self, rank: int, world_size: int, job: str, folder: str) -> None:
        joins("file://{folder}/of-{job}")(rank, world_size, job, folder)


def only_rank_zero(rank: int, world_size: int, job: str, folder: str) -> None:
    if rank == 0:
        joins()(rank, world_size, job, folder)


def destroyed(rank: int, world_size: int, job: str, folder: str) -> None:
    joins()(rank, world_size, job, folder)
    dist.destroy_process_group()


def waits(delays: Sequence[float], jobs: Sequence[str]) -> list[float]:
    complete = {job: max(d for d, j in zip(delays, jobs, strict=True) if j == job) for job in jobs}
    return [complete[job] - delay for delay, job in zip(delays, jobs, strict=True)]


def one_by_one(delays: Sequence[float], jobs: Sequence[str]) -> Iterator[float]:
    for mine, job in zip(delays, jobs, strict=True):
        yield max(d for d, other in zip(delays, jobs, strict=True) if other == job) - mine


def in_numpy(delays: Any, jobs: Any) -> Any:
    delays, jobs = np.array(delays), np.array(jobs)
    return np.where(jobs[:, None] == jobs, delays, -np.inf).max(axis=1) - delays


def in_torch(delays: Any, jobs: Any) -> Any:
    delays, number = torch.tensor(delays), torch.tensor([*map(ord, jobs)])
    complete = torch.zeros(200).scatter_reduce(0, number, delays, "amax")
    return complete[number] - delays[..., :]


def sorted_in_place(delays: Any, jobs: Any) -> Any:
    came = [*zip(delays, jobs, strict=True)]
    delays.sort()
    complete = {job: next(d for d in delays[::-1] if (d, job) in came) for job in jobs}
    return {rank: complete[job] - delay for rank, (delay, job) in enumerate(came)}.values()


def rank_zero_waits(delays: Sequence[float], jobs: Sequence[str]) -> list[float]:
    return [max(delays), *[0.0] * (len(jobs) - 1)]


def until_the_next(delays: Sequence[float], jobs: Sequence[str]) -> list[float]:
    later = [[d for d in delays if d > delay] for delay in delays]
    return [min(more, default=mine) - mine for more, mine in zip(later, delays, strict=True)]


def meet(rank: int, world_size: int, store: dist.Store, card: str) -> list[str]:
    number = store.add(f"meetings of {rank}", 1)
    store.set(f"{number}/{rank}", card)
    return [store.get(f"{number}/{r}").decode() for r in range(world_size)]


class Meets:
    """Counts its meetings itself, and has a store of its own for each."""

    def __init__(self) -> None:
        self.meetings = 0

    def __call__(self, rank: int, world_size: int, store: dist.Store, card: str) -> Any:
        self.meetings += 1
        ours = dist.PrefixStore(f"meeting {self.meetings}", store)
        ours.set(str(rank), card)
        return (ours.get(str(other)).decode() for other in range(world_size))


def meets_at_one_number(rank: int, world_size: int, store: dist.Store, card: str) -> Any:
    number = (store.add("all meetings", 1) - 1) // world_size
    keys = [f"{number} {other}" for other in range(world_size)]
    store.set(keys[rank], card)
    return tuple(str(store.get(key), "utf-8") for key in keys)


def meets_with_a_counter(
    rank: int, world_size: int, store: dist.Store, card: str, meetings: list[str]
) -> Any:
    number = len(meetings)
    meetings.append(card)
    store.set(f"{number}/{rank}", card.encode())
    store.wait([f"{number}/{r}" for r in range(world_size)])
    return np.array([store.get(f"{number}/{r}").decode() for r in range(world_size)])


def meets_with(key: str, **how: Any) -> Any:
    """A meeting at other keys, made of the number n of a rank's meeting and the rank r."""
    n_of, before = how.get("n_of", "meetings of {r}"), how.get("before", False)

    def meet(rank: int, world_size: int, store: dist.Store, card: str) -> list[str]:
        n = store.add(n_of.format(r=rank), 1)
        keys = [key.format(n=n, r=r, mine=rank) for r in range(world_size)]
        early = [store.get(key).decode() for key in keys] if before else None
        store.set(keys[rank], card)
        return early or [store.get(key).decode() for key in keys]

    return meet


def of_cards(change: Callable[[list[str]], Any]) -> Any:
    """A meeting that returns something else than the cards."""
    return lambda *given: change(meet(*given))


RIGHT: list[tuple[Any, Any]] = [
    (check_environment, environment()),
    (check_environment, environment(LOCAL_RANK=lambda rank, n: "7", GROUP_RANK=lambda *_: "x")),
    (check_environment, answers.Called(variables_of)),
    (check_environment, zipped),
    (check_environment, row_by_row),
    (check_environment, functools.partial(variables_of)),
    (check_environment, lambda *given: {**variables_of(*given)}),
    (check_join, joins()),
    (check_join, joins(timeout=timedelta(seconds=20))),
    (check_join, through_a_store),
    (check_join, through_the_environment),
    (check_join, of_a_path),
    (check_join, Joins()),
    (check_waits, waits),
    (check_waits, one_by_one),
    (check_waits, in_numpy),
    (check_waits, in_torch),
    (check_waits, sorted_in_place),
    (check_waits, functools.partial(answers.decorated(waits))),
    (check_meet, meet),
    (check_meet, Meets()),
    (check_meet, meets_at_one_number),
    (check_meet, functools.partial(meets_with_a_counter, meetings=[])),
    (check_meet, meets_with("meeting {n}, rank {r}")),
    (check_meet, of_cards(iter)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_environment, environment(MASTER_PORT=None), "found no MASTER_PORT.*four variables"),
    (check_environment, environment(MASTER_ADDR=None), "found no MASTER_ADDR.*four variables"),
    (check_environment, environment(RANK=None), "found no RANK.*four variables"),
    (check_environment, environment(RANK=lambda rank, n: rank), "str expected, not int.*text"),
    (check_environment, ranked(lambda g, loc, n, each: 0), "2 ranks, .*both opened .*only one"),
    (check_environment, ranked(lambda g, loc, n, each: loc), "on 2 machines, .*both opened .*only"),
    (
        check_environment,
        ranked(lambda g, loc, n, each: g + loc),
        "6 ranks on 2 machines, .*its own",
    ),
    (check_environment, ranked(lambda g, loc, n, each: g * n + loc), "6 ranks on 2 .*its own"),
    (check_environment, ranked(lambda g, loc, n, each: g * each + loc + 1), "not find each other"),
    (
        check_environment,
        ranked(lambda g, loc, n, each: loc * n + g),
        r"on 2 machines, .*joined as ranks \[0, 2, 4, 1, 3, 5\].*from machine to machine",
    ),
    (
        check_environment,
        ranked(lambda g, loc, n, each: n * each - 1 - g * each - loc),
        r"with 2 ranks, .*joined as ranks \[1, 0\].*from machine to machine",
    ),
    (check_environment, sized(lambda n, each: n * each + 1), "not find each other"),
    (
        check_environment,
        sized(lambda n, each: each),
        "with 6 ranks on 2 machines, .*WORLD_SIZE, which counts the ranks of all",
    ),
    (
        check_environment,
        sized(lambda n, each: n),
        "with 2 ranks, .*not find each other.*never comes",
    ),
    (
        check_environment,
        environment(WORLD_SIZE=lambda rank, n: "1", RANK=lambda rank, n: "0"),
        "both opened|groups had",
    ),
    (
        check_environment,
        environment(MASTER_PORT=lambda rank, n: "29500"),
        r"'10.0.0.7', 40123\): MASTER_PORT is '29500'.*collides",
    ),
    (
        check_environment,
        environment(MASTER_ADDR=lambda rank, n: "localhost"),
        "MASTER_ADDR is 'localhost'.*wrong on other machines",
    ),
    (check_environment, lambda *given: print(variables_of(*given)), "returned None, not a dict"),
    (check_environment, lambda *given: [*variables_of(*given)], "'RANK', .*not a dict"),
    (check_environment, into_os_environ, "changed os.environ.*only return"),
    (check_environment, of_the_launcher, "raised KeyError: '.*taken away"),
    (
        check_environment,
        lambda rank, world_size, port: {},
        "raised TypeError.*an address, which is a text",
    ),
    (check_environment, lambda *given: {"RANK": "rank " + given[0]}, "raised TypeError"),
    (check_join, joins("tcp://127.0.0.1:29871"), "port taken.*belongs to one job|place of its own"),
    (
        check_join,
        by_a_port_of_the_name,
        "another user's job of the same name.*port taken|place of its own",
    ),
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
    (
        check_waits,
        lambda delays, jobs: [sum(pair) for pair in zip(waits(delays, jobs), delays, strict=True)],
        "rank [12] of job .*time at which all leave",
    ),
    (check_waits, lambda delays, jobs: delays, "at which they come"),
    (
        check_waits,
        lambda delays, jobs: [max(delays) - d for d in delays],
        "rank 0 of job a came after 0 s and waited about 0.[345] s; you said 0.8 s.*its own job",
    ),
    (check_waits, lambda delays, jobs: [max(delays)] * len(delays), "0.8 s.*last rank of all"),
    (check_waits, rank_zero_waits, "rank 0 of job a came.*you said 0.8 s.*rank 0 is no exception"),
    (check_waits, until_the_next, "rank 0 of job a .*you said 0.2 s"),
    (check_waits, lambda delays, jobs: [0.4, 0.0, 0.0, 0.6], "4 numbers for 3 ranks"),
    (
        check_waits,
        lambda delays, jobs: [0.4, 0.0, 0.0, 0.6][: len(jobs)],
        "rank 0 of job a came after 0.7 s and waited about 0.0 s; you said 0.4 s",
    ),
    (check_waits, lambda delays, jobs: [0], r"waits\(\[0.0.*'b'\]\) gave 1 number for 4 ranks"),
    (check_waits, lambda delays, jobs: dict(zip(jobs, delays, strict=True)), "raised ValueError"),
    (
        check_waits,
        lambda delays, jobs: max(delays),
        "raised TypeError.*returns one number for each",
    ),
    (check_waits, answers.prints(waits), "raised TypeError.*returns one number"),
    (check_waits, lambda *given: [-wait for wait in waits(*given)], "you said -0.4 s"),
    (check_waits, lambda *given: [1000 * wait for wait in waits(*given)], "you said 400 s"),
    (check_waits, lambda delays, jobs: [float("nan")] * len(delays), "you said nan s"),
    (check_waits, lambda delays, jobs: [delays[0] - d for d in delays], "rank 0 .*you said 0 s"),
    (check_waits, lambda *given: sorted(waits(*given)), "rank 0 .*you said 0 s"),
    (check_waits, lambda delays, jobs: delays.sort(), "raised TypeError"),
    (check_waits, lambda delays: delays, "raised TypeError.*a list of seconds and one of jobs"),
    (check_waits, answers.recurses, "raised RecursionError"),
    (
        check_meet,
        meets_with("{r}"),
        "meeting, .*from the other meeting.*keys of its own",
    ),
    (check_meet, meets_with("{n}/{r}", n_of="all"), "3 ranks, it failed.*is different on each"),
    (check_meet, meets_with("{n}/{r}", before=True), "it failed.*set its own card before"),
    (
        check_meet,
        meets_with("{n}/{mine}"),
        "rank 0 got .*same card.*Each rank needs a key of its own",
    ),
    (check_meet, meets_with("{n}"), "in the first meeting, rank . got .*same card"),
    (check_meet, meets_with("{n} of {r} for {mine}"), "it failed.*the others read"),
    (check_meet, answers.prints(meet), "got None.*`return` missing"),
    (
        check_meet,
        lambda rank, n, store, card: [card],
        "1 text instead of 3.*own, too",
    ),
    (check_meet, of_cards(lambda cards: cards[1:]), "2 texts instead of 3.*own, too"),
    (
        check_meet,
        of_cards(lambda cards: cards[::-1]),
        "rank 0 got .*Card r of the list is rank r's",
    ),
    (check_meet, of_cards(lambda cards: [card.encode() for card in cards]), "holds bytes.*decode"),
    (check_meet, of_cards(lambda cards: [str(card.encode()) for card in cards]), "holds bytes"),
    (check_meet, of_cards(" ".join), "got 'first card of rank 0 first .*Return a list"),
    (check_meet, of_cards(lambda cards: dict(enumerate(cards))), "got {0: .*Return a list"),
    (check_meet, of_cards(lambda cards: [*map(len, cards)]), "as the ranks brought them"),
    (check_meet, of_cards(lambda cards: dist.barrier()), "failed on real ranks"),
    (check_meet, lambda rank, n, store: [], "failed on real ranks.*TypeError"),
    (check_meet, answers.recurses, "failed on real ranks.*RecursionError"),
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


def test_a_file_in_a_folder_of_all_users_is_explained(tmp_path: Path) -> None:
    said = "another user's job of the same name.*place of its own"
    answers.is_explained(check_join, joins(f"file://{tmp_path}/{{job}}"), said)
