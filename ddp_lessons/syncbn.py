"""Synchronised batch norm that also runs on CPU tensors.

Runs in workers, called by lessons. `torch.nn.SyncBatchNorm` needs a GPU: it computes in a CUDA
kernel. This module uses ordinary tensor operations and two collectives, so it runs on CPU tensors
with any backend. Lesson 09 builds it by hand.

::

    forward     all_gather of each rank's [count, mean, sum of squared deviations]
    backward    all_reduce of [sum of dy, sum of dy * normalised x]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

TORCH_RUNS_ON = ("cuda", "xpu", "hpu")  # device types that torch.nn.SyncBatchNorm supports


def convert_sync_batchnorm(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, *, quiet: bool = False
) -> nn.Module:
    """Make every batch norm layer of a model a SyncBatchNorm, and print which kind.

    Layers on a GPU become `torch.nn.SyncBatchNorm`, others this module's `SyncBatchNorm`, which
    computes as torch's does if the model moves to a GPU later. Convert before you wrap the model in
    DistributedDataParallel.

    Parameters
    ----------
    model : Module
        Its layers are replaced; parameters and buffers stay the same objects with the same names,
        so optimizers and checkpoints still work.
    process_group : ProcessGroup, optional
        The ranks that share their statistics; by default all.
    quiet : bool
        Rank 0 prints no line on what was converted.

    Returns
    -------
    Module
        The same model, or the new layer if `model` is itself a batch norm layer.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If it is already wrapped in DistributedDataParallel.
    """
    _refuse_nonsense(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]
    ours = [layer for layer in layers if _device_type(layer) not in TORCH_RUNS_ON]
    for layer in ours:
        layer.__class__ = SyncBatchNorm
    if not (quiet or (dist.is_initialized() and dist.get_rank())):
        print(_what_was_converted(len(layers), len(ours)))
    return model


def _refuse_nonsense(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_sync_batchnorm needs a torch.nn.Module, got {type(model)}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel already, which knows the old layers "
            "only. Convert first, then wrap: DDP(convert_sync_batchnorm(model))."
        )


def _device_type(layer: nn.SyncBatchNorm) -> str:
    tensors = (*layer.parameters(), *layer.buffers())
    return tensors[0].device.type if tensors else "cpu"


def _what_was_converted(layers: int, ours: int) -> str:
    if not layers:
        return "no batch norm layer to convert"
    count = f"{layers} batch norm layer{'s' if layers > 1 else ''}"
    if not ours:
        return f"{count} converted to torch.nn.SyncBatchNorm"
    part = "" if ours == layers else f", {layers - ours} of them torch's own"
    return f"{count} converted to ddp_lessons.syncbn.SyncBatchNorm{part}: torch's own needs a GPU"


class SyncBatchNorm(_BatchNorm):  # type: ignore[misc]
    """`torch.nn.SyncBatchNorm` that accepts CPU tensors, too.

    Input `(n, num_features, ...)` of 2 to 5 dimensions; `n` may differ from rank to rank, and be 0
    on some. Training normalises each channel with the mean and variance over the batches of all
    ranks of `process_group`, as `torch.nn.BatchNorm` does over the whole batch; evaluation uses the
    running statistics, without communication. Arguments, parameters, buffers and their names are
    those of `torch.nn.SyncBatchNorm`, which computes for tensors on a GPU. It is not a subclass,
    because DistributedDataParallel refuses those on CPU.

    Raises
    ------
    ValueError
        If the input has fewer than 2 dimensions or the wrong number of channels, or if in training
        all ranks together have only one value a channel, which has no variance.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`; the result has its shape and type."""
        if input.device.type in TORCH_RUNS_ON:
            return nn.SyncBatchNorm.forward(self, input)
        self._check_input_dim(input)
        if input.size(1) != self.num_features:
            raise ValueError(
                f"SyncBatchNorm({self.num_features}) got an input of shape {tuple(input.shape)}: "
                f"dimension 1 is that of the channels and must be {self.num_features}"
            )
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return super().forward(input)
        output, count, mean, var = _Normalize.apply(input, self.weight, self.bias, self.eps, group)
        if self.track_running_stats:
            self._track(count, mean, var)
        return output

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _track(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics, with the unbiased variance as BatchNorm does."""
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


def combine(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of parts into those of the whole.

    Parameters
    ----------
    counts : Tensor
        `(parts, 1)`, the number of values of each part; 0 is allowed.
    means, squares : Tensor
        `(parts, channels)`, each part's mean and its sum of squared deviations from that mean.

    Returns
    -------
    count, mean, variance : Tensor
        `(1,)`, `(channels,)` and `(channels,)`; the variance is the biased one, divided by count.

    Notes
    -----
    T. F. Chan, G. H. Golub and R. J. LeVeque, 1979. Unlike `sum(x^2)/n - mean^2` it loses no digits
    where the mean is large beside the deviations.
    """
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    square = (squares + counts * (means - mean).square()).sum(0)
    return count, mean, square / count


class _Normalize(torch.autograd.Function):  # type: ignore[misc]
    """Normalise over all ranks; also return the global count, mean and biased variance."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = _exact(x)
        count, mean, var = combine(*_gathered(exact, group))
        if count < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, and all "
                f"{dist.get_world_size(group)} ranks together have {int(count)}: "
                f"this rank's input has shape {tuple(x.shape)}. Use a larger batch."
            )
        mean32, inverse = mean.to(exact.dtype), (var + eps).rsqrt().to(exact.dtype)
        normal = (exact - _as(mean32, x)) * _as(inverse, x)
        ctx.save_for_backward(x, weight, mean32, inverse)
        ctx.group, ctx.count = group, float(count)
        ctx.mark_non_differentiable(count, mean, var)
        if weight is not None:
            normal = normal * _as(weight, x)
        if bias is not None:
            normal = normal + _as(bias, x)
        return normal.to(x.dtype), count, mean, var

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dy = _exact(dy)
        normal = (_exact(x) - _as(mean, x)) * _as(inverse, x)
        # Gradients of weight and bias are this rank's own: DDP averages them like all others.
        of_bias, of_weight = _sum(dy), _sum(dy * normal)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([of_bias, of_weight])
            dist.all_reduce(sums, group=ctx.group)
            of_mean, of_deviation = sums / ctx.count
            scale = inverse if weight is None else inverse * weight
            dx = (dy - _as(of_mean, x) - normal * _as(of_deviation, x)) * _as(scale, x)
            dx = dx.to(x.dtype)
        return (
            dx,
            of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            of_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _gathered(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Count, means and sums of squared deviations of every rank, in double precision."""
    channels, count = x.size(1), x.numel() // x.size(1)
    mean = _sum(x) / max(count, 1)
    square = _sum((x - _as(mean, x)).square())
    own = torch.cat([x.new_tensor([count], dtype=torch.float64), mean.double(), square.double()])
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, own, group=group)
    counts, means, squares = torch.stack(ranks).split([1, channels, channels], dim=1)
    return counts, means, squares


def _exact(x: Tensor) -> Tensor:
    """The tensor in at least float32: half precision is too coarse for sums."""
    return x if x.dtype == torch.float64 else x.float()


def _sum(x: Tensor) -> Tensor:
    """The sum of each channel."""
    return x.sum([0, *range(2, x.dim())])


def _as(channels: Tensor, x: Tensor) -> Tensor:
    """One value a channel, in a shape that broadcasts over `x`."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))
