"""The checks of lesson 19: fit a ring's cost, predict an efficiency, find the wall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ddp_lessons.exercises.framework import Wrong, call, exercise, judge
from ddp_lessons.exercises.numeric_answers import is_number, number, numbers

Point = tuple[int, float, float]  # ranks, bytes of a rank's tensor, seconds

SLACK = 1e-3  # relative: how far an answer may be from the right number


def ring_steps(ranks: int) -> int:
    """The steps of a ring `all_reduce`, one after another."""
    return 2 * (ranks - 1)


def ring_bytes(ranks: int, nbytes: float) -> float:
    """The bytes that each rank sends in a ring `all_reduce`."""
    return 2 * (ranks - 1) / ranks * nbytes


def ring_seconds(ranks: int, nbytes: float, alpha: float, beta: float) -> float:
    """The time of a ring `all_reduce` by the lesson's model."""
    return alpha * ring_steps(ranks) + beta * ring_bytes(ranks, nbytes)


def _close(answer: object, target: float) -> bool:
    return is_number(answer) and math.isclose(answer, target, rel_tol=SLACK, abs_tol=1e-15)


class Machine(NamedTuple):
    """What points were made with; `calls` are (ranks, bytes)."""

    alpha: float
    beta: float
    calls: tuple[tuple[int, float], ...]

    def points(self, steps: Callable[[int], float], sent: Callable[[int], float]) -> list[Point]:
        """The points of a call that takes so many steps and sends so much of its tensor."""
        return [
            (n, size, self.alpha * steps(n) + self.beta * sent(n) * size) for n, size in self.calls
        ]


MACHINES = (
    Machine(2e-4, 1e-9, ((2, 400), (2, 4e6), (4, 400), (4, 4e6), (8, 400), (8, 4e6))),
    Machine(1e-5, 2e-11, ((3, 1e3), (5, 1e8), (16, 1e6))),
    Machine(5e-6, 1e-10, ((64, 1e6), (8, 1e9))),
    Machine(3e-6, 1e-9, ((4, 100), (4, 1e9))),
)

# Measured points: the deviations cancel out in a fit of relative errors, and in no other.
NOISY = Machine(
    2e-4, 1e-9, ((2, 400), (8, 400), (4, 800), (16, 800), (2, 2e7), (4, 1e8), (8, 4e7), (2, 2e8))
)
DEVIATIONS = (0.05, -0.05, -0.05, 0.05, -0.05, 0.05, 0.05, -0.05)
NOISY_SLACK = 0.02  # relative


def _ring_points(machine: Machine) -> list[Point]:
    return machine.points(ring_steps, lambda n: ring_bytes(n, 1))


@exercise(
    "The time of each point is `alpha * steps + beta * bytes`, and both are known from the ranks "
    "and the size: `ring_terms`.",
    "That is one equation for each point, and two unknowns: `np.linalg.lstsq`. Divide each "
    "equation by its seconds, or large times drown small ones.",
    "It is the lesson's `fit`.",
)
def check_fit(fit_ring: Callable[..., Any]) -> str:
    """Check `fit_ring(points)`: alpha and beta of a ring, from (ranks, bytes, seconds)."""
    because = "It takes a list of (ranks, bytes, seconds)."
    for machine in MACHINES:
        points = _ring_points(machine)
        answer = numbers(call(fit_ring, points, because=because))
        calls = ", ".join(f"{n} ranks and {size:,.0f} bytes" for n, size in machine.calls)
        told = f"points of {calls}, made with alpha {machine.alpha:g} and beta {machine.beta:g}: "
        if not isinstance(answer, list) or len(answer) != 2 or not all(map(is_number, answer)):
            raise Wrong(f"{told}you returned {answer!r}.", "Return two numbers: alpha and beta.")
        _judge_fit(told, answer, machine)
    _judge_noisy(numbers(call(fit_ring, _noisy_points(), because=because)))
    return (
        f"alpha and beta of {len(MACHINES)} machines, on 2 to 64 ranks, and of points that are 5 % "
        "off."
    )


def _noisy_points() -> list[Point]:
    points = zip(_ring_points(NOISY), DEVIATIONS, strict=True)
    return [(n, size, seconds * (1 + off)) for (n, size, seconds), off in points]


