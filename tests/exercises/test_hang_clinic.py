"""The checks of lesson 10: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from functools import partial
from itertools import zip_longest
from typing import Any

import cloudpickle
import numpy as np
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


def barrier_only_if(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        if losses[n] < bound:
            dist.barrier()
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


def diagnose_by_zip(calls: Any) -> Any:
    for here in zip_longest(*calls):
        looks = [made and made[:2] for made in here]
        if len(set(looks)) > 1:
            odd, usual = sorted(set(looks), key=looks.count)
            what = (
                "missing" if odd is None else "other call" if odd[0] != usual[0] else "other tensor"
            )
            return what, np.int64(looks.index(odd))
    return None


def diagnose_in_recursion(calls: Any) -> Any:
    if not any(calls) or diagnose([of_rank[:1] for of_rank in calls]):
        return diagnose(calls)
    return diagnose_in_recursion([of_rank[1:] for of_rank in calls])


def empties_the_calls(calls: Any) -> Any:
    while any(calls):
        here = [[of_rank.pop(0)] if of_rank else [] for of_rank in calls]
        if diagnose(here):
            return diagnose(here)
    return None


def changed(change: Any) -> Any:
    """Finds what is wrong, and then says it in another way."""
    return lambda calls: diagnose(calls) and change(*diagnose(calls))


def by_number_of_calls(calls: Any) -> Any:
    most = max(map(len, calls))
    short = [rank for rank, of_rank in enumerate(calls) if len(of_rank) < most]
    return ("missing", short[0]) if short else diagnose(calls)


def votes(losses: Any, bound: float, epoch: Any) -> int:
    for n, loss in enumerate(losses):
        epoch(n)
        wanted: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(wanted, loss < bound)
        if 2 * sum(wanted) > len(wanted):
            return n + 1
    return len(losses)


def by_store(losses: Any, bound: float, epoch: Any) -> Any:
    store = dist.distributed_c10d._get_default_store()
    for n in range(len(losses)):
        epoch(n)
        if dist.get_rank() == 0:
            store.set(f"stop {n}", str(int(losses[n] < bound)))
        if int(store.get(f"stop {n}")):
            return torch.tensor(n + 1)
    return np.int64(len(losses))


def by_the_last_rank(losses: Any, bound: float, epoch: Any, n: int = 0) -> int:
    epoch(n)
    flag = torch.tensor(float(losses[n] < bound))
    dist.broadcast(flag, src=dist.get_world_size() - 1)
    if flag or n + 1 == len(losses):
        return n + 1
    return by_the_last_rank(losses, bound, epoch, n + 1)


def one_too_late(losses: Any, bound: float, epoch: Any) -> int:
    flag = torch.zeros(())
    for n in range(len(losses)):
        epoch(n)
        if flag:
            return n + 1
        flag = torch.tensor(float(losses[n] < bound))
        dist.broadcast(flag, src=0)
    return len(losses)


def always_two(losses: Any, bound: float, epoch: Any) -> int:
    epoch(0)
    epoch(1)
    return 2


def own_bound(losses: Any, bound: float, epoch: Any) -> int:
    return by_all(losses, 0.3, epoch)


def up_to_the_bound(losses: Any, bound: float, epoch: Any) -> int:
    return by_any(losses, bound + 1e-9, epoch)


def by_the_best(losses: Any, bound: float, epoch: Any) -> int:
    """One vote, on the best loss of all epochs."""
    best = torch.tensor(min(losses))
    dist.all_reduce(best, dist.ReduceOp.MIN)
    return by_rank_0(losses, bound, epoch) if best < bound else len(losses)


def stops_at_the_last(losses: Any, bound: float, epoch: Any) -> int:
    return by_rank_0(losses, bound, epoch) if losses[-1] < bound else len(losses)


def other_epochs_on_rank_1(losses: Any, bound: float, epoch: Any) -> int:
    if dist.get_rank() != 1:
        return by_rank_0(losses, bound, epoch)
    return by_rank_0(losses, bound, lambda n: epoch(max(0, n - 1)))


def other_count_on_rank_2(losses: Any, bound: float, epoch: Any) -> Any:
    return by_rank_0(losses, bound, epoch) + (dist.get_rank() == 2)


def leaves_the_process(losses: Any, bound: float, epoch: Any) -> int:
    for n in range(len(losses)):
        epoch(n)
        if losses[n] < bound:
            sys.exit()
    return len(losses)


def over_everybody(x: Any, row: Any, column: Any) -> Any:
    """Collects all, and adds up what is of the group."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.item())
    groups = map(dist.get_process_group_ranks, (row, column))
    return (sum(parts[rank] for rank in group) for group in groups)


