"""The checks of lesson 18: right answers pass, and wrong ones are explained."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ddp_lessons.exercises.honest_metrics import check_auc, check_keep_best
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def auc(scores: Any, positive: Any, tie: float = 0.5) -> Any:
    gaps = scores[positive][:, None] - scores[~positive]
    return ((gaps > 0).double() + (gaps == 0).double() * tie).mean()


def gathered(value: Any) -> list[Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def together(scores: Any, positive: Any) -> tuple[Any, Any]:
    parts = zip(*gathered((scores, positive)), strict=True)
    all_scores, all_positive = (torch.cat(part) for part in parts)
    return all_scores, all_positive


def summed(value: Any) -> Any:
    total = torch.as_tensor(value, dtype=torch.double).clone()
    dist.all_reduce(total)
    return total


# An AUC over all ranks.


def by_objects(scores: Any, positive: Any) -> Any:
    return auc(*together(scores, positive)).item()


def by_padding(scores: Any, positive: Any, cut: bool = True) -> Any:
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(scores)]))
    longest = int(max(sizes))
    both = torch.stack([pad(x.double(), (0, longest - len(x))) for x in (scores, positive)])
    parts = [torch.empty_like(both) for _ in sizes]
    dist.all_gather(parts, both)
    kept = [part[:, : int(n) if cut else longest] for part, n in zip(parts, sizes, strict=True)]
    all_scores, all_positive = torch.cat(kept, 1)
    return auc(all_scores, all_positive == 1)


def by_ranks_of_scores(scores: Any, positive: Any) -> Any:
    """Mann and Whitney's way, with mean ranks for ties."""
    scores, positive = together(scores, positive)
    below = (scores[None] < scores[:, None]).sum(1) + (scores[None] == scores[:, None]).sum(1) / 2
    n, others = positive.sum(), (~positive).sum()
    return float((below[positive].sum() - n * n / 2) / (n * others))


def by_pairs_with_all(scores: Any, positive: Any) -> Any:
    """Each rank compares its positives with all negatives; then counts are added."""
    negatives = torch.cat(gathered(scores[~positive]))
    gaps = scores[positive][:, None] - negatives
    wins, pairs = summed([float(((gaps > 0) + (gaps == 0) / 2).sum()), float(gaps.numel())])
    return wins / pairs


def by_rank_0(scores: Any, positive: Any) -> Any:
    parts = together(scores, positive)
    answer = auc(*parts) if dist.get_rank() == 0 else torch.zeros(()).double()
    dist.broadcast(answer, src=0)
    return answer.numpy()


def by_curve(scores: Any, positive: Any) -> Any:
    """The area under the curve itself, from threshold to threshold."""
    scores, positive = together(scores, positive)
    area = x = y = 0.0
    for value in sorted(set(scores.tolist()), reverse=True):
        found = (scores == value) & positive
        right, up = ((scores == value) & ~positive).sum() / (~positive).sum(), found.sum()
        step = float(up / positive.sum())
        area += float(right) * (y + step / 2)
        x, y = x + float(right), y + step
    return area


def own(scores: Any, positive: Any) -> Any:
    return auc(scores, positive).item()


def mean_of_ranks(scores: Any, positive: Any) -> Any:
    return summed(auc(scores, positive)) / dist.get_world_size()


def nanmean(scores: Any, positive: Any) -> Any:
    return torch.stack(gathered(auc(scores, positive))).nanmean()


def nan_as_0(scores: Any, positive: Any) -> Any:
    return summed(auc(scores, positive).nan_to_num(0)) / dist.get_world_size()


def weighted(scores: Any, positive: Any) -> Any:
    value = auc(scores, positive).nan_to_num(0)
    total = summed([float(value) * len(scores), float(len(scores) * len(positive.unique()) > 1)])
    return total[0] / summed(len(scores))


def weighted_by_pairs(scores: Any, positive: Any) -> Any:
    pairs = float(positive.sum() * (~positive).sum())
    return summed(float(auc(scores, positive).nan_to_num(0)) * pairs) / summed(pairs)


