"""What a rank displays, as a cell of a notebook does: it is sent to the parent, which shows it.

Runs in the ranks of a notebook, called by main.py. `display(...)` is a builtin there, as in a cell,
and what `plt.show()` calls. A rank has no IPython shell, without which IPython prints an object's
`repr`; the rank imports IPython only once the function does, or displays something.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from ddp_lessons.text import count
from ddp_lessons.wire.messages import Displayed

MOST, MOST_BYTES = 50, 8 << 20  # of a rank
IPYTHONS = "IPython.core.display_functions"  # the module that defines `display`
WIDGET = "application/vnd.jupyter.widget-view+json"  # a widget of a rank has no front end


class Displays:
    """Sends what this rank displays, within bounds."""

    def __init__(self, send: Callable[[Displayed], None]) -> None:
        self._send = send
        self._pid = os.getpid()
        self._count = self._bytes = self._left_out = 0
        self._sizes: dict[str, int] = {}  # of displays that may be updated, by id

    def catch(self) -> None:
        """From now on, take what is displayed in this process."""
        vars(builtins)["display"] = self.display
        sys.meta_path.insert(0, _Finder(self.display))

    def close(self) -> None:
        """Tell how much was left out."""
        if self._left_out:
            text = (
                f"{count(self._left_out, 'more display')} left out: at most {MOST} of a rank are "
                f"kept, of {MOST_BYTES >> 20} MB."
            )
            self._send(Displayed({"text/plain": text}))

    def display(
        self,
        *objs: Any,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        metadata: dict[str, Any] | None = None,
        display_id: str | bool | None = None,
        raw: bool = False,
        **_: Any,
    ) -> Any:
        """As IPython's: show objects below the cell, in their richest form."""
        if os.getpid() != self._pid:  # a child that the rank forked
            print(*objs)
            return None
        handle = None
        if display_id:
            from IPython.core.display_functions import DisplayHandle

            handle = DisplayHandle(None if display_id is True else display_id)
        for one in objs:
            data, described = (one, {}) if raw else _formatted(one, include, exclude)
            self._take(data, {**described, **(metadata or {})}, handle and handle.display_id)
        return handle

    def _take(self, data: dict[str, Any], metadata: dict[str, Any], display_id: str | None) -> None:
        data = {kind: value for kind, value in data.items() if kind != WIDGET}
        size = sum(len(value) for value in data.values() if isinstance(value, str | bytes))
        replaced = self._sizes.get(display_id or "")
        more = size - (replaced or 0)
        if (self._count >= MOST and replaced is None) or self._bytes + more > MOST_BYTES:
            self._left_out += 1
        elif data:
            self._count += replaced is None
            self._bytes += more
            if display_id is not None:
                self._sizes[display_id] = size
            self._send(Displayed(data, metadata, display_id))


def _formatted(
    value: Any, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A value by MIME type, and the metadata of these."""
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _png)
    data, metadata = formatter.format(value, include, exclude)
    return data, metadata


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", dpi=figure.dpi)
    return file.getvalue()


class _Finder(importlib.abc.MetaPathFinder):
    """Replaces IPython's own `display` when it is imported, before others import it by name."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != IPYTHONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executes(module: types.ModuleType) -> None:
                execute(module)
                vars(module)["display"] = self._display

            vars(spec.loader)["exec_module"] = executes
        return spec
