"""The checks of lessons 14, 14b and 14c: a token mean, pairs on all ranks, clipping, whose inf."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, WorkerDied
from ddp_lessons.exercises.framework import (
    Wrong,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import is_number, number, number_or_text
from ddp_lessons.exercises.small_training import flat, gradients, new_layer
from ddp_lessons.text import count, ranks_text

IGNORED = -100
Batch = tuple[Tensor, Tensor]
Counts = tuple[tuple[int, ...], ...]  # labels that count, by rank and micro-batch

# Several cases share a launch. No two ways of weighing agree in all of them.
ACCUMULATED: tuple[tuple[Counts, ...], ...] = (
    (((1, 6), (2, 3)), ((4,), (2,)), ((3, 0), (2, 5)), ((2, 2), (2, 2))),
    (((1, 2, 5), (1, 1, 2), (4, 3, 0)),),
    (((5, 1, 2),),),
)
PAIRS = ((2, (3, 1)), (3, (2,)), (1, (4,)))  # ranks, and pairs of each rank in each case
TEMPERATURE = 0.1


# A mean over what counts, in micro-batches on ranks.


def _micro_batches(rank: int, counts: Counts) -> list[Batch]:
    """Micro-batches with two more labels that do not count in every other one."""
    generator = torch.Generator().manual_seed(10 * rank + len(counts))
    batches = []
    for number_of, counting in enumerate(counts[rank]):
        size = counting + 2 * ((number_of + rank) % 2) + (counting == 0)
        inputs = torch.randn(size, 4, generator=generator, dtype=torch.double)
        labels = torch.randint(3, (size,), generator=generator)
        labels[counting:] = IGNORED
        batches.append((inputs, labels))
    return batches


@in_group
def _accumulated(
    rank: int, accumulate: Callable[..., Any], cases: tuple[Counts, ...]
) -> list[Tensor]:
    found = []
    for counts in cases:
        model = DistributedDataParallel(new_layer())
        accumulate(model, _micro_batches(rank, counts))
        found.append(gradients(model))
    return found


@exercise(
    "Of how many labels is the mean? Only all ranks together know it: `all_reduce` the number of "
    "labels that are not -100, in all your micro-batches.",
    'With `reduction="sum"` a micro-batch without labels gives 0, not nan. Divide each sum by '
    "the total, and make up for DDP's division by the number of ranks.",
    "`loss = cross_entropy(model(inputs), labels, reduction='sum') * dist.get_world_size() / "
    "total`, with `model.no_sync()` around forward and backward of all but the last micro-batch.",
)
def check_accumulate(accumulate: Callable[..., Any]) -> str:
    """Check `accumulate(model, micro_batches)`: the gradient of the mean over all labels."""
    for cases in ACCUMULATED:
        ranks = len(cases[0])
        run = run_ranks(_accumulated, (accumulate, cases), nprocs=ranks, check=False)
        _explain_failure(ranks, run)
        for case, counts in enumerate(cases):
            _judge_accumulated(counts, [value[case] for value in run.values])
        _judge_journeys(cases, run)
    return "the mean over all labels that count, for 6 cases on 1, 2 and 3 ranks, sent once."


def _explain_failure(ranks: int, run: Run) -> None:
    if run.ok:
        return
    said = " ".join(error.summary for error in errors(run))
    mistakes = {
        "you returned nothing to call `backward()` on.\nIs `return` missing?": (
            "'NoneType' object has no attr" in said and "backward" in said
        ),
        "the loss has no history.\n`backward()` follows what was calculated from the weights. "
        "`dist.all_gather` fills plain tensors, and `.item()`, `.detach()` and `torch.tensor` "
        "take values only.": "does not require grad" in said,
        f"{run.explain().splitlines()[0]}\nAll ranks must make the same calls in the same order, "
        "whatever they have.": stuck(run) or isinstance(run.error, WorkerDied),
    }
    judge(f"on {count(ranks, 'rank')}, ", mistakes)
    run.raise_for_failure()


def _near(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, atol=1e-9))


def _are_equal(found: Sequence[Tensor]) -> bool:
    return all(torch.equal(found[0], other) for other in found[1:])


def _ratio(found: Tensor, truth: Tensor) -> float:
    """The factor between two gradients; nan if they have different directions."""
    ratio = float((found @ truth) / (truth @ truth))
    return ratio if _near(found, truth * ratio) else math.nan


class _Sums(NamedTuple):
    """The gradient of each micro-batch's summed loss, `(ranks, k, weights)`, and its counts."""

    of: Tensor
    counting: Tensor
    sizes: Tensor


