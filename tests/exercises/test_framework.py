"""Every check: the solution passes; typical wrong answers fail with the right explanation."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import exercises, launch
from ddp_lessons.exercises import init_process_group, spawn, start_here
from ddp_lessons.exercises.framework import Exercise, is_unattempted

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHECKS = [
    value
    for module in pkgutil.iter_modules(exercises.__path__, f"{exercises.__name__}.")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, Exercise)
]


def _greet(condition: Callable[[int], bool], text: str = "hello from {} ranks") -> Any:
    def greet(rank: int, world_size: int) -> None:
        if condition(rank):
            print(text.format(world_size))

    return greet


def _environment(**changes: Any) -> Any:
    def environment(g: int, local: int, nnodes: int, nprocs: int, address: str, port: int) -> Any:
        rank, world_size = g * nprocs + local, nnodes * nprocs
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        for name, change in changes.items():
            if change is None:
                del variables[name]
            else:
                variables[name] = change(rank, world_size)
        return variables

    return environment


def _join(url: str, own: bool = True) -> Any:
    def join(rank: int, world_size: int, job: str, folder: str) -> None:
        where = {"rank": rank, "world_size": world_size} if own else {}
        dist.init_process_group("gloo", url.format(job=job, folder=folder), **where)

    return join


def _waits(delays: Sequence[float], jobs: Sequence[str]) -> list[float]:
    complete = {job: max(d for d, j in zip(delays, jobs, strict=True) if j == job) for job in jobs}
    return [complete[job] - delay for delay, job in zip(delays, jobs, strict=True)]


def _meet(rank: int, world_size: int, store: dist.Store, card: str) -> list[str]:
    number = store.add(f"meetings of {rank}", 1)
    store.set(f"{number}/{rank}", card)
    return [store.get(f"{number}/{r}").decode() for r in range(world_size)]


def _meet_with_the_same_keys(rank: int, world_size: int, store: dist.Store, card: str) -> list[str]:
    store.set(f"{rank}", card)
    return [store.get(f"{r}").decode() for r in range(world_size)]


def _place(rank: int, ranks_on: Sequence[int]) -> tuple[int, int]:
    for machine, ranks in enumerate(ranks_on):
        if rank < ranks:
            return machine, rank
        rank -= ranks
    raise AssertionError("there are not so many ranks")


def _plain_or_launched(fn: Any, nprocs: int) -> list[Any]:
    return [fn(0)] if nprocs == 1 else launch(fn, nprocs=nprocs).values


RIGHT: list[tuple[Exercise, Any]] = [
    (start_here.check_greet, _greet(lambda rank: rank == 0)),
    (spawn.check_global_rank, lambda group, local, nprocs: group * nprocs + local),
    (spawn.check_run_job, _plain_or_launched),
    (init_process_group.check_environment, _environment()),
    (init_process_group.check_join, _join("file://{folder}/{job}")),
    (init_process_group.check_waits, _waits),
    (init_process_group.check_meet, _meet),
    (spawn.check_place, _place),
]

WRONG: list[tuple[Exercise, Any, str]] = [
    (start_here.check_greet, _greet(lambda rank: True), "printed 4 times.*world_size times"),
    (start_here.check_greet, _greet(bool), "3 times, by rank 1, 2, 3.*`if rank:` is true"),
    (
        start_here.check_greet,
        _greet(lambda rank: rank == 1),
        "1 rank nothing.*only rank that every",
    ),
    (
        start_here.check_greet,
        _greet(lambda rank: rank == 0, "hello from 4 ranks"),
        "2 ranks.*choice",
    ),
    (
        start_here.check_greet,
        lambda rank, world_size: f"hello from {world_size}",
        "nothing.*returned",
    ),
    (start_here.check_greet, lambda rank: print("x"), "failed on real ranks.*TypeError"),
    (
        spawn.check_global_rank,
        lambda g, loc, n: g + loc,
        "two ranks call themselves.*local rank starts",
    ),
    (
        spawn.check_global_rank,
        lambda g, loc, n: loc,
        "two ranks call themselves 0.*local rank starts",
    ),
    (
        spawn.check_global_rank,
        lambda g, loc, n: loc * n + g,
        "machine 0, local rank 1 should be rank 1",
    ),
    (
        spawn.check_global_rank,
        lambda g, loc, n: g * 3 + loc,
        "3 machines with 2.*machine by machine",
    ),
    (
        spawn.check_global_rank,
        lambda g, loc, n: str(g * n + loc),
        "got '0', which is no whole number",
    ),
    (
        spawn.check_run_job,
        lambda fn, n: launch(fn, nprocs=n).values,
        "nprocs=1 a process was started",
    ),
    (
        spawn.check_run_job,
        lambda fn, n: [fn(r) for r in range(n)],
        "in a loop or in threads, does not make N ranks",
    ),
    (spawn.check_run_job, lambda fn, n: fn(0) if n == 1 else [], "a list of 1 value"),
    (spawn.check_run_job, lambda fn, n: [fn(n)], "called with 1 as rank"),
    (spawn.check_run_job, lambda fn, n: [fn()], "raised TypeError"),
    (
        init_process_group.check_environment,
        _environment(MASTER_PORT=None),
        "found no MASTER_PORT.*four variables",
    ),
    (
        init_process_group.check_environment,
        _environment(RANK=lambda rank, n: rank),
        r"str expected, not int.*text",
    ),
    (
        init_process_group.check_environment,
        _environment(RANK=lambda rank, n: "0"),
        "both opened the meeting point.*RANK must differ",
    ),
    (
        init_process_group.check_environment,
        _environment(WORLD_SIZE=lambda rank, n: str(n + 1)),
        "did not find each other.*same",
    ),
    (
        init_process_group.check_environment,
        _environment(WORLD_SIZE=lambda rank, n: "1", RANK=lambda rank, n: "0"),
        "both opened|groups had",
    ),
    (
        init_process_group.check_join,
        _join("tcp://127.0.0.1:29871"),
        "port taken.*belongs to one job|place of its own",
    ),
    (init_process_group.check_join, _join("file://{folder}/store"), "place of its own"),
    (init_process_group.check_join, _join("env://", own=False), "mixed.*22.0.*place of its own"),
    (init_process_group.check_join, lambda r, n, job, folder: job + folder, "must call"),
    (
        init_process_group.check_waits,
        lambda delays, jobs: [sum(pair) for pair in zip(_waits(delays, jobs), delays, strict=True)],
        "rank [12] of job .*time at which all leave",
    ),
    (init_process_group.check_waits, lambda delays, jobs: delays, "at which they come"),
    (
        init_process_group.check_waits,
        lambda delays, jobs: [max(delays) - d for d in delays],
        "rank 0 of job a came after 0 s and waited about 0.[345] s; you said 0.8 s.*its own job",
    ),
    (
        init_process_group.check_waits,
        lambda delays, jobs: [max(delays), *[0] * (len(delays) - 1)],
        "rank 0 is no exception",
    ),
    (init_process_group.check_waits, lambda delays, jobs: [0], "1 number for 4 ranks"),
    (init_process_group.check_waits, lambda delays: delays, "raised TypeError"),
    (
        init_process_group.check_meet,
        _meet_with_the_same_keys,
        "of them belong to the other meeting",
    ),
    (
        init_process_group.check_meet,
        lambda rank, n, store, card: [store.get(f"{card[0]}/{r}") for r in range(n)],
        "it failed.*set its own card before",
    ),
    (
        init_process_group.check_meet,
        lambda rank, n, store, card: store.set(f"{card[0]}/{rank}", card),
        "got None.*`return` missing",
    ),
    (init_process_group.check_meet, lambda rank, n, store, card: [card], "not 3 cards"),
    (
        init_process_group.check_meet,
        lambda *given: _meet(*given)[::-1],
        "rank 0 got .*Card r of the list is rank r's",
    ),
    (
        init_process_group.check_meet,
        lambda *given: [card.encode() for card in _meet(*given)],
        "has bytes",
    ),
    (spawn.check_place, lambda r, on: divmod(r, on[0]), "one division does not find"),
    (spawn.check_place, lambda r, on: _place(r, on)[::-1], "The machine comes first"),
    (spawn.check_place, lambda r, on: (_place(r, on)[0] + 1, _place(r, on)[1]), "counted from 0"),
    (spawn.check_place, lambda r, on: r, "returned 0.*two whole numbers"),
    (spawn.check_place, lambda r, on: [float(n) for n in _place(r, on)], "two whole numbers"),
    (spawn.check_place, lambda r, on: (0, r), "it is local rank 0 of machine 1"),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=[c.__name__ for c, _ in RIGHT])
def test_a_right_answer_passes(check: Exercise, answer: Any) -> None:
    verdict = check(answer)
    assert verdict.passed, verdict
    assert verdict.because == ""
    assert repr(verdict).startswith(f"✓ {check.__name__}: ")


@pytest.mark.parametrize(
    ("check", "answer", "said"), WRONG, ids=[f"{c.__name__}-{said[:30]}" for c, _, said in WRONG]
)
def test_a_wrong_answer_is_explained(
    check: Exercise, answer: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = check(answer)
    assert verdict.passed is False

    assert re.search(said, repr(verdict).replace("\n", " ")), repr(verdict)
    assert f"{check.__name__}.hint()" in repr(verdict)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_has_its_tests(check: Exercise) -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    here = [importlib.import_module(f"tests.exercises.{file.stem}") for file in files]
    assert sum(c is check for tests in here for c, _ in tests.RIGHT) >= 1
    assert sum(c is check for tests in here for c, _, _ in tests.WRONG) >= 3
    assert check.__doc__


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_not_attempted_yet(check: Exercise) -> None:
    def answer(*args: object) -> None: ...

    for unattempted in (answer, ...):
        verdict = check(unattempted)
        assert verdict.passed is None
        assert "not attempted yet" in repr(verdict)


def test_what_counts_as_an_attempt() -> None:
    def documented() -> None:
        """Return nothing."""

    def half() -> int:
        x: Any = ...
        return int(x)

    def within() -> Any:
        def inner() -> Any:
            return ...

        return inner

    def done() -> None:
        print()

    def in_a_dict() -> Any:
        return {"RANK": ..., "WORLD_SIZE": "2"}

    def passed() -> None:
        print(...)

    def indexed(x: Any, i: int) -> Any:
        x[...] = x[..., 0] + x[..., i] + x[...] + x[i, ..., 1:i]
        x[..., i] = 0
        return x[...]

    def left_over(x: Any) -> Any:
        x += 1
        ...  # noqa: PIE790
        return x

    assert is_unattempted(within)
    assert is_unattempted(in_a_dict)
    assert is_unattempted(passed)
    assert not is_unattempted(indexed)
    assert not is_unattempted(left_over)
    assert is_unattempted(documented)
    assert is_unattempted(half)
    assert not is_unattempted(done)
    assert not is_unattempted(lambda: 0)

    @contextlib.contextmanager
    def decorated() -> Any: ...

    assert is_unattempted(decorated)
    assert not is_unattempted(42)


def test_hints_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    check = start_here.check_greet
    check.hint()
    first = capsys.readouterr().out
    check.hint()
    second = capsys.readouterr().out
    assert first
    assert second
    assert first != second


def test_a_verdict_escapes_what_it_quotes() -> None:
    def greet(rank: int, world_size: int) -> None:
        if rank == 0:
            print("<b>hi</b>")

    verdict = start_here.check_greet(greet)
    assert "<b>hi" not in verdict._repr_html_()
    assert "<details>" in verdict._repr_html_()
