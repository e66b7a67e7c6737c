"""The framework of all checks: what counts as an attempt, hints, and each check's tests."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from ddp_lessons import exercises
from ddp_lessons.exercises import capstone, script_runner, start_here
from ddp_lessons.exercises.framework import Exercise, Unjudged, is_unattempted

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHECKS = [
    value
    for module in pkgutil.iter_modules(exercises.__path__, f"{exercises.__name__}.")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, Exercise)
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_has_its_tests(check: Exercise) -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    modules = [importlib.import_module(f"tests.exercises.{file.stem}") for file in files]
    here = [tests for tests in modules if hasattr(tests, "RIGHT")]
    least = 4 if check.__module__ == capstone.__name__ else 10  # eight checks on one trainer
    assert sum(c is check for tests in here for c, _ in tests.RIGHT) >= 3
    assert sum(c is check for tests in here for c, _, _ in tests.WRONG) >= least
    assert check.__doc__


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_not_attempted_yet(check: Exercise) -> None:
    def answer(*args: object) -> None: ...

    for unattempted in (answer, ...):
        verdict = check(unattempted)
        assert verdict.passed is None
        assert "not attempted yet" in repr(verdict)


def test_what_counts_as_an_attempt() -> None:
    def documented() -> None:
        """Return nothing."""

    def half() -> int:
        x: Any = ...
        return int(x)

    def within() -> Any:
        def inner() -> Any:
            return ...

        return inner

    def done() -> None:
        print()

    def in_a_dict() -> Any:
        return {"RANK": ..., "WORLD_SIZE": "2"}

    def passed() -> None:
        print(...)

    def indexed(x: Any, i: int) -> Any:
        x[...] = x[..., 0] + x[..., i] + x[...] + x[i, ..., 1:i]
        x[..., i] = x[..., i + 1] + x[..., len(x) :].sum() - x[..., -i, x[i, 0]]
        return x[...]

    def left_over(x: Any) -> Any:
        x += 1
        ...  # noqa: PIE790
        return x

    assert is_unattempted(within)
    assert is_unattempted(in_a_dict)
    assert is_unattempted(passed)
    assert not is_unattempted(indexed)
    assert not is_unattempted(left_over)
    assert is_unattempted(documented)
    assert is_unattempted(half)
    assert not is_unattempted(done)
    assert not is_unattempted(lambda: 0)

    @contextlib.contextmanager
    def decorated() -> Any: ...

    assert is_unattempted(decorated)
    assert not is_unattempted(42)


def test_what_does_nothing_on_purpose_is_an_attempt(tmp_path: Path) -> None:
    class Sampler:
        def __init__(self) -> None:
            """Nothing to keep."""

        def set_epoch(self, epoch: int) -> None:
            pass

        def __len__(self) -> int:
            return 1

    class Begun(Sampler):
        def __iter__(self) -> Any: ...

    assert not is_unattempted(Sampler)
    assert is_unattempted(Begun)
    script = tmp_path / "script.py"
    script.write_text("class Alone(Exception): ...\nprint()\n")
    assert not script_runner.is_unattempted(script)
    for left in ("def work(): ...", "class Model: ...", "if True:\n    ..."):
        script.write_text(f"class Alone(Exception): ...\n{left}\n")
        assert script_runner.is_unattempted(script)


def test_hints_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    check = Exercise(lambda _: "", ("look", "look there"))
    for said in (
        "Hint 1 of 2: look\n",
        "Hint 2 of 2: look there\n",
        "That was the last hint. From the first again:\nHint 1 of 2: look\n",
    ):
        check.hint()
        assert capsys.readouterr().out == said


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_function_returned_is_not_taken_for_it(check: Exercise) -> None:
    """Some checks take a script or an object of the learner's."""
    if check.__name__ in ("check_both_ways", "check_resumes") or check.__doc__ is None:
        return
    if check.__module__.endswith("rank_zero") and check.__name__ == "check_resume":
        return
    verdict = check([1, 2])
    assert verdict.passed is False
    assert "it got [1, 2], which cannot be called" in verdict.seen
    assert f" itself, {check.__name__}(" in verdict.because


def test_what_cannot_be_judged_is_no_wrong_answer() -> None:
    def check(answer: object) -> str:
        raise Unjudged("The course's own answer fails, too.")

    verdict = Exercise(check, ("look",))(42)
    assert verdict.passed is None
    assert repr(verdict) == "○ check: could not be judged. The course's own answer fails, too."


def test_a_verdict_escapes_what_it_quotes() -> None:
    def greet(rank: int, world_size: int) -> None:
        if rank == 0:
            print("<b>hi</b>")

    verdict = start_here.check_greet(greet)
    assert "<b>hi" not in verdict._repr_html_()
    assert "<details>" in verdict._repr_html_()
