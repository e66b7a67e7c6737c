"""The errors of the package, raised in the parent process.

::

    LaunchError
    ├── BadLaunch       the arguments of launch() make no sense; nothing was started
    ├── CannotSend      the function, an argument or a return value cannot be pickled
    ├── WorkerFailed    a rank raised an exception
    ├── WorkerDied      a rank's process ended by a signal or by os._exit
    └── WorkersHung     no rank made progress

Each message says what happened, on which rank, at which line, and what to try. A notebook shows
only the message: the launcher's frames would hide it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddp_lessons.text import wrapped

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord

_RED, _BOLD, _RESET = "\x1b[31m", "\x1b[1m", "\x1b[0m"


class LaunchError(Exception):
    """Base of the errors that launch() raises.

    Attributes
    ----------
    run : Run or None
        The record of the run, with every rank's output, value and error; None if it never began.
    rank : int or None
        The rank that caused the failure, if it was one rank.
    """

    def __init__(
        self, message: str, *, run: RunRecord | None = None, rank: int | None = None
    ) -> None:
        super().__init__(message)
        self.run = run
        self.rank = rank

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback (ipyparallel uses this hook, too)."""
        name = type(self).__name__
        title, *rest = str(self).splitlines() or [""]
        first, *more = wrapped(f"{name}: {title}").removeprefix(name).splitlines()
        bold = [f"{_BOLD}{line}{_RESET}" for line in more]
        return [f"{_BOLD}{_RED}{name}{_RESET}{_BOLD}{first}{_RESET}", *bold, *map(wrapped, rest)]


def show_without_frames(error: BaseException) -> None:
    """Make a notebook show only the name of an error that was explained already."""
    lines = [f"{_BOLD}{_RED}{type(error).__name__}{_RESET}"]
    error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


class BadLaunch(LaunchError):
    """The arguments of launch() make no sense; the message says which one, and what works."""


class CannotSend(LaunchError):
    """An object cannot be pickled, so it cannot be sent between processes; names the object."""


class WorkerFailed(LaunchError):
    """A rank raised an exception, which is `__cause__` if it could be pickled."""


class WorkerDied(LaunchError):
    """A rank's process ended without returning: by a signal, or by os._exit."""


class WorkersHung(LaunchError):
    """No rank made progress for `timeout` seconds, or none ever could."""
