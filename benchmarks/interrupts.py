"""Presses Stop at random moments, one to four times: is anything left, does the next launch work?

    python -m benchmarks.interrupts --runs 1000 --seed 0

After each launch there must be no rank, no new descriptor, temporary file or shared memory. A
stopped launch says so once, with the ranks' output. Prints errors and figures; the exit code is 1
if there were errors.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.leftovers import left
from ddp_lessons import launch

MOST_PRESSES = 4
SOON = 0.8  # seconds until the first press; a launch takes about half of it


class Moment(NamedTuple):
    """The times of the presses, in seconds since the launch, and the ranks' work then."""

    presses: tuple[float, ...]
    stubborn: bool


def plan(draw: random.Random) -> Moment:
    """A random moment."""
    first = draw.uniform(0.0, SOON)
    gaps = [draw.choice((0.0, 0.01, 0.1, 0.4)) for _ in range(draw.randrange(MOST_PRESSES))]
    presses = [first]
    for gap in gaps:
        presses.append(presses[-1] + gap)
    return Moment(tuple(presses), draw.random() < 0.2)


def work(rank: int, stubborn: bool) -> int:
    import torch.distributed as dist

    print("begun", flush=True)
    while True:
        try:
            dist.init_process_group("gloo")
            time.sleep(0.1)
            dist.barrier()
            dist.destroy_process_group()
            time.sleep(0.2)
            return rank
        except KeyboardInterrupt:
            if not stubborn:
                raise


def wrongs(moment: Moment, before: set[str]) -> Iterator[str]:
    """The errors after a launch that is interrupted at a moment."""
    began = time.monotonic()
    over = threading.Event()

    def press() -> None:
        for when in moment.presses:
            over.wait(max(0.0, began + when - time.monotonic()))
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    told = io.StringIO()
    stopped = False
    try:
        try:
            with contextlib.redirect_stdout(told):
                thread.start()
                launch(work, (moment.stubborn,), timeout=30)
        except KeyboardInterrupt:
            stopped = True
        over.set()
        thread.join()
        time.sleep(0.01)
    except KeyboardInterrupt:  # a press after the launch was over
        over.set()
        thread.join()
    text = told.getvalue()
    if text.count("Stopped.") > 1 or (text.count("Stopped.") and not stopped):
        yield f"said {text!r}"
    if "stopped at" in text and "begun" not in text:
        yield f"output was lost: {text!r}"
    deadline = time.monotonic() + 5
    while (more := left() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    if more:
        yield f"left {sorted(more)}"


def campaign(runs: int, seed: int) -> tuple[int, collections.Counter[str]]:
    """The number of presses, and the errors with their seeds."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    launch(lambda rank: rank)
    before = left()
    presses = 0
    wrong: collections.Counter[str] = collections.Counter()
    for number in range(seed, seed + runs):
        moment = plan(random.Random(number))
        presses += len(moment.presses)
        wrong.update(f"seed {number}: {what}" for what in wrongs(moment, before))
        if launch(lambda rank: rank).values != [0, 1]:
            wrong[f"seed {number}: the next launch"] += 1
    return presses, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()
    presses, wrong = campaign(chosen.runs, chosen.seed)
    for what in wrong:
        print(what)
    took = time.monotonic() - began
    print(f"{chosen.runs} launches, {presses} interrupts, {len(wrong)} wrong, {took:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
