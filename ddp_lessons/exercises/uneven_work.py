"""The checks of lessons 11 and 11b: uneven batches, join's mean, flag or remove."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, WorkerDied
from ddp_lessons.diagnosis import rank_state
from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.exercises.numeric_answers import is_number, near, number
from ddp_lessons.exercises.small_training import descend, flat
from ddp_lessons.text import ranks_text

Counts = tuple[int, ...]  # batches of each rank
Batches = list[tuple[Tensor, Tensor]]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Train = Callable[[DistributedDataParallel, torch.optim.Optimizer, LossFunction, Batches], object]

RATE = 0.1
TRAINED: tuple[Counts, ...] = ((3, 4), (4, 3), (2, 2), (1, 3, 2), (3,), (0, 2))
MOVED: tuple[Counts, ...] = ((3, 4), (1, 9), (2, 2), (4, 1, 2), (5,))


def _batches(rank: int, number: int) -> Batches:
    generator = torch.Generator().manual_seed(rank)

    def draw(features: int) -> Tensor:
        return torch.randn(5, features, generator=generator, dtype=torch.double)

    return [(draw(3), draw(1)) for _ in range(number)]


def _layer() -> nn.Module:
    layer = nn.Linear(3, 1).double()
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)
    return layer


@in_group
def _trained(rank: int, train: Train, counts: Counts) -> tuple[list[int], Tensor]:
    seen: list[int] = []
    batches, layer = _batches(rank, counts[rank]), _layer()
    known = [inputs.clone() for inputs, _ in batches]
    model = DistributedDataParallel(layer)

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.extend(n for n, inputs in enumerate(known) if torch.equal(args[0], inputs))

    layer.register_forward_pre_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer, nn.functional.mse_loss, batches)
    return seen, flat(layer.parameters())


def _expected(
    counts: Counts,
    steps: int,
    initial: bool = True,
    zeroed: bool = True,
    used: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The weights after `steps` steps; with `initial`, ranks without a batch count as zeros.

    Without `zeroed`, each backward adds to the previous step's mean gradient. `used` are the
    numbers of each rank's batches in another order than theirs.
    """
    layer = _layer()
    batches = [_batches(rank, number) for rank, number in enumerate(counts)]
    if used:
        batches = [[of_rank[n] for n in own] for of_rank, own in zip(batches, used, strict=True)]
    for step in range(steps):
        present = [of_rank[step] for of_rank in batches if step < len(of_rank)]
        divisor = len(counts) if initial else len(present)
        if zeroed:
            layer.zero_grad()
        elif step:
            for parameter in layer.parameters():
                parameter.grad *= len(present) / divisor
        for inputs, targets in present:
            (nn.functional.mse_loss(layer(inputs), targets) / divisor).backward()
        descend(layer, RATE)
    return flat(layer.parameters())


@exercise(
    "Each backward waits for all ranks. Either one with no batch left stays and answers, or all "
    "stop with it.",
    "`with model.join():` around the loop is enough to use every batch.",
    "To trim instead, `all_reduce` the number of batches with `dist.ReduceOp.MIN` before the loop.",
)
def check_train(train: Train) -> str:
    """Check `train(model, optimizer, loss_fn, batches)`: all finish together, with equal weights.

    Ranks may use every batch, or as many as the rank with the fewest has.
    """
    trims = False
    for counts in TRAINED:
        run = run_ranks(_trained, (train, counts), nprocs=len(counts), check=False)
        if not run.ok:
            _explain_failure(counts, run)
        run.raise_for_failure()
        trims = _judge_trained(counts, run) or trims
    used = "trimmed to the shortest list" if trims else "every batch used"
    return f"all ranks finish with equal weights, for {_list(TRAINED[0])} and 5 more; {used}."


