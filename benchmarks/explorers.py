"""How long a learner waits, from a key on a control until the picture of the new run is there.

Run it by hand on a quiet machine with Chromium: `python -m benchmarks.explorers`. Each explorer is
shown by a real JupyterLab, with the ranks that it starts with; its first slider goes up and down.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from benchmarks.tables import machine, table
from tests.browser.pages import SIZES, Notebook
from tests.browser.server import Server
from tests.widgets.test_explorers import EXPLORERS

GOAL = 0.3  # seconds, at 2 to 4 ranks
REST = 500  # milliseconds between moves, as by a hand that looks at the picture
CELL = """
    from tests.widgets.test_explorers import EXPLORERS

    explorer = EXPLORERS[{name!r}][0]()
    explorer
"""
# Resolves, to seconds, when the picture of the cell has changed and was painted. It observes, as
# asking in each frame would keep one of two cores busy.
CHANGED = """([number, key]) => new Promise((resolve, reject) => {
    setTimeout(() => reject(Error(`no new picture after ${key}`)), 30000);
    const cell = document.querySelector(`.jp-Cell[data-windowed-list-index="${number}"]`);
    const picture = () => cell.querySelector(".jp-OutputArea img")?.src;
    const before = picture();
    let began;
    const observer = new MutationObserver(() => {
        const now = picture();
        if (now && now !== before) {
            observer.disconnect();
            requestAnimationFrame(() => resolve((performance.now() - began) / 1000));
        }
    });
    observer.observe(cell, {subtree: true, childList: true, attributeFilter: ["src"]});
    const slider = cell.querySelector("[role=slider]");
    slider.focus();
    began = performance.now();
    slider.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
})"""


def measure(names: list[str], moves: int) -> list[list[str]]:
    """Rows: the explorer, the median, the longest."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in names:
            print(name, file=sys.stderr)
            path = server.write(f"explorer_{name}", CELL.format(name=name))
            page = browser.new_context(viewport=SIZES["usual"])
            notebook = Notebook(page, path, server.url(path, name))
            notebook.start_all()
            notebook.wait_for_all()
            slider = notebook.show(0).get_by_role("slider").first
            if not slider.count():
                continue
            keys = ["ArrowRight", "ArrowLeft"] * (moves // 2 + 2)
            if slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax"):
                del keys[0]
            seconds = []
            for key in keys[: moves + 2]:
                notebook.page.wait_for_timeout(REST)
                seconds.append(notebook.page.evaluate(CHANGED, [0, key]))
            seconds = seconds[2:]  # without the first ones, which warm up
            label = str(slider.get_attribute("aria-label"))
            rows.append(
                [f"{name}: {label}", f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"]
            )
            page.close()
            server.end_kernels()
        browser.close()
    return rows


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorers", description=__doc__)
    parser.add_argument("--moves", type=int, default=10, help="default: %(default)s")
    parser.add_argument("names", nargs="*", help="explorers; default: all")
    options = parser.parse_args()
    head = machine("torch", "jupyterlab", "ipywidgets")
    rows = measure(options.names or list(EXPLORERS), options.moves)
    quick = sum(float(median) <= GOAL for _, median, _ in rows)
    print(head)
    print(table(["explorer: control", "median, s", "longest, s"], rows))
    print(f"- at most {GOAL:g} s: {quick} of {len(rows)}")


if __name__ == "__main__":
    main()
