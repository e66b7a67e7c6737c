"""Tells `tests.support.answers` which answers will be judged, so that they can share runs."""

from __future__ import annotations

import pytest

from tests.support import answers


def pytest_collection_finish(session: pytest.Session) -> None:
    """Expect the answers of the tests that were selected."""
    params = [getattr(item, "callspec", item).__dict__.get("params", {}) for item in session.items]
    answers.verdict_on.expect(
        (p["check"], p["answer"]) for p in params if {"check", "answer"} <= {*p}
    )
