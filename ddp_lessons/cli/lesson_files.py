"""Finds this installation's lessons, their titles and questions, and a lesson by its name.

Runs in the command `ddp-lessons`, and only reads. A wheel has the lessons inside the package; an
editable installation uses the repository's `notebooks/`.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ddp_lessons.text import INSTALL

PACKAGE = Path(__file__).parent.parent
# pyproject.toml has the same patterns, for the wheel.
PATTERNS = (
    "[0-9][0-9]_*.ipynb",
    "gpu.ipynb",
    "clusters.md",
    "pictures/*.png",
    "solutions/[0-9][0-9]_*.ipynb",
)
APPENDIX = "gpu.ipynb"


class CommandError(Exception):
    """The command cannot do something; the message is for its user."""


class Lesson(NamedTuple):
    """A lesson, from the first cell of its notebook."""

    file: str
    question: str
    minutes: int

    @property
    def number(self) -> str:
        """Two digits; "" for the appendix."""
        return self.file[:2] if self.file[:2].isdigit() else ""

    @property
    def name(self) -> str:
        """The file's name without its number, as in ``ddp_timing``."""
        return Path(self.file).stem.removeprefix(f"{self.number}_")


def source() -> Path:
    """The folder of this installation that has the lessons.

    Raises
    ------
    CommandError
        If there is none.
    """
    for folder in (PACKAGE / "notebooks", PACKAGE.parent / "notebooks"):
        if any(folder.glob(PATTERNS[0])):
            return folder
    raise CommandError(
        f"this installation holds no lessons: {PACKAGE / 'notebooks'} is missing. "
        f"Install it again: {INSTALL} --force-reinstall --no-deps"
    )


def files(folder: Path) -> list[str]:
    """All files of the course below a folder, as relative POSIX paths."""
    found = (path for pattern in PATTERNS for path in folder.glob(pattern))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def lessons(folder: Path) -> list[Lesson]:
    """The lessons below a folder in order, the appendix last."""
    names = [name for name in files(folder) if name.endswith(".ipynb") and "/" not in name]
    return [_lesson(folder / name) for name in sorted(names, key=lambda n: (n == APPENDIX, n))]


def _lesson(path: Path) -> Lesson:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = "".join(notebook["cells"][0]["source"])
    minutes = re.search(r"(\d+) minutes", text)
    return Lesson(path.name, _question(text), int(minutes[1]) if minutes else 0)


def code(path: Path) -> str:
    """All code of a notebook, cell by cell."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def _question(text: str) -> str:
    """The title if it is a question, else the question in bold below it."""
    title = text.partition("\n")[0].partition(" · ")[2].strip()
    asked = re.search(r"\*\*(.*?\?)\*\*", text)
    return title if title.endswith("?") or not asked else asked[1].replace("`", "")


def find(text: str, among: list[Lesson]) -> Lesson:
    """The lesson of a number (`7`), a name (`ddp_timing`) or a file's name.

    Raises
    ------
    CommandError
        If there is no such lesson; names the closest ones, and all.
    """
    wanted = _plain(text)
    for lesson in among:
        if wanted in _names(lesson):
            return lesson
    listed = "\n".join(f"  {lesson.number:>2}  {lesson.name}" for lesson in among)
    raise CommandError(
        f"there is no lesson {text!r}.{_closest(wanted, among)} The lessons:\n{listed}"
    )


def _plain(text: str) -> str:
    """A lesson's name, normalised for comparison."""
    name = text.strip().lower().removesuffix(".ipynb")
    return re.sub(r"[\s-]+", "_", name.rpartition("/")[2] if "solutions/" not in name else name)


def _names(lesson: Lesson) -> set[str]:
    stem = Path(lesson.file).stem
    number = {lesson.number, str(int(lesson.number))} if lesson.number else set()
    return {stem, lesson.name, *number}


def _closest(wanted: str, among: list[Lesson]) -> str:
    names = [lesson.name for lesson in among]
    word = re.sub(r"^\d+_", "", wanted)
    close = [name for name in names if len(word) > 2 and word in name]
    close += difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
