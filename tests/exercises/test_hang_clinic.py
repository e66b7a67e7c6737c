"""The checks of lesson 10: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises import hang_clinic
from ddp_lessons.exercises.hang_clinic import check_add_up, check_diagnose, check_train
from tests.support import answers

# The check keeps what it once recorded: in one process that is done once.
pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("hang clinic")]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def look(calls: Any, n: int) -> Any:
    return calls[n][:2] if n < len(calls) else None


def diagnose(calls: Any) -> Any:
    for n in range(max(map(len, calls))):
        here = [look(of_rank, n) for of_rank in calls]
        (most, _), *others = Counter(here).most_common()
        if others:
            rank = here.index(others[0][0])
            if here[rank] is None:
                return "missing", rank
            return "other call" if here[rank][0] != most[0] else "other tensor", rank
    return None


def diagnose_with_lists(calls: Any) -> Any:
    for n in range(20):
        here = [of_rank[n][:2] if len(of_rank) > n else ("", "") for of_rank in calls]
        for rank, mine in enumerate(here):
            others = here[:rank] + here[rank + 1 :]
            if mine not in others and len({*others}) == 1:
                if mine[0] == others[0][0]:
                    return ["other tensor", rank]
                return ["other call" if mine[0] else "missing", rank]
    return None


def by_line(calls: Any) -> Any:
    return diagnose([[(line, tensor) for _, tensor, line in of_rank] for of_rank in calls])


def by_last_call(calls: Any) -> Any:
    here = [of_rank[-1][:2] for of_rank in calls]
    (_, _), *others = Counter(here).most_common() or [(0, 0)]
    return ("other call", here.index(others[0][0])) if others else diagnose(calls)


def only_while_all_call(calls: Any) -> Any:
    shortest = min(map(len, calls))
    return diagnose([of_rank[:shortest] for of_rank in calls])


def only_functions(calls: Any) -> Any:
    return diagnose([[(op, "") for op, _, _ in of_rank] for of_rank in calls])


def first_that_is_not_as_rank_0(calls: Any) -> Any:
    found = diagnose(calls)
    return found if found is None or found[1] else (found[0], 1)


def blames_those_who_wait(calls: Any) -> Any:
    found = diagnose(calls)
    if found and found[0] == "missing":
        return "missing", max(range(len(calls)), key=lambda rank: len(calls[rank]))
    return found


def all_alike(calls: Any) -> Any:
    found = diagnose(calls)
    return found and ("other call", found[1])


def stop(flag: Any, op: Any) -> bool:
    vote = torch.tensor(int(flag))
    dist.all_reduce(vote, op=op)
    return bool(vote)


def by_rank_0(losses: Any, bound: float, epoch: Any) -> int:
    for n, loss in enumerate(losses):
        epoch(n)
        flag = torch.tensor(float(loss < bound))
        dist.broadcast(flag, src=0)
        if flag:
            return n + 1
    return len(losses)


def by_any(losses: Any, bound: float, epoch: Any) -> int:
    n = 0
    while n < len(losses):
        epoch(n)
        n += 1
        if stop(losses[n - 1] < bound, dist.ReduceOp.MAX):
            break
    return n


def by_all(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        if stop(losses[n] < bound, dist.ReduceOp.MIN):
            return n + 1
    return len(losses)


def by_mean(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        mean = torch.tensor(losses[n])
        dist.all_reduce(mean)
        if mean / dist.get_world_size() < bound:
            return n + 1
    return len(losses)


def by_object(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        decision = [losses[n] < bound]
        dist.broadcast_object_list(decision, src=0)
        if decision[0]:
            return n + 1
    return len(losses)


def each_alone(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        if losses[n] < bound:
            return n + 1
    return len(losses)


def barrier_then_leaves(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        dist.barrier()
        if losses[n] < bound:
            return n + 1
    return len(losses)


def tells_only_if(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        if losses[n] < bound:
            dist.broadcast(torch.ones(1), src=dist.get_rank())
            return n + 1
    return len(losses)


def only_rank_0_broadcasts(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        flag = torch.tensor(float(losses[n] < bound))
        if dist.get_rank() == 0:
            dist.broadcast(flag, src=0)
        if flag:
            return n + 1
    return len(losses)


def never_stops(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
    return len(losses)


def looks_before(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        if stop(losses[n] < bound, dist.ReduceOp.MIN):
            return n
        epoch(n)
    return len(losses)


def one_too_few(losses: Any, bound: float, epoch: Any) -> int:
    return by_any(losses, bound, epoch) - 1


def says_nothing(losses: Any, bound: float, epoch: Any) -> None:
    by_rank_0(losses, bound, epoch)


def counts_from_one(losses: Any, bound: float, epoch: Any) -> int:
    return by_rank_0(losses, bound, lambda n: epoch(n + 1))


def sees_the_future(losses: Any, bound: float, epoch: Any) -> int:
    """One vote, on losses of epochs that nobody has trained yet."""
    wanted = next((n + 1 for n, loss in enumerate(losses) if loss < bound), len(losses))
    last = torch.tensor(wanted)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    for n in range(int(last)):
        epoch(n)
    return int(last)


def by_slice(losses: Any, bound: float, epoch: Any) -> int:
    """The best loss so far, of all ranks."""
    for n in range(len(losses)):
        epoch(n)
        best = torch.tensor(min(losses[: n + 1]))
        dist.all_reduce(best, dist.ReduceOp.MIN)
        if best < bound:
            return n + 1
    return len(losses)


def waits_for_a_lock(losses: Any, bound: float, epoch: Any) -> int:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return 0


def add_up(x: Any, row: Any, column: Any) -> Any:
    sums = x.clone(), x.clone()
    dist.all_reduce(sums[0], group=row)
    dist.all_reduce(sums[1], group=column)
    return sums


def column_first(x: Any, row: Any, column: Any) -> Any:
    down, across = x.clone(), x.clone()
    dist.all_reduce(down, group=column)
    dist.all_reduce(across, group=row)
    return across.item(), down.item()


def started_together(x: Any, row: Any, column: Any) -> Any:
    """Asynchronous calls may start in any order."""
    groups = [row, column] if dist.get_rank() % 2 else [column, row]
    sums = {group: x.clone() for group in groups}
    works = [dist.all_reduce(sums[group], group=group, async_op=True) for group in groups]
    for work in works:
        work.wait()
    return [float(sums[row]), float(sums[column])]


def gathered(x: Any, row: Any, column: Any) -> Any:
    found = []
    for group in (row, column):
        parts = [torch.zeros(()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        found.append(sum(parts))
    return found


def own_order(x: Any, row: Any, column: Any) -> Any:
    sums = {row: x.clone(), column: x.clone()}
    for group in (row, column) if dist.get_rank() in (0, 3) else (column, row):
        dist.all_reduce(sums[group], group=group)
    return sums[row], sums[column]


def in_place(x: Any, row: Any, column: Any) -> Any:
    dist.all_reduce(x, group=row)
    across = x.item()
    dist.all_reduce(x, group=column)
    return across, x.item()


def over_all(x: Any, row: Any, column: Any) -> Any:
    dist.all_reduce(x)
    return x, x


def other_way_round(x: Any, row: Any, column: Any) -> Any:
    return add_up(x, column, row)


def only_rank_0(x: Any, row: Any, column: Any) -> Any:
    if dist.get_rank() == 0:
        return add_up(x, row, column)
    return x, x


RIGHT: list[tuple[Any, Any]] = [
    (check_diagnose, diagnose),
    (check_diagnose, diagnose_with_lists),
    (check_train, by_rank_0),
    (check_train, by_any),
    (check_train, by_all),
    (check_train, by_mean),
    (check_train, by_object),
    (check_train, by_slice),
    (check_add_up, add_up),
    (check_add_up, column_first),
    (check_add_up, started_together),
    (check_add_up, gathered),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_diagnose, by_line, "on 3 ranks, call 2.*Lines do not matter"),
    (check_diagnose, by_last_call, "call 5: .*rank 1 in all_reduce.* The first call|in the end"),
    (check_diagnose, only_while_all_call, "call 3: .*rank 3 did not come.*The ranks differ"),
    (check_diagnose, only_functions, r"rank 2 in all_reduce of float32 \(1,\).*The ranks differ"),
    (check_diagnose, first_that_is_not_as_rank_0, "rank 0 in barrier.* rank 1 does what most do"),
    (check_diagnose, blames_those_who_wait, "Rank 0 came to that call"),
    (check_diagnose, all_alike, "The rank is right. Say 'missing'"),
    (check_diagnose, lambda calls: [None][0], "You returned None.*The ranks differ"),
    (check_diagnose, lambda calls: diagnose(calls) and 3, "You returned 3.*two things"),
    (check_diagnose, lambda calls: diagnose(calls) and ("missing", "0"), "That is no rank"),
    (check_diagnose, lambda calls: calls[9], "raised IndexError"),
    (check_train, each_alone, "Epochs begun: 2, 3.*loss of its own"),
    (check_train, barrier_then_leaves, "Epochs begun: .*different calls.*hold their vote"),
    (check_train, tells_only_if, "Epochs begun: .*inside `if loss < bound`"),
    (check_train, only_rank_0_broadcasts, "Epochs begun: .*on every rank"),
    (check_train, never_stops, "trained 3 epochs.*After 2 epochs all ranks|must stop there"),
    (check_train, looks_before, "Train first|rank 0 called epoch|No rank was below"),
    (check_train, one_too_few, "rank 0 trained 2 epochs and returned 1"),
    (check_train, says_nothing, "returned None"),
    (check_train, counts_from_one, "rank 0 called epoch with .*once for each n"),
    (check_train, sees_the_future, r"losses\[\d\] is not known before epoch"),
    (check_train, waits_for_a_lock, "got no further"),
    (check_train, lambda losses: 1, "failed on real ranks.*TypeError"),
    (check_add_up, own_order, "2 rows and 2 columns: .*own order"),
    (
        check_add_up,
        in_place,
        r"rank 0 got \(11.0, 1111.0\), not \(11, 101\).*writes into its tensor",
    ),
    (check_add_up, over_all, "sum over all ranks"),
    (check_add_up, other_way_round, r"got \(101.0, 11.0\).*the row first"),
    (check_add_up, only_rank_0, "2 rows and 2 columns: .*same calls in that group"),
    (check_add_up, lambda x, row, column: (x, x), "That is `x` itself"),
    (check_add_up, lambda x, row, column: 5, "rank 0 got 5.*two numbers"),
    (check_add_up, lambda x: 5, "failed on real ranks.*TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


@pytest.mark.parametrize("number", range(len(hang_clinic.PATIENTS)))
def test_what_was_recorded_shows_the_bug(number: int) -> None:
    patient, record = hang_clinic.PATIENTS[number], hang_clinic.records()[number]
    assert diagnose(record) == patient.finding
    for of_rank, script in zip(record, patient.scripts, strict=True):
        planned = [(op, line) for line, op, _ in hang_clinic._parts(script)]
        assert [(op, line) for op, _, line in of_rank] == planned[: len(of_rank)]
