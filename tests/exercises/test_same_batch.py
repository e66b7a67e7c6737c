"""The checks of lessons 14, 14b and 14c: right answers pass, and wrong ones are explained."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ddp_lessons.exercises.same_batch import (
    check_accumulate,
    check_finish_step,
    check_pair_loss,
    check_step_together,
)
from tests.support import answers

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def labelled(micro_batches: Any) -> torch.Tensor:
    return torch.tensor([float((labels != -100).sum()) for _, labels in micro_batches])


def summed(value: Any) -> torch.Tensor:
    total = torch.as_tensor(value, dtype=torch.double).clone()
    dist.all_reduce(total)
    return total


def weighted(model: Any, micro_batches: Any, weights: Any, reduction: str = "sum") -> None:
    """Each micro-batch's summed loss, times its weight; the gradients are sent once."""
    for n, (inputs, labels) in enumerate(micro_batches):
        last = n + 1 == len(micro_batches)
        with nullcontext() if last else model.no_sync():
            (cross_entropy(model(inputs), labels, reduction=reduction) * weights[n]).backward()


def accumulates(model: Any, micro_batches: Any) -> None:
    total = summed(labelled(micro_batches).sum())
    weighted(model, micro_batches, [dist.get_world_size() / total] * len(micro_batches))


def scales_afterwards(model: Any, micro_batches: Any) -> None:
    weighted(model, micro_batches, [1.0] * len(micro_batches))
    total = summed(labelled(micro_batches).sum())
    for parameter in model.parameters():
        parameter.grad.mul_(dist.get_world_size() / total)


def weighs_means(model: Any, micro_batches: Any) -> None:
    own = labelled(micro_batches)
    weighted(model, micro_batches, own * dist.get_world_size() / summed(own.sum()), "mean")


def by_hand(model: Any, micro_batches: Any) -> None:
    """DDP sends nothing."""
    total = summed(labelled(micro_batches).sum())
    for inputs, labels in micro_batches:
        cross_entropy(model.module(inputs), labels, reduction="sum").backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= total


def gathers_counts(model: Any, micro_batches: Any) -> None:
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, labelled(micro_batches).tolist())
    total = sum(map(sum, counts))
    weighted(model, micro_batches, [len(counts) / total] * len(micro_batches))


def as_one_batch(model: Any, micro_batches: Any) -> None:
    inputs, labels = (torch.cat(part) for part in zip(*micro_batches, strict=True))
    accumulates(model, [(inputs, labels)])


def picks_labelled(model: Any, micro_batches: Any) -> None:
    """Takes the log-likelihoods by itself, and adds up losses before one backward."""
    total, loss = summed(labelled(micro_batches).sum()), 0.0
    inputs = torch.cat([inputs for inputs, _ in micro_batches])
    labels = torch.cat([labels for _, labels in micro_batches])
    keep = labels != -100
    likely = log_softmax(model(inputs), dim=1)[keep, labels[keep]]
    loss = -likely.sum() * dist.get_world_size() / total
    loss.backward()


def mean_of_means(model: Any, micro_batches: Any) -> None:
    weighted(model, micro_batches, [1 / len(micro_batches)] * len(micro_batches), "mean")


def sum_of_means(model: Any, micro_batches: Any) -> None:
    weighted(model, micro_batches, [1.0] * len(micro_batches), "mean")


def counts_itself(model: Any, micro_batches: Any) -> None:
    total = labelled(micro_batches).sum().clamp(min=1)
    weighted(model, micro_batches, [1 / total] * len(micro_batches))


def counts_each_pass(model: Any, micro_batches: Any) -> None:
    k, ranks = len(micro_batches), dist.get_world_size()
    weighted(model, micro_batches, ranks / k / summed(labelled(micro_batches)))


def forgets_ddp(model: Any, micro_batches: Any) -> None:
    total = summed(labelled(micro_batches).sum())
    weighted(model, micro_batches, [1 / total] * len(micro_batches))


