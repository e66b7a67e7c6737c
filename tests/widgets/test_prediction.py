"""Predictions: the learner answers, the run reveals; without an answer nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_lessons.course.progress import MARKER, path_beside, read
from ddp_lessons.widgets.prediction import Prediction, predict
from tests.support.kernels import Kernel

RANKS = ["rank 0", "rank 1"]


def test_an_answer_is_compared_with_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = Prediction("Which?", RANKS, "")
    prediction._control.value = "rank 1"
    prediction.reveal("rank 0")
    assert capsys.readouterr().out == "Answer: rank 0\nYou predicted rank 1.\n"


@pytest.mark.parametrize(
    ("said", "answer", "within", "right"),
    [
        ("4", 4, 0, True),
        (" 4.0 ", 4, 0, True),
        ("0.33", 0.3, 0.05, True),
        ("0.4", 0.3, 0.05, False),
    ],
)
def test_a_number_may_be_near(
    capsys: pytest.CaptureFixture[str], said: str, answer: float, within: float, right: bool
) -> None:
    prediction = Prediction("How long?", None, "seconds")
    prediction._control.value = said
    prediction.reveal(answer, within=within)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Answer: {answer} seconds"
    assert second == ("You predicted it." if right else "You predicted 0.4 seconds.")


def test_one_has_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    Prediction("How many?", None, "samples").reveal(1)
    assert capsys.readouterr().out == "Answer: 1 sample\n"


@pytest.mark.parametrize("said", ["", "four", "4 seconds"])
def test_without_a_number_nothing_is_said_of_it(
    capsys: pytest.CaptureFixture[str], said: str
) -> None:
    prediction = Prediction("How long?", None, "seconds")
    prediction._control.value = said
    prediction.reveal(4)
    assert capsys.readouterr().out == "Answer: 4 seconds\n"


def test_an_answer_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="rank 2 is none of the choices"):
        Prediction("Which?", RANKS, "").reveal("rank 2")


def test_what_is_said_after_the_answer_is_no_prediction() -> None:
    prediction = Prediction("Which?", RANKS, "")
    assert not prediction._control.disabled
    prediction.reveal("rank 0")
    assert prediction._control.disabled


def test_the_question_is_text_where_there_is_no_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = predict("Which of `a` and <b>?", RANKS)
    assert "<code>a</code> and &lt;b&gt;?" in prediction._html()
    assert prediction._text().splitlines() == [
        "Predict: Which of `a` and <b>?",
        "  ( ) rank 0",
        "  ( ) rank 1",
    ]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / MARKER).touch()
    return folder


@pytest.fixture
def kernel(copy: Path) -> Iterator[Kernel]:
    with Kernel(f"import os; os.chdir({str(copy)!r})") as kernel:
        kernel.run("from ddp_lessons.widgets.prediction import predict")
        yield kernel


@pytest.mark.system
def test_in_a_kernel_it_has_controls_and_is_kept(kernel: Kernel, copy: Path) -> None:
    cell = kernel.run("which = predict('Which?', ['rank 0', 'rank 1'])")
    assert "application/vnd.jupyter.widget-view+json" in cell.displays[0]
    kernel.run("which._control.value = 'rank 0'")  # what a click does
    assert kernel.run("which.reveal('rank 0')").stdout == "Answer: rank 0\nYou predicted it.\n"
    kernel.run("which = predict('Which?', ['rank 0', 'rank 1'])")
    assert kernel.run("which.reveal('rank 0')").stdout == "Answer: rank 0\n"
    assert read(path_beside(copy)).predictions == {
        "Which?": {"said": "rank 0", "answer": "rank 0", "right": True}
    }


@pytest.mark.system
def test_where_notebooks_are_tested_it_is_text_and_nothing_is_kept(
    kernel: Kernel, copy: Path
) -> None:
    kernel.run("os.environ['DDP_LESSONS_LIVE'] = '0'")
    cell = kernel.run("which = predict('Which?', ['rank 0', 'rank 1'])")
    assert set(cell.displays[0]) == {"text/html", "text/plain"}
    kernel.run("which._control.value = 'rank 0'")
    assert "Answer: rank 0" in kernel.run("which.reveal('rank 0')").stdout
    assert not path_beside(copy).exists()
