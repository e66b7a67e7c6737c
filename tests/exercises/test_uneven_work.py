"""The checks of lesson 11: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from itertools import cycle, islice
from typing import Any

import cloudpickle
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


RIGHT: list[tuple[Any, Any]] = [
    (check_train, joins),
    (check_train, joins_by_the_active),
    (check_train, trims),
    (check_train, asks_each_step),
    (check_train, counts_for_nothing),
    (check_predict_weight, predict),
    (check_predict_weight, predict_in_steps),
    (check_predict_weight, lambda counts, initial: torch.tensor(predict(counts, initial))),
    (check_plan, plan),
    (check_plan, plan_slowly),
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
    (check_train, lambda model, optimizer: 1, "failed on real ranks.*TypeError"),
    (check_predict_weight, lambda counts, initial: sum(counts), "ends at 3.5.*it divides"),
    (check_predict_weight, lambda counts, initial: min(counts), "predicted 3.*trimming"),
    (check_predict_weight, lambda counts, initial: max(counts), "initial=True.*still counts"),
    (check_predict_weight, lambda c, initial: sum(c) / len(c), "initial=False.*the default"),
    (check_predict_weight, predict_for_two, "you predicted 2.*3, 2, 1, 1 ranks have a batch"),
    (check_predict_weight, lambda counts, initial: [], r"predicted \[\].*one number"),
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
    (check_plan, lambda names: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
