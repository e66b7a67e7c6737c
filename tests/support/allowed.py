"""What this machine must allow for some tests: control groups, namespaces, small disks."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = os.environ.get("DDP_LESSONS_LIMIT") == "required"  # then a missing right is a failure


def cannot(reason: str) -> NoReturn:
    """Skip the test for a reason of the machine's; fail it where that must not be."""
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
