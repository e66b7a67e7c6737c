"""The checks of lesson 02: variables, jobs that stay apart, waiting times, a meeting by hand."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ddp_lessons import Run
from ddp_lessons.exercises.framework import (
    TIMEOUT,
    Wrong,
    call,
    errors,
    exercise,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import first_miss, plain, predict, wrong_rule
from ddp_lessons.system.host import reserve_port
from ddp_lessons.text import count

Seconds = Sequence[float]  # by rank

Environment = Callable[[int, int, int, int, str, int], Mapping[str, str]]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@exercise(
    "Four variables: who am I, how many are we, and where is the meeting point (two of them)?",
    "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; the values are strings. How many ranks stand on "
    "the machines before this one, and on all of them?",
    "RANK is `str(group_rank * nprocs + local_rank)`, WORLD_SIZE `str(nnodes * nprocs)`, "
    "MASTER_ADDR `address` and MASTER_PORT `str(port)`.",
)
def check_environment(environment: Environment) -> str:
    """Check that ranks join with nothing but `environment(group_rank, local_rank, ...)`."""

    def join(rank: int, nnodes: int, nprocs: int) -> tuple[int, int]:
        place = rank // nprocs, rank % nprocs, nnodes, nprocs
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        for name in (*VARIABLES, "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        os.environ.update(environment(*place, address, port))
        dist.init_process_group("gloo", timeout=timedelta(seconds=4))
        seen = torch.ones(1)
        dist.all_reduce(seen)
        joined_as = dist.get_rank()
        dist.destroy_process_group()
        return int(seen.item()), joined_as

    _judge_variables(environment)
    for nnodes, nprocs in ((1, 2), (2, 3), (3, 1)):
        run = run_ranks(join, (nnodes, nprocs), nprocs=nprocs, nnodes=nnodes, check=False)
        if not run.ok or run.values != [(nnodes * nprocs, r) for r in range(nnodes * nprocs)]:
            machines = "" if nnodes == 1 else f" on {nnodes} machines"
            _explain_failed_join(f"with {run.world_size} ranks{machines}, ", run)
    return "the ranks of 1, 2 and 3 machines joined with your variables alone."


def _explain_failed_join(where: str, run: Run) -> None:
    raised = errors(run)
    texts = " ".join(error.text for error in raised)
    no_text = next((error.summary for error in raised if error.type_name == "TypeError"), "")
    sizes = [value[0] for value in run.values if value]
    ranks = [value[1] for value in run.values if value]
    missing = next((name for name in VARIABLES if f"{name} expected, but not set" in texts), "")
    mistakes = {
        f"init_process_group found no {missing}.\n"
        "env:// reads four variables; torchrun and launch() set all of them for you.": missing,
        f"the variables could not be set: {no_text}\n"
        "Environment variables are text: a number needs `str`.": no_text,
        "two ranks both opened the meeting point: the second found the port in use.\n"
        "Rank 0 opens the meeting point, so only one process of the job may have RANK 0, and each "
        "has a RANK of its own. The local rank will not do: every machine has a local rank "
        "0.": "already in use" in texts,
        f"the groups had {sizes} members, by rank.\n"
        "WORLD_SIZE is the number of ranks of the whole job, the same on each of "
        "them.": run.ok and {*sizes} != {run.world_size},
        f"the processes, machine by machine, joined as ranks {ranks}.\n"
        "RANK counts on from machine to machine, and on each in the order of local ranks. Rank 0 "
        "opens the meeting point, so it must be on the machine that MASTER_ADDR names, machine "
        "0.": run.ok,
        f"the ranks did not find each other: {run.explain().splitlines()[0]}\n"
        "All ranks need the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, which counts the ranks "
        "of all machines, and each its own RANK from 0 to WORLD_SIZE - 1. The others wait until "
        "the timeout for a rank that never comes.": True,
    }
    judge(where, mistakes)


def _judge_variables(environment: Environment) -> None:
    address, port = "10.0.0.7", 40_123
    given = f"environment(1, 0, 2, 3, {address!r}, {port})"
    before = dict(os.environ)
    because = (
        "It gets the machine's number, the local rank, the numbers of machines and of ranks on "
        "each, an address, which is a text, and a port, a number. It must work with nothing else: "
        "the launcher's own variables are taken away."
    )
    try:
        variables = call(environment, 1, 0, 2, 3, address, port, because=because)
    finally:
        changed = dict(os.environ) != before
        os.environ.clear()
        os.environ.update(before)
    if changed:
        raise Wrong(
            f"{given} changed os.environ.",
            "It must only return the variables; the check sets them on each rank.",
        )
    if not isinstance(variables, Mapping):
        raise Wrong(
            f"{given} returned {variables!r}, not a dict.",
            "It must return the variables, as a dict of names and texts. Is `return` missing?",
        )
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", str(port))):
        if str(variables.get(name, value)) != value:
            raise Wrong(
                f"{given}: {name} is {variables[name]!r}.",
                "A place that is written into the code is wrong on other machines, and collides "
                "with the next job on this one. Use the one that you are given.",
            )


@exercise(
    "Both jobs run on one machine at the same time. What could be theirs alone?",
    "A file named after the job. What must be passed with file://, as with tcp://?",
    '`dist.init_process_group("gloo", f"file://{folder}/{job}", rank=rank, world_size=world_size)`',
)
def check_join(join: Callable[[int, int, str, str], None]) -> str:
    """Check that two concurrent jobs stay apart: `join(rank, world_size, job, folder)`."""

    def work(rank: int, here: str, job: str, folder: str, port: int) -> float:
        number, job_rank = divmod(rank, 2)
        if number == 1 and port:
            os.environ["MASTER_PORT"] = str(port)  # as another launcher would
        # Rank 0 of one job comes at the same time as rank 1 of the other: do they meet?
        time.sleep((0.0, 0.5, 0.5, 0.0)[rank])
        join(job_rank, 2, ("a", job)[number], (here, folder)[number])
        total = torch.tensor([float(10**number)])
        dist.all_reduce(total)
        # Keeps this job open until the other one has joined, too, if it can.
        _await_all(rank, 4, here, seconds=4.0)
        dist.destroy_process_group()
        return float(total.item())

    with tempfile.TemporaryDirectory() as folder:
        _judge_jobs("", run_ranks(work, (folder, "b", folder, 0), nprocs=4, check=False))
    with (
        tempfile.TemporaryDirectory() as here,
        tempfile.TemporaryDirectory() as there,
        reserve_port() as holder,
    ):
        of_another = here, "a", there, holder.getsockname()[1]
        run = run_ranks(work, of_another, nprocs=4, check=False)
        _judge_jobs("with another user's job of the same name, in another folder: ", run)
    return "two jobs of 2 ranks ran at once, and neither met the other's ranks."


def _judge_jobs(when: str, run: Run) -> None:
    if run.values != [2.0, 2.0, 20.0, 20.0]:
        _explain_collision(when, run)


_OWN = ("TypeError", "ValueError", "NameError", "AttributeError", "KeyError", "RuntimeError")


def _explain_collision(when: str, run: Run) -> None:
    raised = errors(run)
    texts = " ".join(error.text for error in raised)
    # Errors of the network and of gloo come from ranks that do not meet.
    own = next((e for e in raised if e.type_name in _OWN and "gloo" not in e.text), None)
    mistakes = {
        "the second job found the port taken.\n"
        "A port belongs to one job at a time. A number written into the code collides as soon as "
        "two jobs run on one machine, or a crashed one "
        "still holds it.": "already in use" in texts or "EADDRINUSE" in texts,
        "the jobs mixed: the first should add up to 2, the second to 20; the sums were "
        f"{run.values}.\n"
        "All ranks that meet at one place form one group. A file or port that both jobs use is one "
        "place, and so is env:// with the launcher's own variables: give each job a place of its "
        "own.": run.ok,
        "a rank had no process group after join().\n"
        "join() must call dist.init_process_group on every rank, and leave the group to its "
        "caller.": "has not been initialized" in texts,
        f"join() itself failed: {own.summary if own else ''}\n"
        "file:// and tcp:// need rank= and world_size=, and file:// a full path: "
        "f'file://{folder}/{job}'.": own,
        f"the jobs did not come apart: {run.explain().splitlines()[0]}\n"
        "All ranks that meet at one place form one group: give each job a place of its own, and "
        "pass the job's rank and world_size, not those of the launcher.": True,
    }
    judge(when, mistakes)


def _await_all(rank: int, world_size: int, folder: str, seconds: float = TIMEOUT) -> None:
    """Wait until all ranks are here, without a process group."""
    there = [os.path.join(folder, f"rank {r} is there") for r in range(world_size)]
    open(there[rank], "w").close()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(os.path.exists, there)):
        time.sleep(0.01)


@exercise(
    "Nobody leaves init_process_group before the last rank of its job has come. When does that "
    "one come?",
    "For each rank: the largest delay among the ranks of the same job, minus its own.",
    "`max(d for d, job in zip(delays, jobs) if job == mine)` is when the job `mine` is complete. "
    "Do so for each rank, `mine` being its job, and subtract its own delay.",
)
def check_waits(waits: Callable[[Seconds, Sequence[str]], Seconds]) -> str:
    """Check `waits(delays, jobs)`, each rank's seconds in init_process_group, against measured."""

    def arrive(rank: int, delays: Seconds, jobs: list[str], folder: str) -> float:
        job, members = jobs[rank], jobs.count(jobs[rank])
        _await_all(rank, len(delays), folder)  # their delays begin together
        time.sleep(delays[rank])
        began = time.perf_counter()
        dist.init_process_group(
            "gloo", f"file://{folder}/{job}", rank=jobs[:rank].count(job), world_size=members
        )
        waited = time.perf_counter() - began
        dist.destroy_process_group()
        return waited

    because = "It takes a list of seconds and one of jobs; it returns one number for each rank."
    for delays, jobs in (([0.0, 0.8, 0.4, 0.2], [*"abab"]), ([0.7, 0.0, 0.3], [*"aaa"])):
        answer = predict(waits, (delays, jobs), len(jobs), because)
        with tempfile.TemporaryDirectory() as folder:
            inside = run_ranks(arrive, (delays, jobs, folder), nprocs=len(delays)).values
        # What joining takes when nobody is missing, longer under load.
        joining = _of_its_job(min, inside, jobs)
        measured = [total - own for total, own in zip(inside, joining, strict=True)]
        _judge_waits(delays, jobs, answer, measured)
    return "your prediction and the measured waits agree, for one job and for two at once."


