"""What a learner has done is kept beside the copy, and nowhere else."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ddp_lessons.course import progress
from ddp_lessons.course.lesson_files import Tasks
from ddp_lessons.course.progress import (
    FILE,
    MARKER,
    UnreadableProgress,
    note_exercise,
    note_prediction,
    path_beside,
    read,
    show_progress,
)

ASKED = Tasks(("first?", "second?"), ("barriers.check_load", "barriers.check_waits"))


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the lessons, with a live kernel in it."""
    folder = tmp_path / "ddp-lessons"
    (folder / "solutions").mkdir(parents=True)
    (folder / MARKER).touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(progress, "is_live", lambda: True)
    return folder


def test_what_was_done_is_counted(copy: Path) -> None:
    note_prediction("first?", "4", "3", False)
    note_exercise("barriers.check_load", False)
    note_exercise("barriers.check_load", True)
    note_exercise("barriers.check_load", False)  # what was passed once stays passed
    done = read(path_beside(copy)).of(ASKED)
    assert (done.predicted, done.right, done.predictions) == (1, 0, 2)
    assert (done.passed, done.exercises, done.left) == (1, 2, ["check_waits"])
    assert read(path_beside(copy)).exercises["barriers.check_load"]["tries"] == 3


def test_the_first_prediction_counts(copy: Path) -> None:
    note_prediction("first?", "4", "3", False)
    note_prediction("first?", "3", "3", True)
    assert read(path_beside(copy)).predictions["first?"]["said"] == "4"


def test_copies_of_several_versions_share_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_prediction("first?", "3", "3", True)
    newer = tmp_path / "ddp-lessons-2"
    (newer / "solutions").mkdir(parents=True)
    (newer / MARKER).touch()
    monkeypatch.chdir(newer / "solutions")
    note_prediction("second?", "3", "3", True)
    assert read(tmp_path / FILE).of(ASKED).predicted == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [FILE]


def test_kernels_that_write_at_once_lose_nothing(copy: Path) -> None:
    def work(kernel: int) -> None:
        for number in range(20):
            note_exercise(f"kernel{kernel}.check_{number}", True)

    threads = [threading.Thread(target=work, args=(kernel,)) for kernel in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path_beside(copy)).exercises) == 80


@pytest.mark.parametrize("live", [False, True])
def test_nothing_is_written_without_a_copy_or_where_notebooks_are_tested(
    copy: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setattr(progress, "is_live", lambda: live)
    if live:
        (copy / MARKER).unlink()
    note_prediction("first?", "3", "3", True)
    note_exercise("barriers.check_load", True)
    assert not path_beside(copy).exists()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", '{"predictions": {}}', '{"predictions": [], "exercises": {}}'),
        '{"predictions": {"first?": {"right": "yes"}}, "exercises": {}}',
        '{"predictions": {}, "exercises": {"a.check_b": {"passed": true}}}',
        "\udcff",
    ],
)
def test_a_file_that_is_damaged_or_not_ours_stays_as_it_is(copy: Path, content: str) -> None:
    path_beside(copy).write_bytes(before := content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=rf"progress is not kept: .*{FILE}"):
        note_prediction("first?", "3", "3", True)
    assert path_beside(copy).read_bytes() == before
    with pytest.raises(UnreadableProgress, match=FILE):
        read(path_beside(copy))


def test_a_file_that_cannot_be_written_is_a_warning(copy: Path) -> None:
    path_beside(copy).mkdir()
    with pytest.warns(UserWarning, match="progress is not kept"):
        note_exercise("barriers.check_load", True)


def test_a_lesson_says_what_was_done_in_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_exercise("barriers.check_load", True)
    show_progress("04")
    said = capsys.readouterr().out
    assert said.startswith("Lesson 04: you predicted 0 of ")
    assert "passed 1 of 3 exercises; left: check_rank_zero_first, check_waits." in said


def test_elsewhere_it_says_how_much_there_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "is_live", lambda: False)
    show_progress("04")
    assert "and 3 exercises.\nIn a copy made by `ddp-lessons`" in capsys.readouterr().out


def test_the_file_is_plain_json(copy: Path) -> None:
    note_prediction("first?", "3 s", "4 s", False)
    content = json.loads(path_beside(copy).read_text())
    assert content["predictions"]["first?"] == {"said": "3 s", "answer": "4 s", "right": False}