def to_the_first_and_back(x: Any, row: Any, column: Any) -> Any:
    sums = torch.stack([x, x])
    for n, group in enumerate((row, column)):
        first = dist.get_process_group_ranks(group)[0]
        part = sums[..., n].clone()
        dist.reduce(part, dst=first, group=group)
        dist.broadcast(part, src=first, group=group)
        sums[n] = part
    return sums


def one_in_place(x: Any, row: Any, column: Any) -> Any:
    down = x.clone()
    dist.all_reduce(x, group=row)
    dist.all_reduce(down, group=column)
    return np.array([x.item(), down.item()])


def known_ranks(x: Any, row: Any, column: Any) -> Any:
    """Adds up what the lesson's ranks have, without asking."""
    groups = map(dist.get_process_group_ranks, (row, column))
    return tuple(sum(10.0**rank for rank in group) for group in groups)


def only_to_the_first(x: Any, row: Any, column: Any) -> Any:
    sums = x.clone(), x.clone()
    for part, group in zip(sums, (row, column), strict=True):
        dist.reduce(part, dst=dist.get_process_group_ranks(group)[0], group=group)
    return sums


def row_twice(x: Any, row: Any, column: Any) -> Any:
    return add_up(x, row, row)


def swapped_on_rank_3(x: Any, row: Any, column: Any) -> Any:
    sums = add_up(x, row, column)
    return sums[::-1] if dist.get_rank() == 3 else sums


def never_waits(x: Any, row: Any, column: Any) -> Any:
    sums = x.clone(), x.clone()
    dist.all_reduce(sums[0], group=row)
    if dist.get_rank() == 0:
        dist.all_reduce(sums[0], group=row)
    return sums


