"""The checks of lesson 13: a script that runs with and without torchrun, and one that resumes."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from ddp_lessons.exercises import on_two_machines, script_runner
from ddp_lessons.exercises.framework import Unattempted, Wrong, exercise, judge
from ddp_lessons.exercises.script_runner import Outcome

RANKS = 4  # of torchrun, for the script that runs both ways: not the 3 of its example
STEPS, KILLED_IN = 6, 3  # of the resuming script; rank 1 is killed in step 3


@exercise(
    'torchrun sets RANK. A plain `python` does not: `os.environ.get("RANK")` is None there.',
    'Alone there is nobody to add up with: `if "RANK" in os.environ:` around all that needs a '
    'group, or a group of one: `init_process_group("gloo", rank=0, world_size=1, store=...)`.',
)
def check_both_ways(script: str | os.PathLike[str]) -> str:
    """Check a script that prints `total N` once: alone, and on torchrun's ranks."""
    path = _attempted(script)
    _judge_total(script_runner.alone(path), 1)
    ranks = f"--nproc-per-node={RANKS}"
    outcome = script_runner.under_torchrun(path, ranks, first=[on_two_machines.__file__])
    names = script_runner.names(path)
    if "LOCAL_RANK" in names:
        _judge_local(outcome)
    _judge_total(outcome, RANKS)
    if not {"init_process_group", "init_device_mesh"} & names:
        raise Wrong(
            "the total is right, but the script joins no process group: nothing was added up.",
            "A formula knows the sum of ranks, not what other ranks have computed. Let each rank "
            "bring its own number: init_process_group, then a collective.",
        )
    return f"`python both.py`, and torchrun with {RANKS} ranks: the right total, printed once."