def _judge_noisy(answer: Any) -> None:
    """Raise `Wrong` for a fit that is off where all points, of equal weight, would not be."""
    pairs = zip(answer, NOISY[:2], strict=True)
    if all(math.isclose(found, true, rel_tol=NOISY_SLACK) for found, true in pairs):
        return
    mistakes = {
        "In a fit of absolute errors 5 % of a long time hides all the short ones, and those say "
        "most about alpha: divide each equation by its seconds.": _fits(
            _noisy_points(), answer, ring_steps, _sent, relative=False
        ),
        "Two points solve the equations only if both are exact. Here their errors cancel out when "
        "all of them count alike: fit them all, by their relative errors.": True,
    }
    judge(
        f"{len(DEVIATIONS)} points that are 5 % too long or too short, of alpha {NOISY.alpha:g} "
        f"and beta {NOISY.beta:g}: you found {answer[0]:.3g} and {answer[1]:.3g}. ",
        mistakes,
    )


def _judge_fit(told: str, answer: Sequence[float], machine: Machine) -> None:
    alpha, beta = machine.alpha, machine.beta
    right = [_close(answer[0], alpha), _close(answer[1], beta)]
    if all(right):
        return
    points = _ring_points(machine)
    mistakes: dict[str, object] = {
        "These are alpha and beta in the other order. Return alpha first.": _close(answer[0], beta)
        and _close(answer[1], alpha),
        "Beta is the seconds of a byte, not the bytes of a second: divide 1 by it.": right[0]
        and _close(answer[1], 1 / beta),
        "The time was put down as if a call took one step on any number of ranks. A ring takes "
        "2 (N - 1) steps, one after another.": _fits(points, answer, _one, _sent),
        "The steps were counted as N. A ring goes round twice, with N - 1 steps each time.": _fits(
            points, answer, lambda n: n, _sent
        ),
        "Only one half of the ring was counted. It goes round twice: once adding up, once passing "
        "on.": _fits(points, answer, lambda n: n - 1, lambda n: (n - 1) / n)
        or _fits(points, answer, lambda n: n - 1, _sent)
        or _fits(points, answer, ring_steps, lambda n: (n - 1) / n),
        "The bytes were taken as those of the whole tensor. A rank sends 2 (N - 1) / N of "
        "it.": _fits(points, answer, ring_steps, _one),
        "These are the terms of a tree, 2 log2 N. The points are those of a ring.": _fits(
            points, answer, _levels, _levels
        ),
        "Neither the steps nor the bytes depend on the ranks in your fit. In a ring both "
        "do.": _fits(points, answer, _one, _one),
        "Alpha is right, and beta is not. How much of its tensor does a rank send? Both terms "
        "need the ranks.": right[0],
        "Beta is right, and alpha is not. The points of small tensors say most about alpha: in a "
        "fit of absolute errors the large times drown them, so divide each equation by its "
        "seconds.": right[1],
        "Each point gives one equation: seconds = alpha * 2 (N - 1) + beta * 2 (N - 1) / N * "
        "bytes. Two unknowns solve them all.": True,
    }
    judge(f"{told}you found {answer[0]:.3g} and {answer[1]:.3g}. ", mistakes)


def _sent(ranks: int) -> float:
    return ring_bytes(ranks, 1)


def _one(_: int) -> float:
    return 1.0


def _levels(ranks: int) -> float:
    return 2 * math.log2(ranks)


def _fits(
    points: Sequence[Point],
    answer: Sequence[float],
    steps: Callable[[int], float],
    sent: Callable[[int], float],
    relative: bool = True,
) -> bool:
    """Whether an answer is the least-squares fit with these terms, relative or absolute.

    With ``relative=False`` only the absolute fit counts.
    """
    import numpy as np

    terms = np.array([(steps(n), sent(n) * size) for n, size, _ in points])
    seconds = np.array([t for *_, t in points])
    for weights in (1 / seconds, np.ones(len(seconds)))[not relative :]:
        found, *_ = np.linalg.lstsq(terms * weights[:, None], seconds * weights, rcond=None)
        if all(
            math.isclose(a, b, rel_tol=1e-2) for a, b in zip(answer, found.tolist(), strict=True)
        ):
            return True
    return False


