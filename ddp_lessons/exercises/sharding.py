"""The checks of lesson 15: stage 2 of ZeRO, and what each rank keeps in which stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.exercises.numeric_answers import near, number, numbers
from ddp_lessons.exercises.small_training import flat
from ddp_lessons.text import count

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

STEPS, RATE, MOMENTUM = 2, 0.1, 0.5


class Training(NamedTuple):
    """A training run of stage 2: so many ranks, backward passes a step, and the layers' widths."""

    ranks: int
    passes: int
    widths: tuple[int, ...]
    frozen: bool = False

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(p.shape)) for p in _net(self).parameters())
        frozen = ", the first one frozen" if self.frozen else ""
        return (
            f"{count(self.ranks, 'rank')}, {count(self.passes, 'backward')} before each step, "
            f"parameters of shape {shapes}{frozen}"
        )


TRAININGS = (
    (Training(2, 1, (4, 6, 2)), Training(2, 3, (4, 6, 2))),
    (Training(3, 1, (5, 4, 2), frozen=True), Training(3, 2, (5, 4, 1))),
    (Training(1, 2, (3, 1)),),
)


def _net(training: Training) -> nn.Sequential:
    torch.manual_seed(2)
    pairs = zip(training.widths[:-1], training.widths[1:], strict=True)
    net = nn.Sequential(*(nn.Linear(*pair, dtype=torch.double) for pair in pairs))
    net[0].weight.requires_grad_(not training.frozen)
    return net


def _loss(net: nn.Module, training: Training, rank: int, step: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + turn)
    inputs = torch.randn(4, training.widths[0], generator=generator, dtype=torch.double)
    loss: Tensor = net(inputs).square().mean()
    return loss


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def kept_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes that tensors keep: each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Outcome(NamedTuple):
    """What one rank had: weights after one step and all, bytes of gradients and optimizer state."""

    first: Tensor
    weights: Tensor
    gradients: int
    state: int
    returned: str  # the type of what was returned, if that is no optimizer


@in_group
def _train_sharded(_: int, stage_2: Any, trainings: Sequence[Training]) -> list[Outcome]:
    return [_train_one(stage_2, training) for training in trainings]


def _train_one(stage_2: Any, training: Training) -> Outcome:
    net, rank = _net(training), dist.get_rank()
    parameters, made = list(net.parameters()), []

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(_sgd(parameters))
        return made[-1]

    optimizer = stage_2(net, make)
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
        begin = flat(parameters)
        return Outcome(begin, begin, 0, 0, type(optimizer).__name__)
    left, after = 0, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for turn in range(training.passes):
            (_loss(net, training, rank, step, turn) / training.passes).backward()
            left = max(left, kept_bytes(p.grad for p in parameters if p.grad is not None))
        optimizer.step()
        after.append(flat(parameters))
    state = [v for each in made for of_p in each.state.values() for v in of_p.values()]
    kept = [value for value in state if isinstance(value, Tensor)]
    return Outcome(after[0], after[-1], left, kept_bytes(kept), "")


def _expected(
    training: Training,
    *,
    steps: int = STEPS,
    factor: float = 1.0,
    passes: Sequence[int] | None = None,
    zeroed: bool = True,
    by_piece: bool = False,
) -> Tensor:
    """The weights after DDP's training; with other arguments, after a mistaken one.

    `factor` multiplies each gradient, `passes` are those that count; without `zeroed`, gradients
    of earlier steps stay; with `by_piece`, each rank's piece has that rank's own gradient.
    """
    net = _net(training)
    trained = [p for p in net.parameters() if p.requires_grad]
    held = [torch.zeros_like(p) for p in trained]
    moved = [torch.zeros_like(p) for p in trained]
    for step in range(steps):
        of_ranks = []
        for rank in range(training.ranks):
            net.zero_grad()
            for turn in passes or range(training.passes):
                (_loss(net, training, rank, step, turn) / training.passes).backward()
            of_ranks.append([p.grad for p in trained])
        for n, (p, *grads) in enumerate(zip(trained, *of_ranks, strict=True)):
            mean = sum(grads) * factor / training.ranks
            new = _put_together([pieces_of(g, training.ranks) for g in grads], p)
            held[n] = (0 if zeroed else held[n]) + (new if by_piece else mean)
            moved[n] = MOMENTUM * moved[n] + held[n]  # as torch.optim.SGD, which the parent spares
            p.data -= RATE * moved[n]
    return flat(net.parameters())


