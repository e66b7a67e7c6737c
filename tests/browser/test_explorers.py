"""Explorers in JupyterLab: moved by keyboard, with names that a screen reader can say."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import FRONT_ENDS, Open
from tests.browser.pages import SIZES
from tests.browser.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("browser")]

Role = Literal["slider", "checkbox", "combobox"]

# Half of them: JupyterLab shows 50 outputs of a cell at the most.
HALF = """
    from IPython.display import display
    from tests.widgets.test_explorers import EXPLORERS

    shown = []
    for explore, _ in list(EXPLORERS.values())[{half}::2]:
        shown.append(explore())
        display(shown[-1])
"""
COUNT = "print(sum(len(explorer.controls) for explorer in shown))"
CONTROLS = "[role=slider], input[type=checkbox], select"
IMPORTS = "import torch.distributed as dist\nfrom torch.utils.data import DistributedSampler"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_key_moves_a_slider_and_real_ranks_draw_anew(open_notebook: Open, front_end: str) -> None:
    notebook = open_notebook("05_distributed_sampler.ipynb", front_end)
    notebook.forget()
    notebook.add_first(IMPORTS)
    for number in (0, *(notebook.find(text) for text in ("def knobs", "explore(knobs)"))):
        notebook.run(number)
        notebook.wait_for(number)
    cell = notebook.show(number)
    before = "10 samples on 3 ranks: shuffle, set_epoch"
    expect(cell.get_by_role("img", name=before)).to_be_visible()
    slider = cell.get_by_role("slider", name="samples")
    slider.focus()
    notebook.page.keyboard.press("ArrowRight")
    picture = cell.get_by_role("img", name="11 samples on 3 ranks: shuffle, set_epoch")
    expect(picture).to_be_visible()
    expect(slider).to_have_attribute("aria-valuetext", "11")
    expect(slider).to_be_focused()
    notebook.page.keyboard.press("Tab")
    notebook.page.keyboard.press("Tab")
    notebook.picture(f"explorer_05_{front_end}")


@pytest.mark.parametrize("half", [0, 1])
def test_every_control_has_a_name_and_nothing_is_cut_off(
    open_notebook: Open, server: Server, half: int
) -> None:
    notebook = open_notebook(server.write(f"half_{half}", HALF.format(half=half), COUNT))
    notebook.start_all()
    notebook.wait_for_all()
    number = int(notebook.cells()[1]["outputs"][0]["text"])
    cell = notebook.show(0)
    controls = cell.locator(CONTROLS)
    expect(controls).to_have_count(number)
    roles: tuple[Role, ...] = ("slider", "checkbox", "combobox")
    named = [cell.get_by_role(role, name=re.compile(r"\w")) for role in roles]
    expect(named[0].or_(named[1]).or_(named[2])).to_have_count(number)
    for slider in cell.locator(".widget-slider").all():
        label = slider.locator("label").text_content()
        expect(slider.get_by_role("slider")).to_have_accessible_name(str(label))
    for choice in cell.locator("select").all():
        expect(choice.locator("option:checked")).to_have_text(re.compile(r"\w"))
    for name in SIZES:
        notebook.resize(name)
        notebook.show(0)
        notebook.picture(f"explorers_{half}_{name}")
        notebook.check_that_all_fits()
