"""The counts of processes that the OOM killer ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ddp_lessons.system import memory


def test_the_counts_of_machine_and_container_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, container = tmp_path / "vmstat", tmp_path / "memory.events"
    machine.write_text("nr_free_pages 123\noom_kill 2\n")
    container.write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n")
    monkeypatch.setattr(memory, "_COUNTS", (str(machine), str(container)))
    assert memory.kills() == 3
    container.unlink()
    assert memory.kills() == 2
    machine.unlink()
    assert memory.kills() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_linux_says_it() -> None:
    count = memory.kills()
    assert count is not None
    assert count >= 0