RIGHT: list[tuple[Any, Any]] = [
    (check_diagnose, diagnose),
    (check_diagnose, diagnose_by_zip),
    (check_diagnose, diagnose_in_recursion),
    (check_diagnose, empties_the_calls),
    (check_diagnose, partial(answers.decorated(diagnose))),
    (check_diagnose, changed(lambda what, rank: [what, torch.tensor(rank)])),
    (check_diagnose, diagnose_with_lists),
    (check_train, by_rank_0),
    (check_train, by_any),
    (check_train, by_all),
    (check_train, by_mean),
    (check_train, by_object),
    (check_train, by_slice),
    (check_train, answers.mixed(votes, by_store, by_the_last_rank)),
    (check_add_up, add_up),
    (check_add_up, answers.mixed(over_everybody, one_in_place, to_the_first_and_back)),
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
    (check_diagnose, answers.prints(diagnose), "You returned None.*return what you found"),
    (check_diagnose, lambda calls: diagnose(calls) or False, "returned False.*All is well.*None"),
    (
        check_diagnose,
        changed(lambda what, rank: (rank, what)),
        "First what is wrong, then the rank",
    ),
    (check_diagnose, changed(lambda what, rank: {what: rank}), "two things"),
    (check_diagnose, changed(lambda what, rank: (what, rank + 1)), "does what most do"),
    (check_diagnose, changed(lambda what, rank: (what.title(), rank)), "The rank is right. Say"),
    (check_diagnose, changed(lambda what, rank: (what, np.array([0, 1]))), "That is no rank"),
    (check_diagnose, by_number_of_calls, "does what most do.*first call at which they differ"),
    (check_diagnose, lambda calls: diagnose(calls[:3]), "rank 3 did not come.*The ranks differ"),
    (check_diagnose, lambda calls: ("missing", 3), "Lines do not matter"),
    (check_diagnose, answers.recurses, "raised RecursionError"),
    (check_diagnose, lambda calls: calls[9], "raised IndexError"),
    (check_train, each_alone, "Epochs begun: 2, 3.*loss of its own"),
    (check_train, barrier_then_leaves, "Epochs begun: .*different calls.*hold their vote"),
    (check_train, barrier_only_if, "Epochs begun: .*different calls.*inside `if loss < bound`"),
    (check_train, tells_only_if, "Epochs begun: .*inside `if loss < bound`"),
    (check_train, only_rank_0_broadcasts, "Epochs begun: .*on every rank"),
    (check_train, never_stops, "trained 3 epochs.*After 2 epochs all ranks|must stop there"),
    (check_train, looks_before, "Train first|rank 0 called epoch|No rank was below"),
    (check_train, one_too_few, "rank 0 trained 2 epochs and returned 1"),
    (check_train, says_nothing, "returned None"),
    (check_train, counts_from_one, "rank 0 called epoch with .*once for each n"),
    (check_train, sees_the_future, r"losses\[\d\] is not known before epoch.*those to come"),
    (check_train, by_the_best, r"losses\[\d\] is not known before epoch.*one by one"),
    (check_train, stops_at_the_last, r"losses\[3\] is not known before epoch 3.*no other"),
    (check_train, lambda losses, *args: by_any([*losses], *args), "known before epoch 1.*no other"),
    (check_train, one_too_late, "trained 4 epochs.*After 3 epochs all ranks|must stop there"),
    (check_train, always_two, "trained 2 epochs.*No rank was below"),
    (check_train, own_bound, "bound 0.5.*trained 4 epochs.*After 3 epochs all ranks"),
    (check_train, up_to_the_bound, "bound 0.5.*trained 1 epoch.*No rank was below"),
    (check_train, other_epochs_on_rank_1, r"rank 1 called epoch with \[0, 0\].*once for each n"),
    (
        check_train,
        other_count_on_rank_2,
        "rank 2 trained . epochs and returned .*Return the number",
    ),
    (check_train, lambda *args: by_any(*args) > 0, "returned True.*Return the number"),
    (check_train, lambda *args: (n for n in [by_any(*args)]), "returned <generator"),
    (check_train, lambda losses, *args: len(losses), "trained 0 epochs.*Train first"),
    (check_train, leaves_the_process, "Epochs begun: 2, 3.*loss of its own"),
    (check_train, waits_for_a_lock, "got no further"),
    (check_train, lambda losses: 1, "failed on real ranks.*TypeError"),
    (check_add_up, own_order, "2 rows and 2 columns, .*own order"),
    (
        check_add_up,
        in_place,
        r"rank 0 got \(11.0, 1111.0\), not \(11, 101\).*writes into its tensor",
    ),
    (check_add_up, over_all, "sum over all ranks"),
    (check_add_up, other_way_round, r"got \(101.0, 11.0\).*the row first"),
    (check_add_up, only_rank_0, "2 rows and 2 columns, .*same calls in that group"),
    (check_add_up, lambda x, row, column: (x, x), "That is `x` itself"),
    (check_add_up, lambda x, row, column: 5, "rank 0 got 5.*two numbers"),
    (check_add_up, lambda *args: (11.0, 101.0), "rank 1 got .11.0, 101.0.*each time a copy"),
    (check_add_up, known_ranks, "x is 2, 20, 200 and 2000: rank 0 got .11.0, 101.0., not .22, 202"),
    (check_add_up, row_twice, r"got \(11.0, 11.0\)"),
    (check_add_up, only_to_the_first, r"rank 1 got \("),
    (check_add_up, swapped_on_rank_3, "rank 3 got .*the row first"),
    (check_add_up, never_waits, "waited in all_reduce|same calls in that group"),
    (check_add_up, answers.prints(add_up), "got None.*two numbers"),
    (check_add_up, lambda *args: (*add_up(*args), 0), "two numbers"),
    (check_add_up, lambda *args: sum(add_up(*args)), "two numbers"),
    (check_add_up, lambda *args: [part / 2 for part in add_up(*args)], r"got \(5.5, 50.5\)"),
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
