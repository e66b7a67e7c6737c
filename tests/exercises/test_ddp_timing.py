"""The checks of lesson 07: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from itertools import groupby
from statistics import mean
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises import ddp_timing
from ddp_lessons.exercises.ddp_timing import (
    check_accumulate,
    check_choose_bucket,
    check_name_straggler,
)
from tests.support import answers

pytestmark = [pytest.mark.ranks, pytest.mark.alone]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def most(field: str) -> Any:
    """Returns the rank in `field` with the most waiting."""

    def name_straggler(waits: list[Any]) -> Any:
        caused: Counter[Any] = Counter()
        for row in waits:
            caused[getattr(row, field)] += row.wait_ns
        return caused.most_common(1)[0][0]

    return name_straggler


def accumulate(
    model: Any, loss_fn: Any, micro_batches: Any, divided: bool = True, synced: bool = True
) -> None:
    *first, last = micro_batches
    parts = len(micro_batches) if divided else 1
    with model.no_sync():
        for inputs, labels in first if synced else micro_batches:
            (loss_fn(model(inputs), labels) / parts).backward()
    if synced:
        (loss_fn(model(last[0]), last[1]) / parts).backward()


def sync_always(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    for inputs, labels in micro_batches:
        (loss_fn(model(inputs), labels) / len(micro_batches)).backward()


def only_backward_inside(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    for inputs, labels in micro_batches:
        loss = loss_fn(model(inputs), labels) / len(micro_batches)
        with model.no_sync():
            loss.backward()


def never_synced(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    accumulate(model, loss_fn, micro_batches, synced=False)


def undivided(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    accumulate(model, loss_fn, micro_batches, divided=False)


def choose_bucket(
    layers: int, layer_mb: float, backward_ms: float, latency_ms: float, mb_per_s: float
) -> float:
    def finish(per_bucket: int) -> float:
        free = 0.0
        for ready in (*range(per_bucket, layers, per_bucket), layers):
            size = (ready - 1) % per_bucket + 1
            free = max(free, ready * backward_ms) + latency_ms + size * layer_mb / mb_per_s * 1000
        return free

    return min(range(1, layers + 1), key=finish) * layer_mb


def by_rank(waits: list[Any]) -> list[int]:
    return [sum(row.wait_ns for row in waits if row.last_rank == rank) for rank in range(4)]


def empties_the_list(waits: list[Any]) -> Any:
    caused: Counter[Any] = Counter()
    while waits:
        row = waits.pop()
        caused[row.last_rank] += row.wait_ns
    return max(caused, key=caused.__getitem__)


def sorted_and_grouped(waits: list[Any]) -> Any:
    def last(row: Any) -> Any:
        return row.last_rank

    waits.sort(key=last)
    groups = [(sum(row.wait_ns for row in rows), rank) for rank, rows in groupby(waits, key=last)]
    return max(groups)[1]


def in_numpy(waits: list[Any]) -> Any:
    return np.bincount([row.last_rank for row in waits], [row.wait_ns for row in waits]).argmax()


def mean_wait(waits: list[Any]) -> Any:
    return max(range(4), key=lambda r: mean([w.wait_ns for w in waits if w.last_rank == r] or [0]))


def most_often(waits: list[Any]) -> Any:
    return Counter(row.last_rank for row in waits).most_common(1)[0][0]


def by_attribute(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    for number, (inputs, labels) in enumerate(micro_batches, 1):
        model.require_backward_grad_sync = number == len(micro_batches)
        loss_fn(model(inputs), labels).div(len(micro_batches)).backward()


def only_forward_inside(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    for number, (inputs, labels) in enumerate(micro_batches, 1):
        with nullcontext() if number == len(micro_batches) else model.no_sync():
            loss = loss_fn(model(inputs), labels)
        (loss / len(micro_batches)).backward()


def divides_gradients(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    parts = len(micro_batches)
    undivided(model, loss_fn, micro_batches)
    for parameter in model.parameters():
        parameter.grad /= parts


def empties_micro_batches(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    parts, (inputs, labels) = len(micro_batches), micro_batches.pop()
    with model.no_sync():
        while micro_batches:
            early = micro_batches.pop()
            (loss_fn(model(early[0]), early[1]) / parts).backward()
    (loss_fn(model(inputs), labels) / parts).backward()


def all_at_once(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    inputs, labels = zip(*micro_batches, strict=True)
    loss_fn(model(torch.cat(inputs)), torch.cat(labels)).backward()


def by_hand(model: Any, loss_fn: Any, micro_batches: Any, times: int = 1) -> None:
    accumulate(model, loss_fn, micro_batches, synced=False)
    for parameter in list(model.parameters()) * times:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def by_hand_twice(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    by_hand(model, loss_fn, micro_batches, times=2)


def sends_the_first(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    (inputs, labels), *others = micro_batches
    (loss_fn(model(inputs), labels) / len(micro_batches)).backward()
    with model.no_sync():
        for more, others_labels in others:
            (loss_fn(model(more), others_labels) / len(micro_batches)).backward()


def for_three(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    undivided(model, loss_fn, micro_batches)
    for parameter in model.parameters():
        parameter.grad /= 3


def only_the_last(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    accumulate(model, loss_fn, micro_batches[-1:])


def on_the_module(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    for inputs, labels in micro_batches:
        (loss_fn(model.module(inputs), labels) / len(micro_batches)).backward()


def clears_in_between(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    with model.no_sync():
        accumulate(model, loss_fn, micro_batches[:-1], synced=False)
    model.zero_grad()
    only_the_last(model, loss_fn, micro_batches)


def steps_too(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    accumulate(model, loss_fn, micro_batches)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def doubled_on(rank: int) -> Any:
    def doubles(model: Any, loss_fn: Any, micro_batches: Any) -> None:
        accumulate(model, loss_fn, micro_batches)
        for parameter in model.parameters():
            parameter.grad *= 2 if dist.get_rank() == rank else 1

    return doubles


def one_rank_works(model: Any, loss_fn: Any, micro_batches: Any) -> None:
    if dist.get_rank() == 0:
        accumulate(model, loss_fn, micro_batches)


def in_layers(layers: int, layer_mb: float, *link: float) -> Any:
    """Right, but as a number of layers."""
    return choose_bucket(layers, layer_mb, *link) / layer_mb


def all_or_one(
    layers: int, layer_mb: float, backward_ms: float, latency_ms: float, _: float
) -> Any:
    return layer_mb * (layers if latency_ms > 0 else 1)


def waits_least(waits: list[Any]) -> int:
    return min(range(4), key=lambda rank: sum(row.wait_ns for row in waits if row.rank == rank))


RIGHT: list[tuple[Any, Any]] = [
    (check_name_straggler, most("last_rank")),
    (check_name_straggler, empties_the_list),
    (check_name_straggler, sorted_and_grouped),
    (check_name_straggler, in_numpy),
    (check_name_straggler, lambda waits: torch.tensor(by_rank(waits)).argmax()),
    (check_name_straggler, answers.Called(lambda waits: float(np.argmax(by_rank(waits))))),
    (check_accumulate, accumulate),
    (check_accumulate, answers.mixed(by_attribute, only_forward_inside)),
    (check_accumulate, answers.mixed(divides_gradients, empties_micro_batches)),
    (check_accumulate, answers.mixed(all_at_once, by_hand)),
    (check_choose_bucket, choose_bucket),
    (check_choose_bucket, partial(choose_bucket)),
    (check_choose_bucket, lambda *link: np.float32(choose_bucket(*link))),
    (check_choose_bucket, lambda *link: torch.tensor([choose_bucket(*link)])),
    (check_choose_bucket, lambda *link: Fraction(choose_bucket(*link))),
    # Layers fill their bucket, so a little less makes the same.
    (check_choose_bucket, lambda layers, mb, *link: choose_bucket(layers, mb, *link) - mb / 2),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_name_straggler, most("rank"), r"rank 1 slept.*it is the victim"),
    (
        check_name_straggler,
        lambda waits: max(waits, key=lambda row: row.wait_ns).last_rank,
        "rank 0 once 60 ms; you named 0.*One hiccup",
    ),
    (check_name_straggler, waits_least, "rank 1 50 ms .*you named 0.*waited least, but"),
    (check_name_straggler, most_often, "12 ms before each of 8.*you named 2.*most often"),
    (check_name_straggler, mean_wait, "rank 0 once 60 ms; you named 0.*One hiccup"),
    (check_name_straggler, lambda waits: waits[-1].last_rank, "you named 1.*One step is chance"),
    (check_name_straggler, lambda waits: 1, "you named 1"),
    (check_name_straggler, lambda waits: 7, "no rank: there are four"),
    (check_name_straggler, answers.prints(most("last_rank")), "None.*`return` missing"),
    (
        check_name_straggler,
        lambda waits: np.array([1, 2]),
        r"array\(\[1, 2\]\).*number of one rank",
    ),
    (check_name_straggler, by_rank, "number of one rank"),
    (check_name_straggler, lambda waits: str(waits[0].rank), "the number of one rank"),
    (check_name_straggler, lambda waits: waits.argmax(), "raised AttributeError"),
    (check_accumulate, sync_always, r"sent 3 times.*decided in the forward pass"),
    (check_accumulate, only_backward_inside, r"sent 3 times.*decided in the forward pass"),
    (check_accumulate, never_synced, r"rank 0 and 1 the same\? False.*drift apart"),
    (check_accumulate, undivided, r"3\.00 times that of the whole batch.*divide each"),
    (check_accumulate, sends_the_first, "differ from rank to rank.*must be the last one"),
    (check_accumulate, for_three, r"4 micro-batches on 3 ranks.* 1\.33 times.*divide each"),
    (check_accumulate, only_the_last, "of other samples.*Every micro-batch must count"),
    (check_accumulate, clears_in_between, "of other samples.*clear no gradient"),
    (check_accumulate, on_the_module, "no gradient was ever sent"),
    (check_accumulate, by_hand_twice, "all_reduce was called 4 times.*travel once"),
    (check_accumulate, steps_too, "the weights have changed.*takes the step"),
    (check_accumulate, doubled_on(1), "on rank 1 the gradient is not.*all ranks must do"),
    (check_accumulate, doubled_on(2), "3 ranks: on rank 2 the gradient is not"),
    (check_accumulate, lambda *args: print(args), "no gradient, or only zeros.*`backward"),
    (check_accumulate, one_rank_works, "rank 1 has returned before DDP's all_reduce"),
    (check_accumulate, lambda model: 1, "failed on real ranks.*TypeError"),
    (check_choose_bucket, lambda *a: 25, r"25 MB make 1 bucket: .*leaves late"),
    (check_choose_bucket, lambda *a: 0.01, r"make 16 buckets: .*pays the latency again"),
    (check_choose_bucket, lambda *a: 1.2, r"0 ms a bucket .*make 2 buckets: .*leaves late"),
    (check_choose_bucket, lambda *a: -1, "you chose -1"),
    (check_choose_bucket, in_layers, "4 MB make 2 buckets: .*leaves late"),
    (check_choose_bucket, lambda *a: choose_bucket(*a) * 1e6, "make 1 bucket: .*leaves late"),
    (check_choose_bucket, lambda n, mb, *a: n * mb, "4.8 MB make 1 bucket: .*leaves late"),
    (
        check_choose_bucket,
        lambda n, mb, ms, latency, speed: choose_bucket(n, mb, ms, 0, speed),
        "make 16 buckets: .*pays the latency again",
    ),
    (check_choose_bucket, all_or_one, "8 ms a bucket .*4.8 MB make 1 bucket: .*leaves late"),
    (check_choose_bucket, answers.prints(choose_bucket), "you chose None.*a number above 0"),
    (check_choose_bucket, lambda *a: float("inf"), "you chose inf"),
    (check_choose_bucket, lambda *a: f"{choose_bucket(*a)} MB", "you chose '1.2.* MB'"),
    (check_choose_bucket, lambda *a: [choose_bucket(*a)], r"you chose \[1.2.*a number above 0"),
    (check_choose_bucket, lambda layers: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


def test_a_stall_does_not_hide_why_a_rank_was_named(monkeypatch: Any) -> None:
    """In the last run the machine holds up rank 0 once, which then is also the longest wait."""
    *others, (what, ((_, *rest), *steps)) = ddp_timing.DELAYS
    monkeypatch.setattr(ddp_timing, "DELAYS", (*others, (what, ((0.11, *rest), *steps))))
    answers.is_explained(check_name_straggler, waits_least, "rank 1 50 ms.*waited least, but")