def sums(model: Any, micro_batches: Any) -> None:
    weighted(model, micro_batches, [1.0] * len(micro_batches))


def counts_all_labels(model: Any, micro_batches: Any) -> None:
    total = summed(float(sum(len(labels) for _, labels in micro_batches)))
    weighted(model, micro_batches, [dist.get_world_size() / total] * len(micro_batches))


def divides_by_k_too(model: Any, micro_batches: Any) -> None:
    total, k = summed(labelled(micro_batches).sum()), len(micro_batches)
    weighted(model, micro_batches, [dist.get_world_size() / total / k] * k)


def clears(model: Any, micro_batches: Any) -> None:
    total = summed(labelled(micro_batches).sum())
    for batch in micro_batches:
        model.zero_grad()
        weighted(model, [batch], [dist.get_world_size() / total])


def clears_at_the_end(model: Any, micro_batches: Any) -> None:
    accumulates(model, micro_batches)
    model.zero_grad()


def sends_each(model: Any, micro_batches: Any) -> None:
    total = summed(labelled(micro_batches).sum())
    for batch in micro_batches:
        weighted(model, [batch], [dist.get_world_size() / total])


def only_backward_inside(model: Any, micro_batches: Any) -> None:
    """`no_sync` around backward alone does nothing."""
    total = summed(labelled(micro_batches).sum())
    for n, (inputs, labels) in enumerate(micro_batches):
        loss = cross_entropy(model(inputs), labels, reduction="sum") / total
        with nullcontext() if n + 1 == len(micro_batches) else model.no_sync():
            (loss * dist.get_world_size()).backward()


def never_sends(model: Any, micro_batches: Any) -> None:
    with model.no_sync():
        accumulates(model, micro_batches)


def skips_what_is_empty(model: Any, micro_batches: Any) -> None:
    """The last micro-batch is the one that sends, with labels or without."""
    total = summed(labelled(micro_batches).sum())
    for n, (inputs, labels) in enumerate(micro_batches):
        if (labels != -100).any():
            weighted(model, [(inputs, labels)], [dist.get_world_size() / total])
        elif n + 1 == len(micro_batches):
            return


def by_mask(model: Any, micro_batches: Any) -> None:
    own = labelled(micro_batches)
    weights = own * dist.get_world_size() / summed(own.sum())
    for n, (inputs, labels) in enumerate(micro_batches):
        mask = labels != -100
        losses = -log_softmax(model(inputs), dim=1)[range(len(labels)), labels.clamp(min=0)]
        with nullcontext() if n + 1 == len(micro_batches) else model.no_sync():
            ((losses * mask).sum() / mask.sum() * weights[n]).backward()


def steps(model: Any, micro_batches: Any) -> None:
    accumulates(model, micro_batches)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def weighs_by_samples(model: Any, micro_batches: Any) -> None:
    own = torch.tensor([float(len(labels)) for _, labels in micro_batches])
    weighted(model, micro_batches, own * dist.get_world_size() / summed(own.sum()), "mean")


# Pairs.


class Gathered(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any, how: str) -> Any:
        ctx.how = how
        return torch.cat(plain_gather(x))

    @staticmethod
    def backward(ctx: Any, of_all: Any) -> Any:
        of_all = of_all.contiguous()
        if ctx.how != "mine":
            dist.all_reduce(of_all)
        if ctx.how == "mean":
            of_all /= dist.get_world_size()
        return of_all.chunk(dist.get_world_size())[dist.get_rank()], None


def plain_gather(x: Any) -> list[Any]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return parts


def put_back(x: Any) -> Any:
    parts = plain_gather(x)
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def contrast(a: Any, b: Any, first: int = 0, temperature: float = 0.1) -> Any:
    return cross_entropy(a @ b.T / temperature, torch.arange(len(a)) + first)


def first_of(a: Any) -> Any:
    return dist.get_rank() * len(a)


