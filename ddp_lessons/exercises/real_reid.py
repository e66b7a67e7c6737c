"""The checks of the re-identification reading: find what drifts, average gradients by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ddp_lessons.exercises.framework import (
    Wrong,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.text import count

LIMIT = timedelta(seconds=3)  # of a process group: a collective that some rank misses fails soon
_in_group = functools.partial(in_group, timeout=LIMIT)
SMALL = 1e-3  # how far the parameters of a rank are moved

# World size, and by how much each rank's part of a parameter is moved: name, rank, by.
Moves = tuple[tuple[str, int, float], ...]
DRIFTS: tuple[tuple[int, Moves], ...] = (
    (3, (("model.weight", 0, SMALL), ("model.weight", 2, -SMALL))),
    (1, ()),
    (2, ()),
    (4, (("centers", 3, -SMALL), ("model.bias", 1, SMALL), ("model.bias", 2, -SMALL))),
)


class _Trainer(nn.Module):  # type: ignore[misc]
    """A model, centers of its loss, and a scale that has no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)
        self.centers = nn.Parameter(torch.zeros(4, 2))
        self.scale = nn.Parameter(torch.zeros(()))
        for number, parameter in enumerate(self.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float32) - 2 + number
            parameter.data = values.reshape(parameter.shape) / 4


@_in_group
def _found(rank: int, find_drift: Callable[[nn.Module], Any], moves: Moves) -> tuple[Any, bool]:
    """The answer, as a sorted list if it has that form, and whether a parameter was changed."""
    module = _Trainer()
    parameters = dict(module.named_parameters())
    for name, at, by in moves:
        if at == rank:
            parameters[name].data.flatten()[-1] += by
    before = [p.detach().clone() for p in parameters.values()]
    answer = find_drift(module)
    changed = not all(map(torch.equal, before, (p.detach() for p in module.parameters())))
    if not isinstance(answer, str | bytes | None):
        try:
            names = list(answer)
        except TypeError:
            return repr(answer), changed
        if all(isinstance(name, str) for name in names):
            return sorted(set(names)), changed
    return repr(answer), changed


@exercise(
    "Each rank knows only its own numbers. Which collective tells every rank about all others?",
    "If the largest and the smallest value over all ranks are the same, all are the same.",
    "For each parameter, `all_reduce` one copy with `dist.ReduceOp.MAX` and another with "
    "`dist.ReduceOp.MIN`; the name belongs to the list if the two are not equal.",
)
def check_find_drift(find_drift: Callable[[nn.Module], Any]) -> str:
    """Check `find_drift(module)`: the names of the parameters that differ, on every rank."""
    for world_size, moves in DRIFTS:
        run = run_ranks(_found, (find_drift, moves), nprocs=world_size, check=False)
        where = f"{_ranks(world_size)}, {_moved(moves)}"
        if stuck(run):
            raise Wrong(
                f"{where}: the ranks did not come to an end together.",
                "Every rank must call the same collectives in the same order, whatever it finds "
                "and whatever its own number is.",
            )
        run.raise_for_failure()
        _judge_names(where, sorted({name for name, _, _ in moves}), run.values)
    return "the right names, on every rank: none, one or two, on one to four ranks."


def _judge_names(where: str, truth: list[str], values: list[tuple[Any, bool]]) -> None:
    answers = [answer for answer, _ in values]
    wrong = next((rank for rank, answer in enumerate(answers) if answer != truth), None)
    if wrong is None and not any(changed for _, changed in values):
        return
    answer = answers[wrong or 0]
    others = [other for other in answers if other == truth]
    missed = isinstance(answer, list) and set(answer) < set(truth)
    mistakes = {
        " The parameters were changed.\n"
        "Collectives write into the tensor that they get. Give them a copy: "
        "`parameter.detach().clone()`.": any(changed for _, changed in values),
        "Return a list of names on every rank, [] if none differs. Is `return` "
        "missing?": not isinstance(answer, list),
        "Other ranks got it right. Each rank compared with some other one, and so saw only some of "
        "the differences: let all ranks decide by numbers that are the same "
        "everywhere.": others,
        "A parameter whose ranks differ is missing. Ranks may differ in opposite directions, so "
        "that a sum or mean shows nothing; it may also be any rank, and a single "
        "element.": missed,
        "These do not differ: every rank has exactly the same numbers in them.": isinstance(
            answer, list
        )
        and set(answer) > set(truth),
        "Compare each parameter over all ranks, element by element.": True,
    }
    judge(f"{where}: rank {wrong or 0} returned {answer}; {truth} differ.", mistakes)


def _moved(moves: Moves) -> str:
    if not moves:
        return "all of them alike"
    return ", ".join(f"{name} moved by {by:+g} on rank {rank}" for name, rank, by in moves)


def _ranks(world_size: int) -> str:
    return count(world_size, "rank")


