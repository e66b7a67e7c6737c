"""Code without a file: below a magic, by exec, `-c`, stdin; and code in an installed package.

Each test runs such code until it fails or hangs; the message must come within seconds, with the
best line that exists.
"""

from __future__ import annotations

import linecache
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons.wire import unfiled
from tests.support.checkout import ROOT
from tests.support.kernels import Cell, Kernel

pytestmark = pytest.mark.system

SOON = 15.0  # seconds to the verdict on a hang that is proved; the timeout is 30 s
SKIPS = """
def work(rank):
    dist.init_process_group("gloo")
    if rank == 1:
        dist.broadcast(torch.ones(1), src=0)
    dist.barrier()
"""
RAISES = """
def work(rank):
    if rank == 1:
        raise ValueError("no sample 17")
"""
RAISE = RAISES.splitlines()[-1].strip()


class Shell:
    """An IPython session that notes which cells are looked at."""

    def __init__(self, cells: list[str]) -> None:
        self.input_hist_raw = ["", *cells]
        self.looked_at: list[str] = []

    @property
    def history_manager(self) -> Shell:
        return self

    def get_ipython(self) -> Shell:
        return self

    def transform_cell(self, cell: str) -> str:
        self.looked_at.append(cell)
        return cell


def test_each_cell_is_looked_at_once_and_newest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"def work():\n    return {number}\n" for number in range(5)]
    shell = Shell([f"%%time\n{text}" for text in texts])
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(linecache, "cache", {})
    codes = [compile(text, "<timed exec>", "exec") for text in texts]
    assert [unfiled.place_of(code) for code in codes[:2:-1]] == [
        ("Cell In[5]", 2),
        ("Cell In[4]", 2),
    ]
    assert shell.looked_at == texts[:2:-1]
    unknown = compile("1", "<string>", "eval")
    for _ in range(3):
        assert unfiled.place_of(unknown) == ("<string>", 1)
    assert shell.looked_at == texts[::-1]


@pytest.fixture(scope="module")
def session() -> Iterator[Kernel]:
    """A kernel that has launched before: its ranks start quickly."""
    with Kernel(
        "import torch, torch.distributed as dist\nfrom ddp_lessons import launch"
    ) as kernel:
        assert kernel.run("launch(lambda rank: rank).values").result["text/plain"] == "[0, 1]"
        yield kernel


# %%capture runs the code below it as a cell of its own.
MAGICS = ["%%time", "%%timeit -n1 -r1", "%%prun -q", "%%capture"]


def marked(cell: Cell) -> str:
    """The line at which the failure is, as shown: its place, then its marked text."""
    lines = cell.error.splitlines()
    number, text = next((n, line) for n, line in enumerate(lines) if line.startswith("---->"))
    place = next(line for line in reversed(lines[:number]) if line.startswith("Cell In["))
    return f"{place}: {text.split(maxsplit=2)[2]}"


@pytest.mark.xdist_group("unfiled")
@pytest.mark.alone
@pytest.mark.parametrize("blank", ["", "\n\n"])
@pytest.mark.parametrize("magic", MAGICS)
def test_a_hang_below_a_magic(session: Kernel, magic: str, blank: str) -> None:
    cell = session.run(f"{magic}\n{blank}{SKIPS}launch(work, timeout=30)")
    assert cell.error_name == "WorkersHung"
    assert cell.seconds < SOON
    assert re.search(r"rank 1 waits in broadcast: Cell In", cell.error)
    assert re.search(r"rank 0 waits in barrier: Cell In\[\d+\], line \d:  dist.barrier", cell.error)
    if magic != "%%capture":
        assert f"line {7 + len(blank)}:  dist.barrier()" in cell.error


@pytest.mark.xdist_group("unfiled")
@pytest.mark.parametrize("magic", MAGICS)
def test_a_failure_below_a_magic(session: Kernel, magic: str) -> None:
    number = int(session.run("len(In)").result["text/plain"])
    cell = session.run(f"{magic}\n{RAISES}launch(work)")
    assert cell.error_name == "WorkerFailed"
    assert marked(cell).endswith(', in work: raise ValueError("no sample 17")')
    if magic != "%%capture":
        assert marked(cell).startswith(f"Cell In[{number}], line 5,")


@pytest.mark.xdist_group("unfiled")
def test_the_text_of_another_cell_is_never_shown(session: Kernel) -> None:
    """Two cells, both named "<timed exec>", whose lines differ only in what they do."""
    session.run(f"%%time\n{RAISES}old = work")
    session.run(f"%%time\n{RAISES.replace('17', '18')}new = work")
    assert "sample 18" in marked(session.run("launch(new)"))
    assert "sample 17" in marked(session.run("launch(old)"))


@pytest.mark.xdist_group("unfiled")
def test_functions_of_two_cells_in_one_launch(session: Kernel) -> None:
    session.run("%%time\ndef helper(x):\n    return 1 // x\n")
    cell = session.run("%%time\ndef work(rank):\n    return helper(rank)\nlaunch(work)")
    places = re.findall(r"Cell In\[(\d+)\], line (\d), in (\w+)", cell.error)
    (at, line, name), (deeper, deep_line, deep_name) = places
    assert (line, name, deep_line, deep_name) == ("3", "work", "3", "helper")
    assert int(deeper) == int(at) - 1
    assert "return 1 // x" in cell.error


@pytest.mark.xdist_group("unfiled")
@pytest.mark.parametrize("magic", ["%time", "%prun -q", "%timeit -n1 -r1"])
def test_a_lambda_behind_a_magic(session: Kernel, magic: str) -> None:
    cell = session.run(f"\n{magic} launch(lambda rank: [1, 2][rank + 1])")
    assert cell.error_name == "WorkerFailed"
    assert "IndexError" in cell.error
    if magic == "%time":
        assert "launch(lambda rank: [1, 2][rank + 1])" in cell.error


