"""The checks of lesson 19: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ddp_lessons.exercises.scaling import (
    TRAININGS,
    WALLS,
    check_efficiency,
    check_fit,
    check_wall,
)
from tests.support import answers


def ring_steps(n: int) -> float:
    return 2 * (n - 1)


def ring_part(n: int) -> float:
    return 2 * (n - 1) / n


def fit(points: Any, steps: Any = ring_steps, part: Any = ring_part, relative: bool = True) -> Any:
    terms = np.array([(steps(n), part(n) * nbytes) for n, nbytes, _ in points])
    seconds = np.array([t for *_, t in points])
    weights = 1 / seconds if relative else np.ones(len(points))
    (alpha, beta), *_ = np.linalg.lstsq(terms * weights[:, None], seconds * weights, rcond=None)
    return alpha, beta


def fit_by_cramer(points: Any) -> Any:
    """From the first and the last point alone."""
    (n, a, t), (m, b, u) = points[0], points[-1]
    one, two = (ring_steps(n), ring_part(n) * a), (ring_steps(m), ring_part(m) * b)
    det = one[0] * two[1] - one[1] * two[0]
    return (t * two[1] - one[1] * u) / det, (one[0] * u - t * two[0]) / det


def fit_by_normal_equations(points: Any) -> Any:
    rows = torch.tensor(
        [(ring_steps(n) / t, ring_part(n) * size / t) for n, size, t in points], dtype=torch.double
    )
    return torch.linalg.solve(rows.T @ rows, rows.sum(0))


def fit_in_halves(points: Any) -> Any:
    """Two halves of N - 1 steps; each point's time is halved."""
    alpha, beta = fit([(n, size, t / 2) for n, size, t in points], lambda n: n - 1, half)
    return {"alpha": alpha, "beta": beta}.values()


def half(n: int) -> float:
    return (n - 1) / n


def fit_one_by_one(points: Any) -> Iterator[float]:
    yield from fit(points)


def edited(answer: Any, edit: Any) -> Any:
    return lambda *given: edit(*answer(*given))


def efficiency(
    ranks: int, compute: float, nbytes: float, buckets: int, alpha: float, beta: float,
    *, steps: Any = ring_steps, part: Any = ring_part, share: Any = None,
) -> float:  # fmt: skip
    communication = buckets * alpha * steps(ranks) + beta * part(ranks) * nbytes
    own = compute / ranks if share is None else share
    return float(own / (own + communication))


def efficiency_in_a_loop(
    ranks: int, compute: float, nbytes: float, buckets: int, alpha: float, beta: float
) -> Any:
    step = compute / ranks
    for _ in range(buckets):
        for _ in range(2):
            step += (ranks - 1) * (alpha + beta * nbytes / buckets / ranks)
    return torch.tensor(compute / step / ranks, dtype=torch.float64)


def efficiency_in_fractions(*given: Any) -> Any:
    ranks, compute, nbytes, buckets, alpha, beta = map(Fraction, given)
    step = compute / ranks + 2 * (ranks - 1) * (buckets * alpha + beta * nbytes / ranks)
    return compute / ranks / step


def efficiency_with_a_case(ranks: int, *rest: Any) -> float:
    return 1 if ranks == 1 else efficiency(ranks, *rest)


def efficiency_by_speedup(
    ranks: int, compute: float, nbytes: float, buckets: int, alpha: float, beta: float
) -> Any:
    one = compute
    many = one / ranks + beta * ring_part(ranks) * nbytes
    many += buckets * alpha * ring_steps(ranks)
    return np.float64(one / many / ranks)


def parts(*given: Any) -> tuple[float, float, float]:
    """The computing, latency and bytes of a step, in seconds."""
    ranks, compute, nbytes, buckets, alpha, beta = given
    return (
        compute / ranks,
        buckets * alpha * ring_steps(ranks),
        beta * ring_part(ranks) * nbytes,
    )


