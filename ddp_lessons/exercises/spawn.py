"""The checks of lesson 01: ranks on machines, and a launcher for one process or many."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Sequence
from typing import Any

from ddp_lessons import Run
from ddp_lessons.exercises.framework import Wrong, call, errors, exercise, judge, run_ranks
from ddp_lessons.exercises.numeric_answers import numbers, plain
from ddp_lessons.text import count

LOOKED = "it looked for {}, which the check has taken away."
COMPUTED = "RANK is what you are to compute, from the three numbers."
SHAPES = ((3, 2), (2, 3), (4, 1), (1, 4))  # (nprocs, nnodes)


@exercise(
    "How many ranks stand on the machines before this one?",
    "group_rank machines come before this one, each with nprocs ranks.",
    "`group_rank * nprocs` ranks come before this machine's first, and local_rank more before this "
    "one. Add the two.",
)
def check_global_rank(global_rank: Callable[[int, int, int], int]) -> str:
    """Check `global_rank(group_rank, local_rank, nprocs)` against RANK on real ranks."""

    def compare(_: int) -> tuple[int, int, Any]:
        names = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        group, local, nprocs = (int(os.environ[name]) for name in names)
        del os.environ["RANK"]  # which would be the answer
        return group, local, plain(global_rank(group, local, nprocs))

    for nprocs, nnodes in SHAPES:
        run = run_ranks(compare, nprocs=nprocs, nnodes=nnodes, check=False)
        is_right = run.ok and [answer for *_, answer in run.values] == list(range(run.world_size))
        if not is_right and _names(getattr(global_rank, "__code__", None), "RANK"):
            raise Wrong(LOOKED.format("RANK"), COMPUTED)
        _raise_if_failed(run, ("RANK",), COMPUTED)
        _judge_ranks(f"on {_machines(nnodes, nprocs)}, ", run.values)
    return "right on every rank of 2 machines with 3 ranks, 3 with 2, 1 with 4 and 4 with 1."


def _raise_if_failed(run: Run, taken: Sequence[str], because: str) -> None:
    """Raise what failed; `because` if a rank looked for a variable that the check has taken."""
    for name in taken:
        if any(
            error.summary == f"KeyError: '{name}'" or f"variable {name} expected" in error.summary
            for error in errors(run)
        ):
            raise Wrong(LOOKED.format(name), because)
    run.raise_for_failure()


def _names(code: types.CodeType | None, name: str) -> bool:
    """Whether a function's code, or that of a function in it, has this text."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType)) if code else ()
    return code is not None and (name in code.co_consts or any(_names(c, name) for c in inner))


def _machines(nnodes: int, nprocs: int) -> str:
    each = " each" if nnodes > 1 else ""
    return f"{count(nnodes, 'machine')} with {count(nprocs, 'rank')}{each}"


def _judge_ranks(where: str, values: list[tuple[int, int, Any]]) -> None:
    places = [f"machine {group}, local rank {local}" for group, local, _ in values]
    answers = [answer for _, _, answer in values]
    rank = next((r for r, a in enumerate(answers) if type(a) is not int or a != r), None)
    if rank is None:
        return
    this, answer = places[rank], answers[rank]
    twin = next((r for r, a in enumerate(answers) if a == answer and r != rank), None)
    twins = f"two ranks call themselves {answer!r}: {this}, and {places[twin or 0]}.\n"
    mistakes = {
        f"{this} got {answer!r}, which is no whole number.\n"
        "The function must return an `int`. Is `return` missing, is it a text, or did `/` make a "
        "float of it?": type(answer) is not int,
        f"{twins}All ranks of a machine have its group_rank. What tells them apart is the local "
        "rank: it must be added.": twin is not None and values[twin][0] == values[rank][0],
        f"{twins}The local rank starts at 0 on every machine; it only chooses the device. The "
        "global rank must be different for every process of the job.": twin is not None,
        f"{this} should be rank {rank}; it calls itself {answer!r}.\n"
        "Ranks, machines and local ranks are all counted from 0.": all(
            type(a) is int and a - r == answer - rank for r, a in enumerate(answers)
        ),
        f"{this} should be rank {rank}; it calls itself {answer!r}.\n"
        "Ranks are counted machine by machine: all ranks of machine 0 first, then those of machine "
        "1. The stride between machines is the number of ranks on one.": True,
    }
    judge(where, mistakes)


MACHINES = ([3, 3], [2, 4, 1], [1, 1, 5], [6])  # ranks on each


@exercise(
    "Whose ranks come first? If this rank is none of machine 0's, how many are behind you?",
    "Go through the machines. While the rank is not smaller than the number of ranks on a machine, "
    "take that number away from it.",
    "`for machine, ranks in enumerate(ranks_on)`: if `rank < ranks`, return `machine, rank`; "
    "otherwise `rank -= ranks`.",
)
def check_place(place_of: Callable[[int, list[int]], tuple[int, int]]) -> str:
    """Check `place_of(rank, ranks_on)`: the machine's number and the local rank of every rank."""
    taken = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # they know nothing of these machines

    def find(rank: int, ranks_on: list[int]) -> tuple[Any, str]:
        for name in taken:
            del os.environ[name]
        answer = place_of(rank, ranks_on)
        return numbers(answer), repr(answer)

    for ranks_on in MACHINES:
        run = run_ranks(find, (ranks_on,), nprocs=sum(ranks_on), check=False)
        _raise_if_failed(run, taken, "Compute the place from the rank and the list alone.")
        _judge_places(ranks_on, run.values)
    return "every rank found its place, on equal machines and on unequal ones."