def _of_its_job(
    choose: Callable[[Iterable[float]], float], seconds: Seconds, jobs: list[str]
) -> Seconds:
    """For each rank, the smallest or largest number among the ranks of its job."""
    return [choose(s for s, j in zip(seconds, jobs, strict=True) if j == job) for job in jobs]


def _judge_waits(delays: Seconds, jobs: list[str], answer: Seconds, measured: Seconds) -> None:
    rank = first_miss(answer, measured)
    if rank is None:
        return
    rules = {
        " You gave the times at which they come: waiting is from there to the last "
        "arrival.": delays,
        " You gave the time at which all leave: waiting begins when a rank comes.": _of_its_job(
            max, delays, jobs
        ),
        " You let the jobs wait for each other: a rank waits for those of its own job only.": [
            max(delays) - delay for delay in delays
        ],
        " You gave the time at which the last rank of all comes: a rank waits for those of its own "
        "job only, and only from when it comes.": [max(delays)] * len(delays),
    }
    raise Wrong(
        f"rank {rank} of job {jobs[rank]} came after {delays[rank]:g} s and waited about "
        f"{measured[rank]:.1f} s; you said {answer[rank]:g} s.",
        "init_process_group returns when the last rank of the job has arrived: the first one waits "
        f"longest, the last one hardly at all, and rank 0 is no exception."
        f"{wrong_rule(answer, rules)}",
    )


