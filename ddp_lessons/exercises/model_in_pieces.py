"""The checks of lessons 16 and 16b: where a block's all_reduces stand, and a pipeline's bubble."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, silu

from ddp_lessons import Run, span
from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks, stuck
from ddp_lessons.exercises.numeric_answers import is_number, near, number
from ddp_lessons.text import count, listed
from ddp_lessons.wire.records import Kind, Lane

WIDTH, SAMPLES = 3, 4
HIDDEN: dict[int, int] = {2: 4, 3: 6}  # ranks: hidden units of all ranks
PIECES = ("gate", "up", "down")
NAMES = ("x", *PIECES, "bias")

Tensors = dict[str, Tensor]


# A gated block, cut over the ranks.


def _whole(ranks: int) -> Tensors:
    generator = torch.Generator().manual_seed(ranks)
    hidden = HIDDEN[ranks]
    shapes = {
        "x": (SAMPLES, WIDTH),
        "gate": (hidden, WIDTH),
        "up": (hidden, WIDTH),
        "down": (WIDTH, hidden),
        "bias": (WIDTH,),
    }
    return {n: torch.randn(s, generator=generator, dtype=torch.double) for n, s in shapes.items()}


def _piece(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    if name not in PIECES:
        return tensor
    return tensor.chunk(ranks, dim=1 if name == "down" else 0)[rank]


def _loss(out: Tensor) -> Tensor:
    weights = torch.arange(1.0, out.numel() + 1, dtype=torch.double).view_as(out)
    return (out * weights).sum()


class Passed(NamedTuple):
    """What one rank had: the output, or the type of what was returned, and the gradients."""

    out: Tensor | str
    gradients: dict[str, Tensor | None]


@in_group
def _pass(rank: int, block: Callable[..., Any]) -> Passed:
    ranks = dist.get_world_size()
    own = {
        name: _piece(name, tensor, rank, ranks).clone().requires_grad_()
        for name, tensor in _whole(ranks).items()
    }
    with span("forward"):
        out = block(*own.values())
    if not isinstance(out, Tensor) or out.shape != (SAMPLES, WIDTH):
        shape = f" of shape {tuple(out.shape)}" if isinstance(out, Tensor) else ""
        return Passed(f"{type(out).__name__}{shape}", {})
    if out.requires_grad:
        with span("backward"):
            _loss(out).backward()
    return Passed(out.detach(), {name: tensor.grad for name, tensor in own.items()})


@exercise(
    "Which tensors does every rank have whole, and which in pieces? `x`, `bias` and the result are "
    "whole; what lies between the first two products and the last one is in pieces.",
    "`enter` stands where the whole becomes pieces, once for both products: "
    "`inner = enter(x)`. `leave` stands behind the last product.",
    "`bias` and the residual `x` are whole: add them after `leave`, and take `x` itself, not "
    "`enter(x)`.",
)
def check_block(block: Callable[..., Any]) -> str:
    """Check `block(x, gate, up, down, bias)` on 2 and 3 ranks: output, gradients, calls."""
    for ranks in HIDDEN:
        run = run_ranks(_pass, (block,), nprocs=ranks, check=False)
        if stuck(run):
            raise Wrong(
                run.explain(),
                "Every rank of the group must make the same calls in the same order.",
            )
        run.raise_for_failure()
        _judge_block(run)
    return (
        "output and all gradients of one process, on 2 and 3 ranks, with one all_reduce in forward "
        "and one in backward."
    )


def _judge_block(run: Run) -> None:
    ranks, told = run.world_size, f"{count(run.world_size, 'rank')}: "
    for rank, passed in enumerate(run.values):
        if isinstance(passed.out, str):
            raise Wrong(
                f"{told}rank {rank} returned {passed.out}.",
                f"Return the block's output, of the shape of `x`: {(SAMPLES, WIDTH)}.",
            )
    _judge_output(told, ranks, [passed.out for passed in run.values])
    for rank, passed in enumerate(run.values):
        _judge_gradients(told, ranks, rank, passed.gradients)
    _judge_calls(told, run)


def _parts(ranks: int, tensors: Tensors) -> list[Tensor]:
    """Each rank's part of the block's sum."""
    parts = []
    for rank in range(ranks):
        gate, up, down = (_piece(name, tensors[name], rank, ranks) for name in PIECES)
        x = tensors["x"]
        parts.append(linear(silu(linear(x, gate)) * linear(x, up), down))
    return parts


def _judge_output(told: str, ranks: int, outs: list[Tensor]) -> None:
    whole = _whole(ranks)
    x, bias, parts = whole["x"], whole["bias"], _parts(ranks, whole)
    total = torch.stack(parts).sum(0)

    def all_are(*right: Tensor) -> bool:
        each = right if len(right) > 1 else right * ranks
        return all(map(_near, outs, each))

    if all_are(x + total + bias):
        return
    mistakes = {
        "each rank has a different output, with its own part of the sum only.\n"
        "The last product's inputs are in pieces, so its result is a part of a sum: `leave` adds "
        "up the parts of all ranks.": all_are(*(x + part + bias for part in parts)),
        f"the output has `bias` {ranks} times.\n"
        "Each rank adds it, and then the ranks' results are added up. Add `bias` after "
        "`leave`, once.": all_are(x + total + ranks * bias),
        f"the output has the residual `x` {ranks} times.\n"
        "Each rank adds it, and then the ranks' results are added up. Add `x` after `leave`, "
        "once.": all_are(ranks * x + total + bias),
        f"the output has `bias` and the residual `x` {ranks} times.\n"
        "Both are whole on each rank. Only the product with `down` is a part of a sum: add the "
        "others after `leave`.": all_are(ranks * (x + bias) + total),
        f"the block's sum was divided by {ranks}.\n"
        "The parts are a sum's, not a mean's. A mean is right for gradients of different "
        "batches.": all_are(x + total / ranks + bias)
        or all_are((ranks * (x + bias) + total) / ranks),
        "`bias` is missing in the output.\nAdd it after `leave`.": all_are(x + total),
        "the residual is missing in the output.\n"
        "The block returns `x` plus what it computes.": all_are(total + bias),
        "`x` was added up over the ranks before the block.\n"
        "`enter` does nothing in forward: every rank has all of `x`. In backward it adds up the "
        "gradients.": all_are(x + _entered(ranks, whole, ranks) + bias)
        or all_are(ranks * x + _entered(ranks, whole, ranks) + bias),
        f"the sum was taken over the ranks {count(2, 'time')}.\n"
        "After the first `leave` every rank has all of it: one is "
        "enough.": all_are(x + ranks * total + bias),
        "the output is not that of one process.\n"
        "Between the first two products and the last one, each rank has hidden units of its own: "
        "adding those up mixes them. Only the result of the last product is a part of a "
        "sum.": True,
    }
    judge(told, mistakes)


def _entered(ranks: int, whole: Tensors, factor: float) -> Tensor:
    """The block's sum with a wrong input, `factor` times `x`."""
    return torch.stack(_parts(ranks, {**whole, "x": factor * whole["x"]})).sum(0)