def _explain_failure(counts: Counts, run: Run) -> None:
    lonely = [rank.rank for rank in run.ranks if rank_state.waits(rank)]
    alone = f"{ranks_text(lonely)} waited for the others until the timeout.\n" if lonely else ""
    has_waited = stuck(run) and lonely
    mistakes = {
        f"{run.explain().splitlines()[0]}\n"
        "Two calls met that do not belong together. A rank that has joined answers DDP's calls "
        "only, not one of your own inside the loop.": isinstance(run.error, WorkerDied),
        f"{alone}The rank without any batch must do what the others do outside of the loop: the "
        "call that agrees on a number, or entering join.": has_waited and 0 in counts,
        f"{alone}Each backward is a call of all ranks. A rank that has no batch left must not be "
        "missed: let all stop at the same step, or let it stay and answer, as join "
        "does.": has_waited,
    }
    judge(f"ranks with {_list(counts)} batches: ", mistakes)


def _judge_trained(counts: Counts, run: Run) -> bool:
    """Whether every rank trained on as many batches as the smallest rank has."""
    used, weights = map(list, zip(*run.values, strict=True))
    once = [list(dict.fromkeys(numbers)) for numbers in used]
    lengths = tuple(map(len, once))
    trims = lengths == (min(counts),) * len(counts)
    if trims or lengths == counts:
        ways = [_expected(counts, max(lengths), way, used=once) for way in (True, False)]
        if all(torch.equal(weights[0], other) for other in weights) and any(
            _near(weights[0], way) for way in ways
        ):
            return trims and lengths != counts
    _explain_training(counts, used, weights)
    return False


def _explain_training(counts: Counts, used: list[list[int]], weights: list[Tensor]) -> None:
    most, least, ends = max(counts), min(counts), weights[0]
    are_apart = any(not torch.equal(ends, other) for other in weights)
    alone = [_expected((0,) * r + (n,), n, initial=False) for r, n in enumerate(counts)]
    ways = ((most, True), (most, False), (least, True))
    repeats = [rank for rank, numbers in enumerate(used) if len(set(numbers)) < len(numbers)]
    rank = repeats[0] if repeats else 0
    batch, times = (*Counter(used[rank]).most_common(1), (0, 0))[0]
    differ = "the ranks end with different weights.\n"
    mistakes = {
        f"{differ}Each rank trained for itself. Gradients are put together only if forward goes "
        "through `model`, not `model.module`, and not "
        "under `no_sync`.": are_apart and all(map(_near, weights, alone)),
        f"{differ}A rank took steps that the others did not take, or took them with its own "
        "gradient. What one rank does to its weights, all must do.": are_apart,
        f"rank {rank} used batch {batch} {times} times.\n"
        "Going round again makes the lists equally long, and some samples count more than others. "
        "Here each batch may count once.": repeats,
        f"each rank used {len(used[0])} of its batches.\n"
        f"All ranks have {least}: leave out only what the shortest list has "
        "not.": {len(of_rank) for of_rank in used} == {len(used[0])} and len(used[0]) < least,
        "the weights are as they were in the beginning.\n"
        "Backward alone moves nothing: each batch "
        "needs an `optimizer.step()`.": _near(ends, _expected(counts, 0)),
        "each step was taken with the gradients of all steps before it, too.\n"
        "Backward adds to `.grad`. Call `optimizer.zero_grad()` for each "
        "batch.": any(_near(ends, _expected(counts, *way, zeroed=False)) for way in ways),
        "the ranks end with equal weights, but not those of steps with a mean gradient.\n"
        "Weights that are averaged or sent round at the end are not those of a joint run. "
        "Every step must take the mean gradient of all ranks: let DDP's backward do it.": True,
    }
    judge(f"ranks with {_list(counts)} batches: ", mistakes)


def _near(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, atol=1e-9))


def _list(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) if len(numbers) < 3 else ", ".join(map(str, numbers))


@in_group
def _moved(rank: int, counts: Counts, initial: bool) -> float:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with model.join(divide_by_initial_world_size=initial):
        for _ in range(counts[rank]):
            optimizer.zero_grad()
            (-model(torch.ones(1, 1).double())).sum().backward()
            optimizer.step()
    return float(layer.weight)


@functools.cache
def _real_weight(counts: Counts, initial: bool) -> float:
    """Where the weight really ends, in a run that is made once."""
    return float(run_ranks(_moved, (counts, initial), nprocs=len(counts)).values[0])


