"""Alternative text for a notebook's pictures: a screen reader says the titles.

Runs in the parent; every plot calls `offer`. JupyterLab ignores the alternative text in a PNG's
metadata (jupyter/enhancement-proposals#120), but prefers HTML to PNG and keeps the text of an
`<img>`. So a live notebook gets both. A stored one has only the PNG, with the text in its metadata,
where nbconvert and nbviewer look for it.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from matplotlib.figure import Figure

from ddp_lessons.system.notebook import in_kernel, is_live

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure


def text(figure: Figure | SubFigure) -> str:
    """The alternative text of a figure: its left-hand titles."""
    titles = (" ".join(axes.get_title("left").split()) for axes in figure.axes)
    return "; ".join(filter(None, titles))


def image(png: str, alt: str) -> str:
    """The HTML of a base64 PNG with alternative text."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png.strip()}">'


def offer() -> None:
    """Make this kernel show figures with alternative text from now on."""
    if not in_kernel():
        return
    formatters = sys.modules["IPython"].get_ipython().display_formatter.formatters
    render = formatters["image/png"].type_printers.get(Figure)
    if render is None or isinstance(getattr(render, "__self__", None), _Rendered):
        return  # another backend, or offered already
    rendered = _Rendered(render)
    formatters["image/png"].for_type(Figure, rendered.png)
    if is_live():
        formatters["text/html"].for_type(Figure, rendered.html)


class _Rendered:
    """Makes the PNG and the HTML of a figure from one rendering, which takes a while."""

    def __init__(self, render: Callable[[Figure], Any]) -> None:
        self._render = render
        self._kept: WeakKeyDictionary[Figure, Any] = WeakKeyDictionary()

    def html(self, figure: Figure) -> str | None:
        alt = text(figure)
        if not alt:
            return None
        self._kept[figure] = made = self._render(figure)
        return image(made, alt) if isinstance(made, str) else None

    def png(self, figure: Figure) -> Any:
        made = self._kept.pop(figure, None) or self._render(figure)
        alt = text(figure)
        return (made, {"alt": alt}) if alt and isinstance(made, str) else made