def with_parts(edit: Any) -> Any:
    """The efficiency when `edit(computing, latency, bytes, given)` is the communication."""

    def answer(*given: Any) -> float:
        computing, latency, moved = parts(*given)
        return float(computing / (computing + edit(latency, moved, given)))

    return answer


def wall(
    compute: float, nbytes: float, alpha: float, beta: float,
    *, steps: Any = ring_steps, part: Any = ring_part, first: int = 2, weak: bool = False,
) -> int:  # fmt: skip
    n = first
    while alpha * steps(n) + beta * part(n) * nbytes <= (compute if weak else compute / n):
        n += 1
        if n > 400_000:
            break
    return n


def wall_by_roots(compute: float, nbytes: float, alpha: float, beta: float) -> Any:
    """2 (n - 1) (alpha n + beta nbytes) > compute, solved for n."""
    a, b, c = 2 * alpha, 2 * (beta * nbytes - alpha), -2 * beta * nbytes - compute
    root = -c / b if a == 0 else (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return math.floor(root) + 1


def wall_by_halving(compute: float, nbytes: float, alpha: float, beta: float) -> int:
    def behind(n: int) -> bool:
        return 2 * (n - 1) * (alpha * n + beta * nbytes) > compute

    low, high = 1, 2
    while not behind(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if behind(middle) else (middle, high)
    return high


def wall_in_numpy(compute: float, nbytes: float, alpha: float, beta: float) -> Any:
    n = np.arange(1, 300_000)
    longer = alpha * 2 * (n - 1) + beta * 2 * (n - 1) / n * nbytes > compute / n
    return n[longer][0]


def wall_in_torch(*given: Any) -> Any:
    return torch.tensor(wall_in_numpy(*given))


def doubled(*given: Any) -> int:
    right, n = wall_by_halving(*given), 1
    while n < right:
        n *= 2
    return n


RIGHT: list[tuple[Any, Any]] = [
    (check_fit, fit),
    (check_fit, fit_by_normal_equations),
    (check_fit, lambda points: np.array(fit(points))),
    (check_fit, fit_in_halves),
    (check_fit, fit_one_by_one),
    (check_efficiency, efficiency),
    (check_efficiency, efficiency_in_a_loop),
    (check_efficiency, efficiency_in_fractions),
    (check_efficiency, efficiency_with_a_case),
    (check_efficiency, efficiency_by_speedup),
    (check_efficiency, answers.Called(efficiency)),
    (check_wall, partial(wall, first=1)),
    (check_wall, wall_by_roots),
    (check_wall, wall_by_halving),
    (check_wall, wall_in_numpy),
    (check_wall, wall_in_torch),
    (check_wall, answers.decorated(wall)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_fit, edited(fit, lambda a, b: (b, a)), "other order"),
    (check_fit, edited(fit, lambda a, b: (a, 1 / b)), "divide 1 by it"),
    (check_fit, partial(fit, steps=lambda n: 1), "one step on any number"),
    (check_fit, partial(fit, steps=lambda n: n), "counted as N"),
    (check_fit, partial(fit, steps=lambda n: n - 1, part=half), "Only one half"),
    (check_fit, partial(fit, part=half), "Only one half"),
    (check_fit, partial(fit, part=lambda n: 1), "whole tensor"),
    (check_fit, partial(fit, steps=lambda n: 1, part=lambda n: 1), "depend on the ranks"),
    (
        check_fit,
        partial(fit, steps=lambda n: 2 * math.log2(n), part=lambda n: 2 * math.log2(n)),
        "terms of a tree",
    ),
    (check_fit, edited(fit, lambda a, b: (a, 2.5 * b)), "Alpha is right, and beta is not"),
    (check_fit, edited(fit, lambda a, b: (0.5 * a, b)), "Beta is right, and alpha is not"),
    (check_fit, edited(fit, lambda a, b: (3 * a, 3 * b)), "Two unknowns"),
    (check_fit, fit_by_cramer, "5 % too long or too short.*Two points solve"),
    (check_fit, partial(fit, relative=False), "5 % too long or too short.*absolute errors"),
    (check_fit, edited(fit, lambda a, b: a), "you returned.*two numbers"),
    (check_fit, edited(fit, lambda a, b: (a, b, 0)), "two numbers"),
    (check_fit, edited(fit, lambda a, b: (a, float("nan"))), "two numbers"),
    (check_fit, edited(fit, lambda a, b: f"{a} {b}"), "two numbers"),
    (check_fit, answers.prints(fit), "you returned None"),
    (check_fit, answers.recurses, "RecursionError"),
    (check_efficiency, lambda *g: sum(parts(*g)), "That is the step's time"),
    (check_efficiency, lambda *g: g[0] * efficiency(*g), "how many times as fast"),
    (check_efficiency, lambda *g: 100 * efficiency(*g), "per cent"),
    (check_efficiency, lambda *g: 1 / efficiency(*g), "inverse"),
    (check_efficiency, lambda *g: efficiency(*g, share=g[1]), "weak scaling"),
    (
        check_efficiency,
        lambda *g: parts(*g)[0] / max(parts(*g)[0], sum(parts(*g)[1:])),
        "nothing is: add",
    ),
    (check_efficiency, with_parts(lambda a, b, g: a / g[3] + b), "8.*paid once"),
    (check_efficiency, with_parts(lambda a, b, g: a + b * g[3]), "8.*with all bytes"),
    (check_efficiency, partial(efficiency, steps=lambda n: 2 * n), "counted as 2 N"),
    (
        check_efficiency,
        lambda n, *rest: efficiency(n, *rest) if n > 1 else efficiency(2, *rest),
        "On one rank there is nothing",
    ),
    (check_efficiency, partial(efficiency, steps=lambda n: 1), "counted as one step"),
    (check_efficiency, partial(efficiency, part=lambda n: 1), "whole gradients"),
    (check_efficiency, with_parts(lambda a, b, g: (a + b) / 2), "Only half of the ring"),
    (check_efficiency, with_parts(lambda a, b, g: b), "latency is missing"),
    (check_efficiency, with_parts(lambda a, b, g: a), "bytes are missing"),
    (check_efficiency, with_parts(lambda a, b, g: (a + b) / g[0]), "does not get less"),
    (check_efficiency, lambda *g: 0.5, "Write down the step first"),
    (check_efficiency, lambda *g: f"{efficiency(*g):.0%}", "a number from 0 to 1"),
    (check_efficiency, answers.prints(efficiency), "you returned None"),
    (check_efficiency, lambda ranks: 1.0, "raised TypeError"),
    (check_wall, lambda *g: wall(*g) - 1, "last number before the wall"),
    (check_wall, lambda *g: wall(*g) + 1, "one rank earlier"),
    (check_wall, lambda *g: wall(*g) - 0.5, "counted whole"),
    (check_wall, lambda *g: 1, "One rank sends nothing"),
    (check_wall, partial(wall, weak=True), "weak scaling"),
    (check_wall, partial(wall, steps=lambda n: 0), "latency is missing"),
    (check_wall, partial(wall, part=lambda n: 0), "bytes are missing"),
    (check_wall, partial(wall, steps=lambda n: 1), "counted as one step"),
    (check_wall, partial(wall, part=lambda n: 1), "whole tensor"),
    (check_wall, partial(wall, steps=lambda n: n - 1, part=half), "Only half"),
    (check_wall, lambda *g: min(wall(*g), 1000), "ended too soon"),
    (check_wall, doubled, "went too far.*between the last two"),
    (check_wall, lambda *g: "many", "a number of ranks"),
    (check_wall, answers.prints(wall), "you returned None"),
    (check_wall, answers.recurses, "RecursionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)


@pytest.mark.parametrize("of", TRAININGS)
def test_no_efficiency_is_above_one(of: Any) -> None:
    assert 0 < of.efficiency() <= 1


@pytest.mark.parametrize("of", WALLS)
def test_the_wall_is_where_communication_becomes_longer(of: Any) -> None:
    place = of.place()
    assert of.communication(place) > of.compute / place
    assert of.communication(place - 1) <= of.compute / (place - 1)
