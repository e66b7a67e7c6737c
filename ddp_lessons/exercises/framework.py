"""The framework of all checks: exercises, hints, and the feedback that a cell shows.

Runs in the parent; only `Watched` and what `in_group` decorates run in workers. A check is a
function that raises `Wrong` with what it saw, mostly through `judge`; the `exercise` decorator
turns it into an `Exercise`, which never raises for a wrong answer.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dis
import functools
import inspect
import io
import reprlib
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ddp_lessons import ErrorRecord, LaunchError, Run, launch
from ddp_lessons.course.progress import note_exercise
from ddp_lessons.launcher.live_panel import hidden
from ddp_lessons.system.notebook import is_live, show_html
from ddp_lessons.text import as_html, count

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

TIMEOUT = 8.0  # seconds without progress: an answer that hangs is stopped soon
_short = reprlib.Repr()
P = ParamSpec("P")
R = TypeVar("R")


class Wrong(Exception):
    """A wrong answer: what the ranks did, and the misconception behind it."""

    def __init__(self, seen: str, because: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.because = because


class Unjudged(Exception):
    """The check could not judge the answer, for a reason that is not the learner's."""


class Unattempted(Exception):
    """The exercise was not attempted yet; checks raise it where `is_unattempted` cannot tell."""


@dataclass(frozen=True)
class Feedback:
    """What a check found; the learner's cell shows it.

    Attributes
    ----------
    passed : bool or None
        None if the exercise was not attempted yet, or could not be judged.
    seen : str
        What happened when the answer ran.
    because : str
        The corrected misconception behind a wrong answer; "" if the answer is right.
    """

    exercise: str
    passed: bool | None
    seen: str
    because: str
    hints: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"{_MARKS[self.passed]} {self.exercise}: {self.seen}"]
        if self.because:
            lines.append(f"  {self.because}")
        if self.passed is False:
            lines.append(f"  For a hint: {self.exercise}.hint()")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        colour = {True: "#009E73", False: "#D55E00", None: "#888888"}[self.passed]
        parts = [f"<b>{_MARKS[self.passed]} {self.exercise}</b>: {_text(self.seen)}"]
        if self.because:
            parts.append(f"<p style='margin:6px 0'>{_text(self.because)}</p>")
        if self.passed is False:
            parts += [
                f"<details><summary>Hint {number}</summary>{_text(hint)}</details>"
                for number, hint in enumerate(self.hints, start=1)
            ]
        return (
            f"<div style='border-left:4px solid {colour};padding:4px 12px'>{''.join(parts)}</div>"
        )


_MARKS = {True: "✓", False: "✗", None: "○"}


class Exercise:
    """A check as the learner calls it: `check_greet(greet)`, and `check_greet.hint()`."""

    def __init__(self, check: Callable[[Any], str], hints: tuple[str, ...]) -> None:
        self._check = check
        self._hints = hints
        self._given = 0
        self.__name__ = check.__name__
        self.__module__ = check.__module__
        self.__doc__ = check.__doc__

    def __call__(self, answer: Any) -> Feedback:
        """Run the answer on real ranks and return the feedback; keep whether it was right."""
        with _Status(self.__name__):
            feedback = self._judge(answer)
        if feedback.passed is not None:
            note_exercise(f"{self.__module__.rpartition('.')[2]}.{self.__name__}", feedback.passed)
        return feedback

    def _judge(self, answer: Any) -> Feedback:
        try:
            if is_unattempted(answer):
                raise Unattempted
            if self._takes_a_function() and not callable(answer):
                raise Wrong(
                    f"it got {_short.repr(answer)}, which cannot be called.",
                    f"Pass {self._parameter.name} itself, {self.__name__}({self._parameter.name}), "
                    "and not what a call of it returns.",
                )
            return self._feedback(True, self._check(answer))
        except Unattempted:
            return self._feedback(
                None, "not attempted yet. Replace the `...` and run the cell again."
            )
        except Wrong as wrong:
            return self._feedback(False, wrong.seen, wrong.because)
        except Unjudged as reason:
            return self._feedback(None, f"could not be judged. {reason}")
        except LaunchError as error:
            return self._feedback(
                False, f"it failed on real ranks.\n{error}", "Read the error first."
            )

    @property
    def _parameter(self) -> inspect.Parameter:
        return next(iter(inspect.signature(self._check).parameters.values()))

    def _takes_a_function(self) -> bool:
        """Whether the check says so, by the type of its parameter."""
        name, written = self._parameter.name, self._parameter.annotation
        try:
            return typing.get_origin(typing.get_type_hints(self._check).get(name)) is Callable
        except NameError:  # it has names that only type checkers import
            return isinstance(written, str) and written.startswith("Callable[")

    def hint(self) -> None:
        """Print the next hint; after the last one, say so and print the first again."""
        number = self._given % len(self._hints)
        if self._given and not number:
            print("That was the last hint. From the first again:")
        print(f"Hint {number + 1} of {len(self._hints)}: {self._hints[number]}")
        self._given += 1

    def _feedback(self, passed: bool | None, seen: str, because: str = "") -> Feedback:
        return Feedback(self.__name__, passed, seen, because, self._hints)


def exercise(*hints: str) -> Callable[[Callable[[Any], str]], Exercise]:
    """Make an `Exercise` of a check that returns what it saw or raises `Wrong`."""
    return lambda check: Exercise(check, hints)