def plain_all_gather(scores: Any, positive: Any) -> Any:
    parts = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, scores)
    labels = [torch.empty_like(positive) for _ in parts]
    dist.all_gather(labels, positive)
    return auc(torch.cat(parts), torch.cat(labels))


def turned_round(scores: Any, positive: Any) -> Any:
    return 1 - by_objects(scores, positive)


def only_on_rank_0(scores: Any, positive: Any) -> Any:
    answer = by_objects(scores, positive)
    return answer if dist.get_rank() == 0 else None


def gathers_to_rank_0(scores: Any, positive: Any) -> Any:
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((scores, positive), parts, dst=0)
    if parts is None:
        return math.nan
    return auc(*(torch.cat(part) for part in zip(*parts, strict=True)))


def leaves_if_empty(scores: Any, positive: Any) -> Any:
    return by_objects(scores, positive) if len(scores) else 0.0


def leaves_without_positives(scores: Any, positive: Any) -> Any:
    return by_objects(scores, positive) if positive.any() else 0.0


def forgets_labels(scores: Any, positive: Any) -> Any:
    """Takes the others' samples for negatives."""
    labels = [len(p) * [False] for p in gathered(positive.tolist())]
    labels[dist.get_rank()] = positive.tolist()
    return auc(torch.cat(gathered(scores)), torch.tensor([x for own in labels for x in own]))


def sorts_scores(scores: Any, positive: Any) -> Any:
    scores, positive = together(scores, positive)
    return auc(scores.sort(descending=True).values, positive)


def accuracy(scores: Any, positive: Any) -> Any:
    scores, positive = together(scores, positive)
    return ((scores > 0) == positive).double().mean()


def counts_pairs(scores: Any, positive: Any) -> Any:
    scores, positive = together(scores, positive)
    return (scores[positive][:, None] > scores[~positive]).sum()


# The best epoch.


def keeps(
    epoch: Any,
    save: Any,
    most: int,
    patience: int,
    *,
    loss_of: Any = lambda total: float(total[0] / total[1]),
) -> Any:
    best, best_epoch = math.inf, 0
    for n in range(most):
        loss = loss_of(summed(epoch(n)))
        if loss < best:
            best, best_epoch = loss, n
            save(n)
        elif n - best_epoch >= patience:
            return n + 1
    return most


def by_sums(*args: Any) -> Any:
    """All epochs have the same samples, so their number does not matter."""
    return keeps(*args, loss_of=lambda total: float(total[0]))


def by_history(epoch: Any, save: Any, most: int, patience: int) -> Any:
    history: list[float] = []
    while len(history) < most:
        total, number = zip(*gathered(epoch(len(history))), strict=True)
        history.append(sum(total) / sum(number))
        if history[-1] < min(history[:-1], default=math.inf):
            save(len(history) - 1)
        if len(history) > patience and min(history[-patience:]) >= min(history[:-patience]):
            break
    return len(history)


def rank_0_decides(epoch: Any, save: Any, most: int, patience: int) -> Any:
    """By the common loss, and tells the others."""
    best, bad = math.inf, 0
    for n in range(most):
        total = torch.tensor(epoch(n), dtype=torch.double)
        dist.reduce(total, dst=0)
        flag = torch.zeros(1)
        if dist.get_rank() == 0 and total[0] / total[1] < best:
            best, flag = float(total[0] / total[1]), torch.ones(1)
        dist.broadcast(flag, src=0)
        bad = 0 if flag else bad + 1
        if flag:
            save(n)
        if bad == patience:
            return torch.tensor(n + 1)
    return most


def by_count_down(epoch: Any, save: Any, most: int, patience: int) -> Any:
    best, left, n = None, patience, 0
    while n < most and left:
        number, samples = summed(epoch(n)).tolist()
        is_best = best is None or number / samples < best
        if is_best:
            best = number / samples
            save(n)
        left = patience if is_best else left - 1
        n += 1
    return n


