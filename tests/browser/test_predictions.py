"""A lesson as a learner reads it: the answer comes after the prediction."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from ddp_lessons.course.progress import FILE, read
from tests.browser.conftest import FRONT_ENDS, Open
from tests.browser.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("browser")]

LESSON = "04_barriers.ipynb"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_learner_predicts_by_keyboard_and_then_sees_the_answer(
    open_notebook: Open, server: Server, front_end: str
) -> None:
    notebook = open_notebook(LESSON, front_end)
    question = notebook.find("longest_wait = predict(")
    run = notebook.find("longest_wait.reveal(")
    for number in range(2, question + 1):
        if notebook.cells()[number]["kind"] == "code":
            notebook.run(number)
            notebook.wait_for(number)
    cell = notebook.show(question)
    choice = cell.get_by_role("radio", name="rank 3")
    choice.focus()
    notebook.page.keyboard.press("Space")
    expect(choice).to_be_checked()
    notebook.picture(f"prediction_{front_end}")
    notebook.run(run)
    notebook.wait_for(run)
    expect(notebook.show(run)).to_contain_text("You predicted rank 3.")
    fold = notebook.show(run + 1).locator("details")
    expect(fold.get_by_text("All leave when rank 3 has come")).not_to_be_visible()
    fold.locator("summary").click()
    expect(fold.get_by_text("All leave when rank 3 has come")).to_be_visible()
    notebook.picture(f"prediction_revealed_{front_end}")
    (kept,) = read(server.root.parent / FILE).predictions.values()
    assert (kept["said"], kept["right"]) == ("rank 3", False)


def test_an_untouched_lesson_closes_without_a_question(open_notebook: Open) -> None:
    notebook = open_notebook(LESSON)
    dirty = "() => jupyterapp.shell.currentWidget.context.model.dirty"
    assert notebook.page.evaluate(dirty) is False
    notebook.menu("File", "Close Tab")
    expect(notebook.page.locator(".jp-Dialog")).to_have_count(0)
    expect(notebook.page.locator(".jp-NotebookPanel")).to_have_count(0)