def _put_together(of_ranks: list[list[Tensor]], like: Tensor) -> Tensor:
    """Piece r of rank r's pieces, for all ranks, in the shape of `like`."""
    whole = torch.cat([pieces[rank] for rank, pieces in enumerate(of_ranks)])
    return whole[: like.numel()].view_as(like)


def pieces_of(tensor: Tensor, ranks: int) -> list[Tensor]:
    """A flat tensor in equal pieces; zeros fill up the last ones."""
    return list(pad(tensor.flatten(), (0, -tensor.numel() % ranks)).chunk(ranks))


@exercise(
    "Begin with `zero_2`. What does its hook do with the piece that the backward before has left?",
    "`shard.grad = own if shard.grad is None else shard.grad + own`; then `p.grad = None`. "
    "`optimizer.zero_grad()` empties it for the next step.",
    "Only what `requires_grad` gets a shard and a hook. After the step, gather what has a shard.",
)
def check_stage_2(stage_2: Callable[[nn.Module, MakeOptimizer], Any]) -> str:
    """Check `stage_2(model, make_optimizer)`: DDP's weights, and no more bytes than pieces have."""
    for trainings in TRAININGS:
        run = run_ranks(
            _train_sharded, (stage_2, trainings), nprocs=trainings[0].ranks, check=False
        )
        if stuck(run):
            raise Wrong(
                f"{trainings[0].ranks} ranks: {run.explain()}",
                "All ranks must make the same calls in the same order: every rank has a piece of "
                "every parameter.",
            )
        run.raise_for_failure()
        for place, training in enumerate(trainings):
            _judge_training(training, [outcomes[place] for outcomes in run.values])
    return (
        "DDP's weights and pieces of the bytes, on 2, 3 and 1 ranks, with 1 to 3 backwards a step."
    )


def _judge_training(training: Training, outcomes: list[Outcome]) -> None:
    parameters = [p for p in _net(training).parameters() if p.requires_grad]
    trained = [p.numel() * p.element_size() for p in parameters]
    pieces = sum(kept_bytes([pieces_of(p, training.ranks)[0].clone()]) for p in parameters)
    ends, expected = [outcome.weights for outcome in outcomes], _expected(training)
    several = training.ranks > 1
    left, state = (max(getattr(o, name) for o in outcomes) for name in ("gradients", "state"))
    same = all(_near(ends[0], end) for end in ends)

    def is_like(**mistake: Any) -> bool:
        return same and _near(ends[0], _expected(training, **mistake))

    last = [training.passes - 1]
    right = same and _near(ends[0], expected)
    mistakes = {
        f"it returned {outcomes[0].returned}.\n"
        "Return the optimizer that `make_optimizer` gives for the "
        "shards.": outcomes[0].returned,
        f"after backward a rank still has gradients of {left} bytes on the model's parameters; all "
        f"of them together have {sum(trained)}.\n"
        "Stage 2 hands on each gradient as soon as it is there, and then lets go of it: "
        "`p.grad = None`, in a hook of the parameter.": several and left,
        "the weights have not moved.\n"
        "The optimizer must get the shards' gradients, and the model the new "
        "weights.": same and _near(ends[0], flat(_net(training).parameters())),
        "the ranks end with different weights.\n"
        "Each rank has updated its own pieces. After every step all ranks need all pieces: "
        "`all_gather` them in a hook behind `step`.": not same,
        f"the gradients were {training.ranks} times too large.\n"
        "`reduce_scatter` adds up. DDP's gradient is the mean: divide by the number of "
        "ranks.": several and is_like(factor=training.ranks),
        "only the last backward before each step counted.\n"
        "The hook runs in every backward. What it finds must be added to the piece that is there, "
        "not put in its place.": training.passes > 1 and is_like(passes=last),
        "the gradients of earlier steps counted again.\n"
        "`optimizer.zero_grad()` clears the `.grad` of the shards that it was made with: keep the "
        "sum there.": is_like(zeroed=False),
        "each rank took the step with its own gradient.\n"
        "The piece that a rank updates needs the mean over all ranks: `reduce_scatter` adds up "
        "that piece of all.": several and is_like(by_piece=True),
        f"a rank keeps {state} bytes of optimizer state; the pieces of all parameters that are "
        f"trained need {pieces}.\n"
        "Give `make_optimizer` this rank's pieces alone: that is what stage 1 "
        "saves.": right and several and state > pieces,
        "only the elements of rank 0's pieces have moved.\n"
        "Every rank updates pieces that no other has: what one rank broadcasts is old everywhere "
        "else. `all_gather` the pieces of all.": several and _moved_on_rank_0(training, ends[0]),
        "the weights are not those of DDP.\n"
        "They are wrong at the last elements of a parameter: fill up with zeros before you cut, "
        "and leave the zeros out again.": _wrong_at_ends(training, outcomes[0].first),
        "the ranks end with equal weights, but not with those of DDP.\n"
        "Print the first step's gradients beside DDP's: a piece must hold the mean of that piece "
        "over the ranks, summed over the backwards of the step.": not right,
    }
    judge(f"{training}: ", mistakes)