class Training(NamedTuple):
    """Strong scaling: `compute` seconds on one rank; then all_reduces of `nbytes` in buckets."""

    ranks: int
    compute: float
    nbytes: float
    buckets: int
    alpha: float
    beta: float

    def step(self) -> float:
        """The seconds of a step on these ranks."""
        return self.compute / self.ranks + self.buckets * ring_seconds(
            self.ranks, self.nbytes / self.buckets, self.alpha, self.beta
        )

    def efficiency(self) -> float:
        """One rank's time over that of all, by ranks."""
        return self.compute / (self.ranks * self.step())


TRAININGS = (
    Training(4, 2.0, 4e8, 1, 5e-3, 1e-10),
    Training(8, 1.0, 1e8, 10, 1e-4, 1e-9),
    Training(1, 3.0, 1e8, 4, 1e-3, 1e-9),
    Training(3, 0.5, 1e6, 7, 2e-3, 0.0),
    Training(1000, 60.0, 1.6e10, 640, 5e-6, 3e-12),
)


@exercise(
    "A step is `compute / ranks` and then the communication. What is that of one bucket?",
    "Each bucket has `nbytes / buckets` bytes, and pays for 2 (N - 1) steps of its own. The bytes "
    "of all buckets together are the same as of one.",
    "`compute / (ranks * step)`.",
)
def check_efficiency(efficiency: Callable[..., Any]) -> str:
    """Check `efficiency(ranks, compute, nbytes, buckets, alpha, beta)`, from 0 to 1."""
    because = "It takes ranks, compute, nbytes, buckets, alpha and beta."
    for training in TRAININGS:
        answer = number(call(efficiency, *training, because=because))
        told = f"{', '.join(f'{k} {v:g}' for k, v in training._asdict().items())}: "
        if not is_number(answer):
            raise Wrong(f"{told}you returned {answer!r}.", "Return a number from 0 to 1.")
        if not _close(answer, training.efficiency()):
            _explain_efficiency(told, answer, training)
    return f"right for {len(TRAININGS)} training runs, on 1 to 1,000 ranks."


def _explain_efficiency(told: str, answer: float, of: Training) -> None:
    n, right, share = of.ranks, of.efficiency(), of.compute / of.ranks
    moved = of.beta * ring_bytes(n, of.nbytes)
    latency = of.buckets * of.alpha * ring_steps(n)

    def is_with(communication: float) -> bool:
        return _close(answer, share / (share + communication))

    mistakes: dict[str, object] = {
        "That is the step's time. Efficiency compares it with one rank's: compute / (ranks * "
        "step).": _close(answer, of.step()),
        "That is how many times as fast. Divide by the ranks.": n > 1 and _close(answer, n * right),
        "That is in per cent. Return a number from 0 to 1.": _close(answer, 100 * right),
        "That is the inverse: one rank's time belongs above.": _close(answer, 1 / right),
        "The communication was compared with all of `compute`, as in weak scaling. Here each rank "
        "computes for compute / ranks, and its communication does not get less.": _close(
            answer, of.compute / (of.compute + latency + moved)
        ),
        "Here communication is hidden behind computing. In this exercise nothing is: add the "
        "two.": _close(answer, share / max(share, latency + moved)),
        "The latency was paid once. Each bucket pays for its own steps.": is_with(
            latency / of.buckets + moved
        ),
        "Each bucket was counted with all bytes. It has `nbytes / buckets`.": is_with(
            latency + of.buckets * moved
        ),
        "On one rank there is nothing to send: 2 (N - 1) is 0.": n == 1,
        "A call was counted as one step. A ring takes 2 (N - 1).": is_with(
            of.buckets * of.alpha + moved
        ),
        "The bytes were taken as those of the whole gradients. Each rank sends 2 (N - 1) / N of "
        "them.": is_with(latency + of.beta * of.nbytes),
        "Only half of the ring was counted. It goes round twice.": is_with((latency + moved) / 2),
        "The steps were counted as 2 N. Each time round the ring takes N - 1.": is_with(
            of.buckets * of.alpha * 2 * n + moved
        ),
        "The latency is missing.": is_with(moved),
        "The bytes are missing.": is_with(latency),
        "Write down the step first: compute / ranks, and for each bucket alpha * 2 (N - 1) + "
        "beta * 2 (N - 1) / N * its bytes.": True,
    }
    judge(f"{told}{right:.4g} is right, and you returned {answer:.4g}. ", mistakes)


