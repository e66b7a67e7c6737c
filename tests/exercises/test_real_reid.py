"""The checks of the re-identification reading: right answers pass; wrong ones are explained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_lessons.exercises.real_reid import check_average, check_find_drift
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def everywhere(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach())
    return parts


def reduced(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    copy = tensor.detach().clone()
    dist.all_reduce(copy, op)
    return copy


def named(differs: Callable[[Tensor], bool]) -> Callable[[nn.Module], Any]:
    """An answer that names the parameters for which this holds."""
    return lambda module: [name for name, p in module.named_parameters() if differs(p)]


def min_max(p: Tensor) -> bool:
    return not torch.equal(reduced(p, dist.ReduceOp.MAX), reduced(p, dist.ReduceOp.MIN))


def gathered(p: Tensor) -> bool:
    first, *others = everywhere(p)
    return any(not torch.equal(first, other) for other in others)


def from_zero(p: Tensor) -> bool:
    """Compares with rank 0 alone."""
    zero = p.detach().clone()
    dist.broadcast(zero, src=0)
    return not torch.equal(zero, p.detach())


def votes(p: Tensor) -> bool:
    return bool(reduced(torch.tensor(float(from_zero(p)))) > 0)


def squares(p: Tensor) -> bool:
    mean = reduced(p) / dist.get_world_size()
    return bool(reduced((p.detach() - mean).abs()).max() > 1e-6)


def as_objects(module: nn.Module) -> set[str]:
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, {k: p.tolist() for k, p in module.named_parameters()})
    return {name for state in states for name in state if state[name] != states[0][name]}


def by_generator(module: nn.Module) -> Iterable[str]:
    yield from named(gathered)(module)


def by_mean_of_sums(p: Tensor) -> bool:
    total = p.detach().double().sum()
    return not torch.allclose(reduced(total) / dist.get_world_size(), total, atol=1e-6)


def of_last(p: Tensor) -> bool:
    parts = everywhere(p)
    return not torch.equal(parts[0], parts[-1])


def loosely(p: Tensor) -> bool:
    return any(not torch.allclose(p.detach(), other, atol=0.1) for other in everywhere(p))


def in_place(p: Tensor) -> bool:
    own = p.detach().clone()
    dist.all_reduce(p.data)
    return not torch.allclose(p.detach() / dist.get_world_size(), own)


def prints(module: nn.Module) -> None:
    print(as_objects(module))


def only_zero_calls(module: nn.Module) -> list[str]:
    return named(gathered)(module) if dist.get_rank() == 0 else []


def zero_knows(module: nn.Module) -> list[str]:
    names = named(gathered)(module)
    return names if dist.get_rank() == 0 else []


def all_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()] if dist.get_world_size() > 1 else []


def flags(module: nn.Module) -> list[bool]:
    return [gathered(p) for p in module.parameters()]


def zeros_for_none(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def each(change: Callable[[nn.Parameter], None]) -> Callable[[list[nn.Parameter]], None]:
    """An answer that does this to each parameter."""

    def answer(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            change(p)

    return answer


def mean(p: nn.Parameter) -> None:
    p.grad = reduced(zeros_for_none(p)) / dist.get_world_size()


def flat(parameters: list[nn.Parameter]) -> None:
    everything = torch.cat([zeros_for_none(p).flatten() for p in parameters])
    dist.all_reduce(everything)
    parts = (everything / dist.get_world_size()).split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p)


def asynchronous(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = zeros_for_none(p) / dist.get_world_size()
    for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
        work.wait()


def stacked(p: nn.Parameter) -> None:
    p.grad = torch.stack(everywhere(zeros_for_none(p))).mean(0)


def unless_nobody(p: nn.Parameter) -> None:
    """None stays where no rank has a gradient."""
    if reduced(torch.tensor(float(p.grad is not None))) > 0:
        mean(p)


def to_zero_and_back(p: nn.Parameter) -> None:
    p.grad = zeros_for_none(p) / dist.get_world_size()
    dist.reduce(p.grad, dst=0)
    dist.broadcast(p.grad, src=0)


def total(p: nn.Parameter) -> None:
    p.grad = reduced(zeros_for_none(p))


def halved(p: nn.Parameter) -> None:
    p.grad = reduced(zeros_for_none(p)) / (1 if dist.get_world_size() == 1 else 2)


def of_holders(p: nn.Parameter) -> None:
    held = reduced(torch.tensor(float(p.grad is not None)))
    p.grad = reduced(zeros_for_none(p)) / max(1.0, float(held))


def skips_none(p: nn.Parameter) -> None:
    if p.grad is not None:
        mean(p)


def in_copy(p: nn.Parameter) -> None:
    reduced(zeros_for_none(p)) / dist.get_world_size()


def of_zero(p: nn.Parameter) -> None:
    p.grad = zeros_for_none(p)
    dist.broadcast(p.grad, src=0)


def twice(p: nn.Parameter) -> None:
    p.grad = reduced(zeros_for_none(p) / dist.get_world_size()) / dist.get_world_size()


def weights(p: nn.Parameter) -> None:
    p.data = reduced(p) / dist.get_world_size() + 1


def only_own(p: nn.Parameter) -> None:
    """Takes part, but a rank without a gradient does not keep the mean."""
    result = reduced(zeros_for_none(p)) / dist.get_world_size()
    if p.grad is not None:
        p.grad = result


def if_rank_zero(parameters: list[nn.Parameter]) -> None:
    if dist.get_rank() == 0:
        each(mean)(parameters)


def no_none(p: nn.Parameter) -> None:
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


RIGHT: list[tuple[Any, Any]] = [
    (check_find_drift, answers.mixed(named(min_max), named(gathered))),
    (check_find_drift, answers.mixed(named(squares), as_objects)),
    (check_find_drift, answers.mixed(named(votes), answers.Called(by_generator))),
    (check_average, answers.mixed(each(mean), flat)),
    (check_average, answers.mixed(asynchronous, each(stacked))),
    (check_average, answers.mixed(each(to_zero_and_back), answers.Called(each(unless_nobody)))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_find_drift, named(from_zero), "Other ranks got it right"),
    (check_find_drift, named(by_mean_of_sums), "is missing.*opposite|got it right"),
    (check_find_drift, named(of_last), "is missing"),
    (check_find_drift, named(loosely), "is missing"),
    (check_find_drift, named(in_place), "Give them a copy"),
    (check_find_drift, prints, "`return` missing"),
    (check_find_drift, only_zero_calls, "did not come to an end together"),
    (check_find_drift, zero_knows, "Other ranks got it right"),
    (check_find_drift, all_names, "do not differ"),
    (check_find_drift, flags, "Return a list of names"),
    (check_find_drift, lambda module: [], "is missing"),
    (check_average, each(total), "That is the sum"),
    (check_average, each(halved), "Add up over all ranks"),
    (check_average, each(of_holders), "number of ranks that had a gradient"),
    (check_average, each(skips_none), "skipped a call"),
    (check_average, each(in_copy), "still the rank's own gradient"),
    (check_average, each(of_zero), "one rank's gradient"),
    (check_average, each(twice), "more than once"),
    (check_average, each(weights), "parameters were changed"),
    (check_average, each(only_own), "has no gradient"),
    (check_average, if_rank_zero, "did not come to an end together"),
    (check_average, each(no_none), "NoneType|skipped a call"),
]


@answers.right(RIGHT)
def test_right_answers_pass(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_wrong_answers_are_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


@pytest.mark.parametrize("check", [check_find_drift, check_average])
def test_nothing_is_said_of_an_answer_that_is_not_there(check: Any) -> None:
    assert check(...).passed is None
