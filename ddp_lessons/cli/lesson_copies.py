"""The learner's copy of the lessons, in which nothing is ever overwritten.

Runs in the command `ddp-lessons`. A marker in the copy says which lessons it was made from. If this
installation holds other lessons, they become a new folder beside the copy, which stays as it is.

A lesson that the learner deleted or renamed is copied again when it is opened, so that is how to
begin it afresh. What else they deleted stays away until nothing of the copy is left.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

from ddp_lessons.cli.lesson_files import CommandError, files
from ddp_lessons.system.atomic_files import write_files

MARKER = ".ddp-lessons"


def containing(place: Path) -> Path | None:
    """The copy that holds a folder, or None: a command given inside a copy means that copy."""
    return next((at for at in (place, *place.parents) if (at / MARKER).is_file()), None)


def find_copy(course: Path, folder: Path) -> Path:
    """Where the copy of a course is, or would be made: in `folder` or, if that is taken, beside it.

    Folders are taken that hold a copy of other lessons, or files of the learner's own that have the
    names of lessons. Beside ``course`` are ``course-2``, ``course-3`` and so on.
    """
    first = Path(os.path.abspath(folder))
    base = re.sub(r"-\d\d?$", "", first.name)
    beside = (first.with_name(f"{base}-{number}") for number in itertools.count(2))
    places = itertools.chain([folder], beside)
    return next(place for place in places if is_copy(course, place) or _is_free(course, place))


def is_copy(course: Path, folder: Path) -> bool:
    """True if a folder is a copy of these lessons, whatever the learner did in it."""
    return _marker(folder) == _digest(course)


def bring(course: Path, folder: Path, wanted: str) -> bool:
    """Copy the lessons into a folder, as far as it lacks them.

    Parameters
    ----------
    course : Path
        Where the lessons of this installation are.
    folder : Path
        Where `find_copy` found their copy, or a place for it.
    wanted : str
        A file that is to be there even if the learner deleted it.

    Returns
    -------
    bool
        True if nothing of the lessons was there before.

    Raises
    ------
    CommandError
        If something cannot be written. Every file is then as it was, or complete.
    """
    names = files(course)
    new = not any(os.path.lexists(folder / name) for name in names)
    complete = is_copy(course, folder) and not new
    for name in [wanted] if complete else names:
        if not os.path.lexists(folder / name):
            _write(folder / name, (course / name).read_bytes())
    if not complete:
        _write(folder / MARKER, _digest(course).encode())
    return new


def changed(course: Path, folder: Path) -> list[str]:
    """The files of a copy in which the learner wrote something."""
    there = [name for name in files(course) if (folder / name).is_file()]
    return [name for name in there if _written(folder / name) != _written(course / name)]


def _written(path: Path) -> Any:
    """What people write in a file: of a notebook, its cells without what running adds to them."""
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
    """The digest of the lessons from which a copy was made; empty if the folder is no copy."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _digest(course: Path) -> str:
    """The same for the same lessons: the version may stay while they change, and change alone."""
    digest = hashlib.sha256()
    for name in files(course):
        digest.update(f"\n{name}\n".encode() + (course / name).read_bytes())
    return digest.hexdigest()


def _is_free(course: Path, folder: Path) -> bool:
    """True if a copy can be made in a folder, or be completed: nothing else has its names."""
    taken = [name for name in files(course) if os.path.lexists(folder / name)]
    return not _marker(folder) and all(_is_same(course / name, folder / name) for name in taken)


def _is_same(given: Path, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file() and filecmp.cmp(given, path, shallow=False)
    return False


def _write(path: Path, content: bytes) -> None:
    """Write a file of the copy; turn the system's error into a sentence."""
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
