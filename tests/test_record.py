"""`-m ddp_lessons.record` records scripts that know nothing of us, and changes nothing for them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ddp_lessons import load_run
from tests.support import torchrun

pytestmark = pytest.mark.system

RECORD = ("-m", "ddp_lessons.record")
HELPER = """
    import torch.distributed as dist

    def average(x):
        dist.all_reduce(x)

    def read(x, rank):
        if rank == 1:
            raise ValueError("bad sample 17")
        return x
"""
HANGS = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.distributed import all_reduce
    from helper import average

    if __name__ == "__main__":
        dist.init_process_group("gloo")
        x = torch.ones(2)
        all_reduce(x)
        if dist.get_rank() == 1:
            dist.barrier()
        average(x)
"""
SKIPS = """
    import torch
    import torch.distributed as dist
    from helper import read

    if __name__ == "__main__":
        dist.init_process_group("gloo")
        try:
            dist.all_reduce(read(torch.ones(1), dist.get_rank()))
        except ValueError:
            pass
        dist.barrier()
"""
TELLS = """
    import os, pickle, sys
    from helper import average

    class Sample:
        size: int

    if __name__ == "__main__":
        pickle.dumps(Sample())  # found in __main__
        print(__file__, sys.argv, sys.path[0] == os.path.dirname(os.path.abspath(__file__)), end="")
        print(Sample.__annotations__)
        print("torch" in sys.modules, os.environ.get("DDP_LESSONS_RECORD"))
"""


def written(folder: Path, text: str) -> Path:
    (folder / "helper.py").write_text(textwrap.dedent(HELPER).lstrip())
    script = folder / "train.py"
    script.write_text(textwrap.dedent(text).lstrip())
    return script


def explain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddp_lessons.cli", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250)


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *RECORD, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=torchrun.environment(folder / "train.py", env),
        timeout=100,
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_a_job_that_hangs_is_explained_meanwhile(tmp_path: Path) -> None:
    script = written(tmp_path, HANGS)
    options = ("--standalone", "--nproc-per-node=2", *RECORD)
    with torchrun.agent(script, *options):
        deadline = time.monotonic() + torchrun.PATIENCE
        while (done := explain("record", "--png", "board.png", cwd=tmp_path)).returncode != 1 or (
            "WorkersHung" not in done.stdout
        ):
            assert time.monotonic() < deadline, done
            time.sleep(0.5)
    assert "rank 1 still runs, waiting in barrier, train.py, line 12" in done.stdout
    assert "call 2 is not the same on all ranks" in done.stdout
    *_, head, first, second, _, _ = done.stdout.splitlines()
    assert head.split("  ")[-1] == "now"
    assert first.split()[:4] == ["rank", "0", "all_reduce", "all_reduce"]
    assert second.split()[:5] == ["rank", "1", "all_reduce", "barrier", "!…"]
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")
    ended = load_run(tmp_path / "record")
    assert ended.name == "train.py"
    assert {Path((span.site or "").rpartition(":")[0]).name for span in ended.spans()} >= {
        "train.py",
        "helper.py",
    }


@pytest.mark.ranks
@pytest.mark.skipif(sys.version_info < (3, 12), reason="later Pythons tell what is caught")
def test_what_a_rank_of_a_script_caught(tmp_path: Path) -> None:
    script = written(tmp_path, SKIPS)
    with torchrun.agent(script, "--standalone", "--nproc-per-node=2", *RECORD):
        deadline = time.monotonic() + torchrun.PATIENCE
        while "WorkersHung" not in (done := explain("record", cwd=tmp_path)).stdout:
            assert time.monotonic() < deadline, done
            time.sleep(0.5)
    line = 'rank 1 caught ValueError: bad sample 17: helper.py, line 8:  raise ValueError("bad sam'
    assert line in done.stdout


@pytest.mark.slow
def test_the_script_is_as_if_it_had_been_started_itself(tmp_path: Path) -> None:
    written(tmp_path, TELLS)
    plain = subprocess.run(
        [sys.executable, "train.py", "--epochs", "3"], capture_output=True, text=True, cwd=tmp_path
    )
    done = run(tmp_path, "train.py", "--epochs", "3")
    assert done.stdout.splitlines()[0] == plain.stdout.splitlines()[0]
    assert "nothing is recorded: RANK is not set" in done.stderr
    assert not (tmp_path / "record").exists()


@pytest.mark.slow
def test_a_module_is_run_by_its_name_and_the_folder_is_ones_own(tmp_path: Path) -> None:
    written(tmp_path, TELLS)
    place = {"RANK": "0", "WORLD_SIZE": "1", "DDP_LESSONS_RECORD": "mine"}
    done = run(tmp_path, "-m", "train", "--epochs", "3", **place)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "True mine"
    assert load_run(tmp_path / "mine").ok
    said = explain("mine", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")


@pytest.mark.slow
def test_an_empty_variable_names_no_folder(tmp_path: Path) -> None:
    script = written(tmp_path, "import ddp_lessons\n")
    before = set(os.listdir(tmp_path))
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": ""})
    assert code == 0, text
    assert set(os.listdir(tmp_path)) == before
    run(tmp_path, "train.py", RANK="0", WORLD_SIZE="1", DDP_LESSONS_RECORD="")
    assert load_run(tmp_path / "record").ok


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: torchrun"),
        (["--epochs"], "usage: torchrun"),
        (["none.py"], "none.py cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path, *arguments, RANK="0")
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_no_record_to_explain(tmp_path: Path) -> None:
    done = explain("record", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ddp-lessons explain: record holds no record" in done.stderr
