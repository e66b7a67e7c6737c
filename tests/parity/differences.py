"""Where `launch` differs from plain torch: in which part of the outcome, and why.

test_parity.py fails if a feature that is listed here does not differ in just these parts.
"""

from __future__ import annotations

DIFFERENCES: dict[str, tuple[set[str], str]] = {
    "fresh.warnings_filters": (
        {"value"},
        "torch._dynamo has been imported for all ranks, and with it SymPy, which adds a filter",
    ),
    "fresh.this_process": (
        {"value"},
        "multiprocessing has no start method yet, as in a script; a spawned child has spawn",
    ),
    "fresh.start_methods": ({"value"}, "as above: a start method can still be set"),
    "fresh.groups_of_processes": (
        {"value"},
        "a rank leads a session of its own, so that the interrupt of a notebook does not reach it",
    ),
    "processes.keyboard_interrupt": (
        {"raised", "exitcode"},
        "torch's spawn takes it for its own stop, and the rank ends with 0; a script fails",
    ),
    "processes.exit_with_a_text": (
        {"output"},
        "the text of sys.exit is part of the explanation, not of the output",
    ),
    "python.no_line_at_the_end": (
        {"output"},
        "as in a script, logging's exit handler flushes stderr before Python flushes stdout",
    ),
    "python.progress_bars": (
        {"output"},
        "of a line that is drawn again after carriage returns its last state is kept",
    ),
}
