"""What a rank does in the suite of parity: functions that know nothing of this package.

Each is run by `launch` and by plain torch; test_parity.py compares them. A feature is called with
its rank (and `args`, if it has any) and may return, raise or print anything that is the same on
every run.
"""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Feature:
    """One function and how it is run.

    `alone` is for what ends its process, leaves it changed or asks what a fresh one is like: its
    plain ranks run nothing else, and their exit codes and last words are compared, too. `args`
    makes, in the parent, what all ranks are called with. A feature in the `sample` is part of
    `make whole`.
    """

    name: str
    run: Callable[..., Any]
    ranks: int
    alone: bool
    sample: bool
    env: Mapping[str, str]
    args: Callable[[], tuple[Any, ...]] | None


FEATURES: dict[str, Feature] = {}


def feature(
    ranks: int = 2,
    *,
    alone: bool = False,
    sample: bool = False,
    env: Mapping[str, str] | None = None,
    args: Callable[[], tuple[Any, ...]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the suite, under the names of its module and its own."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        assert name not in FEATURES
        apart = alone or bool(env or args)
        FEATURES[name] = Feature(name, function, ranks, apart, sample, env or {}, args)
        return function

    return add


def joined(ranks: int = 2, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same for a function that runs in a process group of gloo's."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def in_group(rank: int, *args: Any) -> Any:
            dist.init_process_group("gloo")
            value = function(rank, *args)
            gc.collect()  # plain DDP that is freed after the group is left may hang
            # A rank that leaves early makes others fail. A barrier would do, but gloo's also raises
            # the errors of calls whose threads have not quite ended.
            dist.all_reduce(torch.zeros(1))
            dist.destroy_process_group()
            return value

        return feature(ranks, **options)(in_group)

    return add


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or how a traceback of what it raises would end."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return text_of(error)


def text_of(error: BaseException) -> str:
    """How a traceback ends: type and text."""
    return "".join(traceback.format_exception_only(error)).strip()


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all that a module's state_dict holds."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]
