"""The stored notebooks: run for real, complete, small, and in the house style.

That their outputs are what a fresh run gives is checked by nbval, the last part of `make whole`.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

from ddp_lessons.course.lesson_files import tasks
from tests.support.checkout import ROOT
from tests.support.kernels import Kernel

folder = ROOT / "notebooks"
LESSONS = sorted([*folder.glob("[0-9]*.ipynb"), *folder.glob("real_*.ipynb")])
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
APPENDIX = ROOT / "notebooks" / "gpu.ipynb"
ALL = [
    pytest.param(path, id=str(path.relative_to(ROOT))) for path in (*LESSONS, APPENDIX, *SOLUTIONS)
]
ONLY_LESSONS = [pytest.param(path, id=path.stem) for path in LESSONS]
MOST_LINES, USUAL_LINES = 25, 6  # of a code cell
MOST_BYTES, MOST_PICTURE_BYTES = 1 << 20, 80_000


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


def _text(path: Path) -> str:
    return "\n".join(cell.source for cell in _read(path).cells if cell.cell_type == "markdown")


def test_there_are_lessons_each_with_its_solution() -> None:
    assert LESSONS
    assert [path.name for path in LESSONS] == [path.name for path in SOLUTIONS]


@pytest.mark.parametrize("path", ALL)
def test_every_code_cell_was_run_once_and_in_order(path: Path) -> None:
    counts = [cell.execution_count for cell in _code(path)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", ALL)
def test_errors_only_where_they_are_meant(path: Path) -> None:
    for cell in _code(path):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), cell.source


@pytest.mark.parametrize("path", ALL)
def test_nothing_of_the_machine_is_stored(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"/root/|/home/|/Users/|/tmp/ipykernel|site-packages", text)
    assert "widgets" not in _read(path).metadata
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", ALL)
def test_pictures_are_small_and_have_a_text(path: Path) -> None:
    for cell in _code(path):
        for output in cell.outputs:
            picture = output.get("data", {}).get("image/png", "")
            assert len(picture) * 3 / 4 < MOST_PICTURE_BYTES
            if picture:
                assert output.metadata["image/png"]["alt"]


@pytest.mark.parametrize("path", ALL)
def test_cells_are_short(path: Path) -> None:
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in _code(path)]
    assert max(lengths) <= MOST_LINES
    assert median(lengths) <= USUAL_LINES


@pytest.mark.parametrize("path", ALL)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", _text(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", ONLY_LESSONS)
def test_a_lesson_has_its_parts(path: Path) -> None:
    cells = _read(path).cells
    first, last = cells[0].source, cells[-1].source
    assert re.match(r"# (\d\d[a-z]?|real_\d) · ", first)
    assert re.search(r"\*\*.*\?\*\*", first), "the question"
    assert re.search(r"\d+ minutes · .* · stored outputs: ", first)
    assert "## What you have seen" in last
    assert "**Next:**" in last
    assert "## Exercise" in _text(path)
    assert f"solutions/{path.name}" in _text(path)


@pytest.mark.parametrize(
    "path", [p for p in ONLY_LESSONS if re.match(r"(0[1-9]|1[0-2])_", str(p.id))]
)
def test_a_lesson_has_an_explorer_whose_picture_is_stored(path: Path) -> None:
    (cell,) = [cell for cell in _code(path) if re.search(r"^explore\(", cell.source, re.M)]
    controls, picture = cell.outputs
    assert "application/vnd.jupyter.widget-view+json" in controls.data
    assert picture.data["image/png"]
    assert picture.data["text/plain"] == picture.metadata["image/png"]["alt"]


@pytest.mark.parametrize("path", ONLY_LESSONS)
def test_no_answer_is_in_view_where_a_lesson_asks_for_a_prediction(path: Path) -> None:
    """From a question to the fold below its answer, no output, assertion or text tells it."""
    cells = _read(path).cells
    asked = [number for number, cell in enumerate(cells) if _prediction(cell)]
    assert asked
    for number in asked:
        name = _prediction(cells[number])
        reveal = _next(cells, number, f"{name}.reveal(")
        fold = _next(cells, reveal, "<details><summary>")
        answers = _answers(cells[reveal])
        assert answers, cells[reveal].source
        for cell in cells[number + 1 : fold]:
            hidden = "hide-output" in cell.metadata.get("tags", [])
            assert hidden or _prediction(cell) or not cell.get("outputs"), cell.source
            assert cell.cell_type == "code" or cell is cells[fold], "explained before the fold"
            assert not re.search(r"^ *assert ", cell.source, re.M), cell.source
            for title in re.findall(r"title=f?\"(.*?)\"", cell.source):
                assert not any(answer in title for answer in answers if len(answer) > 3), title


def _prediction(cell: nbformat.NotebookNode) -> str:
    """The name under which a cell keeps its prediction; "" if it asks for none."""
    found = re.match(r"(\w+) = predict\(", cell.source) if cell.cell_type == "code" else None
    return found[1] if found else ""


def _next(cells: list[nbformat.NotebookNode], after: int, text: str) -> int:
    """The number of the first cell behind another that has a text."""
    found = (n for n, cell in enumerate(cells) if n > after and text in cell.source)
    number = next(found, None)
    assert number is not None, f"no {text} below: {cells[after].source}"
    return number


def _answers(cell: nbformat.NotebookNode) -> list[str]:
    printed = "".join(output.get("text", "") for output in cell.outputs)
    return re.findall(r"^Answer: (.+)$", printed, re.M)


def test_no_question_is_asked_twice() -> None:
    """Progress is kept by question and by check."""
    asked = [task for path in LESSONS for task in tasks(path).predictions]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("path", ONLY_LESSONS)
def test_a_lesson_ends_with_what_was_done_in_it(path: Path) -> None:
    cell = _read(path).cells[-2]
    number = re.match(r"\d\d[a-z]?|real_\d", path.name)
    assert number
    assert cell.source.endswith(f'show_progress("{number[0]}")')


@pytest.mark.parametrize("path", ONLY_LESSONS)
def test_exercises_are_left_to_the_learner(path: Path) -> None:
    results = "".join(str(cell.outputs) for cell in _code(path))
    assert results.count("text/html") >= results.count("not attempted yet") / 2 > 0
    assert "✗" not in results


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in SOLUTIONS])
def test_solutions_pass(path: Path) -> None:
    shown = [output.data for cell in _code(path) for output in cell.outputs if "data" in output]
    verdicts = [data["text/plain"] for data in shown if "image/png" not in data]
    assert verdicts
    assert all(verdict.startswith("✓") for verdict in verdicts)


def test_the_appendix_has_its_parts() -> None:
    cells = _read(APPENDIX).cells
    first, last = cells[0].source, cells[-1].source
    assert first.startswith("# Appendix · ")
    assert re.search(r"\*\*.*\?\*\*", first), "the question"
    assert re.search(r"\d+ minutes · .* · stored outputs: ", first)
    assert re.search(r"stored outputs: one NVIDIA .*, torch", first)
    assert "## What you have seen" in last
    assert "**Next:**" in last


def test_the_appendix_shows_what_one_gpu_did_and_says_what_needs_two() -> None:
    """What differs where there is no GPU is not compared by nbval."""
    guarded = [cell for cell in _code(APPENDIX) if cell.source.startswith("if enough(")]
    assert len(guarded) > 5
    for cell in _code(APPENDIX):
        text = "".join(output.get("text", "") for output in cell.outputs)
        skipped = cell.source.startswith("if enough(2)")
        assert text.startswith("skipped: GPUs needed: 2, found: 1") == skipped, cell.source
        if cell in guarded:
            assert "nbval-ignore-output" in cell.metadata.tags
            assert cell.outputs


@pytest.mark.slow
@pytest.mark.system
def test_lesson_13_skips_one_part_where_ipyparallel_is_missing() -> None:
    cells = [cell.source for cell in _code(ROOT / "notebooks" / "13_torchrun.ipynb")]
    imports = next(source for source in cells if "from ddp_lessons import launch" in source)
    (cluster,) = [source for source in cells if "ipyparallel" in source]
    with Kernel("import sys; sys.modules['ipyparallel'] = None") as kernel:
        assert not kernel.run(imports).error
        cell = kernel.run(cluster)
    assert not cell.error
    assert cell.stdout == "skipped: this needs ipyparallel (pip install ipyparallel)\n"
