"""The checks of real_2: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp_lessons.exercises.real_launcher import check_gather_scores, check_to_start
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def starts(num_proc: int, shard_id: int, num_shards: int) -> Any:
    world_size = num_proc * num_shards
    if world_size == 1:
        return None
    return [(shard_id * num_proc + n, world_size) for n in range(num_proc)]


def of_batches(num_proc: int, shard_id: int, num_shards: int) -> Any:
    if (num_proc, num_shards) != (1, 1):
        every = zip(range(10**6), itertools.repeat(num_proc * num_shards), strict=False)
        return tuple(itertools.islice(every, shard_id * num_proc, (shard_id + 1) * num_proc))
    return None


def of_tensor(num_proc: int, shard_id: int, num_shards: int) -> Any:
    world_size = torch.tensor(num_proc * num_shards)
    ranks = torch.arange(world_size)[shard_id * num_proc :][:num_proc]
    return torch.stack([ranks, world_size.expand(num_proc)], dim=1) if world_size > 1 else None


def or_none(pairs: Any) -> Any:
    """A to_start that is right for one rank."""
    return lambda p, s, m: None if p * m == 1 else pairs(p, s, m)


def pairs(ids: Tensor, scores: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every rank's ids and scores."""
    parts = [(ids, scores)]
    if dist.is_initialized():
        parts = [(ids, scores)] * dist.get_world_size()
        dist.all_gather_object(parts, (ids, scores))
    return parts


