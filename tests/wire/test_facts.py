"""The facts in a record of a script are checked before they are used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ddp_lessons.wire import facts


@pytest.mark.parametrize("value", [10**400, -(10**400), "1", None])
def test_what_was_reported_is_a_number(value: Any) -> None:
    line = json.dumps({"report": {"t_ns": 1, "values": {"loss": value}}})
    found, sources = facts.parse(line.encode())
    with pytest.raises(ValueError, match="is damaged: "):
        list(facts.messages(found, sources))
