"""What the tests of all checks share: right answers pass, wrong ones are explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest


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
