"""Alternative text in a real kernel: the titles, rendered once; other pictures unchanged."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from ddp_lessons.plots import alt_text
from tests.support.kernels import Kernel

pytestmark = pytest.mark.system

PICTURE = """
    from ddp_lessons import plots
    ax = plots.timeline(launch(lambda rank: rank), title='one <"two">')
    ax.figure.axes
"""


@pytest.mark.slow
def test_a_picture_has_its_title_as_its_text(kernel: Kernel) -> None:
    kernel.run("import os; os.environ['DDP_LESSONS_LIVE'] = '1'")
    *_, live = kernel.run(PICTURE).displays  # the first launch may take long enough for a panel
    assert live["text/html"].startswith('<img alt="one &lt;&quot;two&quot;&gt;" src="data:image')
    assert live["image/png"].strip() in live["text/html"]


@pytest.mark.slow
def test_a_stored_picture_has_no_html(kernel: Kernel) -> None:
    kernel.run("import os; os.environ['DDP_LESSONS_LIVE'] = '0'")
    (stored,) = kernel.run(PICTURE).displays
    assert set(stored) == {"image/png", "text/plain"}


@pytest.mark.slow
def test_pictures_of_others_are_shown_as_ever(kernel: Kernel) -> None:
    kernel.run(PICTURE)
    cell = kernel.run("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.title('mine');")
    assert set(cell.displays[0]) == {"image/png", "text/plain"}


@pytest.mark.slow
def test_a_figure_is_rendered_once_for_both_and_anew_the_next_time(kernel: Kernel) -> None:
    cell = kernel.run("""
        import matplotlib.pyplot as plt
        from IPython.core.getipython import get_ipython
        from matplotlib.figure import Figure
        from ddp_lessons.plots import alt_text

        figure, ax = plt.subplots()
        ax.set_title("one", loc="left")
        formatter = get_ipython().display_formatter
        render, rendered = formatter.formatters["image/png"].type_printers[Figure], []
        formatter.formatters["image/png"].for_type(
            Figure, lambda figure: rendered.append(figure) or render(figure)
        )
        alt_text.offer()
        alt_text.offer()
        data, metadata = formatter.format(figure)
        assert len(rendered) == 1
        assert metadata["image/png"] == {"alt": "one"}
        ax.set_title("two", loc="left")
        again, _ = formatter.format(figure)
        assert len(rendered) == 2
        assert data["image/png"] != again["image/png"]
        assert 'alt="two"' in again["text/html"]
        plt.close(figure)
        print("done")
    """)
    assert cell.stdout == "done\n", cell.error


def test_a_text_cannot_leave_its_attribute() -> None:
    assert alt_text.image("AAAA\n", '"><script>') == (
        '<img alt="&quot;&gt;&lt;script&gt;" src="data:image/png;base64,AAAA">'
    )


def test_a_title_on_two_lines_is_one_text() -> None:
    figure, axes = plt.subplots()
    axes.set_title("ranks 0 and 2 call\nall_reduce", loc="left")
    assert alt_text.text(figure) == "ranks 0 and 2 call all_reduce"
    plt.close(figure)