def joined(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    of_ids, of_scores = zip(*pairs(ids, scores), strict=True)
    return torch.cat(of_ids), torch.cat(of_scores)


def of_dict(ids: Tensor, scores: Tensor) -> Tensor:
    rows = dict(zip(*(part.tolist() for part in joined(ids, scores)), strict=True))
    return torch.tensor([rows[clip] for clip in sorted(rows)])


def of_index(ids: Tensor, scores: Tensor) -> Tensor:
    ids, scores = joined(ids, scores)
    rows = torch.zeros(int(ids.max()) + 1, scores.shape[1])
    rows[ids] = scores
    return rows


def of_padding(ids: Tensor, scores: Tensor) -> Tensor:
    if dist.is_initialized():
        most = torch.tensor(len(ids))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        table = torch.full((int(most), 3), -1.0)
        table[: len(ids)] = torch.cat([ids[:, None], scores], dim=1)
        parts = [torch.empty_like(table) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, table)
        table = torch.cat(parts)
        ids, scores = table[:, 0].long(), table[:, 1:]
    return of_first(ids[ids >= 0], scores[ids >= 0])


def of_first(ids: Tensor, scores: Tensor) -> Tensor:
    """Each id's row, without communication."""
    _, first = np.unique(ids.numpy(), return_index=True)
    return scores[torch.from_numpy(first)]


def of_broadcasts(ids: Tensor, scores: Tensor) -> Tensor:
    rows: dict[int, Tensor] = dict(zip(ids.tolist(), scores, strict=True))
    for source in range(dist.get_world_size() if dist.is_initialized() else 0):
        sent = [rows]
        dist.broadcast_object_list(sent, src=source)
        rows = {**sent[0], **rows}
    return torch.stack([rows[clip] for clip in sorted(rows)])


def of_mean(ids: Tensor, scores: Tensor) -> Tensor:
    """Each rank fills its rows; the sum is divided by how often each came."""
    most = torch.tensor(int(ids.max()) + 1 if len(ids) else 0)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    rows = torch.zeros(int(most), 3).index_add_(0, ids, torch.cat([scores, scores[:, :1] ** 0], 1))
    if dist.is_initialized():
        dist.all_reduce(rows)
    return rows[:, :2] / rows[:, 2:]


RIGHT: list[tuple[Any, Any]] = [
    (check_to_start, starts),
    (check_to_start, of_batches),
    (check_to_start, of_tensor),
    (check_to_start, functools.partial(lambda _, *numbers: starts(*numbers), None)),
    (check_to_start, or_none(lambda p, s, m: [[s * p + n, p * m] for n in range(p)])),
    (check_gather_scores, of_dict),
    (check_gather_scores, of_index),
    (check_gather_scores, of_padding),
    (check_gather_scores, answers.Called(of_broadcasts)),
    (check_gather_scores, answers.decorated(of_mean)),
]


def gathered_alike(ids: Tensor, scores: Tensor) -> Tensor:
    parts = [torch.zeros_like(scores) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, scores)
    return torch.stack(parts, dim=1).flatten(0, 1)


def padding_kept(ids: Tensor, scores: Tensor) -> Tensor:
    parts = [s for _, s in pairs(ids, scores)]
    most = max(map(len, parts))
    padded = [torch.cat([s, torch.zeros(most - len(s), 2)]) for s in parts]
    return torch.stack(padded, dim=1).flatten(0, 1)


def cut_to_shortest(ids: Tensor, scores: Tensor) -> Tensor:
    parts = pairs(ids, scores)
    least = min(len(i) for i, _ in parts)
    rows = {c: s for i, t in parts for c, s in zip(i[:least].tolist(), t[:least], strict=True)}
    return torch.tensor([rows[clip].tolist() for clip in sorted(rows)])


def on_rank_0(ids: Tensor, scores: Tensor) -> Any:
    rows = of_dict(ids, scores)
    return rows if not dist.is_initialized() or dist.get_rank() == 0 else None


def gathered_by_rank_0(ids: Tensor, scores: Tensor) -> Any:
    if dist.get_rank() == 0:
        return of_dict(ids, scores)
    return scores


def twins_kept(ids: Tensor, scores: Tensor) -> Tensor:
    ids, scores = joined(ids, scores)
    return scores[ids.argsort(stable=True)]


def twins_added(ids: Tensor, scores: Tensor) -> Tensor:
    ids, scores = joined(ids, scores)
    return torch.zeros(int(ids.max()) + 1, 2).index_add_(0, ids, scores)


def interleaved(ids: Tensor, scores: Tensor) -> Tensor:
    """As if every rank had every world_size-th clip."""
    parts = [list(s) for _, s in pairs(ids, scores)]
    turns: Iterator[Any] = itertools.chain(*itertools.zip_longest(*parts))
    return torch.stack([row for row in turns if row is not None])


def group_needed(ids: Tensor, scores: Tensor) -> Tensor:
    dist.get_rank()
    return of_dict(ids, scores)


def first_has_some(ids: Tensor, scores: Tensor) -> Tensor:
    assert len(ids), "no clips"
    return of_dict(ids, scores)


WRONG: list[tuple[Any, Any, str]] = [
    (check_to_start, lambda p, s, m: starts(p, s, m) if p > 1 else None, "apart, and no error"),
    (check_to_start, lambda p, s, m: [(s * p + n, p * m) for n in range(p)], "1.*, not None"),
    (check_to_start, or_none(lambda p, s, m: [(n, p * m) for n in range(p)]), "begins again at 0"),
    (
        check_to_start,
        or_none(lambda p, s, m: [(s * p + n, m) for n in range(p)]),
        "has 2 ranks.*all",
    ),
    (
        check_to_start,
        or_none(lambda p, s, m: [(s * p + n, p) for n in range(p)]),
        "2 machines.*has 2 ranks.*num_proc . num_shards",
    ),
    (
        check_to_start,
        or_none(lambda p, s, m: [(s + n, p * m) for n in range(p)]),
        "shard_id machines",
    ),
    (
        check_to_start,
        or_none(lambda p, s, m: [(s * m + n, p * m) for n in range(p)]),
        "before this one",
    ),
    (check_to_start, or_none(lambda p, s, m: [(s * p + n + 1, p * m) for n in range(p)]), "from 0"),
    (check_to_start, or_none(lambda p, s, m: [(p * m, s * p + n) for n in range(p)]), "rank first"),
    (check_to_start, or_none(lambda p, s, m: starts(p, s, m)[::-1]), "order is that of the local"),
    (check_to_start, or_none(lambda p, s, m: starts(p * m, 0, 1)), "2 pairs.*own processes only"),
    (check_to_start, or_none(lambda p, s, m: starts(p, s, m)[0]), "pair of whole numbers"),
    (
        check_to_start,
        or_none(lambda p, s, m: [(s * p + n, p * m / 1) for n in range(p)]),
        "whole num",
    ),
    (check_to_start, or_none(lambda p, s, m: print(starts(p, s, m))), "`return` missing"),
    (check_to_start, or_none(lambda p, s, m: int(os.environ["RANK"])), "follows from them"),
    (check_to_start, lambda p, s: starts(p, s, 1), "TypeError"),
    (check_gather_scores, lambda ids, scores: scores, "own scores only"),
    (check_gather_scores, gathered_alike, "different counts.*one shape on all"),
    (check_gather_scores, padding_kept, r"\[0.0, 0.0\].*cut off again"),
    (check_gather_scores, cut_to_shortest, "no scores of clip .*none may be cut"),
    (check_gather_scores, on_rank_0, "rank 1 returned None.*on every rank"),
    (check_gather_scores, gathered_by_rank_0, "each of 2 ranks.*same calls"),
    (check_gather_scores, twins_kept, "which have clip 0.*5 rows for 4 clips"),
    (check_gather_scores, twins_added, "which have clip 0.*do not add up"),
    (check_gather_scores, interleaved, "a different order.*sort by id"),
    (check_gather_scores, lambda ids, scores: joined(ids, scores)[1], "a different order"),
    (check_gather_scores, group_needed, "raised ValueError.*Without a process group"),
    (check_gather_scores, first_has_some, "also 0, on 3 ranks.*n may be 0"),
    (
        check_gather_scores,
        lambda ids, scores: of_dict(ids, scores).argmax(1),
        r"must be \(clips, cl",
    ),
    (check_gather_scores, answers.prints(of_dict), "returned None"),
    (check_gather_scores, lambda ids, scores: of_dict(ids, scores).tolist(), "Return a tensor"),
]


@answers.right(RIGHT)
def test_right_answers_pass(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_wrong_answers_are_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