def run_ranks(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 2,
    nnodes: int = 1,
    check: bool = True,
) -> Run:
    """`launch` for a check: it prints nothing and gives up soon.

    With ``check=False`` a failure is not raised, so that the check can explain it.
    """
    tell(f"on {count(nprocs * nnodes, 'rank')}")
    token = hidden.set(True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return launch(fn, args, nprocs, nnodes=nnodes, timeout=TIMEOUT, check=check)
    finally:
        hidden.reset(token)


def tell(where: str) -> None:
    """Show below the cell that another run of the answer begins; where, as in ``on 2 ranks``."""
    if status := _status.get():
        status.show_run(where)


class _Status:
    """A line below the cell while a check works, in the place of the panels of its runs."""

    def __init__(self, check: str) -> None:
        self._check = check
        self._runs = 0
        self._handle: DisplayHandle | None = None

    def __enter__(self) -> None:
        self._token = _status.set(self)

    def show_run(self, where: str) -> None:
        if is_live():
            self._runs += 1
            self._show(f"{self._check}: run {self._runs} of your answer, {where} ...")

    def _show(self, text: str) -> None:
        self._handle = show_html(text, self._handle)

    def __exit__(self, *_: object) -> None:
        _status.reset(self._token)
        if self._handle is not None:
            self._show("")


_status: ContextVar[_Status | None] = ContextVar("_status", default=None)


def in_group(worker: Callable[P, R], timeout: timedelta | None = None) -> Callable[P, R]:
    """Decorate a worker function: the rank joins a gloo group first and leaves it afterwards."""

    @functools.wraps(worker)
    def joined(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timeout)
        result = worker(*args, **kwargs)
        dist.destroy_process_group()  # not after an exception: other ranks may still use the group
        return result

    return joined


class Watched:
    """Notes whether an object of a class is made from now on, in this rank."""

    def __init__(self, watched: Any) -> None:
        self.was_made = False
        make = watched.__init__

        def noting(*args: Any, **kwargs: Any) -> None:
            self.was_made = True
            make(*args, **kwargs)

        watched.__init__ = noting


def stuck(run: Run) -> bool:
    """Whether a run failed because ranks depend on each other: none raised its own error."""
    return run.verdict is not None and run.verdict.kind not in ("raised", "unsendable")


def errors(run: Run) -> list[ErrorRecord]:
    """The exceptions of the ranks that raised one."""
    return [rank.error for rank in run.ranks if rank.error is not None]


def judge(seen: str, mistakes: Mapping[str, object]) -> None:
    """Raise `Wrong` for the first mistake whose condition holds.

    Parameters
    ----------
    seen : str
        What the ranks did.
    mistakes : mapping of str to object
        The explanation of each mistake, and its condition; the most specific mistake first, True
        for any other. A line before the explanation completes `seen`.
    """
    for text, applies in mistakes.items():
        if applies:
            more, _, because = text.rpartition("\n")
            raise Wrong(f"{seen}{more}", because)


def call(answer: Callable[..., Any], *args: Any, because: str) -> Any:
    """Call the learner's function here, on copies; an exception is a wrong answer."""
    try:
        return answer(*copy.deepcopy(args))
    except Exception as error:
        name = getattr(answer, "__name__", "it")
        given = ", ".join(_short.repr(argument) for argument in args)
        raise Wrong(f"{name}({given}) raised {type(error).__name__}: {error}", because) from error


def is_unattempted(answer: Any) -> bool:
    """True for `...`, and for a function or class of which a part is still `...`.

    That is a body or a value; not an index, as in `x[..., 0]`. Of a class, a method may do nothing
    on purpose, with `pass` for its body.
    """
    answer = inspect.unwrap(answer) if callable(answer) else answer  # without its decorators
    if answer is ...:
        return True
    if inspect.isclass(answer):
        methods = filter(inspect.isfunction, vars(answer).values())
        return any(is_unattempted(method) and not _does_nothing(method) for method in methods)
    code = getattr(answer, "__code__", None)
    return code is not None and (_is_empty(code) or _keeps_ellipsis(code))


def _does_nothing(method: types.FunctionType) -> bool:
    """Whether the source of a method is known, and has no `...`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):
        return False
    return not any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree))


_IDLE = {"RESUME", "NOP", "COPY_FREE_VARS"}
_RETURN = {"LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}


def _is_empty(code: types.CodeType) -> bool:
    # A body of `...`, of a docstring or of `pass` compiles to nothing but `return None`.
    steps = [step for step in dis.get_instructions(code) if step.opname not in _IDLE]
    return all(step.opname in _RETURN for step in steps) and steps[0].argval is None


def _keeps_ellipsis(code: types.CodeType) -> bool:
    """Whether a function, or one in it, has `...` for a value."""
    steps = list(dis.get_instructions(code))
    kept = (n for n, step in enumerate(steps) if step.argval is ...)
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return any(not _is_index(steps[n + 1 :]) for n in kept) or any(map(_keeps_ellipsis, inner))


def _is_index(after: Sequence[dis.Instruction]) -> bool:
    """Whether what was just loaded is an index, or in a tuple that is one: `x[..., n + 1]`."""
    above = 0  # so many values lie on the stack above it
    for step in after:
        if step.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        effect = dis.stack_effect(
            step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
        )
        taken = 0 if effect > 0 else -effect + (not step.opname.startswith(("STORE", "POP")))
        if taken <= above:
            above += effect
        elif step.opname == "BUILD_TUPLE":
            above = 0
        else:
            return step.opname.endswith("SUBSCR") or step.argrepr == "[]"  # BINARY_OP [] from 3.14
    return False


def _text(text: str) -> str:
    return f"<span style='white-space:pre-wrap'>{as_html(text)}</span>"
