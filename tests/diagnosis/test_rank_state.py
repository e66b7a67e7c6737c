"""Secondary failures, which must not be blamed for a run."""

from __future__ import annotations

import linecache
import os
import sysconfig

import pytest

from ddp_lessons.diagnosis.rank_state import gave_up, handled, lost_partner, own_error
from ddp_lessons.results import RankResult, Status
from ddp_lessons.wire.records import ErrorRecord, Frame

CELL = Frame("/home/learner/train.py", 7, "work", "dist.all_reduce(x)")
LIBRARIES = sysconfig.get_path("purelib")
C10D = os.path.join(LIBRARIES, "torch", "distributed", "distributed_c10d.py")
TORCH = Frame(C10D, 3252, "all_reduce", "work.wait()")
CLOSED = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:25675."
TIMED_OUT = "RuntimeError: [unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation"


def rank(error: ErrorRecord | None, output: str = "", exitcode: int = 1) -> RankResult:
    status: Status = "raised" if error is not None else "died"
    return RankResult(1, status, None, output, error, exitcode, (), 0, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        CLOSED,
        TIMED_OUT,
        "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:81: Connection reset by peer.",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely",
        "torch.distributed.DistStoreError: Timed out after 4 seconds waiting for clients. 1/2",
        "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1000 ms",
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 1 is running ALLREDUCE",
    ],
)
def test_a_call_of_torch_distributed_that_lost_its_partner(text: str) -> None:
    assert lost_partner(rank(ErrorRecord("RuntimeError", text, (CELL, TORCH))))


def test_the_same_words_from_elsewhere_are_the_ranks_own_failure() -> None:
    assert not lost_partner(rank(ErrorRecord("RuntimeError", CLOSED, (CELL,))))
    client = Frame(os.path.join(LIBRARIES, "redis", "client.py"), 9, "send", "raise")
    assert not lost_partner(rank(ErrorRecord("ConnectionError", CLOSED, (CELL, client))))


def test_other_errors_of_torch_distributed_are_the_ranks_own() -> None:
    error = ErrorRecord("ValueError", "ValueError: no group of that name", (CELL, TORCH))
    assert not lost_partner(rank(error))


def test_what_was_raised_because_of_a_loss_is_one() -> None:
    lost = ErrorRecord("RuntimeError", CLOSED, (CELL, TORCH))
    own = ErrorRecord("ValueError", "ValueError: sync failed", (CELL,), lost, "cause")
    assert lost_partner(rank(own))


CHAINS = """\
def work(rank):
    try:
        train()
    except KeyError:
        dist.all_reduce(x)
    except OSError:
        dist.barrier()
        raise
    except EOFError:
        dist.barrier()
        sys.exit(1)
    finally:
        dist.barrier()
"""


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("dist.all_reduce(x)", False),  # dealt with
        ("        raise", True),
        ("        sys.exit(1)", True),
        ("    finally:", True),
    ],
)
def test_a_loss_on_the_way_of_an_exception(line: str, own: bool) -> None:
    """The call lost its partner because the rank left the others by an exception, or not."""
    linecache.cache["chains.py"] = len(CHAINS), None, CHAINS.splitlines(True), "chains.py"
    lines = CHAINS.splitlines()
    number = next(n for n, text in enumerate(lines, 1) if line in text)
    call = number if "dist" in line else number + 1 if "finally" in line else number - 1
    bad = Frame("chains.py", 3, "work", "train()")
    first = ErrorRecord("ValueError", "ValueError: bad sample", (bad,))
    lost = ErrorRecord(
        "RuntimeError",
        TIMED_OUT,
        (Frame("chains.py", call, "work", lines[call - 1].strip()), TORCH),
        first,
        "context",
    )
    assert lost_partner(rank(lost)) == (not own)
    assert (handled(rank(lost)) is first) == (not own)
    assert own_error(lost) is (first if own else lost)
    late = ErrorRecord("OSError", "OSError: disk full", (bad,), lost, "context")
    assert lost_partner(rank(late)) == (not own)
    assert own_error(late) is (first if own else late)


def test_what_torch_itself_handled_is_no_failure() -> None:
    inside = ErrorRecord("KeyError", "KeyError: 'store'", (TORCH,))
    lost = ErrorRecord("RuntimeError", CLOSED, (CELL, TORCH), inside, "context")
    assert lost_partner(rank(lost))


def test_an_abort_that_says_so_is_a_loss() -> None:
    assert lost_partner(rank(None, f"terminate called\nwhat(): {CLOSED}\n", -6))
    assert not lost_partner(rank(None, "what(): std::bad_alloc\n", -6))
    assert not lost_partner(rank(None, CLOSED, -9))


def test_giving_up_is_told_from_losing() -> None:
    assert gave_up(rank(ErrorRecord("RuntimeError", TIMED_OUT, (CELL, TORCH))))
    assert not gave_up(rank(ErrorRecord("RuntimeError", CLOSED, (CELL, TORCH))))
    assert not gave_up(rank(None))


@pytest.mark.parametrize("how", ["context", "cause"])
def test_giving_up_counts_where_a_chain_of_exceptions_began(how: str) -> None:
    """What fails after the call that timed out makes no difference."""
    timed_out = ErrorRecord("RuntimeError", TIMED_OUT, (CELL, TORCH))
    assert gave_up(rank(ErrorRecord("RuntimeError", CLOSED, (CELL, TORCH), timed_out, how)))
    assert gave_up(rank(ErrorRecord("ValueError", "ValueError: no sum", (CELL,), timed_out, how)))
    own = ErrorRecord("ValueError", "ValueError: bad sample", (CELL,))
    assert not gave_up(rank(ErrorRecord("RuntimeError", TIMED_OUT, (CELL, TORCH), own, how)))
