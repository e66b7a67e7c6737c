"""The checks of lessons 03 and 03b: the solution passes; typical wrong answers are explained."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
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


def divided_on_rank_0(x: torch.Tensor) -> torch.Tensor:
    total = x.clone().float()
    dist.all_reduce(total)
    return total / dist.get_world_size() if dist.get_rank() == 0 else total


def not_waited(x: torch.Tensor) -> torch.Tensor:
    total = x.clone().float()
    dist.all_reduce(total, async_op=True)
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


def but(op: str, change: Callable[[list[Any], list[list[int]]], Any]) -> Any:
    """Predicts right, but for one collective in another way."""

    def predict_wrongly(name: str, before: list[list[int]]) -> Any:
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


def gathered(x: torch.Tensor) -> Any:
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x)
    return torch.stack(rows).double().mean(dim=0)


def of_objects(x: torch.Tensor) -> list[float]:
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, x.tolist())
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def reduced_and_broadcast(x: torch.Tensor) -> Any:
    total = x.numpy().astype(np.float64)
    dist.reduce(torch.from_numpy(total), dst=0)
    total /= dist.get_world_size()
    dist.broadcast(torch.from_numpy(total), src=0)
    return total


def asynchronous(x: torch.Tensor) -> Any:
    total = x / dist.get_world_size()
    dist.all_reduce(total, async_op=True).wait()
    return (n for n in total)


class Mean:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = x[..., None].double()
        dist.all_reduce(total)
        return total[..., 0] / dist.get_world_size()


def put_back(x: torch.Tensor) -> Any:
    before = x.clone()
    mean = in_place(x) if x.is_floating_point() else mean_over_ranks(x)
    x.copy_(before)
    return mean


def halved(x: torch.Tensor) -> torch.Tensor:
    return only_summed(x) / 2


def of_one_rank_less(x: torch.Tensor) -> torch.Tensor:
    return only_summed(x) / max(1, dist.get_world_size() - 1)


def shown(x: torch.Tensor) -> None:
    print(mean_over_ranks(x))


def only_on_rank_0(x: torch.Tensor) -> Any:
    mean = mean_over_ranks(x)
    return mean if dist.get_rank() == 0 else None


def only_rank_0_calls(x: torch.Tensor) -> Any:
    return mean_over_ranks(x) if dist.get_rank() == 0 else x


def one_number(x: torch.Tensor) -> Any:
    return mean_over_ranks(x).mean().item()


def changed_on_rank_1(x: torch.Tensor) -> Any:
    mean = mean_over_ranks(x)
    if dist.get_rank() == 1:
        x.zero_()
    return mean


def flipped(op: str, before: list[list[int]]) -> Any:
    before.reverse()
    return predict(op, before)


def exchanging(step: Callable[[torch.Tensor, torch.Tensor, int, int], Any]) -> Any:
    """A ring all_reduce whose ranks exchange two pieces in this way."""

    def ring(x: torch.Tensor) -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        pieces = x.tensor_split(n)
        for turn in range(2 * n - 2):
            mine, theirs = pieces[(rank - turn) % n], pieces[(rank - turn - 1) % n]
            received = torch.empty_like(theirs)
            step(mine, received, (rank + 1) % n, (rank - 1) % n)
            theirs.copy_(received + theirs if turn < n - 1 else received)

    return ring


def both_ways(mine: torch.Tensor, received: torch.Tensor, following: int, previous: int) -> None:
    for work in dist.irecv(received, src=previous), dist.isend(mine, dst=following):
        assert work is not None
        work.wait()


def in_a_batch(mine: torch.Tensor, received: torch.Tensor, following: int, previous: int) -> None:
    sends = dist.P2POp(dist.isend, mine, following)
    for work in dist.batch_isend_irecv([sends, dist.P2POp(dist.irecv, received, previous)]):
        work.wait()


def by_turns(mine: torch.Tensor, received: torch.Tensor, following: int, previous: int) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: dist.send(mine, dst=following),
        lambda: dist.recv(received, src=previous),
    ]
    for call in calls if dist.get_rank() else reversed(calls):
        call()


def backwards(x: torch.Tensor) -> None:
    """The ring in the other direction, with pieces of equal lengths."""
    rank, n = dist.get_rank(), dist.get_world_size()
    padded = torch.zeros(-(-len(x) // n) * n)
    padded[: len(x)] = x
    pieces = padded.view(n, -1)
    for turn in range(2 * n - 2):
        received = torch.empty_like(pieces[0])
        place = (rank + turn + 1) % n
        both_ways(pieces[(rank + turn) % n], received, (rank - 1) % n, (rank + 1) % n)
        pieces[place] = pieces[place] + received if turn < n - 1 else received
    x.copy_(padded[: len(x)])


class Ring:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        exchanging(both_ways)(x)
        return x


def divided(x: torch.Tensor) -> None:
    ring_all_reduce(x)
    x /= dist.get_world_size()


def with_the_other_of_two(x: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        received = torch.empty_like(x)
        both_ways(x, received, dist.get_rank() ^ 1, dist.get_rank() ^ 1)
        x += received


def one_step_too_many(x: torch.Tensor) -> None:
    ring_all_reduce(x)
    if dist.get_rank() == 0:
        dist.send(x, dst=dist.get_world_size() - 1)


def chunked(x: torch.Tensor) -> None:
    n = dist.get_world_size()
    pieces = x.chunk(n)
    both_ways(pieces[n - 1], torch.empty_like(pieces[n - 1]), *[(dist.get_rank() + 1) % n] * 2)


RIGHT: list[tuple[Any, Any]] = [
    *[
        (check_mean_over_ranks, answer)
        for answer in (
            mean_over_ranks,
            gathered,
            of_objects,
            reduced_and_broadcast,
            asynchronous,
            Mean(),
            put_back,
            functools.partial(mean_over_ranks),
        )
    ],
    (check_predict, predict),
    (check_predict, lambda op, before: as_tensors(predict(op, before))),
    (check_predict, lambda op, before: (row and map(float, row) for row in predict(op, before))),
    (check_predict, but("all_gather", lambda right, before: [before] * len(before))),
    (check_predict, but("broadcast", lambda right, before: np.array(right))),
    (check_predict, but("scatter", lambda right, before: torch.tensor(right)[..., :])),
    (check_predict, functools.partial(lambda first, op, before: tuple(predict(op, before)), 0)),
    *[
        (check_ring_all_reduce, answer)
        for answer in (
            ring_all_reduce,
            exchanging(both_ways),
            exchanging(in_a_batch),
            exchanging(by_turns),
            backwards,
            Ring(),
        )
    ],
    (check_ring_all_gather, ring_all_gather),
    (check_ring_all_gather, lambda pieces: ring_all_gather(pieces, by=-1)),
    (check_ring_all_gather, with_new_tensors),
    (check_ring_all_gather, one_sends_first),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_mean_over_ranks, only_summed, "you returned .*That is the sum"),
    (check_mean_over_ranks, in_place, "on rank 0: .* x was changed.*Give it a copy"),
    (check_mean_over_ranks, float_is_no_copy, "3 ranks, .* x was changed.*only if x had another"),
    (check_mean_over_ranks, for_one_rank, "on rank 1.*`reduce` gives the sums to `dst` only"),
    (check_mean_over_ranks, divided_on_rank_0, "on rank 1: .*this rank has the sum.*under an `if`"),
    (check_mean_over_ranks, not_waited, r"on rank 0: you returned \[0.5.*`wait\(\)` before"),
    (check_mean_over_ranks, stacked, "as many numbers as x"),
    (check_mean_over_ranks, over_elements, "number of ranks .not of elements"),
    (check_mean_over_ranks, floored, "Integers cannot hold the mean"),
    (check_mean_over_ranks, nothing, "you returned None.*all_reduce` returns None"),
    (check_mean_over_ranks, lambda x: x.float(), "what this rank had itself"),
    (check_mean_over_ranks, lambda x: x / 0 + undefined, "failed on real ranks.*NameError"),  # type: ignore[name-defined]  # noqa: F821
    (check_mean_over_ranks, halved, "3 ranks, .*which is not 2 in every job"),
    (check_mean_over_ranks, of_one_rank_less, "you returned .*That is the sum"),
    (check_mean_over_ranks, shown, "you returned None, not.*as many numbers as x"),
    (check_mean_over_ranks, only_on_rank_0, "on rank 1: you returned None, .*under an `if`"),
    (check_mean_over_ranks, only_rank_0_calls, "rank 0 .*in all_reduce, but rank 1 has returned"),
    (check_mean_over_ranks, one_number, r"you returned 2\..*as many numbers as x"),
    (check_mean_over_ranks, changed_on_rank_1, "on rank 1: .*x was changed"),
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
    (check_predict, lambda op, before: before[0], "one list for each|rank 0 has"),
    (check_predict, lambda op, before: print(predict(op, before)), "you returned None"),
    (
        check_predict,
        lambda op, before: {"broadcast": [before[0]] * len(before)}[op],
        "'all_reduce', .* raised KeyError.*one of broadcast, all_reduce",
    ),
    (check_predict, flipped, r"broadcast of \[.*: rank 0 has .*All ranks, `src` too"),
    (
        check_predict,
        lambda op, before: predict(op, before[:2]),
        "broadcast of .*one list for each of the 3 ranks",
    ),
    (
        check_predict,
        but("all_reduce", lambda right, before: [[sum(row)] * len(row) for row in before]),
        "all_reduce of .*sums, number by number",
    ),
    (
        check_predict,
        but("gather", lambda right, before: [right[0]] * len(right)),
        "gather of .*: rank 1 has None; .*nothing: None",
    ),
    (
        check_predict,
        but("all_gather", lambda right, before: [right[0][::-1]] * len(right)),
        "all_gather of .*in the order of ranks",
    ),
    (
        check_predict,
        but("scatter", lambda right, before: right[::-1]),
        "scatter of .*Rank r has piece r",
    ),
    (
        check_predict,
        but("reduce_scatter", lambda right, before: [before[0][: len(right[0])]] * len(right)),
        "reduce_scatter of .*sums of piece r",
    ),
    (check_predict, lambda op: op, "raised TypeError"),
    (
        check_ring_all_gather,
        lambda pieces: ring_all_gather(pieces, first="send"),
        "all wait in send.*start with `isend`",
    ),
    (check_ring_all_gather, zero_is_done, "do not match.*rank 0.*Do all ranks take all steps"),
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
    (check_ring_all_reduce, zero_returns, "do not match.*rank 0.*Do all ranks take all steps"),
    (check_ring_all_reduce, first_round_only, "rank 0 has .*After the first round each piece"),
    (check_ring_all_reduce, only_equal_pieces, "4 ranks, 10 numbers: rank 0 has"),
    (check_ring_all_reduce, whole_tensors, "4 ranks.*a rank sent 120 bytes; 72 are enough"),
    (check_ring_all_reduce, all_to_zero, "rank 0 sent to rank 2.*In a ring"),
    (check_ring_all_reduce, on_a_copy, "rank 0 has .*x is as it was.*views of it"),
    (check_ring_all_reduce, lambda x: x.sum(), "rank 0 has .*x is as it was"),
    (check_ring_all_reduce, divided, "rank 0 has .*That is the mean"),
    (check_ring_all_reduce, with_the_other_of_two, "4 ranks, 10 numbers: rank 0 has"),
    (check_ring_all_reduce, one_step_too_many, "do not match.*rank 0.*as many"),
    (check_ring_all_reduce, chunked, "2 ranks, 4 numbers: rank 0 has"),
    (check_ring_all_reduce, lambda x: dist.recv(x, src=dist.get_rank()), "failed on real ranks"),
    (check_ring_all_reduce, lambda: 1, "failed on real ranks.*TypeError"),
    (check_ring_all_reduce, lambda x: dist.all_reduce(x), "you called all_reduce"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
