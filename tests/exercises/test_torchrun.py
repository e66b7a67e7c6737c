"""The checks of lesson 13: a right script passes, typical wrong ones are explained.

Right ones with real groups are in the lesson's solutions, which nbval runs, too: each takes five
new Pythons.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons.exercises import script_runner
from ddp_lessons.exercises.torchrun import check_both_ways, check_resumes
from tests.support import answers, warm_torchrun

pytestmark = pytest.mark.ranks

REAL_TORCHRUN = script_runner.TORCHRUN


@pytest.fixture(scope="module", autouse=True)
def forked_agents() -> Iterator[None]:
    """torchrun's agents need not import torch anew."""
    with warm_torchrun.command() as command, pytest.MonkeyPatch.context() as patch:
        patch.setattr(script_runner, "TORCHRUN", command)
        yield


# Only scripts whose group matters import torch, which takes each of five new Pythons a second.
IMPORTS = "import os, signal\n"

GROUP_OF_ONE = """
    import torch, torch.distributed as dist
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
"""
INIT_ALONE = """
    import torch, torch.distributed as dist
    rank = int(os.environ.get("RANK", 0))
    dist.init_process_group("gloo")
"""
EACH_PRINTS = """
    print("total", sum(range(1, int(os.environ.get("WORLD_SIZE", 1)) + 1)))
"""
NOT_ADDED_UP = """
    if int(os.environ.get("RANK", 0)) == 0:
        print("total 1")
"""
SILENT = "x = 1\n"
FAILS_ON_RANKS = """
    if "RANK" in os.environ:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        raise ValueError("no such rank")
    print("total 1")
"""

BY_FORMULA = """
    import numpy as np, sys
    if not int(os.getenv("RANK") or 0):
        sys.stdout.write(f"total {np.arange(1, int(os.getenv('WORLD_SIZE') or 1) + 1).sum()}\\n")
"""
BY_LOCAL_RANK = """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        size = int(os.environ.get("WORLD_SIZE", 1))
        print(f"total {size * (size + 1) // 2}\\n", end="")
"""
SUM_OF_LOCAL_RANKS = """
    if int(os.environ.get("RANK", 0)) == 0:
        size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        print("total", 2 * size * (size + 1) // 2 if "LOCAL_RANK" in os.environ else 1)
"""
# Nobody joins here, but the totals are right: without torch each Python takes a moment only.
JOINS = """
    def init_process_group():
        pass
    init_process_group()
"""
IN_NUMPY = JOINS + BY_FORMULA
BY_FILES = (
    JOINS
    + """
    import glob, sys, tempfile, time
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), job)
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, str(rank + 1)), "w").close()
    while rank == 0 and len(os.listdir(folder)) < size:
        time.sleep(0.01)
    if rank == 0:
        print(f"total {float(sum(map(int, os.listdir(folder))))}")
"""
)
AFTER_AN_ERROR = (
    JOINS
    + """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        rank, size = 0, 1
    print("begun", flush=True)
    class Total:
        def __index__(self):
            return size * (size + 1) // 2
    rank or print("total %d" % Total())
"""
)
HARD_CODED = """
    if "RANK" not in os.environ:
        print("total 1")
    elif os.environ["RANK"] == "0":
        print("total 6")
"""
OTHER_KEY = """
    rank = {}["rank"]
"""
LEAVES = """
    raise SystemExit(3)
"""
WAITS = """
    signal.pause()
"""
TOTAL_OF_NOTHING = """
    print("total None")
"""

