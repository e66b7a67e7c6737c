"""Verdicts on situations that are hard to bring about with real ranks: runs made by hand."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons import LaunchError, Run, WorkersHung
from ddp_lessons.results import RankResult, Status
from ddp_lessons.wire.records import Frame, Span
from tests.support.by_hand import SECOND, made, record, run_of

TRAIN = "/home/learner/train.py"
C10D = "/site-packages/torch/distributed/distributed_c10d.py"
ENFORCED = (
    "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  "
    "[enforce fail at pair.cc:456] op.preamble.length <= op.nbytes. 16 vs 8. Received data size "
    "doesn't match expected size. Is there a distributed collective mismatch in your code?\n"
)
ABORTED = "[rank0]:[E ProcessGroupNCCL.cpp:1] Watchdog caught collective operation timeout\n"


def call(
    rank: int, op: str, seq: int | None, line: int, *, open: bool = True, **facts: Any
) -> Span:
    """A call that began `line` seconds after the run did."""
    t0_ns = line * SECOND
    t1_ns = None if open else t0_ns + 1
    lane, group = facts.pop("lane", "main"), facts.pop("group", "world")
    site = f"{facts.pop('file', TRAIN)}:{line}"
    return Span(rank, lane, "comm", op, t0_ns, t1_ns, None, op, group, seq, site=site, **facts)


def ended(
    rank: int, status: Status, *spans: Span, at: int = 0, op: str | None = None, **facts: Any
) -> RankResult:
    """How a rank ended that had joined; it stood at line `at`, in a call or not."""
    there = [Frame(facts.pop("file", TRAIN), at, "work")] if at else []
    stack = (*there, *([Frame(C10D, 1, op)] if op else []))
    known = {"exitcode": {"returned": 0, "stopped": -15, "died": -6}[status], "stack": stack}
    join = call(rank, "init_process_group", None, 2, open=False, group=None)
    facts = {**known, "activity": "idle", **facts}
    return RankResult(
        rank, status, None, facts.pop("output", ""), None, facts.pop("exitcode"), (join, *spans),
        0, 1, 30 * SECOND, **facts,
    )  # fmt: skip


def waits(
    rank: int, op: str, seq: int | None, line: int, *before: Span, file: str = TRAIN, **facts: Any
) -> RankResult:
    threads = facts.pop("threads", {})
    here = call(rank, op, seq, line, file=file, **facts)
    return ended(rank, "stopped", *before, here, at=line, op=op, file=file, threads=threads)


def hung(*ranks: RankResult, after: float | None = 10.0) -> Run:
    return Run("work", ranks, begin_ns=0, hung_after=after)


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def control(rank: int) -> Span:
    """A thread of the learner's that waits for orders in a group of its own."""
    return call(rank, "recv", 0, 3, lane="thread 1", peer=1 - rank, tag=9, group="ranks 0 1 #2")


CONTROL: dict[str, Any] = {"threads": {"thread 1": "control"}}


def test_a_thread_that_waits_for_orders_hides_no_rank_that_is_missing() -> None:
    both = [waits(rank, "all_reduce", 0, 5, control(rank), **CONTROL) for rank in (0, 1)]
    assert kind(hung(*both, ended(2, "returned"))) == ("returned early", (2,))


def test_nor_that_the_calls_differ() -> None:
    here = waits(0, "all_reduce", 0, 5, control(0), **CONTROL)
    run = hung(here, waits(1, "barrier", 0, 6, control(1), **CONTROL))
    assert kind(run) == kind(hung(waits(0, "all_reduce", 0, 5), waits(1, "barrier", 0, 6)))


@pytest.mark.parametrize("group", ["world", "ranks 0 1"])
def test_a_recv_from_any_rank_accuses_none_that_has_done_its_part(group: str) -> None:
    server = waits(0, "recv", None, 5, tag=0, group=group)
    worker = waits(1, "recv", 0, 9, peer=0, tag=0, group=group)
    run = hung(server, worker, ended(2, "returned"), ended(3, "returned"))
    assert not {2, 3} & set(kind(run)[1])
    assert "rank 0 waits in recv from any rank, but no rank sends to it" in run.explain()


def test_a_recv_from_any_rank_lacks_one_that_could_still_send() -> None:
    server = waits(0, "recv", None, 5, tag=0)
    worker = ended(1, "stopped", at=8, activity="busy")
    assert kind(hung(server, worker, ended(2, "returned"))) == ("computing", (1,))
    assert kind(hung(server, ended(1, "returned"), ended(2, "returned")))[0] == "returned early"


@pytest.mark.parametrize("state", ["begins", "waits"])
def test_a_message_too_long_for_a_recv_from_any_rank_may_come_before_the_wait(state: str) -> None:
    """Gloo aborts the rank as the message comes, which may be before it waits for the recv."""
    look = {"tag": 0, "tensor": "float32 (2,)"}
    sends = [
        call(0, "send", n, 4 + n, open=False, peer=1, nbytes=8 + 8 * n, **look) for n in (0, 1)
    ]
    took = call(1, "irecv", 0, 6, open=False, peer=0, nbytes=8, **look)
    takes = call(1, "irecv", None, 7, open=state == "waits", nbytes=8, **look)
    run = hung(
        ended(0, "stopped", *sends, at=9, op="barrier"),
        ended(1, "died", took, takes, output=ENFORCED),
        after=None,
    )
    assert kind(run) == ("tensor mismatch", (0, 1))
    assert run.verdict is not None
    assert run.verdict.frame == Frame(TRAIN, 7, "")