def pairs(a: Any, b: Any, how: str = "sum") -> Any:
    return contrast(a, Gathered.apply(b, how), first_of(a))


def by_library(a: Any, b: Any) -> Any:
    from torch.distributed.nn.functional import all_gather

    return contrast(a, torch.cat(list(all_gather(b))), first_of(a))


def whole_loss(a: Any, b: Any) -> Any:
    return contrast(Gathered.apply(a, "sum"), Gathered.apply(b, "sum"))


def whole_loss_put_back(a: Any, b: Any) -> Any:
    return contrast(put_back(a), put_back(b)) * dist.get_world_size()


def by_gradients(a: Any, b: Any) -> Any:
    """Finds the gradient of the whole loss for its embeddings, and returns a stand-in with it."""
    all_a, all_b = (torch.cat(plain_gather(x)).requires_grad_() for x in (a, b))
    contrast(all_a, all_b).backward()
    mine = slice(first_of(a), first_of(a) + len(a))
    stand_in = (a * all_a.grad[mine]).sum() + (b * all_b.grad[mine]).sum()
    return stand_in * dist.get_world_size()


def by_rows(a: Any, b: Any) -> Any:
    """Row by row, without cross_entropy."""
    likeness = a @ Gathered.apply(b, "sum").T / 0.1
    right = likeness[range(len(a)), range(first_of(a), first_of(a) + len(a))]
    return (likeness.logsumexp(1) - right).mean()


# Between backward and step.


