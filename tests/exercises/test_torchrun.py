"""The checks of lesson 13: a right script passes, typical wrong ones are explained.

Another right one is in the lesson's solutions, which nbval runs: each takes five new Pythons.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons.exercises.torchrun import check_both_ways, check_resumes
from tests.support import answers

pytestmark = pytest.mark.ranks

IMPORTS = "import os, signal\nimport torch, torch.distributed as dist\n"

NO_GROUP = """
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
        x = torch.tensor(rank + 1)
        dist.all_reduce(x)
        dist.destroy_process_group()
    else:
        rank, x = 0, torch.tensor(1)
    if rank == 0:
        print("total", x.item())
"""
GROUP_OF_ONE = """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = dist.HashStore() if size == 1 else None
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    x = torch.tensor(float(rank + 1))
    dist.all_reduce(x)
    if dist.get_rank() == 0:
        print(f"total {x.item()}")
    dist.destroy_process_group()
"""
ONLY_TORCHRUN = """
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
"""
INIT_ALONE = """
    rank = int(os.environ.get("RANK", 0))
    dist.init_process_group("gloo")
"""
EACH_PRINTS = NO_GROUP.replace("if rank == 0:", "if True:")
NOT_ADDED_UP = NO_GROUP.replace("dist.all_reduce(x)", "dist.barrier()")
SILENT = "x = 1\n"
FAILS_ON_RANKS = NO_GROUP.replace("dist.all_reduce(x)", "raise ValueError('no such rank')")

RESUMES = """
    path = os.environ["CHECKPOINT"]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    state = {"step": 0, "total": 0}
    if os.path.exists(path):
        state = torch.load(path)
    for step in range(state["step"], 6):
        dist.barrier()
        if rank == 1 and step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.tensor(step * (rank + 1))
        dist.all_reduce(x)
        state = {"step": step + 1, "total": state["total"] + x.item()}
        if rank == 0:
            print(f"step {step}")
            torch.save(state, path + ".part")
            os.replace(path + ".part", path)
    dist.destroy_process_group()
    if rank == 0:
        print(f"total {state['total']}")
"""
FROM_THE_START = RESUMES.replace("os.path.exists(path)", "False")
STEP_TWICE = RESUMES.replace('"step": step + 1', '"step": step')
NO_TOTAL = RESUMES.replace("state = torch.load(path)", 'state["step"] = torch.load(path)["step"]')
ONE_LOADS = RESUMES.replace("os.path.exists(path)", "rank == 0 and os.path.exists(path)")
LEAVES_A_FILE = RESUMES.replace("os.replace(path", "import shutil; shutil.copy(path")


RIGHT: list[tuple[Any, str]] = [(check_both_ways, GROUP_OF_ONE), (check_resumes, RESUMES)]
WRONG: list[tuple[Any, str, str]] = [
    (
        check_both_ways,
        ONLY_TORCHRUN,
        "KeyError: 'RANK' +Nobody has set RANK, WORLD_SIZE or MASTER_ADDR here",
    ),
    (check_both_ways, INIT_ALONE, "the script is the only rank"),
    (check_both_ways, EACH_PRINTS, "torchrun with 3 ranks printed 3 totals"),
    (check_both_ways, NOT_ADDED_UP, "`total 1`, not 6"),
    (check_both_ways, SILENT, "printed no line `total N`"),
    (check_both_ways, FAILS_ON_RANKS, "torchrun with 3 ranks failed: ValueError: no such rank"),
    (check_both_ways, "def broken(:\n", "line 3 of torchrun.py: "),
    (check_resumes, FROM_THE_START, "the second start began at 0"),
    (check_resumes, STEP_TWICE, "else one is done twice"),
    (check_resumes, NO_TOTAL, "the total belongs to the state, too"),
    (check_resumes, LEAVES_A_FILE, "holds last.pt, last.pt.part"),
    (check_resumes, ONE_LOADS, "All ranks must load"),
]


def written(folder: Path, body: str) -> Path:
    script = folder / "torchrun.py"
    script.write_text(IMPORTS + textwrap.dedent(body))
    return script


@answers.right(RIGHT)
def test_a_right_script_passes(check: Any, answer: str, tmp_path: Path) -> None:
    answers.passes(check, written(tmp_path, answer))


@answers.wrong(WRONG)
def test_a_wrong_script_is_explained(check: Any, answer: str, said: str, tmp_path: Path) -> None:
    answers.is_explained(check, written(tmp_path, answer), said)


@pytest.mark.parametrize("check", [check_both_ways, check_resumes])
def test_not_attempted(tmp_path: Path, check: Any) -> None:
    verdict = check(written(tmp_path, "if True:\n    ...\n"))
    assert verdict.passed is None
    assert "not attempted yet" in repr(verdict)


def test_no_script(tmp_path: Path) -> None:
    answers.is_explained(check_both_ways, tmp_path / "both.py", "there is no file both.py")
