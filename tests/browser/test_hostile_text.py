"""Text that ranks and learners make up is shown as it is, and never run as part of the page."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Open
from tests.browser.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("browser")]

IMAGE = "<img src=x onerror=window.hacked=1>"
SCRIPT = "<script>window.hacked=2</script>"
SETUP = f"""
    import pathlib
    import time
    from ddp_lessons import launch, plots, span

    TEXT = "{IMAGE} {SCRIPT} \\x1b[31mred\\x1b[0m \\x1b]8;;javascript:window.hacked=3\\x07link"


    def say(rank, go_on):
        print(TEXT, flush=True)
        while not pathlib.Path(go_on).exists():
            time.sleep(0.02)
        with span("{IMAGE} $\\\\frac$"):
            return TEXT


    say.__name__ = "say {IMAGE}"
    run = launch(say, args=("go on, hostile",))
    run
"""
PICTURE = "plots.timeline(run);"
FAILURE = """
    def fail(rank):
        raise ValueError(TEXT)


    print(launch(fail, check=False).explain())
    launch(fail)
"""
ANSWER = """
    from ddp_lessons.exercises.start_here import check_greet

    def greet(rank, world_size):
        raise ValueError(TEXT)

    greet.__name__ = TEXT
    check_greet(greet)
"""
WRONG_ANSWER = "check_greet(lambda rank, world_size: rank or print(TEXT))"
EXPLORER = """
    from ddp_lessons.widgets.barriers import explore

    explore(lambda rank, delays: fail(rank))
"""


def test_no_text_becomes_part_of_the_page(open_notebook: Open, server: Server) -> None:
    cells = [SETUP, PICTURE, FAILURE, ANSWER, WRONG_ANSWER, EXPLORER]
    notebook = open_notebook(server.write("hostile", *cells))
    notebook.run(0)
    panel = notebook.wait_for_panel(0, ranks=2, text=IMAGE)
    expect(panel).to_contain_text(SCRIPT)
    notebook.picture("hostile_panel")
    (server.root / "go on, hostile").touch()
    notebook.wait_for(0)
    for number in range(1, len(cells)):
        notebook.run(number)
        notebook.wait_for(number)
    for number in range(len(cells)):
        outputs = notebook.show(number).locator(".jp-OutputArea-output")
        if number != 1:
            expect(outputs.filter(has_text=IMAGE).first).to_be_visible()
        for output in outputs.filter(visible=True).all():
            output.hover()
            assert not output.locator("img[src=x], script").count()
        notebook.picture(f"hostile_{number}")
    assert notebook.page.evaluate("window.hacked") is None
    notebook.resize("200_percent")
    for number in range(len(cells)):
        notebook.show(number)
        notebook.check_that_all_fits()
        notebook.picture(f"hostile_{number}_200_percent")
