"""DistributedDataParallel and its options: the same losses, weights, errors and warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.parity.features import attempt, joined, weights


class Net(nn.Module):  # type: ignore[misc]
    """Two layers with a BatchNorm between them, and one layer that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.last, self.spare = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, spare: bool = False) -> torch.Tensor:
        hidden = self.first(x)
        return self.spare(hidden) if spare else self.last(hidden)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def train(
    rank: int,
    model: nn.Module,
    *,
    steps: int = 3,
    optimizer: Any = None,
    set_to_none: bool = True,
    uses: Callable[[int], dict[str, Any]] = lambda step: {},
) -> list[Any]:
    """The losses of some steps, then the last gradients and all that the model holds."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank)
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = model(torch.randn(4, 6), **uses(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [losses, gradients, weights(model)]


@joined(sample=True)
def plain_training(rank: int) -> Any:
    return train(rank, DDP(small()))


@joined(ranks=3)
def many_small_buckets(rank: int) -> Any:
    return train(rank, DDP(small(), bucket_cap_mb=0.0001), steps=4)


@joined()
def unused_parameters_found(rank: int) -> Any:
    model = DDP(Net(), find_unused_parameters=True)
    return train(rank, model, steps=4, uses=lambda step: {"spare": step % 2 == rank})


@joined()
def unused_parameters_looked_for_in_vain(rank: int) -> Any:
    return train(rank, DDP(small(), find_unused_parameters=True))


@joined(sample=True)
def unused_parameters_not_found(rank: int) -> Any:
    """The second step fails, and torch says which parameters got no gradient."""
    return attempt(train, rank, DDP(Net()))


@joined()
def static_graph(rank: int) -> Any:
    return train(rank, DDP(Net(), static_graph=True), steps=4)


@joined()
def gradients_are_views_of_buckets(rank: int) -> Any:
    return train(rank, DDP(small(), gradient_as_bucket_view=True))


@joined(ranks=3)
def gradients_kept_as_zeros(rank: int) -> Any:
    return train(rank, DDP(small(), gradient_as_bucket_view=True), set_to_none=False)


@joined()
def delayed_all_reduce(rank: int) -> Any:
    net = small()
    late = [("2.weight", net[2].weight)]
    model = DDP(
        net,
        delay_all_reduce_named_params=late,
        param_to_hook_all_reduce=net[0].weight,
    )
    train(rank, model)
    # Not the weights: now and then plain torch gives others, too.
    return [(name, weight.shape) for name, weight in model.named_parameters()]


@joined()
def parameters_ignored(rank: int) -> Any:
    net = Net()
    DDP._set_params_and_buffers_to_ignore_for_model(net, ["spare.weight", "spare.bias"])
    model = DDP(net)
    return train(rank, model)


@joined()
def no_sync(rank: int) -> Any:
    model = DDP(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    seen = []
    for _ in range(2):
        with model.no_sync():
            model(torch.randn(4, 6)).sum().backward()
        seen.append([p.grad.clone() for p in model.parameters()])
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(weights(model))
    return seen


@joined(ranks=3)
def join_uneven_inputs(rank: int) -> Any:
    model = DDP(small())
    with model.join():
        return train(rank, model, steps=2 + rank), model.module is not None


@joined()
def join_that_divides_by_the_ranks_left(rank: int) -> Any:
    model = DDP(small())
    with model.join(divide_by_initial_world_size=False):
        return train(rank, model, steps=2 + rank)


@joined()
def join_that_throws(rank: int) -> Any:
    model = DDP(small())

    def uneven() -> Any:
        with model.join(throw_on_early_termination=True):
            return train(rank, model, steps=1 + rank)

    return attempt(uneven)


@joined()
def join_of_several(rank: int) -> Any:
    model = DDP(small())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with Join([model, optimizer]):
        return train(rank, model, steps=2 + rank, optimizer=optimizer)[0]


@joined()
def hook_fp16(rank: int) -> Any:
    model = DDP(small())
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return train(rank, model)


@joined()
def hook_bf16_and_wrappers(rank: int) -> Any:
    seen = []
    for wrap in (default_hooks.fp16_compress_wrapper, default_hooks.bf16_compress_wrapper):
        model = DDP(small())
        hook = wrap(default_hooks.allreduce_hook)
        seen.append(attempt(model.register_comm_hook, None, hook))
        seen.append(attempt(train, rank, model))
    return seen


@joined()
def hook_power_sgd(rank: int) -> Any:
    model = DDP(small())
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return train(rank, model, steps=4)


@joined()
def hook_in_cpp(rank: int) -> Any:
    model = DDP(small())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return train(rank, model)


@joined(sample=True)
def hook_of_the_learner(rank: int) -> Any:
    """A hook sees the buckets that it would see without us, and only one can be registered."""
    seen: list[Any] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def] # torch reads no types in quotes
        seen.append((state, bucket.index(), bucket.is_last(), bucket.buffer().clone()))
        seen.append([gradient.shape for gradient in bucket.gradients()])
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / 2)

    model = DDP(small(), bucket_cap_mb=0.0001)
    model.register_comm_hook("state", hook)
    again = attempt(model.register_comm_hook, None, default_hooks.fp16_compress_hook)
    refused = attempt(DDP(small()).register_comm_hook, None, lambda state: None)
    return train(rank, model), seen, again, refused


@joined()
def hook_that_raises(rank: int) -> Any:
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        raise LookupError("the hook's own")

    model = DDP(small())
    model.register_comm_hook(None, hook)
    return attempt(train, rank, model)


@joined()
def hook_of_post_local_sgd(rank: int) -> Any:
    from torch.distributed.algorithms.model_averaging import averagers

    model = DDP(small())
    state = post_localSGD_hook.PostLocalSGDState(None, dist.group.WORLD, start_localSGD_iter=1)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        averagers.PeriodicModelAverager(period=2, warmup_steps=1),
    )
    return train(rank, model, steps=4, optimizer=optimizer)


@joined()
def mixed_precision(rank: int) -> Any:
    from torch.nn.parallel.distributed import _MixedPrecision

    precision = _MixedPrecision(
        param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
    )
    return attempt(lambda: train(rank, DDP(small(), mixed_precision=precision)))


@joined()
def buffers_broadcast(rank: int) -> Any:
    return train(rank, DDP(Net(), find_unused_parameters=True))


@joined()
def buffers_kept(rank: int) -> Any:
    return train(rank, DDP(Net(), find_unused_parameters=True, broadcast_buffers=False))


@joined()
def a_hook_for_buffers(rank: int) -> Any:
    model = DDP(Net(), find_unused_parameters=True)

    def average(module: DDP, buffers: dict[str, torch.Tensor]) -> None:
        for buffer in buffers.values():
            dist.all_reduce(buffer, op=dist.ReduceOp.MAX)

    model._register_buffer_comm_hook(model, average)
    return train(rank, model)


@joined()
def evaluation(rank: int) -> Any:
    model = DDP(Net(), find_unused_parameters=True)
    train(rank, model, steps=1)
    model.eval()
    torch.manual_seed(7 + rank)
    with torch.no_grad():
        first = model(torch.randn(3, 6))
    with torch.inference_mode():
        second = model(torch.randn(3, 6)).tolist()
    return first, second, model.training, [name for name, _ in model.named_parameters()]


@joined()
def backward_twice(rank: int) -> Any:
    model = DDP(small())
    loss = model(torch.ones(4, 6)).sum()
    loss.backward()
    return attempt(loss.backward)


@joined()
def forward_twice(rank: int) -> Any:
    model = DDP(small())
    both = model(torch.ones(4, 6)).sum() + model(torch.full((4, 6), 2.0)).sum()
    both.backward()
    return [p.grad for p in model.parameters()]


@joined()
def gradients_of_a_gradient(rank: int) -> Any:
    model = DDP(small())
    x = torch.full((2, 6), 1.0 + rank, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    return first.detach(), [p.grad for p in model.parameters()]


@joined()
def refused_models(rank: int) -> Any:
    frozen = small().requires_grad_(False)
    meta = nn.Linear(2, 2, device="meta")
    lazy = nn.LazyLinear(2)
    several = [
        attempt(DDP, frozen),
        attempt(DDP, meta),
        attempt(DDP, lazy),
        attempt(DDP, nn.ReLU()),
        attempt(DDP, small(), device_ids=[0]),
        attempt(DDP, small(), device_ids=[0, 1]),
        attempt(DDP, small(), bucket_cap_mb="much"),
        attempt(DDP, small(), static_graph=True, nonsense=1),
        attempt(DDP, small(), process_group="world"),
        attempt(DDP, "model"),
    ]
    return [text if isinstance(text, str) else type(text).__name__ for text in several]
