"""The checks of lesson 11: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from fractions import Fraction
from functools import partial
from itertools import cycle, islice
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.uneven_work import check_plan, check_predict_weight, check_train
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def step(model: Any, optimizer: Any, loss_fn: Any, batch: Any) -> Any:
    inputs, targets = batch
    optimizer.zero_grad()
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def plain(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    for batch in batches:
        step(model, optimizer, loss_fn, batch)


def agreed(number: int, op: Any) -> int:
    found = torch.tensor(number)
    dist.all_reduce(found, op=op)
    return int(found)


def joins(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join():
        plain(model, optimizer, loss_fn, batches)


def joins_by_the_active(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join(divide_by_initial_world_size=False):
        plain(model, optimizer, loss_fn, batches)


def trims(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    number = agreed(len(batches), dist.ReduceOp.MIN)
    plain(model, optimizer, loss_fn, batches[:number])


def asks_each_step(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    for number in range(100):
        if not agreed(int(number < len(batches)), dist.ReduceOp.MIN):
            return
        step(model, optimizer, loss_fn, batches[number])


def counts_for_nothing(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    """A rank without a batch takes steps with a loss of zero."""
    for number in range(agreed(len(batches), dist.ReduceOp.MAX)):
        there = number < len(batches)
        inputs, targets = batches[number] if there else (torch.zeros(1, 3).double(), torch.zeros(1))
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets) if there else 0 * model(inputs).sum()
        loss.backward()
        optimizer.step()


def by_itself(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    plain(model.module, optimizer, loss_fn, batches)


def alone_in_the_end(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    number = agreed(len(batches), dist.ReduceOp.MIN)
    plain(model, optimizer, loss_fn, batches[:number])
    with model.no_sync():
        plain(model, optimizer, loss_fn, batches[number:])


def broadcasts_in_the_end(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    by_itself(model, optimizer, loss_fn, batches)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)


def averages_in_the_end(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    by_itself(model, optimizer, loss_fn, batches)
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()


def goes_round(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    number = agreed(len(batches), dist.ReduceOp.MAX)
    plain(model, optimizer, loss_fn, islice(cycle(batches), number))


def never_steps(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join():
        for inputs, targets in batches:
            loss_fn(model(inputs), targets).backward()


def never_zeroes(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    for inputs, targets in batches:
        loss_fn(model(inputs), targets).backward()
        optimizer.step()


def joins_and_never_zeroes(model: Any, *others: Any) -> None:
    with model.join():
        never_zeroes(model, *others)


def trims_and_never_zeroes(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    number = agreed(len(batches), dist.ReduceOp.MIN)
    never_zeroes(model, optimizer, loss_fn, batches[:number])


def only_two(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    plain(model, optimizer, loss_fn, batches[:2])


def logs_inside_join(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join():
        for batch in batches:
            dist.all_reduce(step(model, optimizer, loss_fn, batch).float())


def waits_at_the_end(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    plain(model, optimizer, loss_fn, batches)
    dist.monitored_barrier()


def leaves_if_empty(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    if batches:
        joins(model, optimizer, loss_fn, batches)


def predict(counts: Any, initial: bool) -> float:
    return float(sum(counts) / len(counts) if initial else max(counts))


def predict_for_two(counts: Any, initial: bool) -> float:
    low, high = min(counts), max(counts)
    return float(low + (high - low) / len(counts) if initial else high)


def predict_in_steps(counts: Any, initial: bool) -> float:
    there = [sum(n < count for count in counts) for n in range(max(counts))]
    return float(sum(number / (len(counts) if initial else number) for number in there))


def plan(names: Any, used: Any) -> Any:
    each = [of_rank for step in used for of_rank in step]
    ever = set().union(*each)
    return names - ever, any(of_rank != ever for of_rank in each)


def plan_slowly(names: Any, used: Any) -> Any:
    remove, flag = [], False
    for name in names:
        uses = [name in of_rank for step in used for of_rank in step]
        if not any(uses):
            remove.append(name)
        elif not all(uses):
            flag = True
    return [remove, flag]


def compares_ranks(names: Any, used: Any) -> Any:
    """Ignores differences between steps."""
    return plan(names, used)[0], any(of_rank != step[0] for step in used for of_rank in step)


def misses_one_rank(names: Any, used: Any) -> Any:
    """Right except where only one rank lacks a parameter, in the last step."""
    remove, flag = plan(names, used)
    return remove, flag and used[-1] != [{"a", "b"}, {"a"}]


def keeps_all(names: Any, used: Any) -> Any:
    return set(), any(of_rank != names for step in used for of_rank in step)


def removes_what_is_not_always_used(names: Any, used: Any) -> Any:
    return names - set.intersection(*(of_rank for step in used for of_rank in step)), False


def flags_what_it_removes(names: Any, used: Any) -> Any:
    remove, flag = plan(names, used)
    return remove, flag or bool(remove)


def joins_backwards(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join():
        plain(model, optimizer, loss_fn, batches[::-1])


def trims_the_first(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    number = agreed(len(batches), dist.ReduceOp.MIN)
    plain(model, optimizer, loss_fn, batches[len(batches) - number :])


def zips_with_a_range(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    """Trims, looks at each loss again, and takes the step by itself."""
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, len(batches))
    for (inputs, targets), _ in zip(batches, range(min(lengths)), strict=False):
        model.zero_grad()
        loss_fn(model(inputs), targets).backward()
        for parameter in model.parameters():
            parameter.data -= optimizer.param_groups[0]["lr"] * parameter.grad


def misses_one_each(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    joins(model, optimizer, loss_fn, batches[1:] if len(batches) > 1 else batches)


def for_three(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    plain(model, optimizer, loss_fn, batches[:3])


def steps_twice(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    with model.join():
        for batch in batches:
            step(model, optimizer, loss_fn, batch)
            optimizer.step()


def only_rank_0(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    if dist.get_rank() == 0:
        plain(model, optimizer, loss_fn, batches)


def other_on_rank_1(model: Any, optimizer: Any, loss_fn: Any, batches: Any) -> None:
    joins(model, optimizer, loss_fn, batches)
    if dist.get_rank() == 1:
        model.module.bias.data += 1


def in_numpy(counts: Any, initial: bool) -> Any:
    present = (np.array(counts)[None] > np.arange(max(counts))[:, None]).sum(1)
    return np.float32((present / (len(counts) if initial else present)).sum())


def exactly(counts: Any, initial: bool) -> Any:
    return (
        sum(Fraction(1, len(counts)) for n in counts for _ in range(n)) if initial else max(counts)
    )


def plan_in_sets(names: Any, used: Any) -> Any:
    each = [set(of_rank) for step in used for of_rank in step]
    return frozenset(names) - set.union(*each), set.union(*each) != set.intersection(*each)


def plan_and_empty(names: Any, used: Any) -> Any:
    always, left = set(names), set(names)
    while used:
        for of_rank in used.pop():
            always &= of_rank
            left -= of_rank
    return (name for name in left), np.bool_(always | left != names)


RIGHT: list[tuple[Any, Any]] = [
    (check_train, joins),
    (check_train, answers.mixed(joins_backwards, zips_with_a_range, trims_the_first)),
    (check_train, joins_by_the_active),
    (check_train, trims),
    (check_train, asks_each_step),
    (check_train, counts_for_nothing),
    (check_predict_weight, predict),
    (check_predict_weight, predict_in_steps),
    (check_predict_weight, in_numpy),
    (check_predict_weight, exactly),
    (check_predict_weight, partial(answers.decorated(predict))),
    (check_predict_weight, lambda counts, initial: torch.tensor(predict(counts, initial))),
    (check_plan, plan),
    (check_plan, plan_slowly),
    (check_plan, plan_in_sets),
    (check_plan, plan_and_empty),
    (check_plan, answers.Called(plan)),
    (check_plan, partial(answers.decorated(plan))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (
        check_train,
        plain,
        "3 and 4 batches: rank 1 waited for the others until the timeout.*call of all ranks",
    ),
    (check_train, by_itself, "different weights.*Each rank trained for itself"),
    (check_train, alone_in_the_end, "different weights.*steps that the others did not take"),
    (check_train, broadcasts_in_the_end, "equal weights, but not those.*mean gradient"),
    (check_train, averages_in_the_end, "equal weights, but not those.*averaged or sent round"),
    (check_train, goes_round, "3 and 4 batches: rank 0 used batch 0 2 times.*count once"),
    (check_train, only_two, "3 and 4 batches: each rank used 2.*All ranks have 3"),
    (check_train, never_steps, "as they were in the beginning.*optimizer.step"),
    (check_train, joins_and_never_zeroes, "gradients of all steps before.*zero_grad"),
    (check_train, trims_and_never_zeroes, "gradients of all steps before.*zero_grad"),
    (check_train, logs_inside_join, "Two calls met.*answers DDP's calls only"),
    (check_train, waits_at_the_end, "waited for the others until the timeout"),
    (check_train, leaves_if_empty, "0 and 2 batches: rank 1 waited.*without any batch"),
    (check_train, misses_one_each, "3 and 4 batches: the ranks end with equal weights, but not"),
    (check_train, for_three, "1, 3, 2 batches: ranks 1 and 2 waited|rank 1 waited"),
    (check_train, steps_twice, "equal weights, but not those"),
    (check_train, only_rank_0, "3 and 4 batches: rank 0 waited|has returned before"),
    (check_train, other_on_rank_1, "different weights.*What one rank does"),
    (check_train, lambda *args: print(args), "each rank used 0 of its batches.*All ranks have 3"),
    (check_train, answers.recurses, "RecursionError"),
    (check_train, lambda model, optimizer: 1, "failed on real ranks.*TypeError"),
    (check_predict_weight, lambda counts, initial: sum(counts), "ends at 3.5.*it divides"),
    (check_predict_weight, lambda counts, initial: min(counts), "predicted 3.*trimming"),
    (check_predict_weight, lambda counts, initial: max(counts), "initial=True.*still counts"),
    (check_predict_weight, lambda c, initial: sum(c) / len(c), "initial=False.*the default"),
    (check_predict_weight, predict_for_two, "you predicted 2.*3, 2, 1, 1 ranks have a batch"),
    (check_predict_weight, lambda counts, initial: [], r"predicted \[\].*one number"),
    (check_predict_weight, answers.prints(predict), "predicted None.*one number"),
    (check_predict_weight, lambda *args: str(predict(*args)), "predicted '3.5'.*one number"),
    (
        check_predict_weight,
        lambda *args: [predict(*args)] * 2,
        r"predicted \[3.5, 3.5\].*one number",
    ),
    (
        check_predict_weight,
        lambda c, initial: predict(c[:2], initial),
        "4, 1, 2 batches.*3, 2, 1, 1",
    ),
    (check_predict_weight, lambda c, initial: -predict(c, initial), "predicted -3.5"),
    (check_predict_weight, lambda c, initial: sum(c) / 2 if initial else max(c), "4, 1, 2 batches"),
    (
        check_predict_weight,
        lambda c, initial: predict(c, not initial),
        "initial=True.*still counts",
    ),
    (check_predict_weight, lambda counts: 1, "raised TypeError"),
    (check_plan, lambda names, used: (plan(names, used)[0], True), "same gradients: True.*nothing"),
    (check_plan, lambda names, used: (plan(names, used)[0], False), "Expected to have finished"),
    (check_plan, lambda names, used: plan(names, used[:1]), "you remove b, .* in step 1"),
    (check_plan, lambda n, used: plan(n, used[:-1]), "no error, but in step 2.* gradients .* of a"),
    (check_plan, lambda n, used: plan(n, [[s[0]] for s in used]), "remove b, which rank 1 uses"),
    (
        check_plan,
        misses_one_rank,
        "no flag: rank 0 waited in backward for the others until the timeout",
    ),
    (check_plan, compares_ranks, "Expected to have finished.*In step 0, rank 0 has none of b"),
    (check_plan, lambda n, used: plan(n, used)[::-1], "first you returned False.*set of names"),
    (check_plan, keeps_all, "c never gets a gradient, and you keep it"),
    (check_plan, removes_what_is_not_always_used, "you remove a, which rank 0 uses in step 0"),
    (check_plan, flags_what_it_removes, "you want the flag.*What is left"),
    (check_plan, lambda names, used: False, "you returned False.*two things"),
    (
        check_plan,
        lambda names, used: (None, False),
        "first you returned None.*First return the set",
    ),
    (check_plan, answers.prints(plan), "you returned None.*two things"),
    (
        check_plan,
        lambda n, used: plan({*"abcdefg"}, used),
        "remove c, and there is no such parameter",
    ),
    (check_plan, lambda n, used: (*plan(n, used), 1), "two things"),
    (check_plan, lambda n, used: (plan(n, used)[0], None), "for the flag you returned None"),
    (check_plan, lambda n, used: (plan(n, used)[0], "no"), "for the flag you returned 'no'"),
    (check_plan, lambda n, used: ([[]], False), r"first you returned \[\[\]\]"),
    (check_plan, answers.recurses, "raised RecursionError"),
    (check_plan, lambda names: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