def _sums(counts: Counts) -> _Sums:
    model, rows, sizes = new_layer(), [], []
    for rank in range(len(counts)):
        for inputs, labels in _micro_batches(rank, counts):
            model.zero_grad()
            cross_entropy(model(inputs), labels, reduction="sum").backward()
            rows.append(gradients(model))
            sizes.append(len(labels))
    shape = (len(counts), len(counts[0]))
    return _Sums(
        torch.stack(rows).reshape(*shape, -1),
        torch.tensor(counts, dtype=torch.double),
        torch.tensor(sizes, dtype=torch.double).reshape(shape),
    )


def _judge_accumulated(counts: Counts, found: list[Tensor]) -> None:
    sums = _sums(counts)
    n, (ranks, k) = sums.counting, sums.counting.shape
    truth = sums.of.sum((0, 1)) / n.sum()
    if all(_near(gradient, truth) for gradient in found):
        return
    labels = "; ".join(
        f"rank {rank}: {', '.join(map(str, own))}" for rank, own in enumerate(counts)
    )
    means = sums.of / n[..., None].clamp(min=1)  # of each micro-batch
    of_ranks = sums.of.sum(1) / n.sum(1, keepdim=True).clamp(min=1)
    of_passes = sums.of.sum(0) / n.sum(0)[:, None].clamp(min=1)
    first = found[0]
    ratio = _ratio(first, truth)
    mistakes: dict[str, object] = {
        "the gradient is nan.\nA micro-batch without any label that counts has a mean of 0 / 0, "
        "and nan times 0 is nan. Sum its losses instead; a sum over nothing is 0.": bool(
            first.isnan().any()
        ),
        "there is no gradient.\n`backward()` leaves it in the model, and the model must keep it. "
        "Take no optimizer step, and clear nothing afterwards.": not any(g.any() for g in found),
        "the ranks have different gradients.\nSomewhere they were not averaged: the last "
        "micro-batch's forward and backward must be outside of `no_sync()`, on all ranks, and what "
        "you divide by must be the same on all.": not _are_equal(found),
        "the gradient is a mean of the micro-batches' means.\nA label in a micro-batch with few of "
        "them counts more than one in a full one. Weigh each micro-batch by the labels that count "
        "in it.": k * ranks > 1 and _near(first, means.mean((0, 1))),
        "the gradient is a sum of the micro-batches' means.\nIt grows with k, and each "
        "micro-batch has the same weight. Weigh by the labels that count.": _near(
            first, means.sum(1).mean(0)
        ),
        "each rank has the mean over its own labels, and DDP has averaged these.\nInside a rank "
        "all labels count alike, but a rank with few of them has as much weight as one with many. "
        "The total is that of all ranks: `all_reduce` it.": _near(first, of_ranks.mean(0)),
        "each pass has the mean over all ranks, and these means were averaged.\nThe passes have "
        "different numbers of labels, too. Count all micro-batches of the step "
        "first.": _near(first, of_passes.mean(0)),
        "only the last micro-batch is in the gradient.\nNothing may clear the gradients between "
        "the micro-batches.": k > 1 and _near(first * n.sum(), sums.of[:, -1].sum(0)),
        "labels of -100 were counted, too.\n`len(labels)` is not the number of labels that count: "
        f"`(labels != {IGNORED}).sum()`.": not math.isnan(ratio)
        and abs(ratio - float(n.sum() / sums.sizes.sum())) < 1e-9,
        f"the gradient is {ratio:.2f} times the right one.\nThe weights are in proportion. DDP "
        "divides by the number of ranks, too: make up for that, and divide by the total "
        "once.": not math.isnan(ratio),
        "the gradient is not that of the mean over all labels.\nEach label that counts has the "
        "weight 1 / total, in every micro-batch on every rank.": True,
    }
    judge(f"labels that count: {labels}: ", mistakes)


def _judge_journeys(cases: tuple[Counts, ...], run: Run) -> None:
    sent = sum(span.lane == "buckets" for span in run.ranks[0].spans)
    if sent > len(cases):
        raise Wrong(
            f"the gradient is right, but was sent {sent} times in {count(len(cases), 'step')}.",
            "Forward and backward of all but the last micro-batch belong into "
            "`with model.no_sync():`; the forward decides.",
        )


# Pairs on all ranks.


