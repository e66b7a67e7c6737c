"""The checks of lesson 13: a script that runs with and without torchrun, and one that resumes."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from ddp_lessons.exercises import scripts
from ddp_lessons.exercises.checking import Unattempted, Wrong, exercise
from ddp_lessons.exercises.scripts import Outcome

RANKS = 3  # of torchrun, for the script that runs both ways
STEPS, KILLED_IN = 6, 3  # of the script that resumes; the step in which its rank 1 is killed
_NO_CONTEXT = "Read the error first."


@exercise(
    'torchrun sets RANK. A plain `python` does not: `os.environ.get("RANK")` is None there.',
    'Alone there is nobody to add up with: `if "RANK" in os.environ:` around all that needs a '
    'group, or a group of one: `init_process_group("gloo", rank=0, world_size=1, store=...)`.',
)
def check_both_ways(script: str | os.PathLike[str]) -> str:
    """Check a script that prints `total N` once: alone, and with 3 ranks of torchrun."""
    path = _attempted(script)
    _judge_alone(scripts.alone(path))
    _judge_ranks(scripts.under_torchrun(path, f"--nproc-per-node={RANKS}"), RANKS)
    return f"`python both.py`, and torchrun with {RANKS} ranks: the right total, printed once."


def _attempted(script: str | os.PathLike[str]) -> Path:
    path = Path(script)
    if scripts.is_unattempted(path):
        raise Unattempted
    return path


def _totals(outcome: Outcome) -> list[str]:
    return re.findall(r"total (-?\d+(?:\.\d+)?)", outcome.output)


def _judge_alone(outcome: Outcome) -> None:
    if outcome.exitcode is None:
        raise Wrong(
            f"`python both.py` did not end within {scripts.PATIENCE:g} s.",
            "A group waits until WORLD_SIZE ranks have come. Alone, that is one, or no group.",
        )
    if outcome.exitcode:
        because = _NO_CONTEXT
        if "KeyError" in outcome.error or "environment variable" in outcome.error:
            because = (
                "Nobody has set RANK, WORLD_SIZE or MASTER_ADDR here: that is torchrun's part. "
                "Without them the script is the only rank."
            )
        raise Wrong(f"`python both.py` failed: {outcome.error}", because)
    _judge_totals(outcome, "`python both.py`", 1)


def _judge_ranks(outcome: Outcome, nprocs: int) -> None:
    how = f"torchrun with {nprocs} ranks"
    if outcome.exitcode is None:
        raise Wrong(
            f"{how} did not end within {scripts.PATIENCE:g} s.",
            "Ranks wait for one that does not come: do all of them join, and make the same calls?",
        )
    if outcome.exitcode:
        raise Wrong(f"{how} failed: {outcome.error}", _NO_CONTEXT)
    _judge_totals(outcome, how, nprocs)


def _judge_totals(outcome: Outcome, how: str, ranks: int) -> None:
    right = str(ranks * (ranks + 1) // 2)
    printed, totals = outcome.output.count("total"), _totals(outcome)
    if printed > 1:  # several ranks at once, perhaps into each other's lines
        raise Wrong(
            f"{how} printed {printed} totals.",
            "Every rank runs every line. Let only rank 0 print.",
        )
    if not totals:
        raise Wrong(
            f"{how} printed no line `total N`.",
            "One process prints it: rank 0, and the script itself where it runs alone. N is a "
            "number: `.item()` makes one of a tensor.",
        )
    if totals[0] not in (right, f"{right}.0"):
        raise Wrong(f"{how} printed `total {totals[0]}`, not {right}.", _why_not_total(ranks))


def _why_not_total(ranks: int) -> str:
    if ranks == 1:
        return "A script that runs alone is rank 0 of 1: the total is its own 0 + 1."
    return (
        "The total is the sum of rank + 1 over all ranks of the group. torchrun says in RANK who "
        "one is; `all_reduce` adds up, in place."
    )


@exercise(
    "After init_process_group: `if os.path.exists(path): state = torch.load(path)`. All ranks load "
    "it, for all of them start anew.",
    'At the end of a step, on rank 0: torch.save to `path + ".part"`, then os.replace to `path`.',
)
def check_resumes(script: str | os.PathLike[str]) -> str:
    """Check a script of 6 steps, whose rank 1 is killed in step 3: torchrun starts it again."""
    path = _attempted(script)
    with tempfile.TemporaryDirectory() as folder:
        outcome = scripts.under_torchrun(
            path,
            "--nproc-per-node=2",
            "--max-restarts=1",
            env={"CHECKPOINT": os.path.join(folder, "last.pt")},
        )
        left = sorted(os.listdir(folder))
    _judge_resume(outcome)
    if left != ["last.pt"]:
        raise Wrong(
            f"the folder of the checkpoint holds {', '.join(left) or 'nothing'}.",
            "Write under another name, then `os.replace` it by the right one, and nothing is left.",
        )
    return f"killed in step {KILLED_IN}, started again there, and the total is that of 6 steps."


def _judge_resume(outcome: Outcome) -> None:
    steps = [int(number) for number in re.findall(r"step (\d+)", outcome.output)]
    total = _totals(outcome)
    if outcome.exitcode is None:
        raise Wrong(
            f"it did not end within {scripts.PATIENCE:g} s.",
            "After a restart all ranks must go on in the same step: do all of them load?",
        )
    if outcome.exitcode and steps == list(range(STEPS)):
        raise Wrong(
            f"it failed, after the steps {steps}.",
            f"After the restart rank 0 went on with step {KILLED_IN}. Where did rank 1 begin? All "
            "ranks must load.",
        )
    if outcome.exitcode:
        raise Wrong(
            f"it failed, after the steps {steps}: {outcome.error}",
            "The second start must get through: torchrun restarts once here.",
        )
    if steps == [*range(KILLED_IN), *range(STEPS)]:
        raise Wrong(
            f"rank 0 did the steps {steps}: the second start began at 0.",
            "A restart runs the whole script again. What the first start learned is lost, unless a "
            "file keeps it: save after each step, and load before the first.",
        )
    if steps != list(range(STEPS)):
        raise Wrong(
            f"rank 0 did the steps {steps}.",
            "Save after a step what comes next, `step + 1`: else one is done twice, or left out.",
        )
    if total not in ([str(_total())], [f"{_total()}.0"]):
        raise Wrong(
            f"the total is {total[0] if total else 'missing'}, not {_total()}.",
            "Counting the steps is not enough: the total belongs to the state, too.",
        )


def _total() -> int:
    """What the script adds up: in each step, step x (rank + 1) over 2 ranks."""
    return sum(step * 3 for step in range(STEPS))
