"""Whether this process is a notebook's kernel, and whether a person is watching it.

If so, `prepare_widgets` makes the widgets of a cell usable by keyboard.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

# Runs once the output is on the page, and when a part of it is drawn anew. Notebook 7 takes a key
# before the widget that has the focus, unless the widget forbids that; JupyterLab asks it first.
_SCRIPT = """if (element instanceof Node) new ResizeObserver((_, observer) => {
    observer.disconnect();
    const cell = element.closest(".jp-OutputArea") ?? document.body;
    const prepare = () => {
        cell.querySelectorAll("input, select, button, [role=slider], [role=tab], [tabindex]")
            .forEach(widget => widget.setAttribute("data-lm-suppress-shortcuts", ""));
        %s
    };
    new MutationObserver(prepare).observe(cell, {childList: true, subtree: true});
    prepare();
}).observe(element);"""


def in_kernel() -> bool:
    """True in the process of a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def is_live() -> bool:
    """True in a kernel that a person watches; False if it runs to store or test a notebook.

    There the environment variable DDP_LESSONS_LIVE is 0.
    """
    return in_kernel() and os.environ.get("DDP_LESSONS_LIVE", "1") != "0"


def can_display() -> bool:
    """False below `redirect_stdout(None)`: IPython displays nothing then, but raises."""
    return sys.stdout is not None and sys.stderr is not None


def show_html(text: str, handle: DisplayHandle | None = None) -> DisplayHandle | None:
    """Display HTML, in the place of what `handle` shows; its handle. Nothing if that cannot be."""
    from IPython.display import HTML, display

    if not can_display():
        return handle
    if handle is None:
        return display(HTML(text), display_id=True)
    handle.update(HTML(text))
    return handle


def prepare_widgets(script: str = "") -> DisplayHandle:
    """Let the widgets of this cell have the keys that are pressed in them.

    `script` is JavaScript that prepares them further; it knows the cell's output as `cell`.
    """
    from IPython.display import display

    data = {"application/javascript": _SCRIPT % script, "text/plain": ""}
    return display(data, raw=True, display_id=True)
