"""The learner's copy of the lessons: made, brought up to date, kept where it is theirs.

A copy holds a manifest of what was given, so that a later version can tell what the learner wrote.
Runs in the command `ddp-lessons`.

A notebook counts as changed when the sources of its cells differ from what was given: JupyterLab
rewrites everything else as soon as a lesson is run. So a new version of a lesson replaces one that
was only run, and with it the outputs of that run. Keeping every lesson that was ever run would
leave a learner among old texts and twins of them, while outputs come back with one more run; the
command names the lessons to which that happened. If the new version has the same cells, the file
stays as it is, outputs included. A lesson that the learner changed stays, and the new one is put
beside it, once.

A file that the learner deleted stays away until it is asked for by name (`open 5`) or nothing of
the copy is left. So to begin a lesson afresh one deletes it, or renames it, and opens it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddp_lessons.course import CourseError, files

MANIFEST = ".ddp-lessons.json"


class Given(NamedTuple):
    """What the learner was given of one file: SHA-256 hashes, empty where there was nothing."""

    content: str = ""
    cells: str = ""
    offered: str = ""  # the content that was last put beside a file that the learner changed


class Brought(NamedTuple):
    """What was done to a copy, by the names of its files."""

    new: bool  # nothing of the course was there before
    rerun: list[str]  # replaced, and with them the outputs of the learner's own runs
    kept: dict[str, str]  # changed by the learner: the new version's name beside it


def standing_in(place: Path) -> Path | None:
    """The copy that holds a folder, or None: a command given inside a copy means that copy."""
    return next((at for at in (place, *place.parents) if (at / MANIFEST).is_file()), None)


def bring(course: Path, folder: Path, version: str, wanted: str = "") -> Brought:
    """Give a folder what it lacks of the course, and update what the learner left as it was.

    Parameters
    ----------
    course : Path
        Where the lessons of this version are.
    folder : Path
        The copy. It is made if need be; what is in it and was not given stays as it is.
    version : str
        The course's; part of the name of a file that is put beside another.
    wanted : str
        A file that is to be there even if the learner deleted it.

    Raises
    ------
    CourseError
        If something cannot be written. Every file is then as it was, or complete.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names, before = files(course), _manifest(folder)
    brought = Brought(not any(_is_there(folder / name) for name in names), [], {})
    after = dict(before)
    for name in names:
        if name in before and not (_is_there(folder / name) or brought.new or name == wanted):
            continue  # the learner deleted it
        with _explained(folder / name):
            fresh = (course / name).read_bytes()
            given = before.get(name, Given())
            after[name] = _bring_file(folder, name, given, fresh, version, brought)
    if after != before:
        with _explained(folder / MANIFEST):
            _write_manifest(folder, after, version)
    return brought


def changed(folder: Path) -> list[str]:
    """Files of a copy whose text is no longer what was given."""
    return [
        name
        for name, given in _manifest(folder).items()
        if (content := _content(folder / name)) is not None and _cells(name, content) != given.cells
    ]


def _bring_file(
    folder: Path, name: str, given: Given, fresh: bytes, version: str, brought: Brought
) -> Given:
    path = folder / name
    mine, new = _content(path), Given(_hash(fresh), _cells(name, fresh))
    if mine is None or _hash(mine) == given.content != new.content:
        _write(path, fresh)
        return new
    cells = _cells(name, mine)
    if cells == new.cells:
        return new
    if cells == given.cells:
        brought.rerun.append(name)
        _write(path, fresh)
        return new
    if new.content in (given.content, given.offered):
        return given
    brought.kept[name] = _put_beside(path, fresh, version)
    return given._replace(offered=new.content)


def _put_beside(path: Path, fresh: bytes, version: str) -> str:
    """Write a new version beside a file, never over anything else; returns its name."""
    for count in itertools.count(1):
        again = f"-{count}" if count > 1 else ""
        beside = path.with_name(f"{path.stem}.new-{version}{again}{path.suffix}")
        if not _is_there(beside):
            _write(beside, fresh)
        if _content(beside) == fresh:
            break
    return beside.name


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _content(path: Path) -> bytes | None:
    """What a file holds; None if there is none. Other things of that name hold nothing of ours."""
    if not _is_there(path):
        return None
    return path.read_bytes() if path.is_file() else b""


def _cells(name: str, content: bytes) -> str:
    """A hash of what a person writes in a notebook; of everything in any other file."""
    if name.endswith(".ipynb"):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            content = json.dumps(_sources(json.loads(content)), sort_keys=True).encode()
    return _hash(content)


def _sources(notebook: dict[str, Any]) -> list[Any]:
    """Cells without what running adds; JupyterLab also appends an empty cell after the last one."""
    cells = [
        (cell["cell_type"], "".join(cell["source"]), cell.get("attachments") or {})
        for cell in notebook["cells"]
    ]
    return [cell for cell in cells if cell[1].strip() or cell[2]]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest(folder: Path) -> dict[str, Given]:
    """What a copy was given; nothing if that cannot be read: then all counts as the learner's."""
    try:
        noted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: _given(fields) for name, fields in noted.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _given(fields: dict[str, Any]) -> Given:
    return Given(*(str(fields.get(name, "")) for name in Given._fields))


def _write_manifest(folder: Path, given: dict[str, Given], version: str) -> None:
    noted = {name: fields._asdict() for name, fields in sorted(given.items())}
    text = json.dumps({"version": version, "files": noted}, indent=1)
    _write(folder / MANIFEST, text.encode())


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's error into a sentence; one without a path, as for a full disk, too."""
    try:
        yield
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError)
        reason = f"{error.filename} is not a folder" if in_the_way else error.strerror
        raise CourseError(
            f"cannot bring the lessons to {path}: {reason}. "
            "Nothing of yours was touched, and what was brought so far can stay; "
            "--folder PATH takes another place."
        ) from error
