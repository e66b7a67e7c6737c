"""Checks of lessons 16 and 16b: right answers pass, wrong ones get the right explanation."""

from __future__ import annotations

import functools
import sys
from fractions import Fraction
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear, silu

from ddp_lessons.exercises.model_in_pieces import check_block, check_idle
from tests.support import answers

pytestmark = pytest.mark.ranks
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as functions from a cell are
cloudpickle.register_pickle_by_value(answers)


def summed(tensor: Any) -> Any:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


class Leave(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, part: Any) -> Any:
        return summed(part)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad


class Enter(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, part: Any) -> Any:
        return summed(part)


class BothWays(torch.autograd.Function):  # type: ignore[misc]
    forward = staticmethod(Leave.forward)
    backward = staticmethod(Enter.backward)


class EnterMean(Enter):
    @staticmethod
    def backward(ctx: Any, part: Any) -> Any:
        return summed(part) / dist.get_world_size()


def same(x: Any) -> Any:
    return x


def made(
    enter: Any = Enter.apply,
    leave: Any = Leave.apply,
    ends: Any = lambda x, part, bias, leave: x + leave(part) + bias,
    between: Any = same,
) -> Any:
    """The block with other functions in its places."""

    def block(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
        inner = enter(x)
        inner = between(silu(linear(inner, gate)) * linear(inner, up))
        return ends(x, linear(inner, down), bias, leave)

    return block


gated = made()


def with_hooks(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
    """A hook for the gradient, and a sum whose gradient is that of this rank's part."""
    inner = x.view_as(x)
    inner.register_hook(summed)
    part = linear(silu(linear(inner, gate)) * linear(inner, up), down)
    return x + (part + (summed(part) - part).detach()) + bias


def in_one_product(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
    a, b = linear(Enter.apply(x), torch.cat([gate, up])).chunk(2, dim=1)
    return torch.add(Leave.apply((a * a.sigmoid() * b) @ down.T), x + bias)


class Whole(torch.autograd.Function):  # type: ignore[misc]
    """All of the block's sum is one function."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        ctx.save_for_backward(*given)
        return summed(Whole.part(*given))

    @staticmethod
    def part(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            part = Whole.part(*given)
        of_x, *others = torch.autograd.grad(part, given, grad)
        return summed(of_x), *others


def as_one_function(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
    return Whole.apply(x, gate, up, down).add(x).add(bias)


def by_async(x: Any) -> Any:
    total = x.detach().clone()
    dist.all_reduce(total, async_op=True).wait()
    return x + (total - x).detach()


def enters_one(product: str) -> Any:
    def block(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
        into = {name: Enter.apply(x) if name == product else x for name in ("gate", "up")}
        part = linear(silu(linear(into["gate"], gate)) * linear(into["up"], up), down)
        return x + Leave.apply(part) + bias

    return block


def enters_each(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
    inner = silu(linear(Enter.apply(x), gate)) * linear(Enter.apply(x), up)
    return x + Leave.apply(linear(inner, down)) + bias


def enters_the_residual(x: Any, *given: Any) -> Any:
    *pieces, bias = given
    x = Enter.apply(x)
    return x + Leave.apply(Whole.part(x, *pieces)) + bias


def leaves_early(x: Any, gate: Any, up: Any, down: Any, bias: Any) -> Any:
    inner = silu(Leave.apply(linear(Enter.apply(x), gate))) * linear(x, up)
    return x + Leave.apply(linear(inner, down)) + bias


def on_rank_0(x: Any, part: Any, bias: Any, leave: Any) -> Any:
    return x + leave(part + bias if dist.get_rank() == 0 else part)


def by_share(x: Any, part: Any, bias: Any, leave: Any) -> Any:
    return x + leave(part + bias / dist.get_world_size())


def residual_by_share(x: Any, part: Any, bias: Any, leave: Any) -> Any:
    return leave(part + (x + bias) / dist.get_world_size())


def mean(tensor: Any) -> Any:
    return Leave.apply(tensor) / dist.get_world_size()


def only_rank_0(tensor: Any) -> Any:
    return Leave.apply(tensor) if dist.get_rank() == 0 else tensor


def idle(forward: list[float], backward: list[float], m: int) -> Any:
    free = [0.0] * len(forward)
    stages = list(range(len(forward)))
    for seconds, path in ((forward, stages), (backward, stages[::-1])):
        for _ in range(m):
            arrives = 0.0
            for stage in path:
                free[stage] = arrives = max(arrives, free[stage]) + seconds[stage]
    return part_of(forward, backward, m, max(free))


def part_of(forward: Any, backward: Any, m: int, end: Any) -> Any:
    return 1 - m * (sum(forward) + sum(backward)) / (len(forward) * end)


def ends_at(end: Any) -> Any:
    """The share, if the pipeline ends at `end(forward, backward, m, p)`."""
    return lambda f, b, m: part_of(f, b, m, end(f, b, m, len(f)))


def short(f: Any, b: Any, m: int, p: int) -> Any:
    return sum(f) + sum(b) + (m - 1) * (max(f) + max(b))


def in_fractions(f: Any, b: Any, m: int) -> Fraction:
    f, b = ([Fraction(seconds) for seconds in each] for each in (f, b))
    return Fraction(part_of(f, b, m, short(f, b, m, 0)))


def in_numpy(f: Any, b: Any, m: int) -> Any:
    def done(seconds: Any) -> Any:
        at = np.zeros((len(seconds) + 1, m + 1))
        for stage in range(1, len(seconds) + 1):
            for i in range(1, m + 1):
                at[stage, i] = max(at[stage - 1, i], at[stage, i - 1]) + seconds[stage - 1]
        return at[-1, -1]

    end = done(f) + done(b[::-1])
    return np.mean([1 - m * (x + y) / end for x, y in zip(f, b, strict=True)])


def by_recursion(f: Any, b: Any, m: int) -> Any:
    @functools.cache
    def done(path: Any, i: int) -> float:
        return float(max(done(path[:-1], i), done(path, i - 1)) + path[-1]) if path and i else 0.0

    end = done(tuple(f), m) + done(tuple(reversed(b)), m)
    return torch.tensor(part_of(f, b, m, end), dtype=torch.double)


def backward_at_once(f: Any, b: Any, m: int) -> Any:
    """As if each direction had a rank of its own."""
    path = [*f, *reversed(b)]
    return part_of(f, b, m, sum(path) + (m - 1) * max(path))


def equal_stages(f: Any, b: Any, m: int) -> Any:
    return (len(f) - 1) / (m + len(f) - 1)


def of_rank(rank: int) -> Any:
    return lambda f, b, m: 1 - m * (f[rank] + b[rank]) / short(f, b, m, 0)


RIGHT: list[tuple[Any, Any]] = [
    (check_block, gated),
    (check_block, with_hooks),
    (check_block, in_one_product),
    (check_block, as_one_function),
    (check_block, made(leave=by_async)),
    (check_block, answers.Called(answers.decorated(gated))),
    (check_idle, idle),
    (check_idle, ends_at(short)),
    (check_idle, in_fractions),
    (check_idle, in_numpy),
    (check_idle, by_recursion),
    (check_idle, answers.Called(answers.decorated(idle))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (
        check_block,
        made(leave=same),
        "2 ranks: each rank has a different output.*own part of the sum",
    ),
    (
        check_block,
        made(ends=lambda x, part, bias, leave: x + leave(part + bias)),
        "has `bias` 2 times.*Add `bias` after `leave`",
    ),
    (
        check_block,
        made(ends=lambda x, part, bias, leave: leave(x + part) + bias),
        "has the residual `x` 2 times",
    ),
    (
        check_block,
        made(ends=lambda x, part, bias, leave: leave(x + part + bias)),
        "has `bias` and the residual `x` 2 times",
    ),
    (check_block, made(leave=mean), "was divided by 2.*a sum's, not a mean's"),
    (check_block, made(ends=lambda x, part, bias, leave: x + leave(part)), "`bias` is missing"),
    (
        check_block,
        made(ends=lambda x, part, bias, leave: leave(part) + bias),
        "the residual is missing",
    ),
    (check_block, made(enter=Leave.apply), "`x` was added up over the ranks before the block"),
    (check_block, leaves_early, "not that of one process.*mixes them"),
    (check_block, made(between=Leave.apply), "not that of one process.*mixes them"),
    (
        check_block,
        made(leave=lambda part: Leave.apply(Leave.apply(part))),
        "taken over the ranks 2 times.*one is enough",
    ),
    (
        check_block,
        made(leave=BothWays.apply),
        "gradient of gate, up and down is 2 times too large.*in forward only",
    ),
    (check_block, made(enter=same), "gradient of x has this rank's part only"),
    (check_block, enters_one("gate"), "one of the first two products only"),
    (check_block, enters_one("up"), "one of the first two products only"),
    (check_block, enters_the_residual, "the residual's part 2 times.*take `x` itself"),
    (
        check_block,
        made(ends=lambda x, part, bias, leave: x.detach() + leave(part) + bias),
        "lacks the residual's part",
    ),
    (check_block, made(enter=EnterMean.apply), "x is a mean over the ranks"),
    (
        check_block,
        made(enter=lambda x: Enter.apply(Enter.apply(x))),
        "the block's part 2 times.*added up twice",
    ),
    (
        check_block,
        made(leave=summed),
        "on rank 0 gate, up and down got no gradient.*must be autograd functions",
    ),
    (check_block, made(ends=on_rank_0), "on rank 1 bias got no gradient.*drift apart"),
    (check_block, made(ends=by_share), "bias is too small by a factor of 2"),
    (check_block, made(ends=residual_by_share), "of x and bias is too small: what goes past the"),
    (check_block, enters_each, "2 calls in backward: all_reduce and all_reduce.*One .* enough"),
    (check_block, made(leave=only_rank_0), "same calls in the same order"),
    (check_block, answers.prints(gated), "rank 0 returned NoneType.*the block's output"),
    (check_block, lambda *given: (gated(*given),), "rank 0 returned tuple"),
    (check_block, lambda *given: gated(*given).sum(), r"returned Tensor of shape \(\)"),
    (check_block, lambda x: x, "failed on real ranks.*TypeError"),
    (check_idle, equal_stages, r"\[1.0, 3.0, 1.0\].*holds for stages that are equally long"),
    (check_idle, lambda f, b, m: (len(f) - 1) / m, r"idle 0.375 .*you said 0.6.*idle time beside"),
    (check_idle, lambda f, b, m: len(f) / (m + len(f)), "the wrong number of stages"),
    (check_idle, lambda *given: 1 - idle(*given), "the part in which they work"),
    (check_idle, lambda *given: 100 * idle(*given), "in percent"),
    (
        check_idle,
        lambda f, b, m: idle(f, b, m) * short(f, b, m, 0) * len(f),
        "in seconds: divide by the ranks' time, 4 x 24 seconds",
    ),
    (check_idle, lambda f, b, m: idle(f, b, m) * len(f), "parts added up"),
    (check_idle, of_rank(0), "That is one rank's idle time"),
    (check_idle, of_rank(-1), "That is one rank's idle time"),
    (
        check_idle,
        lambda f, b, m: 1 - m * sum(f) / len(f) / (sum(f) + (m - 1) * max(f)),
        r"\[1.0, 1.0, 3.0\].*forward's part only",
    ),
    (
        check_idle,
        ends_at(lambda f, b, m, p: (m + p - 1) * (max(f) + max(b))),
        "began each micro-batch together",
    ),
    (
        check_idle,
        ends_at(lambda f, b, m, p: sum(f) + sum(b) + (m - 1) * max(map(sum, zip(f, b)))),  # noqa: B905
        r"\[1.0, 1.0, 3.0\].*each direction waits for its own slowest",
    ),
    (check_idle, ends_at(lambda f, b, m, p: m * (sum(f) + sum(b))), "no two ranks at once"),
    (
        check_idle,
        ends_at(lambda f, b, m, p: m * max(map(sum, zip(f, b)))),  # noqa: B905
        "The ranks wait longer than that",
    ),
    (check_idle, backward_at_once, "The ranks wait longer than that.*backward begins on the last"),
    (check_idle, answers.prints(idle), "you returned None.*Return a number"),
    (check_idle, lambda f, b: 0.0, "raised TypeError.*two lists of seconds"),
    (check_idle, answers.recurses, "RecursionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
