"""Secondary failures, which must not be blamed for a run."""

from __future__ import annotations

import os
import sysconfig

import pytest

from ddp_lessons.diagnosis.rank_state import gave_up, lost_partner
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


def test_an_abort_that_says_so_is_a_loss() -> None:
    assert lost_partner(rank(None, f"terminate called\nwhat(): {CLOSED}\n", -6))
    assert not lost_partner(rank(None, "what(): std::bad_alloc\n", -6))
    assert not lost_partner(rank(None, CLOSED, -9))


def test_giving_up_is_told_from_losing() -> None:
    assert gave_up(rank(ErrorRecord("RuntimeError", TIMED_OUT, (CELL, TORCH))))
    assert not gave_up(rank(ErrorRecord("RuntimeError", CLOSED, (CELL, TORCH))))
    assert not gave_up(rank(None))