def _moved_on_rank_0(training: Training, end: Tensor) -> bool:
    """Whether what other ranks own of the parameters is as it was in the beginning."""
    begin = list(_net(training).parameters())
    pairs = zip(begin, end.split([p.numel() for p in begin]), strict=True)
    pieces = [[pieces_of(t.detach(), training.ranks) for t in pair] for pair in pairs]
    return all(torch.equal(old, new) for one in pieces for old, new in zip(*one, strict=True)
               if old is not one[0][0])  # fmt: skip


def _wrong_at_ends(training: Training, first: Tensor) -> bool:
    """Whether one step leaves only elements of a parameter's last, filled-up piece wrong."""
    sizes = [p.numel() for p in _net(training).parameters()]
    expected = _expected(training, steps=1)
    pairs = zip(first.split(sizes), expected.split(sizes), strict=True)
    wrong = [(one, other) for one, other in pairs if not _near(one, other)]
    if all(len(one) % training.ranks == 0 for one, _ in wrong):
        return False
    starts = [len(one) // training.ranks * (training.ranks - 1) for one, _ in wrong]
    return all(
        _near(one[:start], other[:start]) for start, (one, other) in zip(starts, wrong, strict=True)
    )


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, atol=1e-9))


KINDS = ("parameters", "gradients", "optimizer state")
STAGES = (0, 1, 2, 3)
MAKERS: dict[str, MakeOptimizer] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "momentum": _sgd,
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=RATE),
}
SIZES: dict[int, tuple[tuple[int, ...], ...]] = {2: ((8, 4),), 3: ((10, 7, 1), (12,)), 1: ((5,),)}

Sizes = tuple[int, ...]
Case = tuple[int, Sizes, str]  # stage, sizes, optimizer
Bytes = tuple[int, int, int]  # in the order of KINDS


@in_group
def _measure(_: int, cases: Sequence[Case]) -> list[Bytes]:
    return [_kept(*case) for case in cases]