MEETINGS = ("first", "second")


@exercise(
    "`store.set(key, card)` leaves your card, `store.get(key).decode()` waits for someone else's. "
    "What must the keys differ by?",
    "In the second meeting the keys of the first are still there. Each rank can count its own "
    "meetings: `store.add(f'meetings of {rank}', 1)` adds 1 and returns the sum.",
    "`n = store.add(f'meetings of {rank}', 1)`, `store.set(f'{n}/{rank}', card)`, "
    "then `store.get(f'{n}/{r}').decode()` for each r in `range(world_size)`.",
)
def check_meet(meet_by_hand: Callable[[int, int, dist.Store, str], list[str]]) -> str:
    """Check that `meet_by_hand(rank, world_size, store, card)` gives each rank all cards, twice."""

    def twice(rank: int, world_size: int, folder: str) -> list[Any]:
        store = dist.FileStore(f"{folder}/store", world_size)
        store.set_timeout(timedelta(seconds=4))
        _await_all(rank, world_size, folder)  # the store's seconds are not for starting
        got = []
        for meeting, late in enumerate((world_size - 1, 0)):
            time.sleep(0.4 if rank == late else 0.0)
            cards = plain(meet_by_hand(rank, world_size, store, _card(meeting, rank)))
            got.append([*cards] if isinstance(cards, Iterator) else cards)
        return got

    for world_size in (3, 2, 1):
        with tempfile.TemporaryDirectory() as folder:
            run = run_ranks(twice, (world_size, folder), nprocs=world_size, check=False)
        _judge_meetings(run)
    return "3, 2 and 1 ranks met twice on one store, and each got all cards of each meeting."


