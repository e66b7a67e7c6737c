"""What the tests of all checks share: right answers pass, wrong ones are explained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch.distributed as dist

from ddp_lessons.exercises.framework import Exercise, Feedback
from tests.support import shared_runs

TOGETHER = 12  # answers whose runs share processes
SAMPLE = 4  # one wrong answer of a check in so many is no slow test, and one right answer


def right(answers: Sequence[tuple[Any, Any]]) -> pytest.MarkDecorator:
    """Give a test each (check, answer)."""
    names = (check.__name__ for check, _ in answers)
    return pytest.mark.parametrize(("check", "answer"), _cases(names, answers, len(answers)))


def wrong(answers: Sequence[tuple[Any, Any, str]]) -> pytest.MarkDecorator:
    """Give a test each (check, answer, what is said of it)."""
    names = (f"{check.__name__}-{said[:30]}" for check, _, said in answers)
    return pytest.mark.parametrize(("check", "answer", "said"), _cases(names, answers, SAMPLE))


def _cases(names: Iterable[str], cases: Iterable[tuple[Any, ...]], sample: int) -> list[Any]:
    """The cases, all but one in `sample` of a check marked slow.

    Those of one check run in one process, which judges them together.
    """
    found, of_check = [], Counter[str]()
    for name, (check, *rest) in zip(names, cases, strict=True):
        marks = [pytest.mark.xdist_group(f"answers of {check.__name__}")]
        if of_check[check.__name__] % sample:
            marks.append(pytest.mark.slow)
        of_check[check.__name__] += 1
        found.append(pytest.param(check, *rest, id=name, marks=marks))
    return found


class Verdicts:
    """The verdicts on the answers of a session, each for one use.

    They are found for several answers at a time: the one that is asked for, and those after it.
    """

    def __init__(self) -> None:
        self._left: dict[Exercise, list[Any]] = {}
        self._found: list[tuple[Exercise, Any, Feedback]] = []

    def expect(self, cases: Iterable[tuple[Exercise, Any]]) -> None:
        for check, answer in cases:
            self._left.setdefault(check, []).append(answer)

    def __call__(self, check: Exercise, answer: Any) -> Feedback:
        if (found := self._taken(check, answer)) is None:
            left = self._left.get(check, [])
            start = next((n for n, one in enumerate(left) if one is answer), None)
            if start is None:
                return check(answer)
            several = left[start : start + TOGETHER]
            del left[start : start + TOGETHER]
            judged = shared_runs.judged(check, several)
            self._found += [(check, *one) for one in zip(several, judged, strict=True)]
            found = self._taken(check, answer)
            assert found is not None
        return found

    def _taken(self, check: Exercise, answer: Any) -> Feedback | None:
        for place, (of, judged, verdict) in enumerate(self._found):
            if of is check and judged is answer:
                del self._found[place]
                return verdict
        return None


verdict_on = Verdicts()


def passes(check: Any, answer: Any) -> None:
    verdict = verdict_on(check, answer)
    assert verdict.passed, verdict
    assert verdict.because == ""
    assert repr(verdict).startswith(f"✓ {check.__name__}: ")


def is_explained(check: Any, answer: Any, said: str) -> None:
    """The verdict is no, and says `said`, a pattern in which a line's end is a space."""
    verdict = verdict_on(check, answer)
    assert verdict.passed is False
    assert re.search(said, repr(verdict).replace("\n", " ")), repr(verdict)


def mixed(*answers: Any) -> Any:
    """One answer that is another of these on each number of ranks: they share a check's runs."""

    def answer(*args: Any) -> Any:
        return answers[dist.get_world_size() % len(answers)](*args)

    return answer


class Called:
    """An answer as an object that is called."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, *args: Any) -> Any:
        return self.answer(*args)


def decorated(answer: Any) -> Any:
    """An answer under a decorator that tells nothing of it."""
    return lambda *args, **options: answer(*args, **options)


def prints(answer: Any) -> Any:
    """An answer that prints instead of returning."""
    return lambda *args: print(answer(*args))


def recurses(*args: Any) -> Any:
    return recurses(*args)
