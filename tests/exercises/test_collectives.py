"""The checks of lessons 03 and 03b: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.collectives import (
    check_mean_over_ranks,
    check_predict,
    check_ring_all_gather,
    check_ring_all_reduce,
)
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    total = x.clone().float()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def only_summed(x: torch.Tensor) -> torch.Tensor:
    return mean_over_ranks(x) * dist.get_world_size()


def in_place(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x / dist.get_world_size()


def float_is_no_copy(x: torch.Tensor) -> torch.Tensor:
    total = x.float()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def for_one_rank(x: torch.Tensor) -> torch.Tensor:
    total = x.clone().float()
    dist.reduce(total, dst=0)
    return total / dist.get_world_size()


def stacked(x: torch.Tensor) -> torch.Tensor:
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, x)
    return torch.stack(pieces)


def over_elements(x: torch.Tensor) -> torch.Tensor:
    return only_summed(x) / len(x)


def floored(x: torch.Tensor) -> torch.Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total // dist.get_world_size()


def nothing(x: torch.Tensor) -> Any:
    return dist.all_reduce(x.clone())


def predict(op: str, before: list[list[int]]) -> list[Any]:
    n, k = len(before), len(before[0]) // len(before)
    sums = [sum(column) for column in zip(*before, strict=True)]
    everything = [number for row in before for number in row]
    answers: dict[str, list[Any]] = {
        "broadcast": [before[0]] * n,
        "all_reduce": [sums] * n,
        "reduce": [sums, *[None] * (n - 1)],
        "all_gather": [everything] * n,
        "gather": [everything, *[None] * (n - 1)],
        "scatter": [before[0][r * k : (r + 1) * k] for r in range(n)],
        "reduce_scatter": [sums[r * k : (r + 1) * k] for r in range(n)],
    }
    return answers[op]


def as_tensors(rows: list[Any]) -> list[Any]:
    return [None if row is None else torch.tensor(row) for row in rows]


def but(op: str, change: Callable[[list[Any], list[list[int]]], list[Any]]) -> Any:
    """Predicts right, except for one collective."""

    def predict_wrongly(name: str, before: list[list[int]]) -> list[Any]:
        right = predict(name, before)
        return change(right, before) if name == op else right

    return predict_wrongly


def ring_all_gather(
    pieces: list[torch.Tensor], steps: int | None = None, by: int = 1, first: str = "isend"
) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for step in range(n - 1 if steps is None else min(steps, n - 1)):
        going, coming = pieces[(rank - by * step) % n], pieces[(rank - by * (step + 1)) % n]
        sending = getattr(dist, first)(going, dst=(rank + by) % n)
        dist.recv(coming, src=(rank - by) % n)
        if first == "isend":
            sending.wait()


def with_new_tensors(pieces: list[torch.Tensor]) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    passing = pieces[rank]
    for step in range(1, n):
        received = torch.empty_like(passing)
        work = dist.irecv(received, src=(rank - 1) % n)
        dist.send(passing, dst=(rank + 1) % n)
        work.wait()
        passing = pieces[(rank - step) % n] = received


def one_sends_first(pieces: list[torch.Tensor]) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for step in range(n - 1):
        going, coming = pieces[(rank - step) % n], pieces[(rank - step - 1) % n]
        if rank == 0:
            dist.send(going, dst=(rank + 1) % n)
        dist.recv(coming, src=(rank - 1) % n)
        if rank != 0:
            dist.send(going, dst=(rank + 1) % n)


def returned(pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    filled = [piece.clone() for piece in pieces]
    ring_all_gather(filled)
    return filled


def in_order_of_arrival(pieces: list[torch.Tensor]) -> None:
    rank = dist.get_rank()
    ring_all_gather(pieces)
    pieces[:] = [pieces[rank - step] for step in range(len(pieces))]


def own_overwritten(pieces: list[torch.Tensor]) -> None:
    ring_all_gather(pieces)
    pieces[dist.get_rank()].fill_(-1.0)


def appended(pieces: list[torch.Tensor]) -> None:
    ring_all_gather(pieces)
    pieces.append(pieces[0])


def to_all(pieces: list[torch.Tensor]) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    others = [other for other in range(n) if other != rank]
    works = [dist.isend(pieces[rank], dst=other) for other in others]
    works += [dist.irecv(pieces[other], src=other) for other in others]
    for work in works:
        work.wait()


def all_that_i_have(pieces: list[torch.Tensor]) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for _ in range(n - 1):
        sent, received = torch.cat(pieces), torch.empty(n * len(pieces[0]))
        sending = dist.isend(sent, dst=(rank + 1) % n)
        dist.recv(received, src=(rank - 1) % n)
        sending.wait()
        for piece, new in zip(pieces, received.chunk(n), strict=True):
            piece.copy_(torch.maximum(piece, new))


def by_library(pieces: list[torch.Tensor]) -> None:
    dist.all_gather(pieces, pieces[dist.get_rank()].clone())


def zero_is_done(pieces: list[torch.Tensor]) -> None:
    if dist.get_rank():
        ring_all_gather(pieces)


def ring_all_reduce(x: torch.Tensor, first: str = "isend") -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    pieces = x.tensor_split(n)

    def exchange(to_next: torch.Tensor, from_previous: torch.Tensor) -> None:
        sending = getattr(dist, first)(to_next, dst=(rank + 1) % n)
        dist.recv(from_previous, src=(rank - 1) % n)
        if first == "isend":
            sending.wait()

    for step in range(n - 1):
        received = pieces[(rank - step - 1) % n].clone()
        exchange(pieces[(rank - step) % n], received)
        pieces[(rank - step - 1) % n].add_(received)
    for step in range(n - 1):
        exchange(pieces[(rank + 1 - step) % n], pieces[(rank - step) % n])


def send_first(x: torch.Tensor) -> None:
    ring_all_reduce(x, "send")


def whole_tensors(x: torch.Tensor) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    passing, received = x.clone(), torch.empty_like(x)
    for _ in range(n - 1):
        sending = dist.isend(passing, dst=(rank + 1) % n)
        dist.recv(received, src=(rank - 1) % n)
        sending.wait()
        x += received
        passing = received.clone()


def all_to_zero(x: torch.Tensor) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank:
        dist.send(x, dst=0)
        dist.recv(x, src=0)
    else:
        for other in range(1, n):
            received = torch.empty_like(x)
            dist.recv(received, src=other)
            x += received
        for other in range(1, n):
            dist.send(x, dst=other)


def first_round_only(x: torch.Tensor) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    pieces = x.tensor_split(n)
    for step in range(n - 1):
        received = pieces[(rank - step - 1) % n].clone()
        sending = dist.isend(pieces[(rank - step) % n], dst=(rank + 1) % n)
        dist.recv(received, src=(rank - 1) % n)
        sending.wait()
        pieces[(rank - step - 1) % n].add_(received)


def only_equal_pieces(x: torch.Tensor) -> None:
    length = len(x) // dist.get_world_size() * dist.get_world_size()
    ring_all_reduce(x[:length])


def zero_returns(x: torch.Tensor) -> None:
    if dist.get_rank():
        ring_all_reduce(x)


def on_a_copy(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    ring_all_reduce(y)
    return y


RIGHT: list[tuple[Any, Any]] = [
    (check_mean_over_ranks, mean_over_ranks),
    (check_predict, predict),
    (check_predict, lambda op, before: as_tensors(predict(op, before))),
    (check_ring_all_gather, ring_all_gather),
    (check_ring_all_gather, lambda pieces: ring_all_gather(pieces, by=-1)),
    (check_ring_all_gather, with_new_tensors),
    (check_ring_all_gather, one_sends_first),
    (check_ring_all_reduce, ring_all_reduce),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_mean_over_ranks, only_summed, "you returned .*That is the sum"),
    (check_mean_over_ranks, in_place, "on rank 0: .* x was changed.*Give it a copy"),
    (check_mean_over_ranks, float_is_no_copy, "3 ranks, .* x was changed.*only if x had another"),
    (check_mean_over_ranks, for_one_rank, "on rank 1.*`reduce` gives the sums to `dst` only"),
    (check_mean_over_ranks, stacked, "as many numbers as x"),
    (check_mean_over_ranks, over_elements, "number of ranks .not of elements"),
    (check_mean_over_ranks, floored, "Integers cannot hold the mean"),
    (check_mean_over_ranks, nothing, "you returned None.*all_reduce` returns None"),
    (check_mean_over_ranks, lambda x: x.float(), "what this rank had itself"),
    (check_mean_over_ranks, lambda x: x / 0 + undefined, "failed on real ranks.*NameError"),  # type: ignore[name-defined]  # noqa: F821
    (
        check_predict,
        but("broadcast", lambda right, before: [before[0], *before[1:]]),
        "broadcast of .*: rank 1 has .*All ranks, `src` too",
    ),
    (
        check_predict,
        but("reduce", lambda right, before: [right[0]] * len(right)),
        "reduce of .*: rank 1 has None.*does not count",
    ),
    (
        check_predict,
        but("scatter", lambda right, before: [row[: len(right[0])] for row in before]),
        "scatter of .*: rank 1 .*nothing of its own",
    ),
    (
        check_predict,
        but("reduce_scatter", lambda right, before: [row[: len(right[0])] for row in before]),
        "reduce_scatter of .*: rank 0 .*sums of piece r only",
    ),
    (
        check_predict,
        but("all_reduce", lambda right, before: right[0]),
        "all_reduce of .* one list for each of the 2 ranks",
    ),
    (check_predict, but("gather", lambda right, before: [1, 2]), r"rank 0 has \[.*you said 1"),
    (check_predict, lambda op, before: before[0], "one list for each"),
    (check_predict, lambda op: op, "raised TypeError"),
    (
        check_ring_all_gather,
        lambda pieces: ring_all_gather(pieces, first="send"),
        "all wait in send.*start with `isend`",
    ),
    (check_ring_all_gather, zero_is_done, "never ends.*rank 0.*Do all ranks take all steps"),
    (
        check_ring_all_gather,
        lambda pieces: ring_all_gather(pieces, steps=1),
        "4 ranks, 4 pieces of 3: rank 0 has .*There are n - 1 steps",
    ),
    (check_ring_all_gather, returned, "rank 0 has .*what is returned does not count"),
    (check_ring_all_gather, in_order_of_arrival, "rank 1 has .*Its own piece must stay"),
    (check_ring_all_gather, own_overwritten, "rank 0 has .*Its own piece must stay"),
    (check_ring_all_gather, appended, "one piece for each rank"),
    (check_ring_all_gather, to_all, "rank 0 sent to rank 2.*In a ring"),
    (check_ring_all_gather, all_that_i_have, "pieces are right, but .*the one that came last"),
    (check_ring_all_gather, by_library, "you called all_gather"),
    (check_ring_all_reduce, send_first, "all wait in send.*start with `isend`"),
    (check_ring_all_reduce, zero_returns, "never ends.*rank 0.*Do all ranks take all steps"),
    (check_ring_all_reduce, first_round_only, "rank 0 has .*After the first round each piece"),
    (check_ring_all_reduce, only_equal_pieces, "4 ranks, 10 numbers: rank 0 has"),
    (check_ring_all_reduce, whole_tensors, "4 ranks.*a rank sent 120 bytes; 72 are enough"),
    (check_ring_all_reduce, all_to_zero, "rank 0 sent to rank 2.*In a ring"),
    (check_ring_all_reduce, on_a_copy, "rank 0 has .*Work on views of x"),
    (check_ring_all_reduce, lambda x: dist.all_reduce(x), "you called all_reduce"),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    verdict = check(answer)
    assert verdict.passed, verdict
    assert verdict.because == ""


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
