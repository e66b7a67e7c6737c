"""The ranks of this machine: what they write is read to its end, and no further."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from ddp_lessons import launch
from ddp_lessons.processes.local import WorkerProcess

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="nobody adopts the daemon"),
]


@pytest.mark.slow
def test_a_daemon_that_writes_without_end_does_not_keep_the_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = WorkerProcess.take

    def slowly(self: WorkerProcess, *what: Any) -> None:
        time.sleep(0.01)  # meanwhile the pipe is filled again
        take(self, *what)

    def leaves_a_daemon(rank: int) -> str:
        subprocess.Popen(["yes"], start_new_session=True)
        print("the last line", file=sys.stderr, flush=True)
        return "done"

    monkeypatch.setattr(WorkerProcess, "take", slowly)
    run = launch(leaves_a_daemon, nprocs=1)
    assert run.values == ["done"]
    assert "the last line" in run.ranks[0].output
