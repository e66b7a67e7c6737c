"""A question that the learner answers before the run that answers it: `predict`, and its `reveal`.

Runs in the parent. In a live notebook `predict` shows choices, or a field for a number; elsewhere,
as on a web page, it shows the question as text. `reveal` prints the same text whether or not there
was a prediction, adds what the learner had said, and keeps it (course/progress.py). It never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
from IPython.display import display

from ddp_lessons.course.progress import note_prediction
from ddp_lessons.system.notebook import is_live, prepare_widgets
from ddp_lessons.text import as_html

LAYOUT = {"width": "auto", "max_width": "60em"}


def predict(
    question: str, choices: Sequence[object] | None = None, *, unit: str = ""
) -> Prediction:
    """Ask the learner for a prediction, and show the question in the cell.

    Parameters
    ----------
    question : str
        The question; `code` in backticks. Progress is kept under it, so the course asks it once.
    choices : sequence, optional
        What may be the answer; without it, a number.
    unit : str
        The unit of a number, as in ``"seconds"``.

    Returns
    -------
    Prediction
        To be revealed by the cell that finds the answer.
    """
    prediction = Prediction(question, choices, unit)
    prediction.show()
    return prediction


class Prediction:
    """A question, and what the learner said to it so far."""

    def __init__(self, question: str, choices: Sequence[object] | None, unit: str) -> None:
        self.question = question
        self.unit = unit
        self.choices = None if choices is None else [str(choice) for choice in choices]
        self._control = _radio(self.choices) if self.choices else _number(unit)
        self._control.tooltip = question

    @property
    def said(self) -> str | float | None:
        """The learner's choice or number; None if there is none yet."""
        if self.choices:
            return self._control.value  # type: ignore[no-any-return]
        try:
            return float(self._control.value)
        except ValueError:
            return None

    def show(self) -> None:
        """Show the question, and the controls where a person can use them."""
        if is_live():
            how = "Choose, then run on." if self.choices else "Write a number, then run on."
            text = f"<b>{as_html(self.question)}</b> <span style='opacity:0.7'>{how}</span>"
            display(ipywidgets.VBox([ipywidgets.HTML(text), self._control], layout=LAYOUT))
            prepare_widgets()
        else:
            display({"text/html": self._html(), "text/plain": self._text()}, raw=True)

    def reveal(self, answer: object, within: float = 0) -> None:
        """Print the answer, and compare it with the prediction.

        Parameters
        ----------
        answer : object
            What the run showed: one of the choices (compared as text), or a number.
        within : float
            How far a predicted number may be from the answer.

        Raises
        ------
        ValueError
            If the answer is none of the choices.
        """
        if self.choices and str(answer) not in self.choices:
            raise ValueError(f"the answer {answer} is none of the choices {self.choices}")
        print("Answer:", self._shown(answer))
        said = self.said
        if said is not None:
            right = str(said) == str(answer) if self.choices else _is_near(said, answer, within)
            if not self._control.disabled:
                note_prediction(self.question, self._shown(said), self._shown(answer), right)
            print("You predicted it." if right else f"You predicted {self._shown(said)}.")
        self._control.disabled = True  # what is said from now on is no prediction

    def _shown(self, answer: Any) -> str:
        if self.choices:
            return str(answer)
        number = f"{answer:g}" if isinstance(answer, float) else str(answer)
        unit = self.unit.removesuffix("s") if answer == 1 else self.unit
        return f"{number} {unit}".rstrip()

    def _text(self) -> str:
        """The question where there are no controls."""
        return "\n".join(
            [f"Predict: {self.question}", *(f"  ( ) {one}" for one in self.choices or ())]
        )

    def _html(self) -> str:
        items = "".join(f"<li>{as_html(choice)}</li>" for choice in self.choices or ())
        listed = f"<ul style='list-style:circle;margin:4px 0'>{items}</ul>" if items else ""
        return f"<div><b>Predict: {as_html(self.question)}</b>{listed}</div>"


def _radio(choices: list[str]) -> ipywidgets.RadioButtons:
    return ipywidgets.RadioButtons(options=choices, value=None, layout=LAYOUT)


def _number(unit: str) -> ipywidgets.Text:
    return ipywidgets.Text(placeholder=unit or "a number", layout={"width": "12em"})


def _is_near(said: Any, answer: Any, within: float) -> bool:
    return bool(abs(said - answer) <= within)
