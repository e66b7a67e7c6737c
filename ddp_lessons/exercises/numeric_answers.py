"""Compares answers that are numbers, and predicted waiting times with measured ones.

Runs in the parent; all but `predict` also in workers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

from ddp_lessons.exercises.framework import Wrong, call
from ddp_lessons.text import count

TOLERANCE = 0.15  # seconds


def plain(value: Any) -> Any:
    """A tensor or array as Python numbers; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def numbers(value: Any) -> Any:
    """A tensor, an array, an iterable or what is nested of them as one flat list of numbers.

    Anything else, as None or a text, comes back as it is.
    """
    value = plain(value)
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return value
    parts = [numbers(part) for part in value]
    return [n for part in parts for n in (part if isinstance(part, list) else [part])]


def number(value: Any) -> Any:
    """A tensor or array of one element as a Python number; other values as they are."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):  # no tensor; more than one element
        return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number: an int, a float, one of numpy's, a Fraction."""
    return isinstance(value, Real) and math.isfinite(value)


def number_or_text(value: object) -> float | str:
    """A number, or the text of anything else: a rank can send both, whatever was returned."""
    value = number(value)
    return value if is_number(value) else repr(value)


def near(value: object, target: float, tolerance: float = 1e-6) -> bool:
    """Whether an answer is a number, and right up to rounding."""
    value = number(value)
    return is_number(value) and abs(value - target) < tolerance


def predict(
    waits: Callable[..., Sequence[float]], given: Sequence[Any], world_size: int, because: str
) -> list[float]:
    """Return the learner's prediction, in seconds by rank; `because` says what `waits` accepts."""

    @functools.wraps(waits)
    def seconds(*given: Any) -> list[float]:
        return [float(number) for number in waits(*given)]

    answer: list[float] = call(seconds, *given, because=because)
    if len(answer) != world_size:
        numbers_given, ranks = count(len(answer), "number"), count(world_size, "rank")
        raise Wrong(
            f"waits({', '.join(map(str, given))}) gave {numbers_given} for {ranks}.", because
        )
    return answer


def first_miss(predicted: Sequence[float], measured: Sequence[float]) -> int | None:
    """Return the first rank whose prediction is off by more than the tolerance."""
    pairs = enumerate(zip(predicted, measured, strict=True))
    return next(
        (rank for rank, (a, b) in pairs if not abs(a - b) <= TOLERANCE), None
    )  # nan is a miss


def wrong_rule(predicted: Sequence[float], rules: Mapping[str, Sequence[float]]) -> str:
    """Return the text of the first rule that gives these numbers; "" if none does."""
    for text, numbers in rules.items():
        if all(abs(a - b) < 1e-6 for a, b in zip(predicted, numbers, strict=True)):
            return text
    return ""