def _card(meeting: int, rank: int) -> str:
    return f"{MEETINGS[meeting]} card of rank {rank}"


def _judge_meetings(run: Run) -> None:
    waited = [error for error in errors(run) if "timeout" in error.summary.lower()]
    if waited or stuck(run):
        raise Wrong(
            f"with {count(run.world_size, 'rank')}, it failed: {run.explain().splitlines()[0]}",
            "A `get` waits until somebody has set this very key, here for 4 seconds at the most. "
            "Each rank must set its own card before it reads the others', and under the key that "
            "the others read. (A number that all ranks add to is different on each.)",
        )
    run.raise_for_failure()
    for meeting, other in ((0, 1), (1, 0)):
        cards, others = ([_card(m, r) for r in range(run.world_size)] for m in (meeting, other))
        for rank, got in enumerate(run.values):
            seen = f"in the {MEETINGS[meeting]} meeting, rank {rank} got {got[meeting]!r}"
            _judge_cards(seen, got[meeting], cards, others)


def _judge_cards(seen: str, got: Any, cards: list[str], others: list[str]) -> None:
    given = [*got] if isinstance(got, list | tuple) else []
    if given == cards:
        return
    strange = [card for card in given if card in others]
    are_or_is = "of them is" if len(strange) == 1 else "of them are"
    mistakes = {
        ".\nReturn a list of all ranks' cards. Is `return` missing?": not isinstance(
            got, list | tuple
        ),
        ".\nA store holds bytes: `.decode()` makes a text of what `get` returns.": any(
            str(card).startswith(("b'", 'b"')) for card in given
        ),
        f"; {len(strange)} {are_or_is} from the other meeting.\n"
        "A store keeps its keys: a `get` of the second meeting finds what the first one left. And "
        "whoever sets a key again overwrites it, perhaps before all have read it. Each meeting "
        "needs keys of its own.": strange,
        f", {count(len(given), 'text')} instead of {len(cards)}.\n"
        "Return the card of each rank, and a rank's own, too.": len(given) != len(cards),
        ".\nThe same card stands there more than once. Each rank needs a key of its own, and card "
        "r of the list is rank r's.": {*map(str, given)} < {*cards},
        f", not {cards!r}.\nCard r of the list is rank r's.": {*map(str, given)} == {*cards},
        f", not {cards!r}.\nThe list has the cards as the ranks brought them.": True,
    }
    judge(seen, mistakes)
