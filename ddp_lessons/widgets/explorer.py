"""The common part of all explorers: controls, and the plot of a run for each setting.

Runs in the parent. An explorer launches the learner's own function from the cell. The plot is a
separate display below the controls, so that readers without a kernel see it, too.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython.core.getipython import get_ipython
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ddp_lessons.errors import LaunchError
from ddp_lessons.launcher.api import launch
from ddp_lessons.launcher.live_panel import hidden
from ddp_lessons.plots import alt_text
from ddp_lessons.system.notebook import is_live, prepare_widgets

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from tornado.ioloop import IOLoop

    from ddp_lessons.run import Run

SOON = 0.03  # seconds in which moves that came during a run are merged
TIMEOUT = 10.0  # seconds without progress: nobody watches a slider longer
LABEL = {"description_width": "10em"}
LAYOUT = {"width": "29em", "max_width": "98%"}
# ipywidgets 8 gives a slider's handle no name for screen readers.
NAMES = """cell.querySelectorAll(".widget-slider").forEach(slider =>
    slider.querySelector("[role=slider]")?.setAttribute(
        "aria-label", slider.querySelector("label").textContent));"""
# While ranks run that the picture does not show yet; a quick run is over before it fades.
BUSY = """<style>.jp-OutputArea:has(> * .ddp-lessons-busy) img {
    opacity: 0.4; transition: opacity 0.2s 0.3s}</style><span class="ddp-lessons-busy"></span>"""
MOST_ERROR = 1500  # characters shown of a failure


class Explorer:
    """Controls, and a plot of the run that they describe.

    A cell shows it as its last expression. Moving a control launches real ranks as soon as the
    kernel is free, with the controls' values at that time: moves that come faster than runs are
    skipped, so runs never pile up. A failure is explained above the plot, which stays.

    Parameters
    ----------
    controls : mapping of str to Widget
        ipywidgets with a `value`; `start` and `draw` get it under this name.
    start : callable
        ``start(**values) -> Run``: launches the ranks. See `run_ranks`.
    draw : callable
        ``draw(run, **values) -> Axes``: draws on new Axes; their titles are the plot's alt text.
    draws_failures : bool
        Whether `draw` also gets runs that failed.
    """

    def __init__(
        self,
        controls: Mapping[str, ipywidgets.Widget],
        start: Callable[..., Run],
        draw: Callable[..., Axes],
        *,
        draws_failures: bool = False,
    ) -> None:
        self.controls = dict(controls)
        self.run: Run | None = None
        self._start, self._draw = start, draw
        self._draws_failures = draws_failures
        self._due = False
        self._drawn = -SOON  # when, on the monotonic clock
        self._picture: DisplayHandle | None = None
        self._failure = ipywidgets.HTML()
        self._busy = ipywidgets.HTML(layout={"height": "0"})
        box = ipywidgets.Box(
            list(self.controls.values()), layout={"flex_flow": "row wrap", "max_width": "60em"}
        )
        self.panel = ipywidgets.VBox([box, self._failure, self._busy])
        for control in self.controls.values():
            control.observe(self._moved, "value")

    @property
    def values(self) -> dict[str, Any]:
        """The controls' current values."""
        return {name: control.value for name, control in self.controls.items()}

    def _ipython_display_(self) -> None:
        self._picture = None
        labels = "; ".join(control.description for control in self.controls.values())
        # Otherwise readers without a kernel, as on a web page, would see the widgets' repr.
        text = {"text/plain": f"Controls, in a running notebook: {labels}"}
        if hasattr(self.panel, "_repr_mimebundle_"):
            display({**self.panel._repr_mimebundle_(), **text}, raw=True)
        else:  # ipywidgets 7, as on Colab
            display(self.panel)
        if is_live():
            prepare_widgets(NAMES)
        self.redraw()
        if self._picture is None:  # reserves the place in this cell for later plots
            self._picture = display({"text/plain": ""}, raw=True, display_id=True)

    def _moved(self, _: object) -> None:
        # A frontend's message may arrive in another thread; ranks are launched in the main one.
        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is None:
            self.redraw()
        else:
            kernel.io_loop.add_callback(self._redraw_soon, kernel.io_loop)

    def _redraw_soon(self, loop: IOLoop) -> None:
        if not self._due:
            self._due = True
            waited = time.monotonic() - self._drawn
            loop.call_later(SOON if waited < SOON else 0, self._redraw_now)

    def _redraw_now(self) -> None:
        self._due = False
        self.redraw()

    def redraw(self) -> None:
        """Launch the ranks with the values of the controls, and show what they did."""
        self._busy.value = BUSY
        try:
            self._run_and_show()
        finally:
            self._busy.value = ""
            self._drawn = time.monotonic()

    def _run_and_show(self) -> None:
        values = self.values
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # hides the ranks' output
                self.run = self._start(**values)
            if not self._draws_failures:
                self.run.raise_for_failure()
            ax = self._draw(self.run, **values)
        except LaunchError as error:
            self._explain(str(error))
        except Exception as error:  # after a move no cell would show it
            self._explain(f"{type(error).__name__}: {error}")
        else:
            self._explain("" if self.run.ok else self.run.explain())
            self._show(ax)

    def _explain(self, failure: str) -> None:
        text = failure[:MOST_ERROR] + ("\n..." if len(failure) > MOST_ERROR else "")
        self._failure.value = f"<pre>{html.escape(text)}</pre>" if text else ""

    def _show(self, ax: Axes) -> None:
        png = base64.b64encode(_png(ax.figure)).decode()
        alt = alt_text.text(ax.figure)
        plt.close(ax.figure)
        data = {"image/png": png, "text/plain": alt}
        if is_live():
            data["text/html"] = alt_text.image(png, alt)
        metadata = {"image/png": {"alt": alt}}
        if self._picture is None:
            self._picture = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self._picture.update(data, metadata=metadata, raw=True)


def _png(figure: Figure | SubFigure) -> bytes:
    """The picture, as it is laid out already. `savefig` would draw it twice, to fit its layout."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def run_ranks(
    worker: Callable[..., Any], args: tuple[Any, ...], nprocs: int, nnodes: int = 1
) -> Run:
    """`launch` for an explorer: gives up soon, and returns a failure as a record."""
    token = hidden.set(True)
    try:
        return launch(worker, args, nprocs, nnodes=nnodes, timeout=TIMEOUT, check=False)
    finally:
        hidden.reset(token)


def whole(label: str, value: int, low: int, high: int, step: int = 1) -> ipywidgets.IntSlider:
    """A slider for whole numbers."""
    return ipywidgets.IntSlider(
        value, low, high, step, description=label, tooltip=label, style=LABEL, layout=LAYOUT
    )


def one_of(label: str, options: Collection[object], value: object) -> ipywidgets.Dropdown:
    """A choice from a list."""
    return ipywidgets.Dropdown(
        options=options, value=value, description=label, style=LABEL, layout=LAYOUT
    )


def switch(label: str, value: bool) -> ipywidgets.Checkbox:
    """A box to tick."""
    return ipywidgets.Checkbox(value, description=label, style=LABEL, layout=LAYOUT)
