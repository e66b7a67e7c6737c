"""Engines are chosen by host, and only those with the notebook's versions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ddp_lessons import BadLaunch
from ddp_lessons.cluster.engine import describe
from ddp_lessons.cluster.engine_selection import choose, refuse_unlike
from ddp_lessons.cluster.remote_worker import Engine


def engine(number: int, host: str) -> Engine:
    return Engine(number, host, host, "a clock", 0, None)


@pytest.mark.parametrize(
    ("hosts", "nprocs", "nnodes", "chosen"),
    [
        ("aaaa", 4, 1, [0, 1, 2, 3]),
        ("aaaa", 2, 1, [0, 1]),
        ("abab", 2, 1, [0, 2]),
        ("abab", 2, 2, [0, 2, 1, 3]),
        ("baab", 2, 2, [0, 3, 1, 2]),
        ("abbb", 3, 1, [1, 2, 3]),
        ("abbcb", 1, 3, [0, 1, 3]),
        ("aaaab", 2, 2, [0, 1, 2, 3]),
        ("aabb", 3, 1, "nnodes=2, nprocs=2"),
        ("aabb", 4, 1, "a has 2 engines (0, 1) and b has 2 engines (2, 3)"),
        ("aaa", 2, 2, "needs 2 engines on each of 2 hosts"),
        ("a", 2, 1, "nprocs=1"),
    ],
)
def test_engines_are_chosen_by_host(hosts: str, nprocs: int, nnodes: int, chosen: Any) -> None:
    engines = [engine(number, host) for number, host in enumerate(hosts)]
    if isinstance(chosen, str):
        with pytest.raises(BadLaunch, match=re.escape(chosen)):
            choose(engines, nprocs, nnodes)
    else:
        assert [engine.id for engine in choose(engines, nprocs, nnodes)] == chosen


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("Python", "3.9", "has Python 3.9"),
        ("torch", "2.0.1", "has torch 2.0.1"),
        ("torch", None, "has no torch"),
        ("ddp-lessons", "0.0.1", "has ddp-lessons 0.0.1"),
    ],
)
def test_an_engine_unlike_the_notebook(name: str, version: str | None, told: str) -> None:
    facts = describe()
    facts["versions"].pop(name)
    if version is not None:
        facts["versions"][name] = version
    with pytest.raises(BadLaunch, match=rf"engine 3 on host .* {re.escape(told)}"):
        refuse_unlike(3, facts)


def test_builds_may_differ() -> None:
    facts = describe()
    facts["versions"]["torch"] = facts["versions"]["torch"].partition("+")[0] + "+cu130"
    refuse_unlike(3, facts)
