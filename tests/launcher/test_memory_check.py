"""launch refuses ranks that do not fit in memory; if memory runs out, the notebook survives."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from ddp_lessons import BadLaunch, launch
from ddp_lessons.launcher import memory_check
from ddp_lessons.system import memory
from tests.support import confined

pytestmark = pytest.mark.xdist_group("memory")

MB = 1 << 20
needs_a_limit = confined.needed()


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(memory_check, "available_memory", lambda: available)


def test_what_fits_is_not_talked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 400 * MB)
    assert memory_check.check(4, "forkserver") == ""


@pytest.mark.ranks
def test_where_it_may_become_tight_the_cell_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_memory(monkeypatch, 200 * MB)
    assert launch(abs, nprocs=4).values == [0, 1, 2, 3]
    notice = capsys.readouterr().out
    assert notice.startswith("Notice: 4 ranks will take 56 MB")
    assert "200 MB are left" in notice
    assert "launch about 3" in notice


@pytest.mark.ranks
def test_what_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 300 * MB)
    with pytest.raises(BadLaunch, match=r"64 ranks would take at least 896 MB .* 300 MB are"):
        launch(abs, nprocs=32, nnodes=2)


def test_a_rank_with_an_interpreter_of_its_own_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 300 * MB)
    assert memory_check.check(4, "forkserver") == ""
    with pytest.raises(BadLaunch, match="about 1 rank that trains a small"):
        memory_check.check(4, "spawn")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_on_the_way_up_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    name = {1: "_VERSION_1", 2: "_VERSION_2"}[version]
    files = getattr(memory, name)._replace(root=tmp_path)
    monkeypatch.setattr(memory, name, files)
    groups = tmp_path / "groups"
    groups.write_text({1: "4:memory:/pod/own\n1:cpu:/\n", 2: "0::/pod/own\n"}[version])
    monkeypatch.setattr(memory, "_GROUPS", groups)
    (tmp_path / "pod" / "own").mkdir(parents=True)
    for group, limit in ((tmp_path / "pod", str(100 * MB)), (tmp_path / "pod" / "own", "max")):
        (group / files.limit).write_text(f"{limit}\n")
        (group / files.usage).write_text(f"{70 * MB}\n")
        (group / "memory.stat").write_text(f"anon 5\n{files.cache} {20 * MB}\n")
    assert memory.available_memory() == 50 * MB


def within(limit: int, script: str) -> tuple[int, str, int]:
    """Run a program within a limit; its exit code, its output, and the number of kills."""
    with confined.Confined(limit) as group:
        process = group.start([sys.executable, "-c", textwrap.dedent(script)])
        text, _ = process.communicate(timeout=250)
        return process.returncode, text, group.kills


@pytest.mark.slow
@pytest.mark.system
@needs_a_limit
def test_the_limit_of_a_container_is_seen() -> None:
    code, text, kills = within(
        700 * MB,
        """
        from ddp_lessons import BadLaunch, launch
        try:
            launch(abs, nprocs=64)
        except BadLaunch as error:
            print(error)
        print(launch(abs, nprocs=2).values)
        """,
    )
    assert code == 0, text
    assert "64 ranks would take at least 896 MB of memory, and " in text
    assert text.endswith("[0, 1]\n")
    assert kills == 0


@pytest.mark.slow
@pytest.mark.system
@needs_a_limit
def test_when_memory_runs_out_the_ranks_go_and_the_notebook_stays() -> None:
    code, text, kills = within(
        900 * MB,
        """
        import torch
        from ddp_lessons import launch

        def fill(rank):
            held = []
            while rank == 1:
                held.append(torch.ones(1_000_000))

        run = launch(fill, nprocs=2, check=False)
        print(run.verdict.kind, run.verdict.ranks, run.explain())
        """,
    )
    assert code == 0, text
    assert "killed (1,)" in text
    assert "because memory had run out" in text
    assert kills == 1