def _kept(stage: int, sizes: Sizes, optimizer: str) -> Bytes:
    """Take one step in the way of a stage, and count what this rank then has."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    shards = parameters
    if stage:
        wholes = [torch.cat(pieces_of(p.data, ranks)) for p in parameters]
        for p, whole in zip(parameters, wholes, strict=True):
            p.data = whole[: p.numel()]
        shards = [nn.Parameter(whole.chunk(ranks)[rank]) for whole in wholes]
        if stage == 3:
            shards = [nn.Parameter(shard.data.clone()) for shard in shards]
    made = MAKERS[optimizer](shards)
    for p, shard in zip(parameters, shards, strict=True):
        p.grad = torch.ones_like(p)
        if stage:
            pieces = pieces_of(p.grad, ranks)
            own = pieces[rank].clone()
            dist.reduce_scatter(own, pieces)
            shard.grad = own / ranks
            p.grad = p.grad if stage == 1 else None
    made.step()
    if stage == 3:
        for p in parameters:
            p.untyped_storage().resize_(0)
    every = [*parameters, *shards]
    state = [v for of_p in made.state.values() for name, v in of_p.items() if name != "step"]
    return (
        kept_bytes(every),
        kept_bytes(p.grad for p in every if p.grad is not None),
        kept_bytes(v for v in state if isinstance(v, Tensor)),
    )


@functools.cache
def _measured(ranks: int) -> dict[Case, Bytes]:
    """What ranks really keep, in a run that is made once; the most of any rank."""
    cases = [(stage, sizes, name) for sizes in SIZES[ranks] for stage in STAGES for name in MAKERS]
    values = run_ranks(_measure, (cases,), nprocs=ranks).values
    most = [tuple(map(max, zip(*of_ranks, strict=True))) for of_ranks in zip(*values, strict=True)]
    return dict(zip(cases, most, strict=True))


@exercise(
    "Of each parameter, a rank's piece has `-(-size // ranks)` elements: that rounds up.",
    "From stage 1 on, the optimizer's state is in pieces; from stage 2 on, gradients are; in stage "
    "3, parameters are, too. A whole parameter in stages 1 and 2 is filled up to `ranks` pieces.",
    "In stage 1 a rank has whole gradients, as DDP, and its own pieces of the mean besides.",
)
def check_bytes(predict_bytes: Callable[..., Any]) -> str:
    """Check `predict_bytes(stage, ranks, sizes, optimizer)` against what real ranks keep."""
    because = "It takes a stage, a number of ranks, a list of sizes and an optimizer's name."
    total = 0
    for ranks in SIZES:
        for (stage, sizes, optimizer), real in _measured(ranks).items():
            given = (stage, ranks, list(sizes), optimizer)
            answer = call(predict_bytes, *given, because=because)
            _judge_bytes(given, numbers(answer), real)
            total += 1
    return f"right for {total} cases, measured on 2, 3 and 1 ranks."


def _judge_bytes(given: tuple[Any, ...], answer: Any, real: Bytes) -> None:
    stage, ranks, sizes, optimizer = given
    told = f"stage {stage} on {count(ranks, 'rank')}, sizes {sizes}, {optimizer}: "
    if not isinstance(answer, list) or len(answer) != len(KINDS):
        raise Wrong(
            f"{told}you returned {answer!r}.",
            "Return three numbers of bytes: for parameters, gradients and optimizer state.",
        )
    for kind, said, kept in zip(KINDS, answer, real, strict=True):
        if not near(said, kept):
            _explain_bytes(f"{told}a rank keeps {kept} bytes of {kind}, and you predicted ", said,
                           kind, kept, given)  # fmt: skip


def _explain_bytes(told: str, said: Any, kind: str, kept: int, given: tuple[Any, ...]) -> None:
    stage, ranks, sizes, optimizer = given
    pieces = sum(-(-size // ranks) for size in sizes)
    moments = {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    is_state = kind == KINDS[2]
    times = moments if is_state else 1
    unfilled = [sum(sizes) / ranks, sum(size // ranks for size in sizes), -(-sum(sizes) // ranks)]
    divides = all(size % ranks == 0 for size in sizes)
    mistakes = {
        "That is the number of elements. One of float32 has 4 bytes.": near(said, kept / 4),
        "SGD without momentum keeps nothing.": is_state and not moments,
        "That is the whole. In this stage it is in pieces, of which each rank has one.": stage
        and near(said, 4 * times * sum(sizes))
        and kept == 4 * times * pieces,
        "Adam keeps two numbers for each parameter, SGD with momentum one.": is_state
        and any(near(said, kept * other / max(1, moments)) for other in (0, 1, 2)),
        "That is a piece. Here every rank still has the whole.": near(said, 4 * times * pieces)
        and kept > 4 * times * pieces,
        "Cut each parameter by itself. Where its size cannot be divided, zeros fill up the last "
        "piece, so every piece has the size divided by the ranks, rounded up.": not divides
        and stage
        and any(near(said, 4 * times * n) for n in unfilled),
        "In stage 1 backward leaves whole gradients, as in DDP, and a rank's own pieces of the "
        "mean come on top.": kind == KINDS[1] and stage == 1,
        "Here a parameter is whole, in a flat tensor that is filled up with zeros to as many "
        "pieces as ranks.": kind == KINDS[0] and stage in (1, 2),
        "DDP fills nothing up: all as large as the parameters.": stage == 0,
        f"Which parts of the {kind} does a rank need in this stage, and how many bytes has each "
        "element?": True,
    }
    judge(f"{told}{number(said)!r}.", mistakes)
