"""`make lessons`, as a newcomer types it. `make test`, which runs this, is the other command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.servers import OPTIONS, Server

# The make target says itself which folder is shown: what else Server asks for is left out.
COMMAND = ("sh", "-c", f"exec make -C '{ROOT}' lessons LAB_ARGS='{' '.join(OPTIONS)}'")


@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="not set up by make")
def test_make_lessons_opens_the_course(tmp_path: Path) -> None:
    kept = ("PATH", "TORCH_INDEX")  # the home is empty, and there is no cache
    env = {name: os.environ[name] for name in kept if name in os.environ}
    with Server(tmp_path, ROOT / "notebooks", COMMAND, env=env) as server:
        files = {file["name"] for file in server.ask("contents")["content"]}
        assert {"00_start_here.ipynb", "solutions", "gpu.ipynb"} <= files
        server.run("00_start_here.ipynb")
