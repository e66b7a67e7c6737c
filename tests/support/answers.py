"""What the tests of all checks share: right answers pass, wrong ones are explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist


def right(answers: Sequence[tuple[Any, Any]]) -> pytest.MarkDecorator:
    """Give a test each (check, answer)."""
    names = [check.__name__ for check, _ in answers]
    return pytest.mark.parametrize(("check", "answer"), answers, ids=names)


def wrong(answers: Sequence[tuple[Any, Any, str]]) -> pytest.MarkDecorator:
    """Give a test each (check, answer, what is said of it)."""
    names = [f"{check.__name__}-{said[:30]}" for check, _, said in answers]
    return pytest.mark.parametrize(("check", "answer", "said"), answers, ids=names)


def passes(check: Any, answer: Any) -> None:
    verdict = check(answer)
    assert verdict.passed, verdict
    assert verdict.because == ""
    assert repr(verdict).startswith(f"✓ {check.__name__}: ")


def is_explained(check: Any, answer: Any, said: str) -> None:
    """The verdict is no, and says `said`, a pattern in which a line's end is a space."""
    verdict = check(answer)
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