def _views(ranks: int, pairs: int) -> tuple[Tensor, Tensor]:
    """The inputs of both views, `(ranks * pairs, 4)`."""
    generator = torch.Generator().manual_seed(7 + pairs)
    first = torch.randn(ranks * pairs, 4, generator=generator, dtype=torch.double)
    noise = torch.randn(ranks * pairs, 4, generator=generator, dtype=torch.double)
    return first, first + 0.5 * noise


def _encode(model: nn.Module, views: tuple[Tensor, Tensor], mine: slice) -> tuple[Tensor, Tensor]:
    one, other = normalize(model(torch.cat([view[mine] for view in views]))).chunk(2)
    return one, other


def _contrast(a: Tensor, b: Tensor, first: int = 0) -> Tensor:
    return cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)) + first)


@in_group
def _compared(rank: int, pair_loss: Callable[..., Any], pairs: tuple[int, ...]) -> list[Tensor]:
    found = []
    for n in pairs:
        model = DistributedDataParallel(new_layer())
        mine = slice(rank * n, rank * n + n)
        pair_loss(*_encode(model, _views(dist.get_world_size(), n), mine)).backward()
        found.append(gradients(model))
    return found


@exercise(
    "Your rows of the likeness are `a @ all_b.T`. Which column is the right one for your first "
    "row, on rank 2?",
    "`all_b` must have its history. The lesson's `AllGather` sums in backward; "
    "`torch.distributed.nn.functional.all_gather` does the same.",
    "`all_b = torch.cat(all_gather(b))`, and return `cross_entropy(a @ all_b.T / 0.1, "
    "torch.arange(len(a)) + len(a) * dist.get_rank())`.",
)
def check_pair_loss(pair_loss: Callable[..., Any]) -> str:
    """Check `pair_loss(a, b)`: DDP's gradient equals that of the pairs of all ranks."""
    for ranks, pairs in PAIRS:
        run = run_ranks(_compared, (pair_loss, pairs), nprocs=ranks, check=False)
        _explain_failure(ranks, run)
        for case, n in enumerate(pairs):
            _judge_pairs(ranks, n, run.values[0][case])
    return "the gradient of all pairs, for 3 and for 1 on each of 2 ranks, for 2 on each of 3."


def _of_pairs(
    ranks: int, n: int, loss: Callable[[int, list[Tensor], list[Tensor]], Tensor]
) -> Tensor:
    """The mean over ranks of the gradient of ``loss(rank, a, b)``, which gets all ranks' parts."""
    model, of_ranks = new_layer(), []
    for rank in range(ranks):
        model.zero_grad()
        a, b = _encode(model, _views(ranks, n), slice(None))
        loss(rank, list(a.split(n)), list(b.split(n))).backward()
        of_ranks.append(gradients(model))
    return torch.stack(of_ranks).mean(0)


def _alone(parts: list[Tensor], rank: int) -> Tensor:
    """All parts, of which only the rank's own has a history."""
    return torch.cat([p if r == rank else p.detach() for r, p in enumerate(parts)])


def _judge_pairs(ranks: int, n: int, found: Tensor) -> None:
    truth = _of_pairs(ranks, n, lambda _, a, b: _contrast(torch.cat(a), torch.cat(b)))
    if _near(found, truth):
        return
    own = _of_pairs(ranks, n, lambda r, a, b: _contrast(a[r], b[r]))
    blind = _of_pairs(ranks, n, lambda r, a, b: _contrast(a[r], torch.cat(b).detach(), r * n))
    put_back = _of_pairs(ranks, n, lambda r, a, b: _contrast(a[r], _alone(b, r), r * n))
    no_offset = _of_pairs(ranks, n, lambda r, a, b: _contrast(a[r], torch.cat(b)))
    cold = _of_pairs(ranks, n, lambda r, a, b: cross_entropy(a[r] @ b[r].T, torch.arange(n)))
    cold_all = _of_pairs(
        ranks, n, lambda r, a, b: cross_entropy(a[r] @ torch.cat(b).T, torch.arange(n) + r * n)
    )
    ratio = _ratio(found, truth)
    mistakes = {
        "each rank compared only its own pairs.\nThe choices are the `b` of all ranks: fetch "
        "them.": ranks > 1 and _near(found, own),
        "the gradient stops at the `b` that were gathered.\n`dist.all_gather` fills plain "
        "tensors. Backward must send each `b` the sum of what all ranks' losses say of "
        "it.": ranks > 1 and _near(found, blind),
        "the other ranks' losses never reach this rank's `b`.\nPut back into the list, it has the "
        "gradient of its own rank's loss only. Gather with a backward that sums over the "
        "ranks.": ranks > 1 and _near(found, put_back),
        "the right choice is in another column.\nThe choices are those of all ranks, in rank "
        "order: row i of rank r belongs to column `r * n + i`.": ranks > 1
        and _near(found, no_offset),
        "the likeness was not divided by 0.1.\nThe loss is that of `contrast`.": _near(found, cold)
        or _near(found, cold_all),
        f"the gradient is {ratio:.2f} times the right one.\nThe direction is right. DDP divides by "
        "the number of ranks, and `all_gather`'s backward has to sum. Count what is summed "
        "twice or divided twice.": not math.isnan(ratio) and ratio > 0,
        "the gradient is not that of all pairs.\nA rank's loss has its own `a` in the rows and the "
        "`b` of all ranks, with their history, in the columns; DDP makes the mean of the ranks' "
        "losses.": True,
    }
    judge(f"{count(n, 'pair')} on each of {count(ranks, 'rank')}: ", mistakes)