# Which ranks have a gradient, for each of three parameters.
HOLDERS: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = (
    (2, ((0, 1), (0, 1), (0, 1))),
    (3, ((0, 1, 2), (0, 2), (1,))),
    (1, ((0,), (0,), (0,))),
    (4, ((0, 1, 2, 3), (3,), ())),
)
SHAPES = ((2, 3), (4,), ())


def _gradient(number: int, rank: int) -> Tensor:
    size = torch.Size(SHAPES[number]).numel()
    values = (torch.arange(size, dtype=torch.float64) + 1) * (number + 1) * (rank + 1) ** 2
    return values.reshape(SHAPES[number])


@_in_group
def _averaged(
    rank: int, average: Callable[[list[nn.Parameter]], Any], holders: tuple[tuple[int, ...], ...]
) -> tuple[list[Tensor | None], bool]:
    """The gradients after it, and whether the parameters themselves were changed."""
    parameters = [nn.Parameter(torch.full(s, float(rank), dtype=torch.float64)) for s in SHAPES]
    for number, parameter in enumerate(parameters):
        if rank in holders[number]:
            parameter.grad = _gradient(number, rank)
    average(parameters)
    changed = any(bool((p != rank).any()) for p in parameters)
    return [None if p.grad is None else p.grad.detach().clone() for p in parameters], changed


@exercise(
    "DDP divides the sum over ranks by the number of ranks. What must a rank without a gradient "
    "put into the sum?",
    "A rank whose `.grad` is None sets it to `torch.zeros_like(parameter)` first. Otherwise the "
    "others wait for its `all_reduce`.",
    "For each parameter: zeros if None, `dist.all_reduce(parameter.grad)`, then "
    "`parameter.grad /= dist.get_world_size()`.",
)
def check_average(average: Callable[[list[nn.Parameter]], Any]) -> str:
    """Check `average(parameters)`: each `.grad` becomes the mean over ranks, None being zeros."""
    for world_size, holders in HOLDERS:
        run = run_ranks(_averaged, (average, holders), nprocs=world_size, check=False)
        where = _ranks(world_size)
        uneven = any(0 < len(held) < world_size for held in holders)
        if stuck(run) or (uneven and not run.ok and _mismatched(run.explain())):
            mistakes = {
                "A rank without a gradient skipped a call that the others made. It has to take "
                "part, with zeros.": uneven,
                "All ranks must call the same collectives in the same order.": True,
            }
            judge(f"{where}: the ranks did not come to an end together.", mistakes)
        run.raise_for_failure()
        for rank, (gradients, changed) in reversed([*enumerate(run.values)]):
            _judge_gradients(where, rank, gradients, changed, world_size, holders)
    return "the mean on every rank, also where some ranks had no gradient."


def _mismatched(text: str) -> bool:
    """Whether calls of different sizes met, which gloo reports as an error of its own."""
    return "op.preamble.length" in text or "Connection closed by peer" in text


def _judge_gradients(
    where: str,
    rank: int,
    gradients: Sequence[Tensor | None],
    changed: bool,
    world_size: int,
    holders: tuple[tuple[int, ...], ...],
) -> None:
    if changed:
        raise Wrong(
            f"{where}: the parameters were changed on rank {rank}.",
            "Average the gradients, `parameter.grad`. The optimizer changes the parameters, "
            "afterwards.",
        )
    for number, (gradient, held) in enumerate(zip(gradients, holders, strict=True)):
        parts = [_gradient(number, r) for r in held]
        total = sum(parts, torch.zeros(SHAPES[number], dtype=torch.float64))
        mean = total / world_size
        if gradient is None and not held:
            continue
        if gradient is not None and _same(gradient, mean):
            continue
        own = _gradient(number, rank) if rank in held else None
        of_holders = total / max(1, len(held))
        named = f"{where}: on rank {rank}, parameter {number} (ranks with a gradient: {list(held)})"
        if gradient is None:
            raise Wrong(
                f"{named} has no gradient.",
                "Every rank must step with the same gradient, also those that had None: else they "
                "drift apart. Set `parameter.grad`.",
            )
        mistakes = {
            "It is still the rank's own gradient. The average must be in `parameter.grad`, because "
            "that is what the optimizer reads: neither in a copy nor in what you "
            "return.": own is not None and _same(gradient, own),
            "That is the sum. DDP divides it by the number of ranks.": _same(gradient, total),
            "It was divided by the number of ranks that had a gradient. The others count as zeros, "
            "as in one process with all samples: divide by the number of all "
            "ranks.": _same(gradient, of_holders),
            "It is one rank's gradient, sent to all. Each rank's samples must count.": any(
                _same(gradient, part) for part in parts
            ),
            "It was divided by the number of ranks more than once.": _same(
                gradient, mean / world_size
            ),
            "Add up over all ranks, with zeros for None, and divide once by the world size.": True,
        }
        judge(f"{named} begins with {_first(gradient):g} in place of {_first(mean):g}.", mistakes)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one.double(), other))


def _first(tensor: Tensor) -> float:
    return float(tensor.flatten()[0])
