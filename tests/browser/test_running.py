"""A cell that runs ranks in JupyterLab: seen meanwhile, stopped, restarted; and never believed."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import FRONT_ENDS, Open
from tests.browser.pages import SIZES
from tests.browser.server import Server
from tests.support.kernels import gone, wait_for_workers

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("browser")]

HANG = """
    import time
    import torch.distributed as dist
    from ddp_lessons import launch


    def work(rank):
        dist.init_process_group("gloo")
        print("joined", flush=True)
        if rank == 0:
            dist.barrier()
        time.sleep(600)


    launch(work, nprocs=3, timeout=600)
"""
LONG = """
    import pathlib
    import time
    from ddp_lessons import launch


    def work(rank, go_on):
        print("waiting for the word", "that takes its time" * 5, flush=True)
        while not pathlib.Path(go_on).exists():
            time.sleep(0.02)


    launch(work, args=("go on, long run",), nprocs=3);
"""
TALKS = """
    import pathlib
    import time
    from ddp_lessons import launch


    def work(rank, go_on):
        for step in range(30):
            time.sleep(0.02 * (1 + rank))
            print(f"step {step}", flush=True)
        print("50 %", end="\\r")
        print("100 %", end="", flush=True)
        while not pathlib.Path(go_on).exists():
            time.sleep(0.02)
        print()


    launch(work, args=("go on, talk",), nprocs=2);
"""
AFTER = "print(launch(lambda rank: rank).values)"
in_both = pytest.mark.parametrize("front_end", FRONT_ENDS)
SOON = 20.0  # seconds from Stop to the explanation; `make stops` measures it


@in_both
def test_a_long_run_shows_what_its_ranks_do(
    open_notebook: Open, server: Server, front_end: str
) -> None:
    go_on = server.root / "go on, long run"
    go_on.unlink(missing_ok=True)
    notebook = open_notebook(server.write("long", LONG), front_end)
    notebook.start_all()
    panel = notebook.wait_for_panel(0, ranks=3, text="waiting for the word")
    assert panel.locator("td:has-text('running')").count() == 3
    notebook.picture(f"panel_{front_end}")
    for name in SIZES:
        notebook.resize(name)
        notebook.check_that_all_fits()
    notebook.picture(f"panel_200_percent_{front_end}")
    go_on.touch()
    notebook.wait_for_all()
    expect(panel).to_have_count(0)
    expect(notebook.show(0)).to_contain_text("[rank 2] waiting for the word")
    notebook.picture(f"panel_gone_{front_end}")


@in_both
def test_the_log_by_rank_and_by_time(open_notebook: Open, server: Server, front_end: str) -> None:
    go_on = server.root / "go on, talk"
    go_on.unlink(missing_ok=True)
    notebook = open_notebook(server.write("talk", TALKS), front_end)
    notebook.start_all()
    notebook.wait_for_panel(0, ranks=2, text="100 %")
    cell = notebook.show(0)
    log = cell.locator("pre:visible", has_text="[rank 0] step 29")
    expect(log).to_contain_text("[rank 1] 100 %")
    assert log.inner_text().splitlines() == [
        f"[rank {rank}] {text}"
        for rank in (0, 1)
        for text in [*(f"step {step}" for step in range(30)), "100 %"]
    ]
    notebook.picture(f"log_by_rank_{front_end}")
    by_time = cell.get_by_role("tab", name="by time")
    cell.get_by_role("tab", name="by rank").focus()
    notebook.page.keyboard.press("ArrowRight")  # to the next tab, which Enter chooses
    notebook.page.keyboard.press("Enter")
    expect(by_time).to_have_attribute("aria-selected", "true")
    log = cell.locator("pre:visible", has_text="[rank 0] step 29")
    lines = log.inner_text().splitlines()
    assert lines.index("[rank 0] step 29") < lines.index("[rank 1] step 29")
    assert lines.index("[rank 1] step 0") < lines.index("[rank 0] step 29")
    notebook.picture(f"log_by_time_{front_end}")
    go_on.touch()
    notebook.wait_for_all()
    expect(cell.get_by_role("tab")).to_have_count(0)
    expect(cell).to_contain_text("[rank 1] step 29")


@in_both
def test_the_stop_button_explains_and_leaves_no_rank(
    open_notebook: Open, server: Server, front_end: str
) -> None:
    notebook = open_notebook(server.write("hang", HANG, AFTER), front_end)
    notebook.start_all()
    notebook.wait_for_panel(0, ranks=3, text="joined")
    (kernel,) = server.kernels().values()
    ranks = wait_for_workers(kernel, 3)
    began = time.monotonic()
    notebook.page.get_by_role("button", name="Interrupt the kernel").click()
    cell = notebook.cell(0)
    expect(cell).to_contain_text("rank 0 stopped, waiting in barrier")
    expect(cell).to_contain_text("KeyboardInterrupt")
    assert time.monotonic() - began < SOON
    assert gone(ranks)
    notebook.picture(f"stop_{front_end}")
    notebook.run(1)
    expect(notebook.cell(1)).to_contain_text("[0, 1]")


def test_a_restart_in_the_middle_of_a_run_leaves_no_rank(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook(server.write("restart", HANG))
    notebook.start_all()
    notebook.wait_for_panel(0, ranks=3, text="joined")
    (kernel,) = server.kernels().values()
    ranks = wait_for_workers(kernel, 3)
    family = kernel.children(recursive=True)
    notebook.menu("Kernel", "Restart Kernel…")
    notebook.page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    assert gone([*ranks, *family])
    notebook.picture("restart")