# Between backward and step, with a scaler.

LIMIT = 1.0
SCALE = 2.0**10
PARTS = (3.0, 0.05, math.inf, 3.0)  # by step: what rank 1 multiplies its loss by
RATE = 0.5


class _Step(NamedTuple):
    """What one step left on a rank."""

    norm: float | str  # as it was returned
    weights: Tensor
    scale: float


@in_group
def _finished(rank: int, finish: Callable[..., Any]) -> list[_Step]:
    layer = new_layer().float()
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    steps = []
    for factor in PARTS:
        optimizer.zero_grad()
        inputs, labels = _inputs(rank)
        loss = cross_entropy(model(inputs), labels)
        scaler.scale(loss * _factor(rank, factor)).backward()
        norm = finish(model, optimizer, scaler, LIMIT)
        steps.append(_Step(number_or_text(norm), flat(layer.parameters()), scaler.get_scale()))
    return steps


def _inputs(rank: int) -> Batch:
    generator = torch.Generator().manual_seed(20 + rank)
    return torch.randn(4, 4, generator=generator), torch.arange(4) % 3


def _factor(rank: int, factor: float) -> float:
    return factor if rank == 1 or math.isfinite(factor) else 1.0


class _Truth(NamedTuple):
    """One step of one process."""

    norm: float  # of the averaged gradient
    weights: Tensor  # after the step
    unclipped: Tensor  # after a step without clipping
    scaled: Tensor  # after a step that clips without unscaling first
    skipped: bool


def _truth(ranks: int, weights: Tensor, factor: float) -> _Truth:
    """A step from these weights."""
    layer = new_layer().float()
    nn.utils.vector_to_parameters(weights, layer.parameters())
    for rank in range(ranks):
        inputs, labels = _inputs(rank)
        (cross_entropy(layer(inputs), labels) * _factor(rank, factor) / ranks).backward()
    gradient = gradients(layer)
    norm = float(gradient.norm())
    if not math.isfinite(norm):
        return _Truth(norm, weights, weights, weights, True)
    return _Truth(
        norm,
        weights - RATE * gradient * min(1.0, LIMIT / norm),
        weights - RATE * gradient,
        weights - RATE * gradient * min(1.0, LIMIT / (norm * SCALE)),
        False,
    )