@exercise(
    "In each step, add up the gradients of the ranks that have a batch. By what does DDP divide?",
    "With `initial`, by `len(counts)`; without, by the number of ranks that have a batch.",
)
def check_predict_weight(predict: Callable[[Counts, bool], float]) -> str:
    """Check `predict(counts, initial)` against real ranks under join."""
    because = "It takes the ranks' numbers of batches, and True or False."
    for counts in MOVED:
        for initial in (True, False):
            real = _real_weight(counts, initial)
            answer = number(call(predict, counts, initial, because=because))
            if not near(answer, real):
                _explain_weight(counts, initial, answer, real)
    return f"right for {_list(MOVED[0])}, for {_list(MOVED[1])}, and on 3 and 1 ranks, both ways."


def _explain_weight(counts: Counts, initial: bool, answer: Any, real: float) -> None:
    total, ranks = sum(counts), len(counts)
    present = [sum(step < number for number in counts) for step in range(max(counts))]
    is_sum = ranks > 1 and near(answer, total)
    mistakes = {
        "That is the sum over all batches. DDP takes means: it divides.": is_sum,
        "That is where trimming ends. Under join the others go on.": near(answer, min(counts)),
        "A rank without a batch gives zeros and still counts, so lonely steps are shorter.": initial
        and near(answer, max(counts)),
        "That is the default. With `divide_by_initial_world_size=False` DDP divides by the ranks "
        "that still have a batch.": not initial and near(answer, total / ranks),
        "Return one number: under join all ranks end with the same weight.": not is_number(answer),
        f"Step by step, {_list(present)} ranks have a batch, and each gives -1. Divide each of "
        "these numbers by the right one, and add up.": True,
    }
    judge(
        f"ranks with {_list(counts)} batches, initial={initial}: the weight ends at {real:.4g}, "
        f"and you predicted {answer!r}.",
        mistakes,
    )


# [step][rank]: the parameters that get a gradient
Used = tuple[tuple[frozenset[str], ...], ...]


def _uses(*steps: str) -> Used:
    """The parameters used in each step by rank: `"ab a"` is a step of two ranks."""
    return tuple(tuple(map(frozenset, step.split())) for step in steps)


PLANS: tuple[tuple[str, Used], ...] = (
    ("ab", _uses("ab ab", "ab ab", "ab ab")),
    ("abc", _uses("ab ab", "ab ab", "ab ab")),
    ("abc", _uses("ac ac", "bc bc", "ac ac")),
    ("abc", _uses("ac bc", "ac bc")),
    ("ab", _uses("ab ab", "ab ab", "a a")),
    ("ab", _uses("ab ab", "ab a")),
    ("abcd", _uses("ab ab a", "a ab a")),
    ("abc", _uses("b b", "b b")),
    ("ab", _uses("a", "ab")),
)


class _Branches(nn.Module):  # type: ignore[misc]
    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.of = nn.ParameterDict({name: torch.ones(1) for name in sorted(names)})

    def forward(self, x: Tensor, used: Collection[str]) -> Tensor:
        return torch.stack([self.of[name] * x for name in sorted(used)])


@in_group
def _used(rank: int, names: Collection[str], used: Used, flag: bool) -> list[list[float | None]]:
    """Each step's gradients, in the order of the parameters' names."""
    model = DistributedDataParallel(_Branches(names), find_unused_parameters=flag)
    gradients = []
    for step in used:
        model.zero_grad()
        model(torch.full((1,), rank + 1.0), step[rank]).sum().backward()
        found = [model.module.of[name].grad for name in sorted(names)]
        gradients.append([None if grad is None else grad.item() for grad in found])
    return gradients


@functools.cache
def _real_training(names: frozenset[str], used: Used, flag: bool) -> Run:
    """A run on real ranks, which is made once."""
    return run_ranks(_used, (names, used, flag), nprocs=len(used[0]), check=False)


