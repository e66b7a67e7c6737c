"""The checks of lesson 01: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.exercises.spawn import check_global_rank, check_place, check_run_job
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Counted:
    """Counts the ranks that come before."""

    def __call__(self, group: int, local: int, nprocs: int) -> int:
        return sum(nprocs for _ in range(group)) + local


def of_a_table(group: int, local: int, nprocs: int) -> int:
    return {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 3, (1, 1): 4, (1, 2): 5}[group, local]


def joins(group: int, local: int, nprocs: int) -> Any:
    dist.init_process_group("gloo")
    return dist.get_rank()


def place_of(rank: int, ranks_on: list[int]) -> tuple[int, int]:
    for machine, ranks in enumerate(ranks_on):
        if rank < ranks:
            return machine, rank
        rank -= ranks
    raise AssertionError(f"no machine has rank {rank}")


def in_numpy(rank: int, ranks_on: list[int]) -> Any:
    ends = np.cumsum(ranks_on)
    machine = np.searchsorted(ends, rank, side="right")
    return machine, rank - ends[machine] + ranks_on[machine]


def in_torch(rank: int, ranks_on: list[int]) -> Any:
    machines = torch.repeat_interleave(torch.tensor(ranks_on))
    return torch.stack([machines[rank], (machines[..., :rank] == machines[rank]).sum()])


def listed(rank: int, ranks_on: list[int]) -> Any:
    return [(m, local) for m, ranks in enumerate(ranks_on) for local in range(ranks)][rank]


def emptied(rank: int, ranks_on: list[int], machine: int = 0) -> Any:
    """Takes machines out of the list, and yields the two numbers."""
    ranks = ranks_on.pop(0)
    if rank < ranks:
        yield from (machine, rank)
    else:
        yield from emptied(rank - ranks, ranks_on, machine + 1)


def placed(change: Callable[[int, int], Any]) -> Any:
    """A place_of that returns something else than machine and local rank."""
    return lambda rank, ranks_on: change(*place_of(rank, ranks_on))


def off_by_one(rank: int, ranks_on: list[int]) -> Any:
    for machine, ranks in enumerate(ranks_on):
        if rank <= ranks:
            return machine, rank
        rank -= ranks
    return None


def many(fn: Any, nprocs: int) -> list[Any]:
    return launch(fn, nprocs=nprocs).values


def or_plain(launched: Callable[[Any, int], Any]) -> Any:
    """A run_job that is right for one process."""
    return lambda fn, nprocs: [fn(0)] if nprocs == 1 else launched(fn, nprocs)


def in_threads(fn: Any, nprocs: int) -> list[Any]:
    with ThreadPoolExecutor(nprocs) as threads:
        return list(threads.map(fn, range(nprocs)))


def all_on_one_rank(fn: Any, nprocs: int) -> list[Any]:
    ran = launch(lambda _: [fn(rank) for rank in range(nprocs)], nprocs=1).values[0]
    return list(ran)


class Job:
    """Collects the values rank by rank."""

    def __call__(self, fn: Any, nprocs: int) -> list[Any]:
        if nprocs > 1:
            return [rank.value for rank in launch(fn, nprocs=nprocs).ranks]
        return [*map(fn, range(nprocs))]


RIGHT: list[tuple[Any, Any]] = [
    (check_global_rank, lambda group, local, nprocs: group * nprocs + local),
    (check_global_rank, lambda group, local, nprocs: np.int64(group) * nprocs + local),
    (
        check_global_rank,
        lambda group, local, n: torch.arange(99).view(-1, 1)[..., 0][group * n + local],
    ),
    (check_global_rank, lambda group, local, n: range(group * n, (group + 1) * n)[local]),
    (check_global_rank, functools.partial(lambda none, g, local, n: g * n + local, None)),
    (check_global_rank, Counted()),
    (check_place, place_of),
    (check_place, in_numpy),
    (check_place, in_torch),
    (check_place, listed),
    (check_place, emptied),
    (check_place, functools.partial(answers.decorated(place_of))),
    (check_run_job, or_plain(many)),
    (check_run_job, Job()),
    (check_run_job, or_plain(lambda fn, n: [*map(launch(fn, nprocs=n).values.pop, [0] * n)])),
    (
        check_run_job,
        functools.partial(lambda first, fn, n: [fn(first)] if n < 2 else many(fn, n), 0),
    ),
    (check_run_job, or_plain(lambda fn, n: launch(fn, nprocs=1, nnodes=n).values)),
    (check_run_job, or_plain(lambda fn, n: sorted(launch(lambda r: fn(r), nprocs=n).values))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_global_rank, lambda g, loc, n: g + loc, "themselves 1: machine 1, .*local rank starts"),
    (check_global_rank, lambda g, loc, n: loc, "two ranks call themselves 0.*local rank starts"),
    (check_global_rank, lambda g, loc, n: g * n, "themselves 0: machine 0, .*0.*must be added"),
    (check_global_rank, lambda g, loc, n: loc * n + g, "machine 0, local rank 1 should be rank 1"),
    (check_global_rank, lambda g, loc, n: g * 3 + loc, "3 machines with 2.*machine by machine"),
    (
        check_global_rank,
        lambda g, loc, n: g * n - loc,
        "local rank 1 should be rank 1; .* itself -1",
    ),
    (check_global_rank, lambda g, loc, n: g * n + loc + 1, "be rank 0; it calls itself 1.*from 0"),
    (check_global_rank, lambda g, loc, n: (g - 1) * n + loc, "itself -3.*all counted from 0"),
    (check_global_rank, lambda g, loc, n: str(g * n + loc), "got '0', which is no whole number"),
    (check_global_rank, lambda g, loc, n: (g * n + loc) / 1, r"got 0\.0, .*`/` make a float"),
    (check_global_rank, lambda g, loc, n: print(g * n + loc), "got None.*`return` missing"),
    (check_global_rank, lambda g, loc, n: (g, loc), r"got \(0, 0\), which is no whole"),
    (check_global_rank, lambda g, loc, n: bool(g or loc), "got False, which is no whole"),
    (check_global_rank, lambda g, loc, n: int(os.environ["RANK"]), "looked for RANK.*taken away"),
    (check_global_rank, lambda g, loc, n: os.environ.get("RANK"), "RANK.*you are to compute"),
    (check_global_rank, lambda g, loc, n: int(os.getenv("RANK") or 0), "RANK.*you are to compute"),
    (
        check_global_rank,
        lambda g, loc, n: int(os.getenv("RANK")),  # type: ignore[arg-type]
        "^. check_global_rank: it looked for RANK",
    ),
    (check_global_rank, joins, "looked for RANK.*you are to compute"),
    (check_global_rank, lambda g, loc, n: dist.get_rank(), "ranks.*calls? dist.init_process_group"),
    (check_global_rank, of_a_table, "failed on real ranks.*ranks 4 and 5 of 6 raised KeyError"),
    (check_global_rank, lambda g, loc: g, "failed on real ranks.*TypeError"),
    (check_place, lambda r, on: divmod(r, on[0]), r"with \[2, 4, 1\] .*one division does not find"),
    (check_place, lambda r, on: (0, r), "machine 0, local rank 3;.*beyond it is on a later"),
    (
        check_place,
        lambda r, on: divmod(r, len(on)),
        "rank 2 said machine 1, local rank 0.*Count from machine",
    ),
    (check_place, lambda r, on: divmod(r, len(on))[::-1], "machine by machine.*not dealt out"),
    (
        check_place,
        lambda r, on: divmod(r, max(on)),
        r"with \[2, 4, 1\] .*last local rank of machine 0 is 1",
    ),
    (
        check_place,
        lambda r, on: (r, on[0]),
        "rank 0 said machine 0, local rank 3.*is 2. A rank beyond",
    ),
    (check_place, lambda r, on: (1, 1), "rank 0 said machine 1, local rank 1; it is local rank 0 "),
    (check_place, lambda r, on: (r // 3, 0), "rank 1 said machine 0, local rank 0.*Rank 0 said so"),
    (check_place, off_by_one, "rank 3 said machine 0, local rank 3.*is on a later machine"),
    (check_place, lambda r, on: (place_of(r, on)[0], r), "machine is right.*begin at 0 on every"),
    (check_place, placed(lambda m, local: (local, m)), "The machine comes first"),
    (check_place, placed(lambda m, local: (m + 1, local)), "counted from 0"),
    (check_place, placed(lambda m, local: (m + 1, local + 1)), "both counted from 0"),
    (check_place, placed(lambda m, local: (m, local + 1)), "both counted from 0"),
    (check_place, placed(lambda m, local: (m - 5, local)), "no machine -5: .* from 0 to 1"),
    (check_place, lambda r, on: r, "rank 0 returned 0.*two whole numbers"),
    (check_place, placed(lambda m, local: (float(m), local)), r"returned \(0.0, 0\).*two whole"),
    (check_place, placed(lambda m, local: f"{m}, {local}"), "returned '0, 0'.*two whole numbers"),
    (check_place, placed(lambda m, local: (m, local, 0)), "two whole numbers"),
    (check_place, placed(lambda m, local: {m: local}), "returned {0: 0}.*two whole numbers"),
    (check_place, answers.prints(place_of), "returned None.*two whole numbers"),
    (
        check_place,
        lambda r, on: (int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])),
        "looked for GROUP_RANK.*from the rank and the list alone",
    ),
    (check_place, lambda r, on: (on.index(r), 0), "failed on real ranks.*ValueError"),
    (check_place, lambda r: (0, r), "failed on real ranks.*TypeError"),
    (check_run_job, many, "nprocs=1 a process was started"),
    (check_run_job, lambda fn, n: [fn(r) for r in range(n)], "1 process, 3 of.*not make N ranks"),
    (check_run_job, in_threads, "in a loop or in threads, does not make N ranks"),
    (check_run_job, or_plain(all_on_one_rank), "in 1 process, and there should be 3.*wait forever"),
    (check_run_job, lambda fn, n: fn(0) if n == 1 else many(fn, n), "a list of 1 value.*how many"),
    (check_run_job, lambda fn, n: (fn(r) for r in range(n)), "generator.*a list of 1 value"),
    (check_run_job, lambda fn, n: [fn(n)], "called with 1 as rank"),
    (check_run_job, lambda fn, n: [fn()], "raised TypeError"),
    (check_run_job, lambda fn, n: print([fn(0)]), "returned None.*`return` missing"),
    (check_run_job, lambda fn, n: [fn] * n, "which is not what fn returned"),
    (check_run_job, or_plain(lambda fn, n: launch(fn, nprocs=n)), "gave Run .*returns a Run"),
    (check_run_job, or_plain(lambda fn, n: many(fn, n)[::-1]), "ranks 2, 1, 0, in this order"),
    (
        check_run_job,
        or_plain(lambda fn, n: many(fn, n - 1)),
        "of 3 values.*one value for each rank",
    ),
    (
        check_run_job,
        or_plain(lambda fn, n: many(lambda r: fn(0), n)),
        "called with 0, 0, 0 as rank",
    ),
    (
        check_run_job,
        or_plain(lambda fn, n: many(lambda r: print(fn(r)), n)),
        r"\[None, .*not what fn",
    ),
    (
        check_run_job,
        or_plain(lambda fn, n: [fn(0), *many(fn, n)[1:]]),
        "3 processes, 1 of the calls",
    ),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
