"""Markdown tables for the benchmarks, and a line on the machine."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def machine(*packages: str) -> str:
    """One line on this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{date.today()}: {len(os.sched_getaffinity(0))} cores, {(names or ['?'])[0]}, {versions}, "
        f"Python {platform.python_version()}. Load before: {os.getloadavg()[0]:.2f}.\n"
    )
