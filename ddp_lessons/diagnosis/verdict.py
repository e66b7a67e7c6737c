"""What a diagnosis says: `Verdict`. Made by failures.py and hangs.py, shown by diagnose.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddp_lessons.wire.records import Frame

Kind = Literal[
    "raised",
    "unsendable",
    "killed",
    "exited",
    "forkserver ended",
    "engine lost",
    "skipped collective",
    "different collectives",
    "unlike tensors",
    "returned early",
    "left the group",
    "never joined",
    "unmatched send",
    "unmatched recv",
    "groups in different order",
    "waiting for each other",
    "computing",
    "blocked in Python",
    "suspended",
    "no answer",
    "not ended",
    "gave up waiting",
    "cut off",
]


@dataclass(frozen=True)
class Verdict:
    """Why a run failed or hung.

    Attributes
    ----------
    kind : str
        What happened, one of these. A rank alone: "raised", "unsendable" (its return value),
        "killed" (by a signal), "exited" (os._exit), "forkserver ended", "engine lost" (of a
        cluster). Calls that do not fit:
        "skipped collective" (a line that some ranks called and others passed by), "different
        collectives" (at one place in the order), "unlike tensors", "unmatched send", "unmatched
        recv", "groups in different order", "waiting for each other". Ranks that others wait for in
        vain: "returned early", "left the group", "never joined", "computing", "blocked in Python",
        "suspended" (SIGSTOP), "no answer". "not ended": the function returned, and a thread or an
        atexit handler goes on. "gave up waiting": a timeout, because of ranks that came
        too late, or with no cause in sight. "cut off": all have come, but not their data from one
        machine to another.
    ranks : tuple of int
        The ranks that caused it; where two sides disagree, the smaller one, or both.
    title : str
        One line.
    evidence : tuple of str
        Lines: tracebacks, and what every rank was doing.
    advice : str
        What to try; "" if the evidence says it.
    frame : Frame or None
        The learner's line that matters most.
    """

    kind: Kind
    ranks: tuple[int, ...]
    title: str
    evidence: tuple[str, ...] = ()
    advice: str = ""
    frame: Frame | None = None

    def text(self) -> str:
        """All of it, as a message."""
        parts = [self.title, "\n".join(self.evidence), self.advice]
        return "\n\n".join(part for part in parts if part)
