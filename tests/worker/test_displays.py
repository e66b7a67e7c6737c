"""What ranks display appears below the cell, by rank, and nowhere but in a notebook."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ddp_lessons import launch
from ddp_lessons.worker.displays import MOST
from tests.support.kernels import Kernel

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("displays")]

SHOWS = """
    import matplotlib.pyplot as plt
    class Table:
        def __init__(self, text):
            self.text = text
        def _repr_html_(self):
            return f"<i>{self.text}</i>"
    def work(rank):
        print("before")
        if rank == 1:
            plt.plot([1, 2])
            plt.show()
        display(Table(rank), Table("two"))
        print("after")
    run = launch(work)
"""


def html_of(displays: list[dict[str, str]]) -> list[str]:
    return [d["text/html"] for d in displays if "text/html" in d and "<i>" in d["text/html"]]


@pytest.mark.slow
def test_pictures_and_tables_by_rank(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run(SHOWS)
    by_rank = [f"[rank {rank}] {word}\n" for rank in (0, 1) for word in ("before", "after")]
    assert cell.stdout == "".join([*by_rank, "[rank 0] displayed:\n[rank 1] displayed:\n"])
    # A run that takes a second shows a panel, too.
    shown = [d for d in cell.displays if "image/png" in d or "<i>" in d.get("text/html", "")]
    assert html_of(shown) == ["<i>0</i>", "<i>two</i>", "<i>1</i>", "<i>two</i>"]
    assert ["image/png" in display for display in shown] == [False, False, True, False, False]
    cell = shared_kernel.run("print([len(rank.displays) for rank in run.ranks])")
    assert cell.stdout == "[2, 3]\n"


def test_however_display_is_called(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        def work(rank):
            from IPython.display import HTML, display, update_display
            handle = display(HTML("<i>old</i>"), display_id=True)
            handle.update(HTML("<i>new</i>"))
            display({"text/html": "<i>raw</i>"}, raw=True)
            display(HTML("<i>not as HTML</i>"), exclude=["text/html"])
        launch(work, nprocs=1)
    """)
    assert cell.error == ""
    assert html_of(cell.displays) == ["<i>new</i>", "<i>raw</i>"]


def test_too_many_and_too_large(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run(f"""
        def work(rank):
            for number in range({MOST} + 3):
                display({{"text/html": f"<i>{{number}}</i>"}}, raw=True)
        launch(work, nprocs=1)
        run = launch(lambda rank: display({{"text/html": "x" * (9 << 20)}}, raw=True), nprocs=1)
        print(run.ranks[0].displays[0].data["text/plain"])
    """)
    assert html_of(cell.displays) == [f"<i>{number}</i>" for number in range(MOST)]
    assert "3 more displays left out: at most 50" in str(cell.displays)
    assert "1 more display left out" in cell.stdout


def test_a_display_may_be_updated_as_often_as_one_likes(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run(f"""
        def work(rank):
            for number in range({MOST} + 3):
                display({{"text/html": f"<i>{{number}}</i>"}}, raw=True, display_id="epoch")
            display({{"text/html": "<i>the end</i>"}}, raw=True)
            for number in range(3):
                large = {{"text/html": f"<i>{{number}}</i>" + "x" * (3 << 20)}}
                display(large, raw=True, display_id="large")
        launch(work, nprocs=1)
    """)
    shown = html_of(cell.displays)
    assert shown[:2] == [f"<i>{MOST + 2}</i>", "<i>the end</i>"]
    assert shown[2].startswith("<i>2</i>")
    assert "left out" not in str(cell.displays)


def test_an_object_that_cannot_be_shown_and_a_forked_child(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        import os
        class Broken:
            def _repr_html_(self):
                raise ValueError("no table")
            def __repr__(self):
                return "broken"
        def work(rank):
            display(Broken())
            child = os.fork()
            if not child:
                display(Broken())
                os._exit(0)
            os.waitpid(child, 0)
        run = launch(work, nprocs=1)
        print([sorted(d.data) for d in run.ranks[0].displays])
    """)
    assert cell.error == ""
    assert "[rank 0] broken\n" in cell.stdout  # the child's
    assert "no table" in cell.stdout
    assert cell.stdout.endswith("[['text/plain']]\n")


def test_displays_of_a_rank_that_fails(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        def work(rank):
            display({"text/html": "<i>last</i>"}, raw=True)
            raise ValueError("bad")
        launch(work, nprocs=1)
    """)
    assert cell.error_name == "WorkerFailed"
    assert html_of(cell.displays) == ["<i>last</i>"]


def in_a_script(rank: int) -> Any:
    try:
        display  # type: ignore[name-defined] # noqa: B018
    except NameError:
        return os.getpid()


def test_a_script_has_no_display() -> None:
    assert None not in launch(in_a_script).values