class Wall(NamedTuple):
    """A training run of which the wall is asked for."""

    compute: float
    nbytes: float
    alpha: float
    beta: float

    def at(self, holds: Callable[[int], bool]) -> int:
        """The smallest number of ranks for which something holds."""
        high = 1
        while not holds(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def communication(self, ranks: int) -> float:
        """The seconds of the all_reduce."""
        return ring_seconds(ranks, self.nbytes, self.alpha, self.beta)

    def place(self) -> int:
        """The right answer."""
        return self.at(lambda n: self.communication(n) > self.compute / n)


WALLS = (
    Wall(1.0, 4e3, 1e-4, 1e-9),
    Wall(40.0, 1.6e10, 5e-6, 3e-12),
    Wall(2.0, 4e8, 1e-5, 1e-9),
    Wall(1e-6, 4e6, 1e-4, 1e-9),
    Wall(9.0, 1e9, 0.0, 1e-9),
    Wall(50_000.0, 1e9, 1e-6, 1e-12),
)


@exercise(
    "Computing is `compute / ranks`, and falls; the `all_reduce` grows. Count up until it is "
    "longer.",
    "One rank sends nothing, so the wall is at 2 at least.",
    "`while alpha * 2 * (n - 1) + beta * 2 * (n - 1) / n * nbytes <= compute / n: n += 1`",
)
def check_wall(find_wall: Callable[..., Any]) -> str:
    """Check `find_wall(compute, nbytes, alpha, beta)`: the smallest number of ranks."""
    because = "It takes compute, nbytes, alpha and beta."
    for wall in WALLS:
        answer = number(call(find_wall, *wall, because=because))
        told = f"{', '.join(f'{k} {v:g}' for k, v in wall._asdict().items())}: "
        if not is_number(answer):
            raise Wrong(f"{told}you returned {answer!r}.", "Return a number of ranks.")
        if answer != wall.place():
            _explain_wall(told, answer, wall)
    return (
        f"right for {len(WALLS)} training runs; the last one's wall is at "
        f"{WALLS[-1].place():,} ranks."
    )


def _explain_wall(told: str, answer: float, wall: Wall) -> None:
    place = wall.place()

    def is_with(seconds: Callable[[int], float]) -> bool:
        return answer == wall.at(lambda n: n > 1 and seconds(n) > wall.compute / n)

    def is_weak() -> bool:
        return wall.alpha > 0 and answer == wall.at(lambda n: wall.communication(n) > wall.compute)

    mistakes: dict[str, object] = {
        "Ranks are counted whole: return the smallest whole number.": answer != int(answer),
        "There the `all_reduce` is still shorter. That is the last number before the wall, not "
        "the first behind it.": answer == place - 1
        and wall.communication(place - 1) < wall.compute,
        "There it is longer already one rank earlier.": answer == place + 1,
        "One rank sends nothing.": answer == 1,
        "`compute` was not shared out: that is weak scaling. Here N ranks compute for compute / N "
        "each.": is_weak(),
        "The latency is missing: alpha for each of the 2 (N - 1) steps.": wall.alpha > 0
        and wall.beta * wall.nbytes > 0
        and is_with(lambda n: wall.beta * ring_bytes(n, wall.nbytes)),
        "The bytes are missing.": wall.alpha > 0 and is_with(lambda n: wall.alpha * ring_steps(n)),
        "A call was counted as one step. A ring takes 2 (N - 1).": is_with(
            lambda n: wall.alpha + wall.beta * ring_bytes(n, wall.nbytes)
        ),
        "The whole tensor was counted. A rank sends 2 (N - 1) / N of it.": is_with(
            lambda n: wall.alpha * ring_steps(n) + wall.beta * wall.nbytes
        ),
        "Only half of the ring was counted. It goes round twice.": is_with(
            lambda n: wall.communication(n) / 2
        ),
        "The search ended too soon. There the `all_reduce` is still shorter than a rank's "
        "computing.": answer < place,
        "The search went too far: fewer ranks are behind the wall already. If you doubled the "
        "ranks, look between the last two.": True,
    }
    judge(f"{told}the wall is at {place:,} ranks, and you returned {answer:,}. ", mistakes)