def _gradients_of(out: Callable[[Tensors], Tensor], ranks: int) -> Tensors:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in _whole(ranks).items()}
    _loss(out(leaves)).backward()
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def _judge_gradients(told: str, ranks: int, rank: int, gradients: dict[str, Tensor | None]) -> None:
    right = _gradients_of(lambda t: t["x"] + sum(_parts(ranks, t)) + t["bias"], ranks)
    right = {name: _piece(name, grad, rank, ranks) for name, grad in right.items()}
    missing = [name for name in NAMES if gradients.get(name) is None]
    if missing == ["bias"]:
        raise Wrong(
            f"{told}on rank {rank} bias got no gradient.",
            "Every rank has a copy of `bias`, and all copies must get the gradient, or they drift "
            "apart: each rank adds it, after `leave`.",
        )
    if missing:
        raise Wrong(
            f"{told}on rank {rank} {listed(missing)} got no gradient.",
            "The output is right, but autograd cannot go back through it. `enter` and `leave` must "
            "be autograd functions, as in the lesson.",
        )
    off = [n for n in NAMES if not _near(_of(gradients, n), right[n])]
    if not off:
        return
    residual = _gradients_of(lambda t: t["x"], ranks)["x"]
    own = _gradients_of(lambda t: _parts(ranks, t)[rank], ranks)["x"]
    block = right["x"] - residual
    x = _of(gradients, "x")
    doubled = [n for n in PIECES if _near(_of(gradients, n), ranks * right[n])]
    seen = f"{told}the output is right. On rank {rank} the gradient of "
    mistakes = {
        f"{listed(doubled or PIECES)} is {ranks} times too large.\n"
        "`leave` must add up in forward only: every rank has the same gradient of the result, and "
        "adding these up counts it once for each rank.": bool(doubled),
        "x has this rank's part only.\n"
        "Each rank's hidden units send back a part of it. `enter`, where `x` goes into the first "
        "two products, adds these up in backward.": _near(x, residual + own),
        "x has the part of one of the first two products only from this rank.\n"
        "Both `gate` and `up` take `x`: let both have `enter(x)`.": off == ["x"]
        and _is_half_entered(x, residual, ranks, rank),
        f"x has the residual's part {ranks} times.\n"
        "What `enter` returns is for the pieces. The residual is whole, with the same gradient on "
        "all ranks: take `x` itself.": _near(x, ranks * residual + block),
        "x lacks the residual's part.\nThe residual must not be detached.": _near(x, block),
        "x is a mean over the ranks.\nThe parts are added up, as in forward: no division.": _near(
            x, residual + block / ranks
        ),
        f"x has the block's part {ranks} times.\n"
        "It is added up twice. Once is enough: `enter(enter(x))`, or `leave` with another "
        "all_reduce in backward, does it again.": _near(x, residual + ranks * block),
        f"{listed(off)} is too small: what goes past the block counts for {ranks} times less.\n"
        "A part of it on each rank, before `leave`, makes the output right. But every rank has a "
        "copy that needs the whole gradient: add `x` and `bias` after `leave`.": (
            _near(x, residual / ranks + block)
            and all(_near(_of(gradients, n), right[n] / ranks) for n in off if n != "x")
        ),
        f"{listed(off)} is too small by a factor of {ranks}.\n"
        "A part of it on each rank makes the output right, but every rank has a copy of it that "
        "needs the whole gradient: add it after `leave`.": all(
            _near(_of(gradients, n), right[n] / ranks) for n in off
        ),
        f"{listed(off)} is not that of one process.\n"
        "`enter` does nothing in forward and adds up in backward; `leave` adds up in forward and "
        "does nothing in backward. Each stands once.": True,
    }
    judge(seen, mistakes)