class Keeper:
    """An object with a state that is called."""

    def __call__(self, epoch: Any, save: Any, most: int, patience: int) -> Any:
        self.best, self.since = torch.tensor(math.inf), 0
        for n in range(most):
            self.since += 1
            loss = torch.stack([torch.tensor(x).float() for x in gathered(epoch(n))]).sum(0)
            if loss[0] / loss[1] < self.best:
                self.best, self.since = loss[0] / loss[1], 0
                save(n)
            if self.since >= patience:
                break
        return n + 1


def by_own_loss(epoch: Any, save: Any, most: int, patience: int) -> Any:
    best, best_epoch = math.inf, 0
    for n in range(most):
        total, number = epoch(n)
        if total / max(number, 1) < best:
            best, best_epoch = total / max(number, 1), n
            save(n)
        elif n - best_epoch >= patience:
            return n + 1
    return most


def told(
    epoch: Any,
    save: Any,
    most: int,
    patience: int,
    loss_of: Any,
    late: int = 0,
    equal: bool = False,
) -> Any:
    """Decides by what `loss_of` makes of the means of all ranks."""
    best, best_epoch = math.inf, 0
    for n in range(most):
        means = [total / number for total, number in gathered(epoch(n)) if number]
        loss = loss_of(means)
        if loss < best or (equal and loss == best):
            best, best_epoch = loss, n
            save(n)
        elif n - best_epoch >= patience + late:
            return n + 1
    return most


def divides_by_own(epoch: Any, save: Any, most: int, patience: int) -> Any:
    return keeps(
        lambda n: (lambda total, number: (total / number, 1.0))(*epoch(n)), save, most, patience
    )


def nan_means(epoch: Any, save: Any, most: int, patience: int) -> Any:
    def mean(n: int) -> Any:
        total, number = epoch(n)
        return torch.tensor(total) / number, 1.0

    return keeps(mean, save, most, patience)


def saves_on_rank_0(epoch: Any, save: Any, most: int, patience: int) -> Any:
    return keeps(epoch, save if dist.get_rank() == 0 else lambda n: None, most, patience)


def loop(
    epoch: Any,
    save: Any,
    most: int,
    patience: int,
    better: Any = lambda loss, best: loss < best,
    more: int = 0,
    resets: bool = True,
    answer: Any = lambda n, best_epoch: n + 1,
) -> Any:
    best, best_epoch, bad = math.inf, 0, 0
    for n in range(most):
        total = summed(epoch(n))
        loss = float(total[0] / total[1])
        if better(loss, best):
            best, best_epoch, bad = min(loss, best), n, 0 if resets else bad
            save(n)
        else:
            bad += 1
        if bad >= patience + more:
            break
    return answer(n, best_epoch)


def never_stops(epoch: Any, save: Any, most: int, patience: int) -> Any:
    return loop(epoch, save, most, 10 * most)


def saves_last(epoch: Any, save: Any, most: int, patience: int) -> Any:
    answer: int = keeps(epoch, lambda n: None, most, patience)
    save(answer - 1)
    return answer


def trains_twice(epoch: Any, save: Any, most: int, patience: int) -> Any:
    return keeps(lambda n: (epoch(n), epoch(n))[1], save, most, patience)


def counts_from_1(epoch: Any, save: Any, most: int, patience: int) -> Any:
    return keeps(lambda n: epoch(n + 1), save, most, patience)


def asks_only_if_worse(epoch: Any, save: Any, most: int, patience: int) -> Any:
    """A collective under an `if` that each rank decides for itself."""
    best = math.inf
    for n in range(most):
        total, number = epoch(n)
        mean = total / max(number, 1)
        if mean < best:
            best = mean
            save(n)
        elif summed(1.0) >= dist.get_world_size():
            return n + 1
    return most