RESUMES = """
    import torch, torch.distributed as dist
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
ONE_LOADS = RESUMES.replace("os.path.exists(path)", "rank == 0 and os.path.exists(path)")
# The ranks do not meet, so only rank 0, which writes, may read.
RESUMES_ALONE = """
    import json
    path, rank = os.environ["CHECKPOINT"], int(os.environ["RANK"])
    state = {"step": 0, "total": 0}
    if rank == 0 and os.path.exists(path):
        state = json.load(open(path))
    for step in range(state["step"], 6 if rank == 0 else 0):
        if step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        state = {"step": step + 1, "total": state["total"] + step * (1 + 2)}
        print(f"step {step}")
        with open(path + ".part", "w") as file:
            json.dump(state, file)
        os.replace(path + ".part", path)
    if rank == 0:
        print(f"total {state['total']}")
"""
FROM_THE_START = RESUMES_ALONE.replace("os.path.exists(path)", "False")
STEP_TWICE = RESUMES_ALONE.replace('"step": step + 1', '"step": step')
NO_TOTAL = RESUMES_ALONE.replace(
    "state = json.load(open(path))", 'state["step"] = json.load(open(path))["step"]'
)
NEVER_KILLED = RESUMES_ALONE.replace("step == 3 and", "step > 6 and")
KEEPS_NOTHING = RESUMES_ALONE.replace('print(f"total', 'os.remove(path); print(f"total')
ELSEWHERE = RESUMES_ALONE.replace('os.environ["CHECKPOINT"],', 'os.environ["CHECKPOINT"] + ".my",')
FAILS_AGAIN = RESUMES_ALONE.replace('and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"', "")
STEP_LEFT_OUT = RESUMES_ALONE.replace('"step": step + 1', '"step": step + 2')
LEAVES_A_FILE = RESUMES_ALONE.replace("os.replace(path", "import shutil; shutil.copy(path")


PICKLED_FLOAT = (
    RESUMES_ALONE.replace("import json", "import pickle")
    .replace("json.load(open(path))", "pickle.load(open(path, 'rb'))")
    .replace('".part", "w"', '".part", "wb"')
    .replace("json.dump", "pickle.dump")
    .replace("state['total']}", "float(state['total'])}")
)
TEXT_STRAIGHT_IN = (
    RESUMES_ALONE.replace("import json", "from pathlib import Path")
    .replace("json.load(open(path))", "dict(zip(state, map(int, Path(path).read_text().split())))")
    .replace("json.dump(state, file)", "print(*state.values(), file=file)")
    .replace('path + ".part", "w"', 'path, "w"')
    .replace('os.replace(path + ".part", path)', "pass")
)
IN_NUMPY_TOO = (
    RESUMES_ALONE.replace("import json", "import numpy as np")
    .replace("json.load(open(path))", "dict(zip(state, np.load(path)))")
    .replace('".part", "w"', '".part", "wb"')
    .replace("json.dump(state, file)", "np.save(file, [*state.values()])")
    .replace("(1 + 2)", "np.arange(1, 3).sum()")
)

RIGHT: list[tuple[Any, str]] = [
    (check_both_ways, GROUP_OF_ONE),
    (check_both_ways, IN_NUMPY),
    (check_both_ways, BY_FILES),
    (check_both_ways, AFTER_AN_ERROR),
    (check_resumes, RESUMES_ALONE),
    (check_resumes, PICKLED_FLOAT),
    (check_resumes, TEXT_STRAIGHT_IN),
    (check_resumes, IN_NUMPY_TOO),
]
WRONG: list[tuple[Any, str, str]] = [
    (
        check_both_ways,
        ONLY_TORCHRUN,
        "KeyError: 'RANK' +Nobody has set RANK, WORLD_SIZE or MASTER_ADDR here",
    ),
    (check_both_ways, INIT_ALONE, "the script is the only rank"),
    (check_both_ways, BY_FORMULA, "the total is right, but the script joins no process group"),
    (
        check_both_ways,
        BY_LOCAL_RANK,
        "2 on each of 2 machines, printed `total 10` and `total 10`, .*LOCAL_RANK begins at 0",
    ),
    (check_both_ways, SUM_OF_LOCAL_RANKS, "2 machines, printed `total 6`, not .*LOCAL_RANK begins"),
    (check_both_ways, EACH_PRINTS, "torchrun with 4 ranks printed 4 totals"),
    (check_both_ways, NOT_ADDED_UP, "`total 1`, not 10"),
    (check_both_ways, HARD_CODED, "torchrun with 4 ranks printed `total 6`, not 10"),
    (check_both_ways, OTHER_KEY, "failed: KeyError: 'rank' +Read the error"),
    (check_both_ways, LEAVES, "failed: it ended with exit code 3"),
    (check_both_ways, WAITS, "did not end within 2 s"),
    (check_both_ways, TOTAL_OF_NOTHING, "no line `total N`.*N is a number"),
    (check_both_ways, "import nothing_such\n", "failed: ModuleNotFoundError: No module"),
    (check_both_ways, SILENT, "printed no line `total N`"),
    (check_both_ways, FAILS_ON_RANKS, "torchrun with 4 ranks failed: ValueError: no such rank"),
    (check_both_ways, "def broken(:\n", "line 2 of torchrun.py: "),
    (check_resumes, FROM_THE_START, "the second start began at 0"),
    (check_resumes, STEP_TWICE, "else one is done twice"),
    (check_resumes, NO_TOTAL, "the total belongs to the state, too"),
    (check_resumes, NEVER_KILLED, "no rank was killed.*Leave the lines in"),
    (check_resumes, KEEPS_NOTHING, "holds nothing.*stays there"),
    (check_resumes, ELSEWHERE, "holds last.pt.my.*belongs at the path"),
    (check_resumes, FAILS_AGAIN, "it failed, after the steps .0, 1, 2.: it ended with SIGKILL"),
    (check_resumes, STEP_LEFT_OUT, "else one is done twice, or left out"),
    (check_resumes, "nothing = {}[0]\n", "failed, after the steps .*KeyError: 0"),
    (check_resumes, LEAVES_A_FILE, "holds last.pt, last.pt.part"),
    (check_resumes, ONE_LOADS, "All ranks must load"),
]


def written(folder: Path, body: str) -> Path:
    script = folder / "torchrun.py"
    script.write_text(IMPORTS + textwrap.dedent(body))
    return script


@pytest.mark.slow
@answers.right(RIGHT)
def test_a_right_script_passes(check: Any, answer: str, tmp_path: Path) -> None:
    answers.passes(check, written(tmp_path, answer))


@pytest.mark.slow
@answers.wrong(WRONG)
def test_a_wrong_script_is_explained(
    check: Any, answer: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer == WAITS:
        monkeypatch.setattr(script_runner, "PATIENCE", 2.0)
    answers.is_explained(check, written(tmp_path, answer), said)


@pytest.mark.parametrize("check", [check_both_ways, check_resumes])
def test_not_attempted(tmp_path: Path, check: Any) -> None:
    verdict = check(written(tmp_path, "if True:\n    ...\n"))
    assert verdict.passed is None
    assert "not attempted yet" in repr(verdict)


def test_no_script(tmp_path: Path) -> None:
    answers.is_explained(check_both_ways, tmp_path / "both.py", "there is no file both.py")


@pytest.mark.slow
@pytest.mark.parametrize("body", [FAILS_AGAIN, NEVER_KILLED, OTHER_KEY])
def test_a_forked_agent_does_what_a_new_one_does(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome() -> tuple[Any, ...]:
        checkpoint = {"CHECKPOINT": str(tmp_path / "last.pt")}
        options = ("--nproc-per-node=2", "--max-restarts=1")
        found = script_runner.under_torchrun(script, *options, env=checkpoint)
        (tmp_path / "last.pt").unlink(missing_ok=True)
        return found.exitcode, found.output, found.error, found.starts

    script = written(tmp_path, body)
    forked = outcome()
    monkeypatch.setattr(script_runner, "TORCHRUN", REAL_TORCHRUN)
    assert forked == outcome()