def finishes(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    return norm


def clips_by_hand(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = sum(p.grad.square().sum() for p in model.parameters()) ** 0.5
    for parameter in model.parameters():
        parameter.grad *= min(1.0, float(limit / norm))
    scaler.step(optimizer)
    scaler.update()
    return norm.item()


def clips_scaled(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    """Clips scaled gradients to a scaled limit: the same."""
    scale = scaler.get_scale()
    norm = clip_grad_norm_(model.parameters(), limit * scale) / scale
    scaler.step(optimizer)
    scaler.update()
    return norm


def looks_itself(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    """Does without unscale_ and step."""
    for parameter in model.parameters():
        parameter.grad /= scaler.get_scale()
    norm = clip_grad_norm_(model.parameters(), limit)
    if norm.isfinite():
        optimizer.step()
    else:
        scaler.update(scaler.get_scale() / 2)
    return norm


def averages_again(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    """A mean of equal gradients: needless, and right."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return finishes(model, optimizer, scaler, limit)


def clips_first(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    norm = clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    return norm / 1024


def clips_first_and_says_so(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scale = scaler.get_scale()
    norm = clip_grad_norm_(model.parameters(), limit * scale)
    scaler.step(optimizer)
    scaler.update()
    return norm


def never_clips(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), math.inf)
    scaler.step(optimizer)
    scaler.update()
    return norm


def clips_afterwards(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return clip_grad_norm_(model.parameters(), limit)


def steps_anyway(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    scaler.update()
    return norm


def never_updates(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    return norm


def leaves_at_an_inf(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scale = scaler.get_scale()
    norm = clip_grad_norm_(model.parameters(), limit * scale) / scale
    if norm.isfinite():
        scaler.step(optimizer)
        scaler.update()
    return norm


def only_on_rank_0(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), limit if dist.get_rank() == 0 else 1e9)
    scaler.step(optimizer)
    scaler.update()
    return norm


def clips_values(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    clip_grad_value_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    return limit


def clips_each(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = max(clip_grad_norm_([parameter], limit) for parameter in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    return norm


def sums_again(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return finishes(model, optimizer, scaler, limit)


def returns_clipped(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    return min(finishes(model, optimizer, scaler, limit), torch.tensor(limit))


def returns_nothing(*args: Any) -> None:
    finishes(*args)


def never_steps(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), limit)
    scaler.update()
    return norm


def hides_the_inf(model: Any, optimizer: Any, scaler: Any, limit: float) -> Any:
    norm = finishes(model, optimizer, scaler, limit)
    return norm if norm.isfinite() else 0.0


# Whose inf?


def average(parameters: Any) -> None:
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def finite(parameters: Any) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in parameters)


def descend(parameters: Any, rate: float, scale: float) -> None:
    for parameter in parameters:
        parameter -= rate * parameter.grad / scale


def together(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    good = finite(parameters)
    if good:
        descend(parameters, rate, scale)
    return good


def asks_all(parameters: Any, rate: float, scale: float) -> Any:
    """Looks after the average, and asks the others nevertheless."""
    average(parameters)
    bad = torch.tensor(0.0 if finite(parameters) else 1.0)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad:
        descend(parameters, rate, scale)
    return bad == 0


def by_norm(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    norms = [p.grad.norm() for p in parameters]
    if not torch.stack(norms).sum().isfinite():
        return 0
    descend(parameters, rate, scale)
    return 1


def in_one_message(parameters: Any, rate: float, scale: float) -> Any:
    every = torch.cat([p.grad for p in parameters])
    dist.all_reduce(every)
    step = every * (rate / scale / dist.get_world_size())
    good = step.isfinite().all()
    if good:
        for parameter, part in zip(
            parameters, step.split([len(p) for p in parameters]), strict=True
        ):
            parameter.sub_(part)
    return good


def by_optimizer(parameters: Any, rate: float, scale: float) -> Any:
    for parameter in parameters:
        parameter.grad /= scale
    average(parameters)
    if finite(parameters):
        torch.optim.SGD(parameters, lr=rate).step()
        return True
    return False


def by_average_op(parameters: Any, rate: float, scale: float) -> Any:
    """Gathers instead of summing; keeps a copy, steps and takes the step back."""
    before = [p.clone() for p in parameters]
    for parameter in parameters:
        parts = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.grad)
        parameter.grad = sum(parts) / len(parts)
    descend(parameters, rate, scale)
    if all(bool(p.isfinite().all()) for p in parameters):
        return True
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
    return False


def looks_first(parameters: Any, rate: float, scale: float) -> Any:
    good = finite(parameters)
    average(parameters)
    if good:
        descend(parameters, rate, scale)
    return good


def leaves_first(parameters: Any, rate: float, scale: float) -> Any:
    return together(parameters, rate, scale) if finite(parameters) else False


def asks_before(parameters: Any, rate: float, scale: float) -> Any:
    """Misses what overflows in the sum."""
    bad = torch.tensor(0.0 if finite(parameters) else 1.0)
    dist.all_reduce(bad)
    if bad:
        return False
    average(parameters)
    descend(parameters, rate, scale)
    return True


def only_inf(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    good = not any(p.grad.isinf().any() for p in parameters)
    if good:
        descend(parameters, rate, scale)
    return good


def never_looks(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    descend(parameters, rate, scale)
    return True


def mends(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    for parameter in parameters:
        parameter.grad = parameter.grad.nan_to_num(0, 0, 0)
    descend(parameters, rate, scale)
    return True


def steps_in_between(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    for parameter in parameters:
        if not parameter.grad.isfinite().all():
            return False
        parameter -= rate * parameter.grad / scale
    return True


def forgets_the_scale(parameters: Any, rate: float, scale: float) -> Any:
    return together(parameters, rate, 1.0)


def forgets_to_divide(parameters: Any, rate: float, scale: float) -> Any:
    return together(parameters, rate, scale / dist.get_world_size())


def scales_twice(parameters: Any, rate: float, scale: float) -> Any:
    return together(parameters, rate, scale * scale)


def climbs(parameters: Any, rate: float, scale: float) -> Any:
    return together(parameters, -rate, scale)


def by_itself(parameters: Any, rate: float, scale: float) -> Any:
    good = finite(parameters)
    if good:
        descend(parameters, rate, scale)
    return good


def always_skips(parameters: Any, rate: float, scale: float) -> Any:
    average(parameters)
    return False


def returns_the_opposite(*args: Any) -> Any:
    return not together(*args)


def tells_nothing(*args: Any) -> None:
    together(*args)


RIGHT: list[tuple[Any, Any]] = [
    (check_accumulate, accumulates),
    (check_accumulate, answers.mixed(scales_afterwards, as_one_batch, by_hand)),
    (check_accumulate, answers.mixed(accumulates, picks_labelled, weighs_means)),
    (check_accumulate, answers.mixed(answers.Called(accumulates), gathers_counts, accumulates)),
    (check_pair_loss, pairs),
    (check_pair_loss, answers.mixed(whole_loss, by_gradients, by_library)),
    (check_pair_loss, answers.mixed(by_rows, whole_loss, whole_loss_put_back)),
    (check_pair_loss, answers.mixed(by_library, answers.Called(pairs), by_gradients)),
    (check_finish_step, finishes),
    (check_finish_step, clips_by_hand),
    (check_finish_step, clips_scaled),
    (check_finish_step, looks_itself),
    (check_finish_step, averages_again),
    (check_finish_step, partial(answers.decorated(finishes))),
    (check_step_together, together),
    (check_step_together, asks_all),
    (check_step_together, by_norm),
    (check_step_together, in_one_message),
    (check_step_together, by_optimizer),
    (check_step_together, by_average_op),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_accumulate, mean_of_means, "rank 0: 1, 6; rank 1: 2, 3: .*mean of the micro-batches'"),
    (check_accumulate, sum_of_means, "sum of the micro-batches' means.*Weigh"),
    (check_accumulate, counts_itself, "each rank has the mean over its own labels"),
    (check_accumulate, counts_each_pass, "each pass has the mean over all ranks"),
    (check_accumulate, forgets_ddp, "0.50 times the right one.*make up for that"),
    (check_accumulate, sums, "6.00 times the right one.*divide by the total once"),
    (check_accumulate, divides_by_k_too, "0.50 times the right one"),
    (check_accumulate, counts_all_labels, "labels of -100 were counted, too"),
    (check_accumulate, weighs_by_samples, "not that of the mean over all labels"),
    (check_accumulate, clears, "only the last micro-batch"),
    (check_accumulate, clears_at_the_end, "there is no gradient.*clear nothing"),
    (check_accumulate, steps, "there is no gradient.*Take no optimizer step"),
    (check_accumulate, sends_each, "was sent 7 times in 4 steps.*no_sync"),
    (check_accumulate, only_backward_inside, "was sent 7 times in 4 steps.*forward decides"),
    (check_accumulate, never_sends, "the ranks have different gradients.*outside of `no_sync"),
    (check_accumulate, skips_what_is_empty, "All ranks must make the same calls"),
    (check_accumulate, by_mask, "rank 0: 3, 0.*the gradient is nan.*sum over nothing is 0"),
    (check_accumulate, lambda *args: print(args), "there is no gradient"),
    (check_accumulate, answers.recurses, "RecursionError"),
    (check_pair_loss, contrast, "3 pairs on each of 2 ranks: each rank compared only its own"),
    (check_pair_loss, lambda a, b: contrast(a, torch.cat(plain_gather(b)), first_of(a)), "stops"),
    (check_pair_loss, lambda a, b: contrast(a, put_back(b), first_of(a)), "never reach this rank"),
    (check_pair_loss, lambda a, b: contrast(put_back(a), put_back(b)), "0.50 times the right one"),
    (check_pair_loss, partial(pairs, how="mine"), "never reach this rank"),
    (check_pair_loss, partial(pairs, how="mean"), "not that of all pairs"),
    (check_pair_loss, lambda a, b: whole_loss(a, b) * 2, "2.00 times the right one"),
    (check_pair_loss, lambda a, b: contrast(a, Gathered.apply(b, "sum")), "in another column"),
    (
        check_pair_loss,
        lambda a, b: contrast(a, Gathered.apply(b, "sum"), first_of(a), 1.0),
        "not divided by 0.1",
    ),
    (check_pair_loss, lambda a, b: contrast(a, b, 0, 1.0), "not divided by 0.1"),
    (
        check_pair_loss,
        lambda a, b: contrast(torch.cat(plain_gather(a)), torch.cat(plain_gather(b))),
        "has no history",
    ),
    (check_pair_loss, lambda a, b: contrast(b, Gathered.apply(a, "sum"), first_of(a)), "not that"),
    (check_pair_loss, lambda a, b: pairs(a, b).item(), "AttributeError"),
    (check_pair_loss, answers.prints(pairs), "Is `return` missing"),
    (check_pair_loss, lambda a, b: pairs(a, b).detach(), "has no history"),
    (
        check_pair_loss,
        lambda a, b: pairs(a, b) if dist.get_rank() else contrast(a, b),
        "All ranks must make the same calls",
    ),
    (check_finish_step, clips_first, "step 0: the step is far too short.*unscale_"),
    (check_finish_step, clips_first_and_says_so, "you returned .*1,024 times too large"),
    (check_finish_step, never_clips, "step 0: .*as if nothing were clipped"),
    (check_finish_step, clips_afterwards, "step 0: .*as if nothing were clipped"),
    (check_finish_step, steps_anyway, "step 2, in which rank 1 has an inf: the weights are nan"),
    (
        check_finish_step,
        never_updates,
        "`unscale_` came twice, or after.*`scaler.update..` ends each",
    ),
    (check_finish_step, leaves_at_an_inf, "step 2, .*the scale stayed at 1024"),
    (check_finish_step, only_on_rank_0, "the ranks have different weights.*on all"),
    (check_finish_step, clips_values, "step 0: the weights are not those of one process"),
    (check_finish_step, clips_each, "step 0: the weights are not those of one process"),
    (check_finish_step, sums_again, "step 0: you returned .*the norm of the averaged gradient is"),
    (check_finish_step, returns_clipped, "step 0: you returned 1, 1; .*before clipping"),
    (check_finish_step, returns_nothing, "you returned None, None.*a number"),
    (check_finish_step, never_steps, "the weights did not change"),
    (check_finish_step, hides_the_inf, "step 2, .*you returned 0, 0.*was skipped"),
    (check_finish_step, answers.prints(finishes), "you returned None, None"),
    (check_finish_step, lambda model: 1, "failed on real ranks.*TypeError"),
    (check_step_together, looks_first, "rank 1 has an inf: rank 0 took the step, and the other"),
    (check_step_together, leaves_first, "on 2 ranks: .*decided by its own gradients"),
    (check_step_together, asks_before, "their sum is not: all ranks took the step.*can overflow"),
    (check_step_together, only_inf, "rank 0 has a nan: all ranks took the step.*isfinite"),
    (check_step_together, never_looks, "rank 1 has an inf: all ranks took the step"),
    (check_step_together, mends, "rank 1 has an inf: all ranks took the step.*mend nothing"),
    (check_step_together, steps_in_between, "all ranks took the step.*before the first weight"),
    (check_step_together, forgets_the_scale, "finite: the step is too long by the scale"),
    (check_step_together, forgets_to_divide, "the step is 2 times the right one"),
    (check_step_together, scales_twice, "the step is 0.000977 times the right one"),
    (check_step_together, climbs, "the step is -1 times the right one.*away from"),
    (check_step_together, by_itself, "a step with its own gradient.*Nothing was averaged"),
    (check_step_together, always_skips, "no rank took the step"),
    (check_step_together, returns_the_opposite, "weights are right, and you returned False"),
    (check_step_together, tells_nothing, "you returned None.*Return True"),
    (check_step_together, answers.recurses, "RecursionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
