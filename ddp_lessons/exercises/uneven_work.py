"""The checks of lesson 11: make it finish, predict join's mean, flag or remove."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import losses, whereabouts
from ddp_lessons.errors import WorkerDied
from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.results import Run
from ddp_lessons.wording import ranks_text

Counts = tuple[int, ...]  # batches of each rank
Batches = list[tuple[Tensor, Tensor]]

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


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _trained(rank: int, train: Callable[..., Any], counts: Counts) -> tuple[list[int], Tensor]:
    dist.init_process_group("gloo")
    seen: list[int] = []
    batches, layer = _batches(rank, counts[rank]), _layer()
    known = [inputs.clone() for inputs, _ in batches]
    model = DistributedDataParallel(layer)

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.extend(n for n, inputs in enumerate(known) if torch.equal(args[0], inputs))

    layer.register_forward_pre_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer, nn.functional.mse_loss, batches)
    dist.destroy_process_group()
    return seen, _flat(layer.parameters())


def _expected(counts: Counts, steps: int, initial: bool = True, zeroed: bool = True) -> Tensor:
    """The weights after so many steps in which ranks without a batch count as zeros, or not.

    If not `zeroed`, each backward adds to the mean gradient that the last one has left.
    """
    layer = _layer()
    batches = [_batches(rank, number) for rank, number in enumerate(counts)]
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
        for parameter in layer.parameters():
            parameter.data -= RATE * parameter.grad
    return _flat(layer.parameters())


@exercise(
    "`with model.join():` around the loop is enough to use every batch.",
    "To trim instead, `all_reduce` the number of batches with `dist.ReduceOp.MIN` before the loop.",
)
def check_train(train: Callable[..., Any]) -> str:
    """Check `train(model, optimizer, loss_fn, batches)`: all finish together, with equal weights.

    Every batch may be used, or as many on each rank as all ranks have.
    """
    trims = False
    for counts in TRAINED:
        run = run_quietly(_trained, (train, counts), nprocs=len(counts))
        if not run.ok:
            _judge_failure(counts, run)
        run.raise_for_failure()
        trims = _judge_trained(counts, run) or trims
    used = "trimmed to the shortest list" if trims else "every batch used"
    return f"all ranks finish with equal weights, for {_list(TRAINED[0])} and 5 more; {used}."


def _judge_failure(counts: Counts, run: Run) -> None:
    lonely = [rank.rank for rank in run.ranks if whereabouts.waits(rank)]
    seen = f"ranks with {_list(counts)} batches: "
    if isinstance(run.error, WorkerDied):
        raise Wrong(
            f"{seen}{run.explain().splitlines()[0]}",
            "Two calls met that do not belong together. A rank that has joined answers DDP's calls "
            "only, not one of your own inside the loop.",
        )
    if run.verdict is None or run.verdict.kind in ("raised", "unsendable") or not lonely:
        return
    because = (
        "Each backward is a call of all ranks. A rank that has no batch left must not be missed: "
        "let all stop at the same step, or let it stay and answer, as join does."
    )
    if 0 in counts:
        because = (
            "The rank without any batch must do what the others do outside of the loop: the call "
            "that agrees on a number, or entering join."
        )
    raise Wrong(f"{seen}{ranks_text(lonely)} waited for the others in vain.", because)


def _judge_trained(counts: Counts, run: Run) -> bool:
    """Whether batches were left out, on all ranks alike."""
    used = [seen for seen, _ in run.values]
    weights = [of_rank for _, of_rank in run.values]
    seen = f"ranks with {_list(counts)} batches: "
    if any(not torch.equal(weights[0], other) for other in weights[1:]):
        raise Wrong(f"{seen}the ranks end with different weights.", _why_apart(counts, weights))
    if any(_near(weights[0], _expected(counts, max(counts), initial)) for initial in (True, False)):
        return False
    if _near(weights[0], _expected(counts, min(counts))):
        return True
    _judge_used(seen, counts, used)
    _judge_loop(seen, counts, weights[0])
    raise Wrong(
        f"{seen}the ranks end with equal weights, but not those of steps with a mean gradient.",
        "Weights that are averaged or sent round at the end are not those of a common training. "
        "Every step must take the mean gradient of all ranks: let DDP's backward do it.",
    )


def _why_apart(counts: Counts, weights: Sequence[Tensor]) -> str:
    alone = [
        _expected((0,) * rank + (number,), number, initial=False)
        for rank, number in enumerate(counts)
    ]
    if all(_near(mine, own) for mine, own in zip(weights, alone, strict=True)):
        return (
            "Each rank trained for itself. Gradients are put together only if forward goes through "
            "`model`, not `model.module`, and not under `no_sync`."
        )
    return (
        "A rank took steps that the others did not take, or took them with its own gradient. What "
        "one rank does to its weights, all must do."
    )


def _judge_used(seen: str, counts: Counts, used: list[list[int]]) -> None:
    for rank, of_rank in enumerate(used):
        twice = [n for n in set(of_rank) if of_rank.count(n) > 1]
        if twice:
            raise Wrong(
                f"{seen}rank {rank} used batch {min(twice)} {of_rank.count(min(twice))} times.",
                "Going round again makes the lists equally long, and some samples count more than "
                "others. Here each batch may count once.",
            )
    numbers = {len(of_rank) for of_rank in used}
    if len(numbers) == 1 and max(numbers) < min(counts):
        raise Wrong(
            f"{seen}each rank used {max(numbers)}.",
            f"All ranks have {min(counts)}: leave out only what the shortest list has not.",
        )


def _judge_loop(seen: str, counts: Counts, weights: Tensor) -> None:
    """Raise if the loop would be wrong on a single rank, too."""
    if _near(weights, _expected(counts, 0)):
        raise Wrong(
            f"{seen}the weights are as they were in the beginning.",
            "Backward alone moves nothing: each batch needs an `optimizer.step()`.",
        )
    ways = ((max(counts), True), (max(counts), False), (min(counts), True))
    if any(_near(weights, _expected(counts, *way, zeroed=False)) for way in ways):
        raise Wrong(
            f"{seen}each step was taken with the gradients of all steps before it, too.",
            "Backward adds to `.grad`. Call `optimizer.zero_grad()` for each batch.",
        )


def _near(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, atol=1e-9))


def _list(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) if len(numbers) < 3 else ", ".join(map(str, numbers))


def _moved(rank: int, counts: Counts, initial: bool) -> float:
    dist.init_process_group("gloo")
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with model.join(divide_by_initial_world_size=initial):
        for _ in range(counts[rank]):
            optimizer.zero_grad()
            (-model(torch.ones(1, 1).double())).sum().backward()
            optimizer.step()
    dist.destroy_process_group()
    return float(layer.weight)


@exercise(
    "In each step, add up the gradients of the ranks that have a batch. By what does DDP divide?",
    "With `initial`, by `len(counts)`; without, by the number of ranks that have a batch.",
)
def check_predict_weight(predict: Callable[[Counts, bool], float]) -> str:
    """Check `predict(counts, initial)` against real ranks under join."""
    for counts in MOVED:
        for initial in (True, False):
            run = run_quietly(_moved, (counts, initial), nprocs=len(counts))
            run.raise_for_failure()
            because = "It takes the ranks' numbers of batches, and True or False."
            answer = call(predict, counts, initial, because=because)
            _judge_weight(counts, initial, answer, run.values[0])
    return f"right for {_list(MOVED[0])}, for {_list(MOVED[1])}, and on 3 and 1 ranks, both ways."


def _judge_weight(counts: Counts, initial: bool, answer: Any, real: float) -> None:
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    if _is(answer, real):
        return
    seen = (
        f"ranks with {_list(counts)} batches, initial={initial}: the weight ends at {real:.4g}, "
        f"and you predicted {answer!r}."
    )
    if len(counts) > 1 and _is(answer, sum(counts)):
        raise Wrong(seen, "That is the sum over all batches. DDP takes means: it divides.")
    if _is(answer, min(counts)):
        raise Wrong(seen, "That is where trimming ends. Under join the others go on.")
    if initial and _is(answer, max(counts)):
        raise Wrong(
            seen,
            "A rank without a batch gives zeros and still counts, so lonely steps are shorter.",
        )
    if not initial and _is(answer, sum(counts) / len(counts)):
        raise Wrong(
            seen,
            "That is the default. With `divide_by_initial_world_size=False` DDP divides by the "
            "ranks that still have a batch.",
        )
    if not isinstance(answer, int | float):
        raise Wrong(seen, "Return one number: under join all ranks end with the same weight.")
    present = [sum(step < count for count in counts) for step in range(max(counts))]
    raise Wrong(
        seen,
        f"Step by step, {_list(present)} ranks have a batch, and each gives -1. Divide each of "
        "these numbers by the right one, and add up.",
    )


def _is(value: Any, target: float) -> bool:
    return isinstance(value, int | float) and abs(value - target) < 1e-6


Used = list[list[set[str]]]  # [step][rank]: the parameters that get a gradient


def _uses(*steps: str) -> Used:
    """Of each step, the ranks' parameters: `"ab a"` are those of two ranks."""
    return [[{*of_rank} for of_rank in step.split()] for step in steps]


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

    def forward(self, x: Tensor, used: set[str]) -> Tensor:
        return torch.stack([self.of[name] * x for name in sorted(used)])


