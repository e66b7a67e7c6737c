"""The errors: the documented tree, display without frames, and their run."""

from __future__ import annotations

import pickle
import re
import sys
import traceback

import cloudpickle
import pytest

from ddp_lessons import (
    BadLaunch,
    CannotSend,
    LaunchError,
    Run,
    WorkerDied,
    WorkerFailed,
    WorkersHung,
    errors,
    launch,
)
from tests.support.kernels import ANSI

cloudpickle.register_pickle_by_value(sys.modules[__name__])

KINDS = [BadLaunch, CannotSend, WorkerDied, WorkerFailed, WorkersHung]


def test_one_tree_drawn_in_the_modules_docstring() -> None:
    assert all(kind.__bases__ == (LaunchError,) for kind in KINDS)
    assert LaunchError.__bases__ == (Exception,)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == {"LaunchError", *(kind.__name__ for kind in KINDS)}
    drawn = re.findall(r"^    (?:[├└]── )?([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(defined)
    assert drawn[0] == "LaunchError"


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_the_message_and_no_frame(kind: type[LaunchError]) -> None:
    message = "rank 1 of 4 stumbled\n\n---->   3     fall()\nTry less."
    with pytest.raises(LaunchError) as caught:
        raise kind(message)
    shown = ANSI.sub("", "\n".join(caught.value._render_traceback_()))
    assert shown == f"{kind.__name__}: {message}"
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert frame.filename not in shown
    assert "Traceback" not in shown


def test_only_the_first_line_is_emphasised() -> None:
    first, *rest = LaunchError("what\nwhere\nwhy")._render_traceback_()
    assert ANSI.search(first)
    assert first.endswith("\x1b[0m")
    assert rest == ["where", "why"]


def test_an_error_without_a_run() -> None:
    error = BadLaunch("nprocs is 0")
    assert str(error) == "nprocs is 0"
    assert error.run is None
    assert error.rank is None


@pytest.mark.ranks
def test_a_failure_carries_its_run_and_rank_also_through_pickle() -> None:
    def work(rank: int) -> str:
        if rank == 1:
            raise ValueError("bad sample")
        return "fine"

    with pytest.raises(WorkerFailed) as caught:
        launch(work)
    error = caught.value
    assert isinstance(error.run, Run)
    assert error.run.error is error
    assert error.run.values[1] is None
    assert error.rank == 1

    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is WorkerFailed
    assert str(copy) == str(error)
    assert copy.rank == 1
    assert repr(copy.run) == repr(error.run)
    assert isinstance(copy.run, Run)
    assert copy.run.error is copy


@pytest.mark.parametrize("kind", [LaunchError, *KINDS])
def test_pickle_keeps_kind_and_message(kind: type[LaunchError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("two\nlines", rank=3)))
    assert type(copy) is kind
    assert str(copy) == "two\nlines"
    assert (copy.run, copy.rank) == (None, 3)
