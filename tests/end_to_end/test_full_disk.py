"""Scripts that are recorded where there is no room: they come to their right end all the same."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons import Run, load_run
from tests.support import torchrun
from tests.support.disks import on_small_disk

pytestmark = pytest.mark.system

KILOBYTES = 1024  # for two ranks, whose whole span buffers would take 36 MB
HEAD = """
    import os, resource, shutil, signal, sys
    from pathlib import Path
    import torch.distributed as dist
    from ddp_lessons import span

    def work(times):
        for _ in range(times):
            with span("work"):
                pass

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
"""
FULL = re.compile(r"^.*ddp_lessons: rank (\d) is recorded no further: (.*)$", re.MULTILINE)

Ended = tuple[int | None, str]


def carry_out(
    folder: Path, body: str, *, kilobytes: int = KILOBYTES, nprocs: int = 2, before: str = ""
) -> Ended:
    """Run a script on ranks whose record is on a small disk; it is copied to `saved`."""
    script = folder / "train.py"
    disk = folder / "disk"
    script.write_text(textwrap.dedent(HEAD).lstrip() + textwrap.dedent(body).lstrip())
    prefix = on_small_disk(disk, kilobytes, folder / "saved")
    if before:
        prefix = (*prefix, "sh", "-c", f'{before}; exec "$@"', "sh")
    env = {"DDP_LESSONS_RECORD": str(disk / "record")}
    if nprocs == 1:
        return torchrun.alone(script, env=env, prefix=prefix)
    options = ("--standalone", f"--nproc-per-node={nprocs}")
    with torchrun.agent(script, *options, env=env, prefix=prefix) as process:
        text, _ = process.communicate(timeout=torchrun.PATIENCE)
    return process.returncode, text


def told(text: str) -> list[tuple[str, str]]:
    return sorted(FULL.findall(text))


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[Ended, Run]]:
    def run(body: str, **options: Any) -> tuple[Ended, Run]:
        ended = carry_out(tmp_path, body, **options)
        return ended, load_run(tmp_path / "saved")

    return run


@pytest.mark.slow
def test_a_training_goes_on_when_its_disk_is_full(
    script: Callable[..., tuple[Ended, Run]],
) -> None:
    (code, text), run = script(
        """
        work(20_000)
        dist.barrier()
        dist.destroy_process_group()
        print(f"rank {rank} is done\\n", end="")
        """
    )
    assert code == 0, text
    assert all(f"rank {rank} is done" in text for rank in (0, 1))
    assert told(text) == [(rank, "No space left on device") for rank in "01"]
    assert run.ok
    assert run.warnings == []
    for rank in run.ranks:
        kept = [span for span in rank.spans if span.name == "work"]
        assert 0 < len(kept) < 20_000
        # What came after is counted: the rest of the work, barrier, destroy_process_group.
        assert rank.dropped == 20_000 - len(kept) + 2
        assert all(span.t1_ns for span in kept)
        assert f"rank {rank.rank}: {rank.dropped:,}" in run.explain()


@pytest.mark.slow
def test_an_exception_on_a_full_disk_is_explained(
    script: Callable[..., tuple[Ended, Run]],
) -> None:
    (code, text), run = script(
        """
        work(20_000)
        if rank == 1:
            raise ValueError("a bad batch")
        dist.barrier()
        """
    )
    assert code == 1, text
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", (1,))
    assert 'raise ValueError("a bad batch")' in run.explain()


@pytest.mark.slow
def test_a_rank_killed_on_a_full_disk_is_explained(
    script: Callable[..., tuple[Ended, Run]],
) -> None:
    (code, text), run = script(
        """
        work(20_000)
        dist.barrier()
        if rank == 1:
            with span("checkpoint"):
                os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        """
    )
    assert code == 1, text
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("killed", (1,))
    assert [s.name for s in run.ranks[1].spans if s.t1_ns is None] == ["train.py", "checkpoint"]


def test_what_does_not_fit_even_at_the_beginning(tmp_path: Path) -> None:
    code, text = carry_out(
        tmp_path,
        """
        work(1000)
        dist.destroy_process_group()
        print("left:", *sorted(Path(os.environ["DDP_LESSONS_RECORD"]).glob("*")))
        """,
        kilobytes=100,
        nprocs=1,
    )
    assert code == 0, text
    assert "nothing is recorded, DDP_LESSONS_RECORD: [Errno 28]" in text
    assert "left:\n" in text


@pytest.mark.slow
def test_nobody_is_accused_for_want_of_spans(script: Callable[..., tuple[Ended, Run]]) -> None:
    (code, text), run = script(
        """
        work(20_000 * rank)  # rank 0 has room to the end
        dist.barrier()
        if rank == 0:
            dist.destroy_process_group()
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        """
    )
    assert code == 1, text
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("killed", (0,))
    assert [rank.dropped > 0 for rank in run.ranks] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "error"),
    [
        ("ulimit -f 1000", "[Errno 27] File too large"),
        ("mount -o remount,ro disk", "[Errno 30] Read-only file system"),
    ],
)
def test_where_nothing_can_be_written(tmp_path: Path, before: str, error: str) -> None:
    body = "work(1000); dist.destroy_process_group(); print('done')"
    code, text = carry_out(tmp_path, body, nprocs=1, before=before)
    assert code == 0, text
    assert "done" in text
    assert f"nothing is recorded, DDP_LESSONS_RECORD: {error}" in text


@pytest.mark.slow
def test_a_limit_on_files_that_comes_later_ends_nothing(
    script: Callable[..., tuple[Ended, Run]],
) -> None:
    (code, text), run = script(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # as a script may
        work(20_000)
        dist.destroy_process_group()
        """,
        kilobytes=8000,
        nprocs=1,
    )
    assert code == 0, text
    assert run.ok