def _used(rank: int, names: set[str], used: Used, flag: bool) -> list[list[float | None]]:
    """Each step's gradients, by the parameters' names in order."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(_Branches(names), find_unused_parameters=flag)
    gradients = []
    for step in used:
        model.zero_grad()
        model(torch.full((1,), rank + 1.0), step[rank]).sum().backward()
        found = [model.module.of[name].grad for name in sorted(names)]
        gradients.append([None if grad is None else grad.item() for grad in found])
    dist.destroy_process_group()
    return gradients


@exercise(
    "What is in no `used[step][rank]` at all may go.",
    "Of the rest, does every rank use everything in every step, the last one included? If not, "
    "DDP needs the flag.",
)
def check_plan(plan: Callable[..., Any]) -> str:
    """Check `plan(names, used)`, and train as it says on real ranks."""
    for names, used in PLANS:
        copies = [[set(of_rank) for of_rank in step] for step in used]
        answer = call(plan, set(names), copies, because="It takes a set and nested lists of sets.")
        _judge_plan(set(names), used, answer)
    return f"right for {len(PLANS)} models, whose training was run on real ranks."


def _judge_plan(names: set[str], used: Used, answer: Any) -> None:
    told = _told(names, used)
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise Wrong(
            f"{told}: you returned {answer!r}.", "Return two things: a set of names, True or False."
        )
    if not isinstance(answer[0], Collection):
        raise Wrong(
            f"{told}: first you returned {answer[0]!r}.",
            "First return the set of names to remove, then True or False.",
        )
    remove, flag = set(answer[0]), bool(answer[1])
    ever = set().union(*(of_rank for step in used for of_rank in step))
    _judge_removed(told, used, remove & ever, names - ever - remove)
    run = run_quietly(_used, (ever, used, flag), nprocs=len(used[0]))
    missing = [
        f"In step {n}, rank {rank} has none of {min(ever - of_rank)}."
        for n, step in enumerate(used)
        for rank, of_rank in enumerate(step)
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
        plain = run_quietly(_used, (ever, used, False), nprocs=len(used[0]))
        plain.raise_for_failure()
        raise Wrong(
            f"{told}, and you want the flag. Without it the training finishes with the same "
            f"gradients: {plain.values == run.values}.",
            "What is left gets a gradient on every rank in every step. The flag would walk the "
            "graph and make one more call in each step for nothing.",
        )


def _judge_removed(told: str, used: Used, missed: set[str], left: set[str]) -> None:
    if missed:
        name = min(missed)
        step, rank = next(
            (n, rank)
            for n, step in enumerate(used)
            for rank, of_rank in enumerate(step)
            if name in of_rank
        )
        raise Wrong(
            f"{told}: you remove {name}, which rank {rank} uses in step {step}.",
            "What only some ranks use, or only some steps, is used. Remove what nobody ever uses.",
        )
    if left:
        raise Wrong(
            f"{told}: {min(left)} never gets a gradient, and you keep it.",
            "It would stay as it was in the beginning, and the flag would only hide that. Remove "
            "it, or freeze it.",
        )


def _what_came_of(run: Run, names: list[str]) -> str:
    """What torch or the gradients say of a training whose bucket was held back."""
    errors = [rank.error for rank in run.ranks if rank.error and not losses.lost_partner(rank)]
    if errors:
        return f"{errors[0].summary.split('. ')[0]}."
    lonely = [rank.rank for rank in run.ranks if rank.status != "returned"]
    if lonely:
        return f"{ranks_text(lonely)} waited in backward for the others in vain."
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
