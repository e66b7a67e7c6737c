"""Runs a learner's script, alone or under torchrun, for lesson 13's checks, in the parent."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ddp_lessons.exercises.framework import Wrong, tell
from ddp_lessons.system.host import LOOPBACK_INTERFACE
from ddp_lessons.text import exit_name

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PATIENCE = 90.0  # seconds: torch is imported anew by each rank, on a busy machine slowly
GRACE = 40.0  # seconds to end after SIGTERM: torchrun gives its ranks 30
# The last option: otherwise, after half of all restarts, ranks find keys of killed ranks in the
# agent's store (pytorch issue 135712).
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")

_OF_RANK = re.compile(r"exitcode *: (-?\d+)")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)


class Outcome(NamedTuple):
    """The outcome of a script: its exit code (None: it did not end), its output and its starts.

    torchrun's ranks write unbuffered to the same file, so their lines may be mixed.
    """

    exitcode: int | None
    output: str
    errors: str
    starts: int = 1

    @property
    def error(self) -> str:
        """The last line of the script's first traceback; how it ended, if there is none."""
        found = [line for line in _EXCEPTION.findall(self.errors) if "ChildFailedError" not in line]
        of_rank = _OF_RANK.search(self.errors)  # torchrun reports the first that failed
        code = int(of_rank[1]) if of_rank else self.exitcode
        return found[0] if found else f"it ended with {exit_name(code)}"


def alone(script: Path) -> Outcome:
    """Run ``python script``, without a rank's environment variables."""
    tell("by python")
    return _run([sys.executable, str(script)], {}, drop=OF_RANKS)


def under_torchrun(
    script: Path, *options: str, env: Mapping[str, str] | None = None, first: Sequence[str] = ()
) -> Outcome:
    """Run ``torchrun --standalone OPTIONS script``; `first` is a script that runs this one."""
    tell("by torchrun")
    with tempfile.TemporaryDirectory() as logs:
        command = [*TORCHRUN, f"--log-dir={logs}", "--standalone", *options, *first, str(script)]
        outcome = _run(command, env or {})
        return outcome._replace(starts=len(list(Path(logs).glob("*/attempt_*"))))


def _run(command: Sequence[str], env: Mapping[str, str], drop: Sequence[str] = ()) -> Outcome:
    variables = {name: value for name, value in os.environ.items() if name not in drop}
    variables |= {**VARIABLES, **env}
    if (loopback := LOOPBACK_INTERFACE.get(sys.platform)) is not None:
        variables.setdefault("GLOO_SOCKET_IFNAME", loopback)
    process = subprocess.Popen(
        command,
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        written = process.communicate(timeout=PATIENCE)
        return Outcome(process.returncode, *written)
    except subprocess.TimeoutExpired:
        return Outcome(None, *_ended(process))
    except BaseException:  # the Stop button
        _ended(process)
        raise


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End the process; an agent also ends its ranks on SIGTERM."""
    process.terminate()
    try:
        return process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:  # a script that ignores SIGTERM
        process.kill()
        return process.communicate()


def is_unattempted(script: Path) -> bool:
    """True if a script still has a line that is only `...`.

    Raises `Wrong` if there is no script, or it is not Python.
    """
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except OSError:
        raise Wrong(
            f"there is no file {script.name}.", "Run the cell that begins with `%%writefile`."
        ) from None
    except ValueError as error:  # not UTF-8; null bytes
        raise Wrong(f"{script.name} is no Python script: {error}.", "Write it anew.") from None
    except SyntaxError as error:
        raise Wrong(
            f"line {error.lineno} of {script.name}: {error.msg}.", "Correct that line."
        ) from None
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    whole = [node.body[0] for node in classes if node.bases]  # as `class Late(Exception): ...`
    return any(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
        and node not in whole
        for node in ast.walk(tree)
    )


def names(script: Path) -> set[str]:
    """The names, attributes and texts in a script."""
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    parts = (getattr(node, field, None) for node in nodes for field in ("id", "attr", "value"))
    return {part for part in parts if isinstance(part, str)}