def _is_half_entered(x: Tensor, residual: Tensor, ranks: int, rank: int) -> bool:
    """Whether one product has the gradients of all ranks, and the other those of its own."""

    def through(product: str, of_rank: int) -> Tensor:
        def out(t: Tensors) -> Tensor:
            gate, up, down = (_piece(name, t[name], of_rank, ranks) for name in PIECES)
            inputs = {name: t["x"] if name == product else t["x"].detach() for name in PIECES[:2]}
            return linear(silu(linear(inputs["gate"], gate)) * linear(inputs["up"], up), down)

        return _gradients_of(out, ranks)["x"]

    for entered, not_entered in (("gate", "up"), ("up", "gate")):
        added = torch.stack([through(entered, r) for r in range(ranks)]).sum(0)
        if _near(x, residual + added + through(not_entered, rank)):
            return True
    return False


def _judge_calls(told: str, run: Run) -> None:
    for name in ("forward", "backward"):
        spans = run.ranks[0].spans
        (around,) = [s for s in spans if s.kind == Kind.COMPUTE and s.name == name]
        calls = [
            s.op
            for s in spans
            if s.lane == Lane.MAIN
            and s.kind in (Kind.COMM, Kind.ISSUE)
            and around.t0_ns <= s.t0_ns <= (around.t1_ns or s.t0_ns)
        ]
        if calls != ["all_reduce"]:
            raise Wrong(
                f"{told}output and gradients are right, with {len(calls)} calls in {name}: "
                f"{listed([str(op) for op in calls]) if calls else 'none'}.",
                "One all_reduce is enough: with `enter(x)` once, used for both products, their "
                "gradients are added before they travel, and with `leave` once, the result.",
            )


