"""Notes the local variables of a rank's function where it failed, as text.

Runs in the rank, called by main.py when `launch(..., post_mortem=True)` was asked for: the `repr`
of the learner's objects is the learner's code. Values are cut short; of tensors and arrays, shape,
type and the first numbers are kept. Of a tensor of a class of its own no numbers are read: other
ranks may hold some of them, and the call that fetches them would wait for those ranks.
"""

from __future__ import annotations

import builtins
import reprlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ddp_lessons.text import count
from ddp_lessons.wire import stacks
from ddp_lessons.wire.owners import is_at_home
from ddp_lessons.wire.records import Frame, FrameVariables

MOST_FRAMES, MOST_VARIABLES = 20, 40
LONGEST = 300  # characters of a value
_FIRST = 6  # numbers of a tensor
_LEFT_OUT = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type


def frames_of(error: BaseException, home: str | None = None) -> tuple[FrameVariables, ...]:
    """The learner's frames in which an exception was, and the innermost one, outermost first."""
    found = [
        (_frame(frame, lineno, home), frame.f_locals)
        for frame, lineno in traceback.walk_tb(error.__traceback__)
        if not stacks.is_infrastructure(frame.f_code.co_filename)
    ]
    if not found:
        return ()
    kept = sorted({*stacks.learners([frame for frame, _ in found]), len(found) - 1})
    return tuple(
        FrameVariables(found[number][0], tuple(_variables(found[number][1])))
        for number in kept[-MOST_FRAMES:]
    )


def _frame(frame: types.FrameType, lineno: int, home: str | None) -> Frame:
    code = frame.f_code
    source = stacks.source_of(code.co_filename, lineno)
    at_home = is_at_home(code.co_filename, home)
    return Frame(code.co_filename, lineno, code.co_name, source, at_home)


def _variables(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = [
        (name, value)
        for name, value in values.items()
        if not name.startswith(("__", "@")) and not isinstance(value, _LEFT_OUT)
    ]
    for name, value in shown[:MOST_VARIABLES]:
        yield name, text_of(value)
    if (more := len(shown) - MOST_VARIABLES) > 0:
        yield "...", f"{count(more, 'variable')} more"


def text_of(value: Any) -> str:
    """A value in at most 300 characters, in one line."""
    try:
        text = " ".join(_short.repr(value).split())
    except Exception as error:  # of the learner's own __repr__
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


class _Short(reprlib.Repr):
    """reprlib's short texts, in which tensors, arrays and modules are short, too."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = LONGEST

    def repr1(self, x: Any, level: int) -> str:
        torch = sys.modules["torch"]
        if isinstance(x, torch.Tensor):
            return _tensor(x, whole=type(x) in (torch.Tensor, torch.nn.Parameter))
        if type(x).__module__ == "numpy" and hasattr(x, "nbytes") and getattr(x, "ndim", None):
            return _numbers("array", x.shape, x.dtype, x, x.size)
        if isinstance(x, torch.nn.Module):
            size = sum(parameter.numel() for parameter in x.parameters())
            return f"{type(x).__name__}, a module with {size:,} parameters"
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:  # noqa: ARG002
        return builtins.repr(x)


_short = _Short()


def _tensor(tensor: Any, *, whole: bool) -> str:
    """A tensor; its first numbers, too, if this process surely has the `whole` of it."""
    where = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{where}"
    shape = tuple(tensor.shape)
    if not whole or tensor.device.type == "meta" or "strided" not in str(tensor.layout):
        return f"{'tensor' if whole else type(tensor).__name__} of shape {shape}, {kind}"
    return _numbers("tensor", shape, kind, tensor.detach(), tensor.numel())


def _numbers(what: str, shape: tuple[int, ...], kind: Any, values: Any, size: int) -> str:
    if not shape:
        return f"{what} of {kind}: {_number(values.item())}"
    row = values
    while row.ndim > 1 and size:
        row = row[0]
    numbers = [_number(number) for number in row[:_FIRST].tolist()]
    numbers += ["..."] if size > len(numbers) else []
    return f"{what} of shape {shape}, {kind}: {', '.join(numbers)}".removesuffix(": ")


def _number(number: Any) -> str:
    return f"{number:.4g}" if isinstance(number, float) else str(number)
