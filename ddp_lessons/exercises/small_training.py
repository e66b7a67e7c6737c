"""A small model and its data, for checks that compare ranks with a single-process training.

Runs in workers and in the parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

SAMPLES = 48


def new_layer() -> nn.Module:
    """A linear layer from 4 features to 3 classes, with the same float64 weights in each call."""
    layer = nn.utils.skip_init(nn.Linear, 4, 3, dtype=torch.double)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def samples() -> tuple[Tensor, Tensor]:
    """The inputs, `(SAMPLES, 4)`, and labels, `(SAMPLES,)`; the same on each call."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.double)
    return inputs, torch.randint(3, (SAMPLES,), generator=generator)


def share(rank: int, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A rank's part of the samples; `counts` are the sizes of all parts."""
    first = sum(counts[:rank])
    inputs, labels = samples()
    return inputs[first : first + counts[rank]], labels[first : first + counts[rank]]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all elements, in one dimension."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradients(model: nn.Module) -> Tensor:
    """A flat copy of the parameters' gradients, with zeros for those that are None."""
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def descend(model: nn.Module, lr: float) -> None:
    """Take one SGD step."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= lr * parameter.grad
