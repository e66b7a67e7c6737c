"""Refuses more ranks than fit in the memory of this machine.

Runs in the parent: `launch` checks before it starts ranks, `ddp-lessons doctor` reports it. Within
a container, as on Binder, its limits count, not the machine's memory.
"""

from __future__ import annotations

from typing import NamedTuple

from ddp_lessons.errors import BadLaunch
from ddp_lessons.system.memory import available_memory
from ddp_lessons.text import count, size_text


class Needs(NamedTuple):
    """Bytes of memory of its own that a rank takes. Measured with torch 2.13 on Linux."""

    least: int  # to join a group and leave it: 14 MB forked, 145 MB as a new interpreter
    usual: int  # to train a small model with DDP


NEEDS = {"forkserver": Needs(14 << 20, 60 << 20), "spawn": Needs(145 << 20, 220 << 20)}


def check(ranks: int, start_method: str) -> str:
    """A notice if memory may run out with so many ranks, else "".

    Raises
    ------
    BadLaunch
        The ranks need more memory than is left, whatever they do.
    """
    available, needs = available_memory(), NEEDS[start_method]
    if ranks * needs.usual <= available:
        return ""
    least, free = size_text(ranks * needs.least), size_text(available)
    fit = available // needs.usual
    few = f"{count(fit, 'rank')} that {'trains' if fit == 1 else 'train'}"
    if ranks * needs.least > available:
        raise BadLaunch(
            f"{count(ranks, 'rank')} would take at least {least} of memory, and {free} are left. "
            + (f"Launch fewer: there is room for about {few} a small model. " if fit else "")
            + "Other notebooks hold memory, too: shut down the kernels that you no longer need."
        )
    return (
        f"Notice: {count(ranks, 'rank')} will take {least} of memory, more in training, and "
        f"{free} are left. Should it run out, launch {f'about {fit}' if fit else 'one'}."
    )
