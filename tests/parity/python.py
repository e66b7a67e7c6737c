"""Python in a rank: output, logs, warnings, random numbers, and what a function can return."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import random
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.parity.features import attempt, feature

LIBC = ctypes.CDLL(None)


@feature(sample=True)
def prints(rank: int) -> Any:
    print("to stdout", rank)
    print("to stderr", file=sys.stderr)
    print("two", "words", sep="-", end="|\n")
    print("ünïcode ☃ 漢字 \U0001f600")
    print()
    print("half a line", end="")
    print(", the other half")
    sys.stdout.write("written\n")
    sys.stdout.writelines(["a\n", "b\n"])
    print("\ttab and \x1b[31mcolour\x1b[0m")
    return sys.stdout.write("x\n")


@feature()
def bytes_and_descriptors(rank: int) -> Any:
    print("printed")
    os.write(1, b"to descriptor 1\n")
    os.write(2, b"to descriptor 2\n")
    sys.stdout.buffer.write(b"to the buffer\n")
    sys.stdout.flush()
    sys.stderr.buffer.write(b"\xff\xfe no text\n")
    sys.stderr.flush()
    with os.fdopen(os.dup(1), "w") as copy:
        copy.write("to a copy\n")
    print("half", end="")
    os.write(1, b"between\n")
    print(" whole")


@feature(ranks=1, alone=True, sample=True)
def written_by_c(rank: int) -> Any:
    """What C has kept when the rank ends is written then."""
    LIBC.puts(b"a line of C's")
    LIBC.printf(b"half a line of C's")
    print("a line of Python's")


@feature(ranks=1, alone=True)
def written_by_c_on_exit(rank: int) -> Any:
    LIBC.puts(b"a line of C's")
    sys.exit(3)


@feature(ranks=1, alone=True)
def no_line_at_the_end(rank: int) -> Any:
    print("no line at the end", end="")
    sys.stderr.write("nor here")


@feature()
def progress_bars(rank: int) -> Any:
    for step in range(3):
        print(f"\rstep {step}", end="")
    print()


@feature()
def streams_redirected(rank: int) -> Any:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        print("into a text")
        sys.stderr.write("and this")
    before, sys.stdout = sys.stdout, text
    print("by hand")
    sys.stdout = before
    return text.getvalue()


@feature(sample=True)
def streams_put_back(rank: int) -> Any:
    """What is written to the streams that Python started with comes, too, and in order."""
    print("first")
    sys.stdout, before = sys.__stdout__, sys.stdout
    print("second")
    print("third", file=sys.__stderr__)
    sys.stdout = before
    print("last")


@feature(ranks=1, alone=True)
def a_closed_stdout(rank: int) -> Any:
    sys.stdout.close()
    return attempt(print, "nobody")


@feature()
def logs(rank: int) -> Any:
    logging.warning("by default %d", rank)
    root = logging.getLogger()
    facts = [len(root.handlers), root.level]
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("train").info("configured")
    logging.getLogger("train").debug("below")
    try:
        os.environ["NO_SUCH_KEY"]
    except KeyError as error:
        logging.getLogger("train").error("failed: %r", error)
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    return facts


@feature(ranks=1, alone=True)
def warnings_shown(rank: int) -> Any:
    for _ in range(2):
        warnings.warn("once a place", UserWarning, stacklevel=1)
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    warnings.warn("future", FutureWarning, stacklevel=1)
    torch.ones(2).div(0).requires_grad_().grad  # noqa: B018
    torch.tensor(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = attempt(warnings.warn, "an error now")
    return refused, sys.warnoptions


@feature(alone=True)
def warnings_of_torch(rank: int) -> Any:
    """Those of the functions that say that they are old, at the lines that call them."""
    dist.init_process_group("gloo")
    gathered = torch.zeros(2)
    dist.all_gather_into_tensor(gathered, torch.ones(1))
    dist._all_gather_base(gathered, torch.ones(1))
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), 1)
    scheduler.step()
    dist.barrier()
    dist.destroy_process_group()
    return gathered


@feature(ranks=1, env={"MY_SETTING": "7", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "job 7"})
def variables_given(rank: int) -> Any:
    return (
        os.environ["MY_SETTING"],
        os.environ["OMP_NUM_THREADS"],
        torch.get_num_threads(),
        dist.is_torchelastic_launched(),
    )


@feature()
def seeded(rank: int) -> Any:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return torch.randn(3), random.random(), np.random.rand(3).tolist(), torch.randperm(9)


@feature()
def a_fault_traced(rank: int) -> Any:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=False)
        faulthandler.dump_traceback_later(60, file=file)
        faulthandler.cancel_dump_traceback_later()
        file.seek(0)
        return file.readlines()[:2]  # the rest shows who called the function


@feature()
def too_deep(rank: int) -> Any:
    def deeper(n: int) -> int:
        return deeper(n + 1)

    return attempt(deeper, 0)


@feature()
def odd_values(rank: int) -> Any:
    """What a function can return."""
    import collections
    import datetime
    import decimal
    import pathlib

    point = collections.namedtuple("point", "x y")
    return [
        None,
        float("inf"),
        1j,
        b"bytes",
        {1, 2},
        frozenset("a"),
        range(3),
        slice(1, 2),
        ...,
        decimal.Decimal("1.5"),
        datetime.date(2020, 1, 2),
        pathlib.PurePosixPath("/a"),
        collections.OrderedDict(a=1),
        torch.float16,
        torch.Size([1, 2]),
        torch.device("cpu"),
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(1)),
        torch.float64.itemsize,
        np.arange(3).tolist(),
        str(point(1, rank)),
        2**80,
    ]


@feature()
def chained_exceptions(rank: int) -> Any:
    try:
        try:
            int("x")
        except ValueError as error:
            raise LookupError("no number") from error
    except LookupError as error:
        return repr(error), repr(error.__cause__), error.__suppress_context__


@feature()
def a_group_of_exceptions(rank: int) -> Any:
    raise ExceptionGroup("several", [ValueError("a"), LookupError("b")])


@feature(ranks=1, alone=True)
def garbage_at_the_end(rank: int) -> Any:
    """Finalizers of what the function leaves run when it returns, or as Python ends."""
    import weakref

    class Kept:
        pass

    kept = Kept()
    weakref.finalize(kept, print, "finalized")
    sys.modules["kept"] = kept  # type: ignore[assignment]
    print("returns")