@exercise(
    "What is in no `used[step][rank]` at all may go.",
    "Of the rest, does every rank use everything in every step, the last one included? If not, "
    "DDP needs the flag.",
    "With `each` as the list of all these sets and `ever` as their union: "
    "`return names - ever, any(of_rank != ever for of_rank in each)`.",
)
def check_plan(plan: Callable[..., Any]) -> str:
    """Check `plan(names, used)` by training on real ranks as it says."""
    because = "It takes a set and nested lists of sets."
    for names, used in PLANS:
        copies = [[set(of_rank) for of_rank in step] for step in used]
        _judge_plan(set(names), used, call(plan, set(names), copies, because=because))
    return f"right for {len(PLANS)} models, whose training was run on real ranks."


def _judge_plan(names: set[str], used: Used, answer: Any) -> None:
    told = _told(names, used)
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise Wrong(
            f"{told}: you returned {answer!r}.", "Return two things: a set of names, True or False."
        )
    first, flag = answer[0], number(answer[1])
    given = list(first) if isinstance(first, Iterable) else [None]
    if not all(isinstance(name, str) for name in given):
        raise Wrong(
            f"{told}: first you returned {first!r}.",
            "First return the set of names to remove, then True or False.",
        )
    if not isinstance(flag, bool):
        raise Wrong(
            f"{told}: for the flag you returned {answer[1]!r}.", "Second return True or False."
        )
    remove = {str(name) for name in given}
    for name in sorted(remove - names):
        raise Wrong(
            f"{told}: you remove {name}, and there is no such parameter.",
            "What may go is in `names`.",
        )
    uses = [(n, rank, of) for n, step in enumerate(used) for rank, of in enumerate(step)]
    ever = frozenset().union(*(of_rank for _, _, of_rank in uses))
    for name in sorted(remove & ever):
        step, rank = next((n, rank) for n, rank, of_rank in uses if name in of_rank)
        raise Wrong(
            f"{told}: you remove {name}, which rank {rank} uses in step {step}.",
            "What only some ranks use, or only some steps, is used. Remove what nobody ever uses.",
        )
    for name in sorted(names - ever - remove):
        raise Wrong(
            f"{told}: {name} never gets a gradient, and you keep it.",
            "It would stay as it was in the beginning, and the flag would only hide that. Remove "
            "it, or freeze it.",
        )
    run = _real_training(ever, used, flag)
    missing = [
        f"In step {n}, rank {rank} has none of {min(ever - of_rank)}."
        for n, rank, of_rank in uses
        if of_rank != ever
    ]
    if missing and not flag:
        raise Wrong(
            f"{told}, no flag: {_what_came_of(run, sorted(ever))}",
            "DDP waits for the gradient of every parameter, on every rank, in every step. "
            f"{missing[0]} Where one can be missing, DDP needs the flag to look for it.",
        )
    run.raise_for_failure()
    if flag and not missing:
        unflagged = _real_training(ever, used, False)
        raise Wrong(
            f"{told}, and you want the flag. Without it the training finishes with the same "
            f"gradients: {unflagged.values == run.values}.",
            "What is left gets a gradient on every rank in every step. The flag would walk the "
            "graph and make one more call in each step for nothing.",
        )


def _what_came_of(run: Run, names: list[str]) -> str:
    """The error or wrong gradients of a run in which a bucket was never sent."""
    errors = [rank.error for rank in run.ranks if rank.error and not rank_state.lost_partner(rank)]
    if errors:
        return f"{errors[0].summary.split('. ')[0]}."
    lonely = [rank.rank for rank in run.ranks if rank.status != "returned"]
    if lonely:
        return f"{ranks_text(lonely)} waited in backward for the others until the timeout."
    for step, of_ranks in enumerate(zip(*run.values, strict=True)):
        for name, found in zip(names, zip(*of_ranks, strict=True), strict=True):
            if len(set(found)) > 1:
                values = " and ".join(map(str, found))
                return (
                    f"no error, but in step {step} the ranks have the gradients {values} of {name}."
                )
    return "it finished, as its last step was the one with something missing."


def _told(names: set[str], used: Used) -> str:
    """`parameters a, b; used by the ranks: a, ab in step 0; ...`."""
    steps = "; ".join(
        f"{', '.join(''.join(sorted(of_rank)) for of_rank in step)} in step {n}"
        for n, step in enumerate(used)
    )
    return f"parameters {', '.join(sorted(names))}; used by ranks 0 to {len(used[0]) - 1}: {steps}"
