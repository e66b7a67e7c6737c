"""`Verdict`: why a run failed or hung. `Finding`: what is wrong though nothing failed.

They live in the parent. failures.py and hangs.py make verdicts, which diagnose.py turns into the
error that `launch` raises; diagnose.py and mistakes.py make findings.
"""

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
    "tensor mismatch",
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
    "no route",
]


@dataclass(frozen=True)
class Verdict:
    """Why a run failed or hung.

    Attributes
    ----------
    kind : str
        One of these. One rank failed: "raised", "unsendable" (its return value cannot be pickled),
        "killed" (by a signal), "exited" (os._exit), "forkserver ended", "engine lost" (of a
        cluster). Calls do not match: "skipped collective" (some ranks called a line that others
        skipped), "different collectives" (at one place in the order), "tensor mismatch",
        "unmatched send", "unmatched recv", "groups in different order", "waiting for each other".
        A rank never comes: "returned early", "left the group", "never joined", "computing",
        "blocked in Python", "suspended" (SIGSTOP), "no answer". "not ended": the function returned,
        but a thread or an atexit handler runs on. "gave up waiting": a timeout, because ranks came
        too late or for no visible cause. "no route": all ranks came, on several machines, but
        the call never ended.
    ranks : tuple of int
        The ranks at fault; where two sides disagree, the smaller side, or both.
    title : str
        What happened, in one line.
    evidence : tuple of str
        Lines: tracebacks, and what every rank was doing.
    advice : str
        What to try; "" if the evidence is enough.
    frame : Frame or None
        The line of the learner's code to look at first.
    """

    kind: Kind
    ranks: tuple[int, ...]
    title: str
    evidence: tuple[str, ...] = ()
    advice: str = ""
    frame: Frame | None = None

    def text(self) -> str:
        """Title, evidence and advice as one message."""
        parts = [self.title, "\n".join(self.evidence), self.advice]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Finding:
    """A mistake that raised nothing: the numbers of the run are wrong, or may be.

    Attributes
    ----------
    kind : str
        "skipped collective", "different collectives" and "tensor mismatch" as in `Verdict`: the
        ranks' calls do not match. "left the group": only some ranks called destroy_process_group.
        "thread died": an exception ended a thread. "overlapping outputs": one tensor was to hold
        the results of several ranks. "never waited for": asynchronous work whose handle was never
        used. "changed too early": the tensor of an isend, before it was waited for. "partly
        filled": a recv into a tensor that is larger than what was sent. In notes: "weights differ",
        "learning rates differ", "same samples", "same random numbers", "order of a set", and
        "compared", which says what was compared.
    ranks : tuple of int
        The ranks at fault; all that took part if that is unknown.
    text : str
        What happened and what to do, in one line.
    frame : Frame or None
        The line of the learner's code to look at first.
    is_note : bool
        It may be meant: see ``launch(..., notes=True)``.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str
    frame: Frame | None = None
    is_note: bool = False

    def __str__(self) -> str:
        return f"{'Note' if self.is_note else 'Warning'}: {self.text}"
