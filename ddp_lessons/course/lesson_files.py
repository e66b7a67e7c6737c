"""Finds this installation's lessons, what each asks of the learner, and a lesson by its name.

Runs in the command `ddp-lessons` and, for a lesson's progress, in a kernel; it only reads. A wheel
has the lessons inside the package; an editable installation uses the repository's `notebooks/`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ddp_lessons.text import INSTALL

PACKAGE = Path(__file__).parent.parent
# pyproject.toml has the same patterns, for the wheel.
PATTERNS = (
    "[0-9][0-9]*_*.ipynb",
    "real_[0-9]_*.ipynb",
    "gpu.ipynb",
    "clusters.md",
    "pictures/*.png",
    "solutions/[0-9][0-9]*_*.ipynb",
    "solutions/real_[0-9]_*.ipynb",
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
        """As in ``03``, ``03b`` or ``real_1``; "" for the appendix."""
        found = re.match(r"(\d\d[a-z]?|real_\d)_", self.file)
        return found[1] if found else ""

    @property
    def name(self) -> str:
        """The file's name without its number, as in ``ddp_timing``."""
        return Path(self.file).stem.removeprefix(f"{self.number}_")


class Tasks(NamedTuple):
    """What a lesson asks of the learner, in the order of its cells.

    Attributes
    ----------
    predictions : tuple of str
        The questions of its calls of ``predict``.
    exercises : tuple of str
        Its checks, each with the module that has it, as in ``barriers.check_load``.
    """

    predictions: tuple[str, ...]
    exercises: tuple[str, ...]


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
    return "\n".join(_code_cells(path))


def _code_cells(path: Path) -> list[str]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tasks(path: Path) -> Tasks:
    """Read from a notebook's code what it asks of the learner; nothing of it is executed."""
    predictions: list[str] = []
    exercises: list[str] = []
    modules: dict[str, str] = {}
    for cell in _code_cells(path):
        with contextlib.suppress(SyntaxError):  # a magic; such cells ask nothing
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.ImportFrom):
                    home = (node.module or "").rpartition(".")[2]
                    modules |= {name.name: home for name in node.names}
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    if node.func.id == "predict":
                        predictions.append(ast.literal_eval(node.args[0]))
                    elif node.func.id.startswith("check_") and node.func.id in modules:
                        exercises.append(f"{modules[node.func.id]}.{node.func.id}")
    return Tasks(tuple(predictions), tuple(dict.fromkeys(exercises)))


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
    listed = "\n".join(f"  {lesson.number:<6}  {lesson.name}" for lesson in among)
    raise CommandError(
        f"there is no lesson {text!r}.{_closest(wanted, among)} The lessons:\n{listed}"
    )


def _plain(text: str) -> str:
    """A lesson's name, normalised for comparison."""
    name = text.strip().lower().removesuffix(".ipynb")
    return re.sub(r"[\s-]+", "_", name.rpartition("/")[2] if "solutions/" not in name else name)


def _names(lesson: Lesson) -> set[str]:
    stem = Path(lesson.file).stem
    number = {lesson.number, lesson.number.lstrip("0") or "0"} if lesson.number else set()
    return {stem, lesson.name, *number}


def _closest(wanted: str, among: list[Lesson]) -> str:
    names = [lesson.name for lesson in among]
    word = re.sub(r"^\d+_", "", wanted)
    close = [name for name in names if len(word) > 2 and word in name]
    close += difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
