"""What became of one rank, and how two outcomes are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# What differs between any two runs: ports, addresses in memory, processes, the time in torch's log;
# and whether a rank came seconds before rank 0's store, and tried again.
VARYING = {
    r"(?m)^.*\[c10d\] (?:The client socket has timed out after \d+ms while trying to connect|"
    r"TCP client failed to connect/validate).*\n?": "",
    r"(127\.0\.0\.1\]?:)\d+": r"\1PORT",
    r"\b0x[0-9a-f]+": "ADDRESS",
    r"\bfd=\d+": "fd",
    r"(?m)^((?:\[rank\d+\]:)?\[?[IWEF])\d{4} [\d:.]+ (?:\d+ )?": r"\1 ",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one rank; `exitcode` only of a process that ran one feature."""

    value: Any = None
    raised: str | None = None  # how a traceback ends
    output: str = ""
    exitcode: int | None = None

    def unlike(self, other: Outcome) -> dict[str, tuple[Any, Any]]:
        """The parts that differ, with both."""
        parts = {
            "value": (comparable(self.value), comparable(other.value)),
            "raised": (lasting(self.raised), lasting(other.raised)),
            "output": (lasting(self.output), lasting(other.output)),
        }
        if self.exitcode is not None and other.exitcode is not None:
            parts["exitcode"] = self.exitcode, other.exitcode
        return {name: (a, b) for name, (a, b) in parts.items() if a != b}


def lasting(text: str | None) -> str | None:
    """The text without what differs between any two runs."""
    if text is not None:
        for pattern, instead in VARYING.items():
            text = re.sub(pattern, instead, text)
    return text


def comparable(value: Any) -> Any:
    """The same with each tensor's bits, and texts without what differs between any two runs."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
        bits = bytes(plain.tolist()).hex(" ", 8)
        return type(value), value.dtype, value.shape, value.requires_grad, bits
    if isinstance(value, Mapping):
        return type(value), {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [comparable(item) for item in value]
    return lasting(value) if isinstance(value, str) else (type(value), value)
