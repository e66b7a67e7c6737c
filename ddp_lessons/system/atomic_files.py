"""Writing files so that nobody sees one that is half-written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def write_files(contents: Mapping[Path, Iterable[bytes]]) -> None:
    """Write files beside their places; they take these when all of them are complete.

    Parameters
    ----------
    contents : mapping of Path to iterable of bytes
        The pieces of each file, in order.

    Raises
    ------
    OSError
        If a file cannot be written; it names the file, not the one beside it, which is gone.
    """
    with contextlib.ExitStack() as parts:
        places: dict[Path, Path] = {}
        for path, pieces in contents.items():
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            with _naming(path), open(part, "wb") as file:
                parts.callback(part.unlink, missing_ok=True)
                file.writelines(pieces)
            places[path] = part
        for path, part in places.items():
            with _naming(path):
                os.replace(part, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