def _judge_local(outcome: Outcome) -> None:
    """Raise `Wrong` if a local rank was taken for the rank."""
    totals = _totals(outcome)
    on_each = RANKS // on_two_machines.MACHINES
    of_local = str(on_two_machines.MACHINES * on_each * (on_each + 1) // 2)
    if len(totals) == on_two_machines.MACHINES or totals[:1] in ([of_local], [f"{of_local}.0"]):
        raise Wrong(
            f"torchrun with {RANKS} ranks, {on_each} on each of {on_two_machines.MACHINES} "
            f"machines, printed {' and '.join(f'`total {total}`' for total in totals)}, not "
            f"`total {RANKS * (RANKS + 1) // 2}` once.",
            "LOCAL_RANK begins at 0 on every machine: it chooses the GPU. RANK says who one is in "
            "the job.",
        )


def _judge_total(outcome: Outcome, ranks: int) -> None:
    is_alone, is_endless = ranks == 1, outcome.exitcode is None
    endless = f"did not end within {script_runner.PATIENCE:g} s.\n"
    failed = f"failed: {outcome.error}\n"
    is_unset = any(name in outcome.error for name in script_runner.OF_RANKS)
    right = str(ranks * (ranks + 1) // 2)
    printed, total = outcome.output.count("total"), (*_totals(outcome), "")[0]
    wrong = f"printed `total {total}`, not {right}.\n"
    is_wrong = total not in (right, f"{right}.0")
    mistakes = {
        f"{endless}A group waits until WORLD_SIZE ranks have come. Alone, that is one, or no "
        "group.": is_endless and is_alone,
        f"{endless}Ranks wait for one that does not come: do all of them join, and make the same "
        "calls?": is_endless,
        f"{failed}Nobody has set RANK, WORLD_SIZE or MASTER_ADDR here: that is torchrun's part. "
        "Without them the script is the only rank.": outcome.exitcode and is_unset and is_alone,
        f"{failed}Read the error first.": outcome.exitcode,
        # Ranks print at once, so their lines may be mixed.
        f"printed {printed} totals.\nEvery rank runs every line. Let only rank 0 print.": (
            printed > 1
        ),
        "printed no line `total N`.\n"
        "One process prints it: rank 0, and the script itself where it runs alone. N is a number: "
        "`.item()` makes one of a tensor.": not total,
        f"{wrong}A script that runs alone is rank 0 of 1: the total is its own 0 + 1.": is_wrong
        and is_alone,
        f"{wrong}The total is the sum of rank + 1 over all ranks of the group. torchrun says in "
        "RANK who one is; `all_reduce` adds up, in place.": is_wrong,
    }
    how = "`python both.py`" if is_alone else f"torchrun with {ranks} ranks"
    judge(f"{how} ", mistakes)


def _attempted(script: str | os.PathLike[str]) -> Path:
    path = Path(script)
    if script_runner.is_unattempted(path):
        raise Unattempted
    return path


def _totals(outcome: Outcome) -> list[str]:
    return re.findall(r"total (-?\d+(?:\.\d+)?)", outcome.output)


@exercise(
    "After init_process_group: `if os.path.exists(path): state = torch.load(path)`. All ranks load "
    "it, for all of them start anew.",
    'At the end of a step, on rank 0: `state = {"step": step + 1, "total": ...}`, torch.save to '
    '`path + ".part"`, then os.replace to `path`.',
)
def check_resumes(script: str | os.PathLike[str]) -> str:
    """Check a script of 6 steps that torchrun restarts after rank 1 is killed in step 3."""
    path = _attempted(script)
    with tempfile.TemporaryDirectory() as folder:
        outcome = script_runner.under_torchrun(
            path,
            "--nproc-per-node=2",
            "--max-restarts=1",
            env={"CHECKPOINT": os.path.join(folder, "last.pt")},
        )
        left = sorted(os.listdir(folder))
    _judge_resume(outcome)
    is_elsewhere = "last.pt" not in left
    mistakes = {
        "The checkpoint belongs at the path in `CHECKPOINT`, and stays there.": is_elsewhere,
        "Write under another name, then `os.replace` it by the right one, and nothing is "
        "left.": left != ["last.pt"],
    }
    judge(f"the folder of the checkpoint holds {', '.join(left) or 'nothing'}.", mistakes)
    return f"killed in step {KILLED_IN}, started again there, and the total is that of 6 steps."


def _judge_resume(outcome: Outcome) -> None:
    steps = [int(number) for number in re.findall(r"step (\d+)", outcome.output)]
    done, totals = list(range(STEPS)), _totals(outcome)
    right = sum(step * (1 + 2) for step in done)  # in each step, step x (rank + 1) over 2 ranks
    mistakes = {
        f"it did not end within {script_runner.PATIENCE:g} s.\n"
        "After a restart all ranks must go on "
        "in the same step: do all of them load?": outcome.exitcode is None,
        f"it failed, after the steps {steps}: {outcome.error}\n"
        f"After the restart rank 0 went on with step {KILLED_IN}. Where did rank 1 begin? All "
        "ranks must load.": outcome.exitcode and steps == done,
        f"it failed, after the steps {steps}: {outcome.error}\n"
        "The second start must get through: torchrun restarts once here.": outcome.exitcode,
        "no rank was killed, so nothing was restarted.\n"
        f"Leave the lines in that kill rank 1 before step {KILLED_IN}: the "
        "script is to survive them.": outcome.starts == 1,
        f"rank 0 did the steps {steps}: the second start began at 0.\n"
        "A restart runs the whole script again. What the first start learned is lost, unless a "
        "file keeps it: save after each step, "
        "and load before the first.": steps == [*range(KILLED_IN), *done],
        f"the steps {steps} were printed.\nLet rank 0 alone print, each step once.": sorted(steps)
        == sorted(2 * done)
        and steps != done,
        f"rank 0 did the steps {steps}.\n"
        "Save after a step what comes next, "
        "`step + 1`: else one is done twice, or left out.": steps != done,
        f"the total is {totals[0] if totals else 'missing'}, not {right}.\n"
        "Counting the steps is not enough: the total belongs "
        "to the state, too.": totals not in ([str(right)], [f"{right}.0"]),
    }
    judge("", mistakes)
