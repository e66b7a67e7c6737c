"""Overlap, totals and bandwidth: exact numbers from made-up runs, and a real run."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from itertools import pairwise

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, launch, steps
from ddp_lessons import span as marked
from ddp_lessons.analysis.intervals import length
from ddp_lessons.analysis.metrics import after_warm_up, segments
from ddp_lessons.wire.records import Span
from tests.analysis.test_wait_states import END, call, run_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def span(rank: int, lane: str, kind: str, t0: int, t1: int, **more: object) -> Span:
    return Span(rank, lane, kind, kind, t0, t1, **more)  # type: ignore[arg-type]


def step(rank: int, number: int, t0: int, t1: int) -> Span:
    return Span(rank, "steps", "mark", f"step {number}", t0, t1, number)


# One rank alone: backward from 100 to 400, a bucket from 200 to 350, blocked for it from 300.
BACKWARD = [
    span(0, "main", "compute", 100, 400, step=0),
    call(0, 200, 350, lane="buckets", step=0, bucket=0),
    span(0, "main", "wait", 300, 350, step=0),
    step(0, 0, 50, 450),
]


def test_overlap_of_a_bucket_with_backward() -> None:
    (overlap,) = run_of(*BACKWARD, ranks=1).overlap()
    assert overlap == (0, 0, 150, 50, 100)


def test_buckets_in_flight_together_count_once() -> None:
    second = call(0, 250, 360, seq=1, lane="buckets", step=0, bucket=1)
    (overlap,) = run_of(*BACKWARD, second, ranks=1).overlap()
    assert (overlap.comm_ns, overlap.exposed_ns) == (160, 50)


def test_a_blocking_call_is_exposed_as_a_whole_and_joining_is_none() -> None:
    joining = call(0, 10, 90, "init_process_group", group=None, seq=None)
    (overlap,) = run_of(joining, call(0, 100, 300), ranks=1).overlap()
    assert overlap == (0, None, 200, 200, 0)


def test_an_asynchronous_call_that_is_waited_for() -> None:
    spans = [
        call(0, 100, 500, lane="comm"),
        call(0, 100, 120, kind="issue"),
        call(0, 400, 500, kind="wait"),
    ]
    (overlap,) = run_of(*spans, ranks=1).overlap()
    assert (overlap.comm_ns, overlap.exposed_ns) == (400, 100)


def test_blocked_for_buckets_is_waiting_until_the_last_rank_came_and_then_transfer() -> None:
    late = [call(1, 330, 350, lane="buckets", step=0, bucket=0)]
    run = run_of(*BACKWARD, *late, ranks=2)
    mine = [(s.kind, s.t0_ns, s.t1_ns) for s in segments(run) if s.rank == 0]
    assert mine == [("wait", 300, 330), ("transfer", 330, 350)]


def test_totals_add_up_to_the_function() -> None:
    spans = [
        *BACKWARD,
        span(0, "main", "data", 500, 520, step=1),
        call(0, 600, 700, seq=5),
        span(0, "main", "compute", 150, 250),  # within backward: counts once
    ]
    (total,) = run_of(*spans, ranks=1).totals()
    assert total.compute_ns == 300 - 50
    assert (total.data_ns, total.wait_ns, total.transfer_ns) == (20, 0, 50 + 100)
    parts = total.compute_ns + total.data_ns + total.wait_ns + total.transfer_ns + total.other_ns
    assert parts == pytest.approx(total.seconds * 1e9)


def test_of_many_steps_the_first_two_are_warm_up() -> None:
    assert after_warm_up([3, None, 1, 3, 0]) == [0, 1, 3]
    assert after_warm_up(range(4)) == [0, 1, 2, 3]
    assert after_warm_up([4, 3, 2, 1, 0]) == [2, 3, 4]


@pytest.mark.parametrize("kind", ["comm", "wait"])
def test_recvs_from_two_ranks_have_waits_of_their_own(kind: str) -> None:
    """Both have sequence number 0, each between its own pair of ranks."""
    spans = [
        call(1, 150, 160, "send", peer=0),
        call(2, 350, 360, "send", peer=0),
        call(0, 100, 170, "recv", peer=1, lane="main" if kind == "comm" else "comm"),
        call(0, 200, 370, "recv", peer=2, lane="main" if kind == "comm" else "comm"),
    ]
    spans += [s._replace(lane="main", kind="wait") for s in spans[2:] if kind == "wait"]
    run = run_of(*spans)
    mine = [(s.kind, s.t0_ns, s.t1_ns) for s in segments(run) if s.rank == 0]
    assert mine == [
        ("wait", 100, 150),
        ("transfer", 150, 170),
        ("wait", 200, 350),
        ("transfer", 350, 370),
    ]
    assert run.totals()[0].wait_ns == 50 + 150


def test_a_call_without_a_number_is_no_part_of_another() -> None:
    spans = [call(r, 100 + 50 * r, 200, "recv", None, group=None) for r in range(2)]
    spans += [call(r, 120 + 50 * r, 180, "recv", 0, group="", peer=1 - r) for r in range(1)]
    run = run_of(*spans, ranks=2)
    assert run.totals()[1].wait_ns == 0


def test_other_threads_take_none_of_the_main_thread_s_time() -> None:
    other = [call(0, 100, 900, lane="thread 1"), span(0, "thread 1", "compute", 100, 900)]
    (total,) = run_of(*other, ranks=1).totals()
    assert (total.compute_ns, total.wait_ns, total.transfer_ns) == (0, 0, 0)


def test_a_rank_that_never_came_into_the_function_did_nothing() -> None:
    run = run_of(ranks=1)
    run.ranks[0] = replace(run.ranks[0], started_ns=None)
    assert run.totals() == [(0, 0.0, 0, 0, 0, 0, 0)]


@pytest.mark.parametrize("kind", ["comm", "wait"])
def test_recvs_with_different_tags_have_waits_of_their_own(kind: str) -> None:
    """As in a pipeline that tags its micro-batches: the calls of each tag are counted apart."""
    spans = []
    for tag, sent in enumerate((150, 350, 550)):
        spans.append(call(1, sent, sent + 10, "send", peer=0, tag=tag))
        lane = "main" if kind == "comm" else "comm"
        spans.append(call(0, sent - 50, sent + 20, "recv", peer=1, lane=lane, tag=tag))
        if kind == "wait":
            spans.append(call(0, sent - 50, sent + 20, "recv", kind="wait", peer=1))
    total = run_of(*spans, ranks=2).totals()[0]
    assert (total.wait_ns, total.transfer_ns) == (150, 60)


def test_a_message_in_flight_takes_nothing_of_another_tag_s_wait() -> None:
    spans = [
        call(0, 10, 900, "irecv", peer=1, lane="comm", tag=0),
        call(1, 120, 130, "send", peer=0, tag=0),
        call(0, 20, 200, "irecv", peer=1, lane="comm", tag=1),
        call(1, 150, 160, "send", peer=0, tag=1),
        call(0, 100, 200, "irecv", kind="wait", peer=1, tag=1),
    ]
    mine = [(s.kind, s.t0_ns, s.t1_ns) for s in segments(run_of(*spans)) if s.rank == 0]
    assert mine == [("wait", 100, 150), ("transfer", 150, 200)]


@pytest.mark.parametrize("kind", ["buckets", "recvs with tags"])
def test_thousands_of_waits_take_no_time(kind: str) -> None:
    """Outside steps, as where a learner updates the weights by hand."""
    spans = []
    for n in range(10_000):
        if kind == "buckets":
            begun = [call(r, 100 * n + r, 100 * n + 50, seq=n, lane="buckets") for r in range(2)]
            spans += [*begun, span(0, "main", "wait", 100 * n + 30, 100 * n + 50)]
        else:
            spans.append(call(0, 100 * n, 100 * n + 50, "recv", peer=1, tag=n))
            spans.append(call(1, 100 * n + 20, 100 * n + 30, "send", peer=0, tag=n))
    begun_s = time.process_time()
    found = [s for s in segments(run_of(*spans, ranks=2)) if s.rank == 0]
    assert time.process_time() - begun_s < 3  # seconds; it takes less than one
    assert sum(s.t1_ns - s.t0_ns for s in found) == 10_000 * (20 if kind == "buckets" else 50)


def train(rank: int, late: dict[int, int]) -> None:
    """One step for each late rank, with an asynchronous all_reduce during some work."""
    dist.init_process_group("gloo")
    for number in steps(range(len(late))):
        with marked("forward"):
            time.sleep(0.03 if rank == late[number] else 0.001)
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        with marked("backward"):
            time.sleep(0.005)
        work.wait()
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rotating() -> Run:
    return launch(train, args=({n: n % 4 for n in range(14)},), nprocs=4)


@pytest.mark.ranks
@pytest.mark.alone
def test_of_a_real_run_everything_adds_up(rotating: Run) -> None:
    for total, rank in zip(rotating.totals(), rotating.ranks, strict=True):
        parts = total.compute_ns, total.data_ns, total.wait_ns, total.transfer_ns, total.other_ns
        assert sum(parts) == pytest.approx(rank.seconds * 1e9, abs=2)
        assert min(parts) >= 0
        assert total.compute_ns > 14 * 6_000_000
    for overlap in rotating.overlap():
        assert overlap.comm_ns == overlap.exposed_ns + overlap.overlapped_ns
        if overlap.step is not None:
            assert overlap.overlapped_ns > 0  # it was in flight during backward


@pytest.mark.ranks
@pytest.mark.alone
def test_a_real_straggler_that_changes(rotating: Run) -> None:
    verdict = rotating.straggler()
    assert (verdict.kind, verdict.rank) == ("rotating", None)
    named = [verdict.late_by_step[number] == number % 4 for number in range(2, 14)]
    assert len(verdict.late_by_step) == 12
    assert sum(named) >= 11


def transfers(times: dict[int, int]) -> list[Span]:
    """All_reduces of two ranks of so many bytes that take so many ns after the last arrival."""
    return [
        call(rank, 10 * seq + 5 * rank, 10 * seq + 5 + time_ns, seq=seq, nbytes=nbytes)
        for seq, (nbytes, time_ns) in enumerate(times.items())
        for rank in range(2)
    ]


def test_the_fit_finds_latency_and_bandwidth() -> None:
    times = {n: 100 + 2 * n for n in (1, 10, 100, 300)}
    (link,) = run_of(*transfers(times), ranks=2).bandwidth()
    assert (link.op, link.group) == ("all_reduce", "world")
    assert link.latency_ns == pytest.approx(100)
    assert link.bytes_per_second == pytest.approx(5e8)
    assert link.points == [(n, float(t)) for n, t in times.items()]


def test_times_that_do_not_grow_have_no_bandwidth() -> None:
    (link,) = run_of(*transfers({1: 100, 100: 100, 300: 90}), ranks=2).bandwidth()
    assert link.bytes_per_second == float("inf")
    assert 90 <= link.latency_ns <= 100


def test_no_latency_is_negative() -> None:
    (link,) = run_of(*transfers({10: 5, 100: 200, 300: 700}), ranks=2).bandwidth()
    assert link.latency_ns == 0
    assert link.bytes_per_second > 0


def test_one_size_is_no_fit_and_open_calls_are_no_measurement() -> None:
    assert run_of(*transfers({1: 100}), ranks=2).bandwidth() == []
    broken = [s._replace(t1_ns=None) for s in transfers({1: 100, 10: 200})]
    assert run_of(*broken, ranks=2).bandwidth() == []


@pytest.mark.parametrize(("send", "recv"), [("send", "irecv"), ("isend", "recv")])
def test_of_a_pair_the_recv_is_measured(send: str, recv: str) -> None:
    spans = []
    for seq, nbytes in enumerate((10, 20)):
        t0 = 1 + 200 * seq
        spans.append(call(0, t0, t0 + 150, send, seq, peer=1, nbytes=nbytes))
        spans.append(call(1, t0 + 50, t0 + 50 + 2 * nbytes, recv, seq, peer=0, nbytes=nbytes))
    (link,) = run_of(*spans, ranks=2).bandwidth()
    assert link.op == recv


@pytest.mark.parametrize("seed", range(20))
def test_overlap_of_several_steps_agrees_with_counting(seed: int) -> None:
    numbers = random.Random(seed)
    flights = [(n % 3, t0, t0 + numbers.randrange(99)) for n, t0 in enumerate(range(1, 900, 60))]
    blocked = [(t0, t0 + numbers.randrange(50)) for t0 in numbers.sample(range(1, 900), 9)]
    spans = [call(0, t0, t1, seq=t0, lane="comm", step=n) for n, t0, t1 in flights]
    spans += [span(0, "main", "wait", t0, t1) for t0, t1 in blocked]
    stuck = {t for t0, t1 in blocked for t in range(t0, t1)}
    for overlap in run_of(*spans, ranks=1).overlap():
        covered = {t for n, t0, t1 in flights if n == overlap.step for t in range(t0, t1)}
        assert overlap.comm_ns == len(covered)
        assert overlap.exposed_ns == len(covered & stuck)


@pytest.mark.parametrize("seed", range(20))
def test_length_and_overlap_agree_with_counting_every_nanosecond(seed: int) -> None:
    numbers = random.Random(seed)
    flights, blocked = (
        [(t0, t0 + numbers.randrange(60)) for t0 in numbers.sample(range(1, 900), 8)]
        for _ in range(2)
    )
    covered = {t for t0, t1 in flights for t in range(t0, t1)}
    stuck = {t for t0, t1 in blocked for t in range(t0, t1)}
    assert length(flights) == len(covered)
    spans = [call(0, t0, t1, seq=n, lane="comm") for n, (t0, t1) in enumerate(flights)]
    spans += [span(0, "main", "wait", t0, t1) for t0, t1 in blocked]
    (overlap,) = run_of(*spans, ranks=1).overlap()
    assert overlap.comm_ns == len(covered)
    assert overlap.exposed_ns == len(covered & stuck)


def test_segments_never_overlap() -> None:
    run = run_of(*BACKWARD, call(0, 600, None, seq=9), ranks=2)
    found = [s for s in segments(run) if s.rank == 0]
    assert all(a.t1_ns <= b.t0_ns for a, b in pairwise(found))
    assert found[-1].t1_ns == END
