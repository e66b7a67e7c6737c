"""The checks of lesson 18: an AUC over ranks of unequal size, and the best epoch kept together."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ddp_lessons import Run, WorkerDied
from ddp_lessons.exercises.framework import (
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import number_or_text
from ddp_lessons.text import count, ranks_text

Part = tuple[tuple[float, ...], tuple[bool, ...]]  # one rank's scores, and which are positive
Parts = tuple[Part, ...]

T, F = True, False
SCORED: tuple[tuple[Parts, ...], ...] = (  # cases of one launch have the same number of ranks
    (
        (((3, 1, 1.5, 8, -1), (T, F, F, T, F)), ((4, 7, 2), (F, T, T))),
        (((2, -1, 6, 4), (T, T, F, T)), ((1, -3), (F, F))),
        (((), ()), ((-1, 2, 1), (F, T, F))),
        (((2, 2, -1), (T, F, T)), ((2, -1, -1, 3), (F, F, T, F))),
        (((-3, -5, -4), (T, F, F)), ((-2, -6), (F, T))),
    ),
    ((((1, 4, 2, 9), (F, T, F, T)), ((3,), (T,)), ((8, 5), (F, F))),),
    ((((5, 2, 4, 1, 2), (T, F, F, T, T)),),),
)


# An AUC over all ranks.


@in_group
def _scored(rank: int, auc: Callable[..., Any], cases: tuple[Parts, ...]) -> list[float | str]:
    found = []
    for parts in cases:
        answer = auc(*_tensors(parts[rank]))
        found.append(math.nan if _is_nan(answer) else number_or_text(answer))
    return found


def _is_nan(answer: Any) -> bool:
    try:
        return math.isnan(answer)
    except (TypeError, ValueError, RuntimeError):
        return False


def _tensors(part: Part) -> tuple[Tensor, Tensor]:
    return torch.tensor(part[0], dtype=torch.float32), torch.tensor(part[1], dtype=torch.bool)


@exercise(
    "A positive of one rank is compared with the negatives of all. Which ranks have the scores?",
    "`all_gather` wants equal shapes: gather the sizes first, pad to the longest, and cut the "
    "padding off again. Or let `all_gather_object` do that.",
    "`parts = [None] * dist.get_world_size()`, `dist.all_gather_object(parts, (scores, "
    "is_positive))`, then `torch.cat` the scores and the labels, and `auc` of both.",
)
def check_auc(auc: Callable[..., Any]) -> str:
    """Check `auc(scores, is_positive)`: on every rank, the AUC over the samples of all ranks."""
    for cases in SCORED:
        run = run_ranks(_scored, (auc, cases), nprocs=len(cases[0]), check=False)
        _explain_gather(len(cases[0]), run)
        for case, parts in enumerate(cases):
            _judge_auc(parts, [value[case] for value in run.values])
    return "the AUC of one process, on every rank, in 7 cases on 1, 2 and 3 ranks."


def _explain_gather(ranks: int, run: Run) -> None:
    if run.ok:
        return
    said = " ".join(error.summary for error in errors(run))
    mistakes = {
        "`all_gather` met tensors of different sizes.\nIt wants one shape on all ranks. Gather the "
        "sizes first and pad to the longest, or take `all_gather_object`.": (
            "invalid tensor size" in said or "do not match" in run.explain()
        ),
        f"{run.explain().splitlines()[0]}\nAll ranks must make the same calls in the same order, "
        "also a rank without samples or without positives.": stuck(run)
        or isinstance(run.error, WorkerDied),
    }
    judge(f"on {count(ranks, 'rank')}, ", mistakes)
    run.raise_for_failure()


def _auc(scores: Tensor, positive: Tensor, tie: float = 0.5) -> float:
    gaps = scores[positive][:, None] - scores[~positive]
    return float(((gaps > 0).double() + (gaps == 0).double() * tie).mean())


def _together(parts: Parts) -> tuple[Tensor, Tensor]:
    scores, positive = zip(*map(_tensors, parts), strict=True)
    return torch.cat(scores), torch.cat(positive)


def _padded(parts: Parts) -> tuple[Tensor, Tensor]:
    """All parts, filled up to the longest with zeros, as if these were samples."""
    longest = max(len(scores) for scores, _ in parts)
    filled = [[pad(t, (0, longest - len(t))) for t in _tensors(part)] for part in parts]
    scores, positive = zip(*filled, strict=True)
    return torch.cat(scores), torch.cat(positive)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """A weighted mean of the values that are not nan."""
    kept = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    total = sum(w for _, w in kept)
    return sum(v * w for v, w in kept) / total if total else math.nan


def _judge_auc(parts: Parts, found: list[float | str]) -> None:
    truth = _auc(*_together(parts))
    if all(_near(value, truth) for value in found):
        return
    own = [_auc(*_tensors(part)) for part in parts]
    sizes = [len(scores) for scores, _ in parts]
    pairs = [sum(positive) * (len(positive) - sum(positive)) for _, positive in parts]
    means = [_mean(own, weights) for weights in ([1] * len(own), sizes, pairs)]
    zeros = sum(0 if math.isnan(value) else value for value in own) / len(own)
    several, first = len(parts) > 1, found[0]
    shown = ", ".join(v if isinstance(v, str) else f"{v:.4g}" for v in found)
    mistakes = {
        "Return one number, on every rank: the others decide by it, too.": any(
            isinstance(value, str) for value in found
        ),
        "Some rank has no positive or no negative, so its own AUC is 0 / 0, and `all_reduce` takes "
        "the nan to all. Put the samples together before you divide.": any(map(_is_nan, found)),
        "Each rank compared its own samples only. A positive must be compared with the negatives "
        "of all ranks.": several and all(map(_near, found, own)),
        "That is a mean of the ranks' own AUCs. However you weigh it, it knows nothing of pairs "
        "whose samples are on two ranks. Gather scores and "
        "labels.": several and any(_near(first, mean) for mean in (*means, zeros)),
        "Padding was counted as samples. After gathering, cut each part to its own size.": _near(
            first, _auc(*_padded(parts))
        ),
        "A tie, a positive and a negative with the same score, counts half.": any(
            _near(first, _auc(*_together(parts), tie)) for tie in (0, 1)
        ),
        "That is the share of pairs in which the *negative* is above. Turn it round.": _near(
            first, 1 - truth
        ),
        "The ranks found different numbers. Each must have the scores of all ranks, with their "
        "labels.": any(value != first for value in found),
        "The AUC is the share, of all pairs of a positive and a negative, in which the positive "
        "has the higher score. Gather scores and labels in the same order.": True,
    }
    judge(f"{_told(parts)}: the AUC of all is {truth:.4g}, and you returned {shown}.", mistakes)


def _near(value: object, target: float) -> bool:
    return isinstance(value, float | int) and abs(value - target) < 1e-6


def _told(parts: Parts) -> str:
    """`rank 0: 2+ 1-; rank 1: none`, with the positives as +."""
    each = (
        " ".join(f"{s}{'+' if p else '-'}" for s, p in zip(*part, strict=True)) or "none"
        for part in parts
    )
    return "; ".join(f"rank {rank}: {scores}" for rank, scores in enumerate(each))


# The best epoch, kept together.

Sums = tuple[tuple[float, ...], ...]  # of losses, by rank and epoch


class _Training(NamedTuple):
    counts: tuple[int, ...]  # samples of each rank
    sums: Sums
    most: int
    patience: int


KEPT: tuple[tuple[_Training, ...], ...] = (
    (
        _Training(
            (30, 10),
            ((30, 24, 36, 24, 27, 24, 15, 3), (20, 30, 4, 12, 11, 12, 5, 1)),
            most=8,
            patience=2,
        ),
        _Training((4, 4), ((8, 6, 7, 5, 4), (8, 7, 7, 6, 6)), most=5, patience=1),
        _Training((4, 2), ((8, 6, 4), (4, 2, 1)), most=3, patience=2),
    ),
    (
        _Training(
            (2, 0, 4),
            (
                (10, 20, 7, 12, 1, 8, 15, 9, 2, 1),
                (0,) * 10,
                (20, 16, 17, 18, 17, 16, 15, 27, 3, 2),
            ),
            most=10,
            patience=3,
        ),
    ),
    (_Training((5,), ((10, 8, 9, 8, 7, 7, 7, 1),), most=8, patience=2),),
)


class _Kept(NamedTuple):
    """What a rank did in one training run."""

    trained: list[int]
    saved: list[int]
    answer: float | str


@in_group
def _keeps(rank: int, train: Callable[..., Any], trainings: tuple[_Training, ...]) -> list[_Kept]:
    found = []
    for training in trainings:
        trained: list[int] = []
        saved: list[int] = []

        def epoch(
            n: int, own: _Training = training, trained: list[int] = trained
        ) -> tuple[float, int]:
            dist.barrier()
            if n >= own.most:
                raise IndexError(f"epoch({n}) was called, and there are at most {own.most} epochs")
            trained.append(n)
            return float(own.sums[rank][n]), own.counts[rank]

        def save(n: int, saved: list[int] = saved) -> None:
            dist.barrier()
            saved.append(n)

        answer = train(epoch, save, training.most, training.patience)
        is_bool = isinstance(answer, bool)  # no count, though Python takes it for a number
        found.append(_Kept(trained, saved, repr(answer) if is_bool else number_or_text(answer)))
        dist.barrier()
    return found


@exercise(
    "By which loss do you decide? Add up sums and counts of all ranks, in every epoch, and divide.",
    "After that all ranks have the same loss, and each can decide by itself: is it below the best? "
    "If not, how many epochs ago was the best?",
    "`total = torch.tensor(epoch(n), dtype=torch.double)`, `dist.all_reduce(total)`, "
    "`loss = total[0] / total[1]`; then `if loss < best: best, best_epoch = loss, n; save(n)`, "
    "`elif n - best_epoch >= patience: break`.",
)
def check_keep_best(train: Callable[..., Any]) -> str:
    """Check `train(epoch, save, most, patience)`: all ranks save and stop alike, and rightly."""
    for trainings in KEPT:
        ranks = len(trainings[0].counts)
        run = run_ranks(_keeps, (train, trainings), nprocs=ranks, check=False)
        _explain_stuck(ranks, run)
        for case, training in enumerate(trainings):
            _judge_kept(training, [value[case] for value in run.values])
    return "all ranks save the same epochs and stop together, in 5 runs on 1, 2 and 3 ranks."


def _explain_stuck(ranks: int, run: Run) -> None:
    if run.ok:
        return
    said = " ".join(error.summary for error in errors(run))
    seen = f"on {count(ranks, 'rank')}, "
    mistakes = {
        "`epoch` was called beyond the last epoch.\nTrain epochs 0 to `most` - 1, and fewer if "
        "`patience` ends it.": "there are at most" in said,
        "a rank divided by the number of its own samples, which may be 0.\nAdd up sums and counts "
        "of all ranks first, then divide.": "ZeroDivisionError" in said,
        f"{run.explain().splitlines()[0]}\nA rank decided something for itself: to save, to stop, "
        "or to ask the others. `epoch`, `save` and what you call yourself are calls of all ranks, "
        "in the same order.": stuck(run) or isinstance(run.error, WorkerDied),
    }
    judge(seen, mistakes)
    run.raise_for_failure()


def _simulate(
    losses: Sequence[float],
    training: _Training,
    *,
    better: Callable[[float, float], bool] = operator.lt,
    more: int = 0,
    resets: bool = True,
) -> tuple[list[int], int]:
    """The saved epochs, and how many are trained, if all decide by these losses."""
    best, saved, bad = math.inf, [], 0
    for n in range(training.most):
        if better(losses[n], best):
            best, bad = losses[n], 0 if resets else bad
            saved.append(n)
        else:
            bad += 1
            if bad >= training.patience + more:
                return saved, n + 1
    return saved, training.most


def _judge_kept(training: _Training, found: list[_Kept]) -> None:
    truth = [sum(own) / sum(training.counts) for own in zip(*training.sums, strict=True)]
    right = _simulate(truth, training)
    if all((k.saved, len(k.trained), k.answer) == (*right, right[1]) for k in found):
        return
    means = [
        [s / n if n else math.nan for s in own]
        for own, n in zip(training.sums, training.counts, strict=True)
    ]
    of_epochs = [[m for m in of if not math.isnan(m)] for of in zip(*means, strict=True)]
    first = found[0]
    did = (first.saved, len(first.trained))
    apart = [r for r, k in enumerate(found) if (k.saved, k.trained) != (first.saved, first.trained)]
    several = len(found) > 1
    losses = "; ".join(
        f"rank {rank}: {', '.join(map(str, own))}, of {count(n, 'sample')} each"
        for rank, (own, n) in enumerate(zip(training.sums, training.counts, strict=True))
    )
    seen = (
        f"sums of losses of {losses}; patience {training.patience}: "
        f"saved {first.saved}, trained {count(len(first.trained), 'epoch')}"
    )

    def by(losses: Sequence[float], **options: Any) -> bool:
        return did == _simulate(losses, training, **options)

    mistakes: dict[str, object] = {
        f" on rank 0, and {ranks_text(apart or [0])} did otherwise.\n"
        "Each rank decided by a loss of its own. Decide by one that all ranks have: sums "
        "and counts of all, added up.": apart,
        f", in the order {first.trained}.\nCall `epoch(n)` once for each n, from 0 "
        "on.": first.trained != list(range(len(first.trained))),
        f", and returned {', '.join(str(k.answer) for k in found)}.\nReturn how many epochs were "
        "trained, on every rank.": did == right,
        ".\nNothing was saved. An epoch below the best so far is to be saved; the first always "
        "is. With nan, no comparison is true.": not first.saved,
        ".\nThat is the decision by rank 0's samples. The others' samples count as much.": several
        and by(means[0]),
        ".\nThat is the decision by a mean of the ranks' means. A rank with few samples counts as "
        "much as one with many: add up sums and counts.": several
        and by([sum(m) / len(m) for m in of_epochs]),
        ".\nThat is the decision by the worst rank, or by the best one. Decide by the mean over "
        "all samples.": several and any(by([f(m) for m in of_epochs]) for f in (min, max)),
        ".\nAn epoch that is as good as the best is not better: save only below it.": by(
            truth, better=operator.le
        ),
        ".\nEvery epoch was saved. Save only one that is below the best so far.": first.saved
        == first.trained,
        ".\nWhich epochs are the best so far is right, but the training ended after the wrong one. "
        f"Stop after {training.patience} epochs in a row without a new best; a new best starts the "
        "count again.": any(by(truth, **o) for o in ({"more": 1}, {"more": -1}, {"resets": False}))
        or first.saved == [n for n in right[0] if n < len(first.trained)],
        f", and by the mean over all samples it is: saved {right[0]}, trained {right[1]}.\nSave "
        "each new best, and stop after `patience` epochs in a row without one.": True,
    }
    judge(seen, mistakes)