# Without a notebook

SCRIPT = """
import time
import torch
import torch.distributed as dist
from ddp_lessons import LaunchError, launch
launch(lambda rank: rank)
{define}
for work in skips, raises:
    began = time.monotonic()
    try:
        launch(work, timeout=30)
    except LaunchError as error:
        print(type(error).__name__, time.monotonic() - began < {soon})
        print(error)
"""
DEFINE = SKIPS.replace("def work", "def skips") + RAISES.replace("def work", "def raises")


def told(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, **options)
    assert "WorkersHung True" in done.stdout, done.stdout + done.stderr
    assert "rank 1 waits in broadcast" in done.stdout
    assert "WorkerFailed True" in done.stdout
    return str(done.stdout)


@pytest.mark.slow
@pytest.mark.alone
def test_what_follows_c_on_the_command_line() -> None:
    text = told([sys.executable, "-c", SCRIPT.format(define=DEFINE, soon=SOON)])
    assert re.search(r"rank 0 waits in barrier: python -c, line \d+:  dist.barrier\(\)", text)
    assert re.search(r'----> +\d+ +raise ValueError\("no sample 17"\)', text)


@pytest.mark.slow
@pytest.mark.alone
def test_what_comes_on_stdin() -> None:
    """Its text is not kept anywhere, so the message gives function and line number."""
    source = SCRIPT.format(define=DEFINE, soon=SOON)
    lines = ["", *source.splitlines()]
    text = told([sys.executable, "-"], input=source)
    waits, raises = (lines.index(line) for line in ("    dist.barrier()", f"        {RAISE}"))
    assert f"rank 0 waits in barrier: <stdin>, line {waits}, in skips" in text
    assert f"<stdin>, line {raises}, in raises" in text


@pytest.mark.slow
@pytest.mark.alone
def test_exec_of_a_string_that_nobody_keeps() -> None:
    define = f"names = {{'dist': dist, 'torch': torch}}\nexec({DEFINE!r}, names)\n"
    define += "skips, raises = names['skips'], names['raises']"
    text = told([sys.executable, "-c", SCRIPT.format(define=define, soon=SOON)])
    assert "rank 0 waits in barrier: <string>, line 6, in skips" in text
    assert "<string>, line 10, in raises" in text


@pytest.mark.slow
@pytest.mark.alone
def test_exec_of_a_string_that_linecache_has() -> None:
    define = f"""
import linecache
text = {DEFINE!r}
linecache.cache["<mine>"] = len(text), None, text.splitlines(True), "<mine>"
names = {{"dist": dist, "torch": torch}}
exec(compile(text, "<mine>", "exec"), names)
skips, raises = names["skips"], names["raises"]
"""
    text = told([sys.executable, "-c", SCRIPT.format(define=define, soon=SOON)])
    assert "rank 0 waits in barrier: <mine>, line 6:  dist.barrier()" in text
    assert '---->  10         raise ValueError("no sample 17")' in text


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of an interpreter in whose site-packages a project lies."""
    packages = tmp_path / "lib" / "python3" / "site-packages"
    project, helper = packages / "trainer", packages / "helper"
    for folder in (project, helper):
        folder.mkdir(parents=True)
    (project / "__init__.py").write_text("")
    (project / "steps.py").write_text(f"import torch, torch.distributed as dist\n{DEFINE}")
    (project / "helped.py").write_text(
        "import helper, torch, torch.distributed as dist\n\n"
        + DEFINE.replace("dist.barrier()", "helper.meet()").replace("raise ", "helper.fail() or ")
    )
    (helper / "__init__.py").write_text(
        "import torch.distributed as dist\n\ndef meet():\n    dist.barrier()\n\n"
        "def fail():\n    raise KeyError('of helper')\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}


@pytest.mark.slow
@pytest.mark.alone
def test_a_worker_in_site_packages(installed: dict[str, str]) -> None:
    define = "from trainer.steps import skips, raises"
    command = [sys.executable, "-c", SCRIPT.format(define=define, soon=SOON)]
    text = told(command, env=installed)
    assert re.search(r"rank 0 waits in barrier: \S*trainer/steps.py, line 7:  dist.barrier", text)
    assert '---->  11         raise ValueError("no sample 17")' in text


@pytest.mark.slow
@pytest.mark.alone
def test_the_line_is_the_workers_own_and_not_that_of_another_package(
    installed: dict[str, str],
) -> None:
    define = "from trainer.helped import skips, raises"
    command = [sys.executable, "-c", SCRIPT.format(define=define, soon=SOON)]
    text = told(command, env=installed)
    assert re.search(r"waits in barrier: \S*trainer/helped.py, line 8:  helper.meet\(\)", text)
    assert re.search(r"---->  12 +helper.fail\(\) or", text)
    assert "raise KeyError('of helper')" in text  # the innermost frame is shown, too


@pytest.mark.slow
@pytest.mark.alone
def test_the_text_of_another_string_is_never_shown() -> None:
    """From Python 3.13 on, linecache has what follows -c under "<string>"."""
    define = f"""
import linecache
wrong = "wrong\\n" * 50
linecache.cache["<string>"] = len(wrong), None, wrong.splitlines(True), "<string>"
names = {{"dist": dist, "torch": torch}}
exec({DEFINE!r}, names)
skips, raises = names["skips"], names["raises"]
"""
    text = told([sys.executable, "-c", SCRIPT.format(define=define, soon=SOON)])
    assert "wrong" not in text
    assert "rank 0 waits in barrier: <string>, line 6, in skips" in text