@exercise(
    "The gradients that you get are averaged, and 1,024 times too long. What must come before "
    "clipping?",
    "Four calls: `scaler.unscale_`, `clip_grad_norm_`, `scaler.step`, `scaler.update`. Each knows "
    "by itself what to do with an inf.",
    "`scaler.unscale_(optimizer)`, `norm = clip_grad_norm_(model.parameters(), limit)`, "
    "`scaler.step(optimizer)`, `scaler.update()`, and return `norm`.",
)
def check_finish_step(finish: Callable[..., Any]) -> str:
    """Check `finish_step(model, optimizer, scaler, limit)` over four steps, one with an inf."""
    run = run_ranks(_finished, (finish,), nprocs=2, check=False)
    said = " ".join(error.summary for error in errors(run))
    mistakes = {
        "the scaler said that `unscale_` came twice, or after the step.\n`scaler.update()` ends "
        "each step, also one that is skipped; in between, `unscale_` is called once.": (
            "unscale_() " in said
        )
    }
    judge("on 2 ranks: ", mistakes)
    _explain_failure(2, run)
    weights = flat(new_layer().float().parameters())
    for step, factor in enumerate(PARTS):
        truth = _truth(2, weights, factor)
        of_ranks = [_Step(*value[step]) for value in run.values]
        before = of_ranks[0].scale if not step else run.values[0][step - 1][2]
        _judge_finished(step, of_ranks, truth, weights, before)
        weights = of_ranks[0].weights
    return "4 steps on 2 ranks: clipped above the limit, left below it, all ranks skip an inf."


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def _judge_finished(
    step: int, of_ranks: list[_Step], truth: _Truth, weights: Tensor, before: float
) -> None:
    found = [one.weights for one in of_ranks]
    after = found[0]
    norms = [one.norm for one in of_ranks]
    values = [float(norm) for norm in norms if _is_value(norm)]
    shown = ", ".join(f"{n:.3g}" if is_number(n) else str(n) for n in norms)
    where = f"step {step}"
    if truth.skipped:
        where += ", in which rank 1 has an inf"
    right = f"the norm of the averaged gradient is {truth.norm:.3g}"
    apart = [rank for rank, one in enumerate(found) if not _close(one, truth.weights)]
    mistakes: dict[str, object] = {
        "the weights are nan or inf.\n`optimizer.step()` takes the step whatever the gradients "
        "are. `scaler.step(optimizer)` looks first, and skips it.": not all(
            one.isfinite().all() for one in found
        ),
        "the ranks have different weights.\nThe gradients are equal on all ranks, so what you do "
        "with them must be, too: clip and step on all.": not _are_equal(found),
        "the weights did not change.\nWho takes the step?": not truth.skipped
        and torch.equal(after, weights),
        "the step is about as long as if nothing were clipped.\n`clip_grad_norm_` must come before "
        "the step, and after `unscale_`.": bool(apart)
        and not _close(truth.unclipped, truth.weights)
        and _close(after, truth.unclipped),
        "the step is far too short.\nThe gradients were still multiplied by the scale when they "
        "were clipped, so all are above the limit: `scaler.unscale_(optimizer)` "
        "first.": bool(apart) and _close(after, truth.scaled),
        "the weights are not those of one process.\nUnscale, clip the averaged gradient by its "
        "norm, once, and step.": bool(apart),
        f"the scale stayed at {of_ranks[0].scale:g}.\nAfter an inf it has to come down, or the "
        "next steps overflow again: `scaler.update()` in every step.": truth.skipped
        and of_ranks[0].scale == before,
        f"you returned {shown}.\nReturn the norm before clipping, a number, on every rank.": len(
            values
        )
        < len(of_ranks),
        f"you returned {shown}; {right}.\n`clip_grad_norm_` returns the norm before clipping; of "
        "gradients that are not unscaled yet it is 1,024 times too large.": not truth.skipped
        and not all(math.isclose(value, truth.norm, rel_tol=1e-3) for value in values),
        f"you returned {shown}; {right}.\nA norm that is not finite tells the log that this step "
        "was skipped.": truth.skipped and any(map(math.isfinite, values)),
    }
    judge(f"{where}: ", mistakes)


def _is_value(norm: float | str) -> bool:
    """Whether it is a number, or the text of one that is not finite."""
    try:
        float(norm)
    except ValueError:
        return False
    return True


# Whose inf?

HUGE = 3e38  # two of them are more than a float32 holds
WHOSE: dict[str, tuple[float, ...]] = {  # by case: an element of each rank's gradient, or 0
    "all gradients are finite": (0.0, 0.0),
    "rank 1 has an inf": (0.0, math.inf),
    "rank 0 has a nan": (math.nan, 0.0),
    "rank 0 has an inf, rank 1 a -inf": (math.inf, -math.inf),
    "the ranks' gradients are finite, but their sum is not": (HUGE, HUGE),
    "all are finite again": (0.0, 0.0),
}


def _parameters(rank: int, odd: float) -> list[nn.Parameter]:
    """Two parameters with scaled gradients; an odd element, if not 0, is in the last one."""
    found = []
    for place, size in enumerate((3, 2)):
        parameter = nn.Parameter(torch.ones(size))
        parameter.grad = SCALE * (torch.arange(size) + 1.0 + rank + 10 * place)
        found.append(parameter)
    if odd:
        found[-1].grad[-1] = odd
    return found


@in_group
def _together(rank: int, step_together: Callable[..., Any]) -> list[tuple[Any, Tensor]]:
    found = []
    for odd in WHOSE.values():
        parameters = _parameters(rank, odd[rank])
        with torch.no_grad():
            told = step_together(parameters, RATE, SCALE)
        dist.barrier()  # whoever left a call out meets no call of the next case
        found.append((number_or_text(told), flat(parameters)))
    return found


