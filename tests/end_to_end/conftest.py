"""A training under torchrun that several tests look at, each in its own way."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import torchrun


class Trained(NamedTuple):
    """What a recorded training left."""

    record: Path
    text: str  # what its ranks printed


@pytest.fixture(scope="package")
def by_one_agent(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two ranks of one agent; its tests need the `xdist_group` "by one agent"."""
    script = tmp_path_factory.mktemp("by_one_agent") / "train.py"
    script.write_text(textwrap.dedent(torchrun.TRAIN).lstrip())
    env = {"DDP_LESSONS_RECORD": "record"}
    code, text = torchrun.run(script, "--nproc-per-node=2", env=env)
    assert code == 0, text
    return Trained(script.with_name("record"), text)
