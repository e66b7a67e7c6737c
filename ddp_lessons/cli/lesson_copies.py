"""Makes the learner's copy of the lessons, and never overwrites anything in it.

Lessons are copied without their stored outputs, which would give away what they ask.

Runs in the command `ddp-lessons`. A marker in the copy has a digest of the lessons it was made
from. Other lessons go into a new folder beside the copy, which stays as it is.

Opening a lesson that the learner deleted or renamed copies it again: that is how to begin it
afresh. Other deleted files stay away until nothing of the copy is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from ddp_lessons.course.lesson_files import APPENDIX, CommandError, files
from ddp_lessons.course.progress import MARKER
from ddp_lessons.system.atomic_files import write_files

# What JupyterLab writes into a notebook when its kernel has started.
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
    "version": platform.python_version(),
}


def find_copy(course: Path, folder: Path) -> Path:
    """The folder of a course's copy, existing or to be made: `folder` or, if taken, one beside it.

    A folder is taken if it has a copy of other lessons, or the learner's own files under names of
    lessons. The folders beside ``course`` are ``course-2``, ``course-3`` and so on.
    """
    first = Path(os.path.abspath(folder))
    base = re.sub(r"-\d\d?$", "", first.name)
    beside = (first.with_name(f"{base}-{number}") for number in itertools.count(2))
    places = itertools.chain([folder], beside)
    return next(place for place in places if is_copy(course, place) or _is_free(course, place))


def is_copy(course: Path, folder: Path) -> bool:
    """True if a folder is a copy of these lessons, changed or not."""
    return _marker(folder) == _digest(course)


def bring(course: Path, folder: Path, wanted: str) -> bool:
    """Copy missing lessons into a folder.

    Parameters
    ----------
    course : Path
        The lessons of this installation.
    folder : Path
        The folder that `find_copy` returned.
    wanted : str
        A file to copy even if the learner deleted it; "" for none.

    Returns
    -------
    bool
        True if the folder had no lessons before.

    Raises
    ------
    CommandError
        If a file cannot be written. Each file is then unchanged or complete.
    """
    names = files(course)
    new = not any(os.path.lexists(folder / name) for name in names)
    complete = is_copy(course, folder) and not new
    for name in [wanted] * bool(wanted) if complete else names:
        if not os.path.lexists(folder / name):
            _write(folder / name, _given(course, name))
    if not complete:
        _write(folder / MARKER, _digest(course).encode())
    return new


def reset(course: Path, folder: Path, name: str) -> str:
    """Begin a lesson of a copy afresh; the name under which the learner's own file is kept."""
    path = folder / name
    kept = (path.with_name(f"{path.stem}-old-{n}{path.suffix}") for n in itertools.count(1))
    mine = next(place for place in kept if not os.path.lexists(place))
    try:
        os.rename(path, mine)
    except OSError as error:
        raise CommandError(f"cannot rename {path}: {error.strerror}. It is unchanged.") from error
    _write(path, _given(course, name))
    return mine.name


def _given(course: Path, name: str) -> bytes:
    """What a copy has in the place of a file of the course.

    A lesson has no outputs, and names this Python: otherwise JupyterLab would write that into it,
    and ask on closing whether to save.
    """
    content = (course / name).read_bytes()
    if "/" in name or not name.endswith(".ipynb") or name == APPENDIX:
        return content
    notebook = json.loads(content)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    notebook["metadata"] |= {"kernelspec": KERNEL, "language_info": LANGUAGE}
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def changed(course: Path, folder: Path) -> list[str]:
    """The files of a copy that the learner changed."""
    there = [name for name in files(course) if (folder / name).is_file()]
    return [name for name in there if _written(folder / name) != _written(course / name)]


def _written(path: Path) -> Any:
    """The content that a person writes: of a notebook, its cells without outputs."""
    content = path.read_bytes()
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        cells = [
            (cell["cell_type"], "".join(cell["source"]), cell.get("attachments") or {})
            for cell in json.loads(content)["cells"]
        ]
        # JupyterLab appends an empty cell after the last one.
        return [cell for cell in cells if cell[1].strip() or cell[2]]
    return content


def _marker(folder: Path) -> str:
    """The digest of the lessons that a copy was made from; "" if the folder is no copy."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _digest(course: Path) -> str:
    """A digest of the lessons, which may change without the version, and the reverse."""
    digest = hashlib.sha256()
    for name in files(course):
        digest.update(f"\n{name}\n".encode() + (course / name).read_bytes())
    return digest.hexdigest()


def _is_free(course: Path, folder: Path) -> bool:
    """True if a copy can be made or completed in a folder: no other file has its names."""
    taken = [name for name in files(course) if os.path.lexists(folder / name)]
    return not _marker(folder) and all(_is_given(course, folder, name) for name in taken)


def _is_given(course: Path, folder: Path, name: str) -> bool:
    with contextlib.suppress(OSError):
        return (folder / name).is_file() and (folder / name).read_bytes() == _given(course, name)
    return False


def _write(path: Path, content: bytes) -> None:
    """Write a file of the copy; an OSError becomes a CommandError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: [content]})
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError)
        reason = f"{error.filename} is not a folder" if in_the_way else error.strerror
        raise CommandError(
            f"cannot copy the lessons to {path}: {reason}. Nothing of yours was touched, and what "
            "was copied so far can stay; --folder PATH takes another place."
        ) from error