def _of(gradients: dict[str, Tensor | None], name: str) -> Tensor:
    grad = gradients[name]
    assert grad is not None
    return grad


def _near(one: Tensor, other: Tensor) -> bool:
    same: bool = one.shape == other.shape and torch.allclose(one.double(), other, atol=1e-6)
    return same


# A pipeline on clocks that ranks pass on.


class Pipe(NamedTuple):
    """Seconds of each stage for one micro-batch, and the number of micro-batches."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    m: int

    def __str__(self) -> str:
        return f"forward={list(self.forward)}, backward={list(self.backward)}, m={self.m}"


PIPES = (
    Pipe((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0), 5),
    Pipe((1.0, 3.0, 1.0), (2.0, 6.0, 2.0), 4),
    Pipe((1.0, 1.0, 3.0), (4.0, 1.0, 1.0), 3),
    Pipe((2.0,), (3.0,), 5),
    Pipe((1.0, 2.0, 4.0), (1.0, 1.0, 3.0), 1),
    Pipe((2.0, 1.0, 1.0, 3.0), (1.0, 4.0, 2.0, 1.0), 6),
)
Ended = tuple[float, float]  # when a rank has done its last work, and how long it worked


@in_group
def _on_clocks(rank: int, pipes: Sequence[Pipe]) -> list[Ended]:
    """Run each pipeline by GPipe's schedule; a message has its sender's time."""
    return [_one_pipe(rank, pipe) for pipe in pipes]


def _one_pipe(rank: int, pipe: Pipe) -> Ended:
    last = len(pipe.forward) - 1
    if rank > last:
        return 0.0, 0.0
    now = worked = 0.0
    sends = []
    for seconds, before, after in (
        (pipe.forward[rank], rank - 1, rank + 1),
        (pipe.backward[rank], rank + 1, rank - 1),
    ):
        for _ in range(pipe.m):
            if 0 <= before <= last:
                arrived = torch.zeros((), dtype=torch.double)
                dist.recv(arrived, before)
                now = max(now, float(arrived))
            now, worked = now + seconds, worked + seconds
            if 0 <= after <= last:
                sends.append(dist.isend(torch.tensor(now, dtype=torch.double), after))
    for send in sends:
        if send is not None:
            send.wait()
    return now, worked


@functools.cache
def _measured() -> tuple[tuple[Ended, ...], ...]:
    """By pipe and rank; the same in every check, because no clock is real."""
    run = run_ranks(_on_clocks, (PIPES,), nprocs=4)
    of_pipes = zip(PIPES, zip(*run.values, strict=True), strict=True)
    return tuple(tuple(ended[: len(pipe.forward)]) for pipe, ended in of_pipes)


@exercise(
    "A rank begins a micro-batch when it has finished the one before, and the micro-batch has "
    "arrived: `max` of the two. Write down when each stage has finished each micro-batch.",
    "Go through the micro-batches; for each, through the stages, with one `free[r]` for the time "
    "at which stage r is free. For backward, go through the stages from the last to the first.",
    "`end` is the last time. All ranks together have `p * end` seconds and work "
    "`m * (sum(forward) + sum(backward))` of them.",
)
def check_idle(idle: Callable[[list[float], list[float], int], Any]) -> str:
    """Check `idle(forward, backward, m)` against the clocks of ranks that pass them on."""
    for pipe, ended in zip(PIPES, _measured(), strict=True):
        told = call(
            idle, list(pipe.forward), list(pipe.backward), pipe.m,
            because="It gets two lists of seconds by stage, and the number of micro-batches.",
        )  # fmt: skip
        _judge_idle(pipe, ended, number(told))
    return f"as on the ranks' clocks, in {len(PIPES)} pipelines of one to four stages."


def _judge_idle(pipe: Pipe, ended: tuple[Ended, ...], told: Any) -> None:
    p, m, end = len(ended), pipe.m, max(at for at, _ in ended)
    worked = [seconds for _, seconds in ended]
    idle = 1 - sum(worked) / (p * end)
    if near(told, idle, 1e-6):
        return
    if not is_number(told):
        raise Wrong(
            f"{pipe}: you returned {told!r}.", "Return a number: which part of the time is idle."
        )
    both = [f + b for f, b in zip(pipe.forward, pipe.backward, strict=True)]
    alone = {near(told, 1 - seconds / end) for seconds in worked}

    def is_with(end: float, of: Sequence[float] = worked) -> bool:
        """Whether this would be the share, had the pipeline ended then."""
        return bool(end) and near(told, 1 - sum(of) / (p * end))

    forward_end = sum(pipe.forward) + (m - 1) * max(pipe.forward)
    seen = f"{pipe}: the ranks were idle {idle:.3g} of the time, and you said {told:.3g}."
    mistakes = {
        f"{seen}\nThat is the part in which they work.": near(told, 1 - idle),
        f"{seen}\nThat is in percent: return a part, from 0 to 1.": near(told, 100 * idle, 1e-3),
        f"{seen}\nThat is (p - 1) / m: idle time beside work. Divide by all the time, which is "
        "work and idle time.": p > 1 and (near(told, (p - 1) / m) or near(told, idle / (1 - idle))),
        f"{seen}\nThat is (p - 1) / (m + p - 1), which holds for stages that are equally long. "
        "With others, a rank waits for the slower one, again at each "
        "micro-batch.": near(told, (p - 1) / (m + p - 1)),
        f"{seen}\nThat is p / (m + p), or has the wrong number of stages: p - 1 stages stand "
        "before the last one.": near(told, p / (m + p))
        or near(told, (p - 1) / (m + p))
        or near(told, p / (m + p - 1)),
        f"{seen}\nThat is in seconds: divide by the ranks' time, {p} x {end:g} seconds.": near(
            told, p * end - sum(worked)
        )
        or near(told, end - max(worked))
        or near(told, end - sum(worked) / p),
        f"{seen}\nThat is the ranks' parts added up: divide by the number of ranks.": p > 1
        and near(told, p * idle),
        f"{seen}\nThat is one rank's idle time. The ranks do not work equally long: take all "
        "together.": p > 1 and True in alone,
        f"{seen}\nThat is forward's part only: backward has its own wait, from the last stage to "
        "the first.": p > 1 and is_with(forward_end, [m * f for f in pipe.forward]),
        f"{seen}\nThat would hold if all stages began each micro-batch together. A rank begins "
        "when its micro-batch is there, and does not wait for those "
        "behind.": is_with((m + p - 1) * max(both))
        or is_with((m + p - 1) * (max(pipe.forward) + max(pipe.backward))),
        f"{seen}\nThat would hold if one stage were the slowest in forward and in backward. Here "
        "other ranks are: all forward comes first, and each direction waits for its own "
        "slowest.": is_with(sum(both) + (m - 1) * max(both)),
        f"{seen}\nThat would hold if a rank worked on one micro-batch at a time, and no two ranks "
        "at once.": is_with(m * sum(both)),
        f"{seen}\nThe ranks wait longer than that. A stage begins when it is free and the "
        "micro-batch has arrived; backward begins on the last stage, when that has gone forward "
        "with all micro-batches.": told < idle,
        f"{seen}\nWrite down when each stage begins each micro-batch: when it is free, and the "
        "micro-batch has arrived.": True,
    }
    judge("", mistakes)
