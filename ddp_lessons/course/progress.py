"""What a learner has done: predictions and exercises, in a JSON file beside the lessons' copy.

Runs in a lesson's kernel, which adds to the file, and in the command `ddp-lessons progress`, which
shows it. The file lies beside the copy's folder, so that the copies of several versions share it.
Nothing is written without a copy (as in the repository), or where notebooks are stored or tested.
Nothing leaves the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_lessons.course.lesson_files import Lesson, Tasks, find, lessons, source, tasks
from ddp_lessons.system.atomic_files import write_files
from ddp_lessons.system.notebook import is_live
from ddp_lessons.text import count

MARKER = ".ddp-lessons"  # a file in each copy of the lessons
FILE = "ddp-lessons-progress.json"


class UnreadableProgress(Exception):
    """The file is none that this module wrote; it stays as it is."""


@dataclass(frozen=True)
class Progress:
    """What was done so far.

    Attributes
    ----------
    predictions : mapping of str to mapping
        By question: ``said`` and ``answer`` as text, and whether what was said first is ``right``.
    exercises : mapping of str to mapping
        By check, as in ``barriers.check_load``: whether it ever ``passed``, and after how many
        ``tries`` so far.
    """

    predictions: Mapping[str, Mapping[str, Any]]
    exercises: Mapping[str, Mapping[str, Any]]

    def of(self, asked: Tasks) -> Counts:
        """Count what was done of a lesson's tasks."""
        made = [self.predictions[text] for text in asked.predictions if text in self.predictions]
        done = [name for name in asked.exercises if self.exercises.get(name, {}).get("passed")]
        left = [name.rpartition(".")[2] for name in asked.exercises if name not in done]
        right = sum(one["right"] for one in made)
        return Counts(
            len(made), right, len(asked.predictions), len(done), len(asked.exercises), left
        )


@dataclass(frozen=True)
class Counts:
    """How much of a lesson, or of several, was done; ``left`` are the checks not yet passed."""

    predicted: int
    right: int
    predictions: int
    passed: int
    exercises: int
    left: list[str]

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))


def containing(place: Path) -> Path | None:
    """The copy of the lessons that contains a folder, or None."""
    return next((at for at in (place, *place.parents) if (at / MARKER).is_file()), None)


def path_beside(copy: Path) -> Path:
    """Where the progress of a copy of the lessons is kept."""
    return copy.resolve().parent / FILE


def read(path: Path) -> Progress:
    """Read a file of progress; an empty `Progress` if there is none.

    Raises
    ------
    UnreadableProgress
        If it cannot be read, or holds something else.
    """
    content = _content(path)
    return Progress(content["predictions"], content["exercises"])


def note_prediction(question: str, said: str, answer: str, right: bool) -> None:
    """Keep a prediction; the first one counts."""
    new = {"said": said, "answer": answer, "right": right}
    _change(lambda content: content["predictions"].setdefault(question, new))


def note_exercise(name: str, passed: bool) -> None:
    """Keep that a check judged an answer."""

    def add(content: dict[str, Any]) -> None:
        done = content["exercises"].setdefault(name, {"passed": False, "tries": 0})
        done["passed"] |= passed
        done["tries"] += 1

    _change(add)


def show_progress(number: str) -> None:
    """Print what was done in a lesson; its last cell calls this.

    Parameters
    ----------
    number : str
        The lesson, as in ``"04"``.
    """
    course = source()
    lesson = find(number, lessons(course))
    asked = tasks(course / lesson.file)
    copy = containing(Path.cwd()) if is_live() else None
    if copy is None:
        print(
            f"Lesson {number} has {count(len(asked.predictions), 'prediction')} and "
            f"{count(len(asked.exercises), 'exercise')}.\n"
            "In a copy made by `ddp-lessons`, this cell says which of them you have done."
        )
        return
    try:
        print(_line(lesson, read(path_beside(copy)).of(asked)))
    except UnreadableProgress as error:
        print(error)


def _line(lesson: Lesson, done: Counts) -> str:
    left = f"; left: {', '.join(done.left)}" if done.left else ""
    return (
        f"Lesson {lesson.number}: you predicted {done.predicted} of {done.predictions}, "
        f"{done.right} right, and passed {done.passed} of "
        f"{count(done.exercises, 'exercise')}{left}."
    )


def _change(change: Callable[[dict[str, Any]], object]) -> None:
    """Change this kernel's file, if there is a copy; what prevents that becomes a warning."""
    copy = containing(Path.cwd()) if is_live() else None
    if copy is None:
        return
    path = path_beside(copy)
    try:
        with open(copy / MARKER) as lock:  # two lessons may run at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = _content(path)
            change(content)
            write_files({path: [json.dumps(content, indent=1, ensure_ascii=False).encode()]})
    except (OSError, UnreadableProgress) as error:
        warnings.warn(f"your progress is not kept: {error}", stacklevel=3)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if _is_ours(content):
            return content  # type: ignore[no-any-return]
    except FileNotFoundError:
        return _empty()
    except (OSError, ValueError) as error:
        raise UnreadableProgress(f"{path} cannot be read ({error})") from error
    raise UnreadableProgress(f"{path} is not a file of progress; rename it to begin a new one")


def _is_ours(content: Any) -> bool:
    """Whether a content has the form that is written here."""
    with contextlib.suppress(TypeError, KeyError, AttributeError):
        said = [type(one["right"]) is bool for one in content["predictions"].values()]
        tried = [
            type(one["passed"]) is bool and type(one["tries"]) is int
            for one in content["exercises"].values()
        ]
        return all(said + tried)
    return False


def _empty() -> dict[str, Any]:
    return {"predictions": {}, "exercises": {}}
