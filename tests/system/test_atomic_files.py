"""Files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_lessons.system.atomic_files import write_files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (path := tmp_path / "file").write_bytes(b"before")
    return path


def test_a_file_is_replaced_when_it_is_complete(path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"af"
        assert path.read_bytes() == b"before"
        yield b"ter"

    write_files({path: pieces()})
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]


def test_none_is_replaced_if_one_cannot_be_completed(path: Path) -> None:
    def half() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_files({path: [b"after"], path.with_name("other"): half()})
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_names_the_file_that_was_asked_for(path: Path) -> None:
    within = path / "file"
    with pytest.raises(NotADirectoryError) as caught:
        write_files({within: [b"after"]})
    assert caught.value.filename == str(within)
