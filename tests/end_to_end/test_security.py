"""Nothing that a learner is told to run opens the server to others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, files

OPENS = {
    "listens beyond this machine": r"(--ip|\.ip)\s*[=,\s]\s*['\"]?(0\.0\.0\.0|\*|::)",
    "no token": r"\.token\s*=\s*['\"]?(['\"]|\s|$|\\n)",
    "no password": r"\.password\s*=\s*['\"]?(['\"]|\s|$|\\n)",
    "other sites may use it": r"allow_origin|disable_check_xsrf|allow_remote_access",
    "runs without asking who": r"allow_unauthenticated_access\s*=\s*True",
}


def test_the_patterns_find_what_they_should() -> None:
    for text, opens in (
        ("jupyter lab --ip 0.0.0.0", "listens beyond this machine"),
        ("--ServerApp.ip='*'", "listens beyond this machine"),
        ("--IdentityProvider.token=''", "no token"),
        ("--NotebookApp.token= --port 1", "no token"),
        ("c.ServerApp.password = ''", "no password"),
        ("c.ServerApp.allow_origin = '*'", "other sites may use it"),
        ("--ServerApp.disable_check_xsrf=True", "other sites may use it"),
    ):
        assert [name for name, pattern in OPENS.items() if re.search(pattern, text)] == [opens]


@pytest.mark.parametrize("opens", OPENS)
def test_no_file_opens_the_server(opens: str) -> None:
    told = [path for path in files() if path.parts[0] != "tests" and path.suffix != ".png"]
    assert Path("README.md") in told
    for path in told:
        assert not re.search(OPENS[opens], (ROOT / path).read_text(errors="replace"), re.M), path