@exercise(
    "An inf survives a sum. When must you look for it, so that all ranks see it?",
    "First average all gradients by `all_reduce`. Then all ranks have the same ones, and each can "
    "decide alone: `isfinite().all()` of every gradient, before the first weight changes.",
    "Average every gradient; `good = all(p.grad.isfinite().all() for p in parameters)`; if good, "
    "`p -= rate * p.grad / scale` for every parameter; return `bool(good)`.",
)
def check_step_together(step_together: Callable[..., Any]) -> str:
    """Check `step_together(parameters, rate, scale)`: all ranks step, or all skip."""
    run = run_ranks(_together, (step_together,), nprocs=2, check=False)
    if not run.ok and (stuck(run) or isinstance(run.error, WorkerDied)):
        raise Wrong(
            f"on 2 ranks: {run.explain().splitlines()[0]}",
            "One rank decided by its own gradients and left the calls that the other still makes. "
            "All must make the same calls, whatever they find.",
        )
    run.raise_for_failure()
    for case, name in enumerate(WHOSE):
        _judge_together(name, [value[case] for value in run.values])
    return "on 2 ranks, 6 cases: all take the same step, or none does."


def _judge_together(name: str, of_ranks: list[tuple[Any, Tensor]]) -> None:
    odd = WHOSE[name]
    if HUGE in odd and _steps_rightly(of_ranks):
        return  # divided before the sum, nothing overflows
    skip = any(odd)
    start = torch.ones(5)
    each = [flat(p.grad for p in _parameters(rank, odd[rank])) for rank in range(2)]
    gradient = (each[0] + each[1]) / 2 / SCALE
    right = start if skip else start - RATE * gradient
    told, found = [one[0] for one in of_ranks], [one[1] for one in of_ranks]
    moved = [rank for rank, one in enumerate(found) if not torch.equal(one, start)]
    ratio = _ratio((found[0] - start).double(), gradient.double()) if not skip else math.nan
    own = [start - RATE * one / SCALE for one in each]
    mistakes: dict[str, object] = {
        f"{ranks_text(moved or [0])} took the step, and the other did not.\nFrom now on their "
        "weights differ. Whoever looks before the average sees only its own gradients; after it "
        "all see the same.": skip and len(moved) == 1,
        "every rank took a step with its own gradient.\nNothing was averaged.": not skip
        and all(_close(one, mine) for one, mine in zip(found, own, strict=True)),
        "all ranks took the step, and the weights have no number left in places.\nLook at the "
        "gradients after the average: a sum can overflow, and `isfinite` finds nan as well as "
        "inf.": skip and len(moved) == 2 and not found[0].isfinite().all(),
        "all ranks took the step.\nA step with an inf is skipped as a whole: decide before the "
        "first weight changes, and mend nothing. The other elements are as "
        "doubtful.": skip and len(moved) == 2,
        "no rank took the step.\nNothing is wrong with these gradients.": not skip and not moved,
        "the step is too long by the scale.\nThe gradients are multiplied by it: divide by it, "
        "once.": not skip and (_is_times(ratio, SCALE) or _is_times(ratio, 2 * SCALE)),
        f"the step is {ratio / -RATE:.3g} times the right one.\nThe step is rate x mean gradient / "
        "scale, away from the gradient.": not skip
        and not math.isnan(ratio)
        and not _is_times(ratio, 1),
        "the weights are not those of one process.\nEvery parameter takes the step: rate x mean "
        "gradient / scale.": not all(_close(one, right) for one in found),
        f"the weights are right, and you returned {told[0]}.\nReturn True where the step was "
        "taken, False where it was skipped.": any(number(t) not in (True, False) for t in told)
        or any(bool(t) == skip for t in told),
    }
    judge(f"{name}: ", mistakes)


def _steps_rightly(of_ranks: list[tuple[Any, Tensor]]) -> bool:
    """Whether all took the step with gradients that only their undivided sum cannot hold."""
    each = [flat(p.grad for p in _parameters(rank, HUGE)).double() for rank in range(2)]
    right = 1 - RATE * (each[0] + each[1]) / 2 / SCALE
    return all(number(told) and _close(found.double(), right) for told, found in of_ranks)


def _is_times(ratio: float, factor: float) -> bool:
    """Whether the weights moved by so many right steps."""
    return math.isclose(ratio, -RATE * factor, rel_tol=1e-3)