def _judge_places(ranks_on: list[int], answers: list[tuple[Any, str]]) -> None:
    right = [[m, local] for m, ranks in enumerate(ranks_on) for local in range(ranks)]
    where = f"with {ranks_on} ranks on the machines, rank "
    for r, (place, text) in enumerate(answers):
        if not (isinstance(place, list) and [*map(type, place)] == [int, int]):
            raise Wrong(
                f"{where}{r} returned {text}.",
                "Return two whole numbers: the machine, and the local rank.",
            )
    places = [place for place, _ in answers]
    rank = next((r for r, place in enumerate(places) if place != right[r]), None)
    if rank is None:
        return
    (machine, local), (its_machine, its_local) = places[rank], right[rank]
    shifted = [[[m + a, loc + b] for m, loc in right] for a, b in ((1, 1), (0, 1), (1, 0))]
    in_turn = [[r % len(ranks_on), r // len(ranks_on)] for r in range(len(right))]
    here = ranks_on[machine] if machine in range(len(ranks_on)) else 0
    mistakes = {
        "The machine comes first, then the local rank.": places == [p[::-1] for p in right],
        "Machines and local ranks are both counted from 0.": places in shifted,
        "Ranks are counted machine by machine: all ranks of machine 0 first, then those of machine "
        "1. They are not dealt out in turn.": places == in_turn,
        f"Rank {places.index(places[rank])} said so, too. No two ranks have the same "
        "place.": places.index(places[rank]) < rank,
        "The machine is right. Local ranks begin at 0 on every machine: take away the ranks of all "
        "machines before this one.": [m for m, _ in places] == [m for m, _ in right],
        f"There is no machine {machine}: they are counted from 0 to {len(ranks_on) - 1}.": not here,
        f"The last local rank of machine {machine} is {here - 1}. A rank beyond it is on a later "
        "machine.": local >= here,
        "The machines have different numbers of ranks, so one division does not find the machine. "
        "Take away the ranks of each machine before it.": len({*ranks_on}) > 1,
        "Count from machine to machine: take away the ranks of each machine before it, and what is "
        "left is the local rank.": True,
    }
    seen = f"said machine {machine}, local rank {local}; it is local rank {its_local} of machine "
    judge(f"{where}{rank} {seen}{its_machine}.", mistakes)


def _probe(rank: int) -> tuple[int, int]:
    return rank, os.getpid()


@exercise(
    "With one process there is nothing to start: call the function yourself. What is its rank?",
    "`[fn(0)]` for one process, `launch(fn, nprocs=nprocs).values` for more.",
)
def check_run_job(run_job: Callable[[Callable[[int], Any], int], list[Any]]) -> str:
    """Check that `run_job(fn, nprocs)` calls fn for one rank, launches more, returns a list."""
    for nprocs in (1, 3):
        result = call(run_job, _probe, nprocs, because="It must work for one process and for many.")
        _judge_result(nprocs, result)
    return "one process: called in the notebook itself; three: launched, values by rank."


def _judge_result(nprocs: int, result: Any) -> None:
    gave_no_list = f"gave {result!r}; expected a list of {count(nprocs, 'value')}.\n"
    mistakes: dict[str, object] = {
        "returned None.\n"
        "Is `return` missing? (`mp.spawn` and a plain call of a worker give back nothing by "
        "themselves; `launch(...).values` is the list of what the ranks returned.)": result is None,
        f"gave {result!r}.\n"
        "`launch` returns a Run. The list of what the ranks returned is its "
        "`.values`.": isinstance(result, Run),
        f"{gave_no_list}What uses the result should not need to know how many processes there "
        "were: one process gives a list of one value.": not isinstance(result, list),
        f"{gave_no_list}There is one value for each rank, 0 to nprocs - 1.": (
            isinstance(result, list) and len(result) != nprocs
        ),
        f"gave {result!r}, which is not what fn returned.\n"
        "The list has what `fn(rank)` returned on each rank, as it is.": not _are_probed(result),
    }
    judge(f"run_job(fn, {nprocs}) ", mistakes)
    ranks, pids = zip(*result, strict=True)
    processes, here = len(set(pids)), pids.count(os.getpid())
    called_with = f", fn was called with {', '.join(map(str, ranks))} as rank.\n"
    ran_in = f", the function ran in {processes} process{'es' if processes > 1 else ''}, "
    mistakes = {
        f", the values are those of ranks {', '.join(map(str, ranks))}, in this order.\n"
        "Value r of the list is rank r's.": list(ranks) != sorted(ranks) == list(range(nprocs)),
        f"{called_with}fn's first argument is its rank, 0 to nprocs - 1; "
        "a single process is rank 0.": list(ranks) != list(range(nprocs)),
        " a process was started.\n"
        "One process is the one you have. Starting another costs time, and a debugger or a print "
        "in the notebook no longer sees the function.": nprocs == 1 and not here,
        f"{ran_in}{here} of the calls in the notebook's own.\n"
        "Calling a function N times, in a loop or in threads, does not make N ranks: each is a "
        "process of its own.": here > 0 and nprocs > 1,
        f"{ran_in}and there should be {nprocs}.\n"
        "Calls in one process, one after the other, are not ranks: the first collective would wait "
        "forever for a call that comes later.": processes < nprocs,
    }
    judge(f"with nprocs={nprocs}", mistakes)


def _are_probed(result: Any) -> bool:
    """Whether these are values that `_probe` returned."""
    return isinstance(result, list) and all(
        isinstance(value, tuple) and [*map(type, value)] == [int, int] for value in result
    )