@pytest.mark.slow
def test_a_folder_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    body = """
        shutil.rmtree(os.environ["DDP_LESSONS_RECORD"])
        work(20_000)
        dist.destroy_process_group()
        print("done")
    """
    code, text = carry_out(tmp_path, body, kilobytes=8000, nprocs=1)
    assert code == 0, text
    assert "done" in text


def test_files_that_a_script_closes_are_not_taken_for_the_record(tmp_path: Path) -> None:
    body = """
        dist.destroy_process_group()
        os.closerange(3, 1000)
        mine = [os.open(f"mine_{n}", os.O_RDWR | os.O_CREAT) for n in range(40)]
        for file in mine:
            os.write(file, b"mine")
        work(20_000)
        print(f"{os.path.getsize('mine_0')=} done")
    """
    code, text = carry_out(tmp_path, body, kilobytes=8000, nprocs=1)
    assert "done" in text
    assert told(text) == [("0", "its file was closed")]
    assert {file.read_bytes() for file in tmp_path.glob("mine_*")} == {b"mine"}
    assert code == 0, text


LAUNCH = """
from ddp_lessons import LaunchError, launch

def work(rank):
    return rank

if __name__ == "__main__":
    try:
        print(launch(work, nprocs=2).values)
    except LaunchError as error:
        print("LaunchError:", error)
"""


def launched(folder: Path, *prefix: str) -> str:
    script = folder / "launch.py"
    script.write_text(LAUNCH)
    done = subprocess.run(
        [*prefix, sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=torchrun.PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_launch_without_room_for_its_span_buffers_is_refused(tmp_path: Path) -> None:
    text = launched(tmp_path, "sh", "-c", 'ulimit -f 1000; exec "$@"', "sh")
    assert "LaunchError: the memory in which ranks note what they do cannot be had" in text
    assert "File too large" in text
    assert "Nothing was started" in text


@pytest.mark.slow
def test_a_launch_needs_no_room_in_dev_shm(tmp_path: Path) -> None:
    prefix = on_small_disk(Path("/dev/shm"), 4, tmp_path / "saved")
    assert launched(tmp_path, *prefix) == "[0, 1]\n"