RIGHT: list[tuple[Any, Any]] = [
    (check_auc, by_objects),
    (check_auc, answers.mixed(by_padding, by_curve, by_pairs_with_all)),
    (check_auc, answers.mixed(by_rank_0, answers.Called(by_objects), by_ranks_of_scores)),
    (check_keep_best, keeps),
    (check_keep_best, answers.mixed(by_history, answers.decorated(loop), rank_0_decides)),
    (check_keep_best, answers.mixed(by_count_down, by_sums, Keeper())),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_auc, own, "rank 0: 3\\+ 1- .* of all is 0.875, and you returned 1, 0.5.*its own"),
    (check_auc, mean_of_ranks, "returned 0.75, 0.75.*a mean of the ranks' own AUCs"),
    (check_auc, nanmean, "a mean of the ranks' own AUCs.*Gather scores"),
    (check_auc, nan_as_0, "a mean of the ranks' own AUCs"),
    (check_auc, weighted, "a mean of the ranks' own AUCs"),
    (check_auc, weighted_by_pairs, "a mean of the ranks' own AUCs.*on two ranks"),
    (check_auc, plain_all_gather, "on 2 ranks, `all_gather` met tensors of different sizes"),
    (check_auc, partial(by_padding, cut=False), "Padding was counted as samples.*cut each"),
    (check_auc, turned_round, "share of pairs in which the .negative. is above"),
    (check_auc, only_on_rank_0, "returned 0.875, None.*on every rank"),
    (check_auc, gathers_to_rank_0, "returned 0.875, nan"),
    (check_auc, leaves_if_empty, "on 2 ranks, .*also a rank without samples or without positives"),
    (check_auc, leaves_without_positives, "returned 0.5417, 0.*The ranks found different numbers"),
    (check_auc, forgets_labels, "The ranks found different numbers.*with their labels"),
    (check_auc, sorts_scores, "in the same order"),
    (check_auc, accuracy, "The AUC is the share"),
    (check_auc, counts_pairs, "returned 14, 14.*The AUC is the share"),
    (check_auc, lambda s, p: auc(*together(s, p), tie=0.0), "A tie, .* counts half"),
    (check_auc, lambda s, p: auc(*together(s, p), tie=1.0), "A tie, .* counts half"),
    (check_auc, answers.prints(by_objects), "returned None, None.*Return one number"),
    (check_auc, answers.recurses, "RecursionError"),
    (check_keep_best, by_own_loss, "Each rank decided by a loss of its own|decided something"),
    (
        check_keep_best,
        partial(told, loss_of=lambda means: means[0]),
        "rank 0: 30, 24, .*of 30 samples each.*saved .0, 1., .*by rank 0's samples",
    ),
    (
        check_keep_best,
        partial(told, loss_of=lambda means: sum(means) / len(means)),
        "saved .0, 2., trained 5 epochs.*mean of the ranks' means",
    ),
    (check_keep_best, partial(told, loss_of=max), "by the worst rank, or by the best"),
    (check_keep_best, partial(told, loss_of=min), "by the worst rank, or by the best"),
    (check_keep_best, divides_by_own, "mean of the ranks' means"),
    (check_keep_best, nan_means, "mean of the ranks' means"),
    (check_keep_best, saves_on_rank_0, "decided something for itself|loss of its own"),
    (check_keep_best, asks_only_if_worse, "decided something for itself"),
    (
        check_keep_best,
        partial(loop, better=lambda loss, best: loss <= best),
        "An epoch that is as good as the best is not better",
    ),
    (check_keep_best, partial(loop, better=lambda loss, best: True), "Every epoch was saved"),
    (check_keep_best, partial(loop, better=lambda loss, best: False), "Nothing was saved"),
    (check_keep_best, partial(loop, more=1), "patience 2: .*after the wrong one.*2 epochs in a"),
    (check_keep_best, partial(loop, more=-1), "ended after the wrong one"),
    (check_keep_best, partial(loop, resets=False), "a new best starts the count again"),
    (check_keep_best, never_stops, "trained 8 epochs.*ended after the wrong one"),
    (check_keep_best, partial(loop, answer=lambda n, best: n), "returned 5, 5.*how many epochs"),
    (check_keep_best, partial(loop, answer=lambda n, best: best), "and returned 3, 3"),
    (check_keep_best, saves_last, "by the mean over all samples it is"),
    (check_keep_best, trains_twice, "in the order .0, 0, 1, 1.*once for each n"),
    (check_keep_best, counts_from_1, "in the order .1, 2|beyond the last epoch"),
    (check_keep_best, answers.prints(keeps), "returned None"),
    (check_keep_best, answers.recurses, "RecursionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