def test_ranks_that_nccl_has_ended_tell_where() -> None:
    ranks = [ended(r, "died", call(r, "all_reduce", 0, 5), output=ABORTED) for r in (0, 1)]
    run = hung(*ranks, after=None)
    assert run.verdict is not None
    assert run.verdict.title == "ranks 0 and 1 waited in all_reduce"
    assert run.verdict.frame == Frame(TRAIN, 5, "")
    assert f"ranks 0 and 1 died: SIGABRT in all_reduce: {TRAIN}, line 5" in run.explain()


def test_one_that_nccl_has_ended_waited_for_the_other() -> None:
    aborted = ended(0, "died", call(0, "all_reduce", 0, 5), output=ABORTED)
    run = hung(aborted, ended(1, "stopped", at=8), after=None)
    assert kind(run) == ("blocked in Python", (1,))
    assert "rank 0 waited in all_reduce, but rank 1 is idle" in run.explain()


@pytest.mark.parametrize(
    ("op", "group", "dropped"), [("all_reduce", "world", 5), ("new_group", "some ranks", 0)]
)
def test_a_rank_whose_calls_are_not_all_known_may_be_the_missing_one(
    op: str, group: str, dropped: int
) -> None:
    here = waits(0, op, None if op == "new_group" else 0, 5, group=group)
    run = hung(here, ended(1, "stopped", at=8, dropped=dropped))
    assert kind(run) == ("blocked in Python", (1,))


def test_a_rank_that_was_suspended_before_it_joined() -> None:
    join = call(0, "init_process_group", None, 3, group=None)
    here = ended(0, "stopped", at=3, op="init_process_group")
    gone = ended(1, "stopped", at=2, activity="suspended")
    run = hung(dataclasses.replace(here, spans=(join,)), dataclasses.replace(gone, spans=()))
    assert kind(run) == ("suspended", (1,))
    assert "SIGSTOP" in run.explain()


LEAVES = """\
import sys
def work(rank):
    for batch in loader:
        loss = model(batch)
        if loss != loss:
            {leave}
        dist.all_reduce(loss)
        optimizer.step()
"""


@pytest.mark.parametrize("leave", ["sys.exit(0)", "raise SystemExit", "break", "return"])
def test_a_loop_that_a_rank_may_leave(leave: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LEAVES.format(leave=leave))
    file = str(script)
    steps = {
        rank: [
            Span(rank, "steps", "mark", f"step {i}", i * SECOND, (i + 1) * SECOND, i)
            for i in range(2 - rank)
        ]
        for rank in (0, 1)
    }
    done = [call(r, "all_reduce", 0, 7, open=False, file=file) for r in (0, 1)]
    run = hung(
        waits(0, "all_reduce", 1, 7, done[0], *steps[0], file=file),
        ended(1, "returned", done[1], *steps[1], at=6, file=file),
    )
    assert "Rank 1 made 1 step; rank 0 began 3." in run.explain()
    assert "A rank has left the loop" in run.explain()


def test_ranks_on_several_machines_whose_call_never_ended() -> None:
    ranks = [
        dataclasses.replace(waits(rank, "all_reduce", 0, 5), host=f"host{rank}") for rank in (0, 1)
    ]
    run = hung(*ranks)
    assert kind(run) == ("no route", (0, 1))
    assert "The likely cause is the network" in run.explain()


@pytest.mark.parametrize("hosts", [("host0", "host0"), ("host0", "host1")])
@pytest.mark.parametrize("ops", [("all_reduce", "barrier"), ("all_reduce",)])
def test_a_job_that_is_looked_at_while_it_works_does_not_hang(
    hosts: tuple[str, str], ops: tuple[str, ...]
) -> None:
    spans = [made(rank, *ops, open="barrier" in ops) for rank in (0, 1)]
    run = run_of(
        record(spans[rank], rank, 2, alive=True, host=hosts[rank], node=rank) for rank in (0, 1)
    )
    assert not isinstance(run.error, WorkersHung)
    assert isinstance(run.error, LaunchError)
    assert str(run.error).startswith("the job still runs")
    assert "Look again later" in run.explain()
    assert "network" not in run.explain()


def test_a_job_whose_ranks_can_never_go_on_hangs_also_while_it_runs() -> None:
    spans = made(0, "all_reduce", "barrier", open=True), made(1, "all_reduce")
    run = run_of([record(spans[0], 0, 2, alive=True), record(spans[1], 1, 2, returned=True)])
    assert isinstance(run.error, WorkersHung)
    assert kind(run) == ("returned early", (1,))


def test_for_how_long_a_job_has_stood_still_is_counted_until_now() -> None:
    now = time.perf_counter_ns()
    spans = [made(rank, "all_reduce", open=True) for rank in (0, 1)]
    seen = [
        dataclasses.replace(record(spans[rank], rank, 2, alive=True), seen_ns=now)
        for rank in (0, 1)
    ]
    after = run_of(seen).hung_after
    assert after == pytest.approx(now / SECOND - 1, abs=0.1)
    title = (
        f"the job still runs, nothing has begun for {after:g} s: ranks 0 and 1 wait in all_reduce"
    )
    assert run_of(seen).explain().startswith(title)


def test_a_signal_may_have_come_from_the_rank_itself() -> None:
    alarm = dataclasses.replace(ended(0, "died"), exitcode=-14)
    assert "or the rank itself sent that signal" in hung(alarm, after=None).explain()


@pytest.mark.parametrize("output", ["", "corrupted list\n"])
def test_what_aborted_need_not_have_said_why(output: str) -> None:
    told = hung(ended(0, "died", output=output), after=None).explain()
    assert ("its last lines may say why" in told) == bool(output)
