"""The checks of lesson 07: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import cloudpickle
import pytest

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


RIGHT: list[tuple[Any, Any]] = [
    (check_name_straggler, most("last_rank")),
    (check_accumulate, accumulate),
    (check_choose_bucket, choose_bucket),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_name_straggler, most("rank"), r"rank 1 slept.*it is the victim"),
    (
        check_name_straggler,
        lambda waits: max(waits, key=lambda row: row.wait_ns).last_rank,
        "rank 0 once 60 ms; you named 0.*One hiccup",
    ),
    (check_name_straggler, lambda waits: waits[-1].last_rank, "you named 2.*One step is chance"),
    (check_name_straggler, lambda waits: str(waits[0].rank), "the number of one rank"),
    (check_name_straggler, lambda waits: waits.argmax(), "raised AttributeError"),
    (check_accumulate, sync_always, r"sent 3 times.*decided in the forward pass"),
    (check_accumulate, only_backward_inside, r"sent 3 times.*decided in the forward pass"),
    (check_accumulate, never_synced, r"rank 0 and 1 the same\? False.*drift apart"),
    (check_accumulate, undivided, r"3\.00 times that of the whole batch.*divide each"),
    (check_accumulate, lambda model: 1, "failed on real ranks.*TypeError"),
    (check_choose_bucket, lambda *a: 25, r"25 MB make 1 bucket, .*leaves late"),
    (check_choose_bucket, lambda *a: 0.01, r"make 12 buckets, .*pays the latency again"),
    (check_choose_bucket, lambda *a: 1.2, r"0 ms a bucket .*make 2 buckets, .*leaves late"),
    (check_choose_bucket, lambda *a: -1, "you chose -1"),
    (check_choose_bucket, lambda layers: 1, "raised TypeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
