"""The record of a run: values, labelled output, text, table and spans, all from real launches."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

from ddp_lessons import RankResult, Run, WorkerDied, WorkerFailed, launch
from ddp_lessons.run import LINES_SHOWN

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVIL = "<img src=x onerror=alert(1)> & \"quotes\" 'too'"
NOISE = (
    "[W1120 20:00:00.123456789 socket.cpp:755] [c10d] The hostname of the client socket cannot be "
    "retrieved. err=-3",
    "[E1121 06:27:19.556688722 ProcessGroupGloo.cpp:67] Gloo connectFullMesh failed with [pair.cc] "
    "Connection closed by peer [127.0.0.1]:22447.",
    "[W1121 13:30:26.038897151 TCPStore.cpp:138] [c10d] recvValueWithTimeout failed on SocketImpl("
    "fd=5): Connection reset by peer\n"
    "Exception raised from recvBytes at c10d/Utils.hpp:784 (most recent call first):\n"
    "frame #0: c10::Error::Error() + 0x9d (0x7f57ee579b8d in libc10.so)\n"
    "<omitting python frames>\n"
    "frame #47: _start + 0x21 (0x564c57dbd081 in python)\n",
)


def greet(rank: int) -> str:
    print(f"hello from {rank}")
    print("bye")
    return "value" * rank


def test_values_and_output_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(greet, nprocs=3)
    assert run.world_size == 3
    assert run.values == ["", "value", "valuevalue"]
    assert [r.rank for r in run.ranks] == [0, 1, 2]
    assert run.ranks[1].output == "hello from 1\nbye\n"
    assert run.ranks[1].lines == ["hello from 1", "bye"]
    labelled = [f"[rank {r}] {line}" for r in range(3) for line in (f"hello from {r}", "bye")]
    assert run.output_lines() == labelled
    assert capsys.readouterr().out.splitlines() == labelled


@pytest.mark.parametrize("nprocs", [1, 3])
def test_about_a_thousand_lines_are_shown(nprocs: int) -> None:
    def talk(rank: int) -> None:
        for n in range(2000 + rank):
            print(n)

    run = launch(talk, nprocs=nprocs)
    shown = run.output_lines()
    assert LINES_SHOWN - 2 * nprocs <= len(shown) <= LINES_SHOWN + nprocs
    for rank in range(nprocs):
        mine = [line for line in shown if line.startswith(f"[rank {rank}] ")]
        *_, last = mine
        assert mine[0] == f"[rank {rank}] 0"
        assert last == f"[rank {rank}] {1999 + rank}"
        assert f"[rank {rank}] [... {2001 + rank - len(mine):,} lines left out ...]" in mine
        assert len(run.ranks[rank].lines) == 2000 + rank
    assert shown == sorted(shown, key=lambda line: line.partition("]")[0])


def test_a_thousand_lines_exactly_are_all_shown() -> None:
    def talk(rank: int) -> None:
        print("\n".join(map(str, range(LINES_SHOWN // 2))))

    assert len(launch(talk).output_lines()) == LINES_SHOWN


def end_in_every_way(rank: int) -> Any:
    match rank:
        case 0:
            time.sleep(60)
        case 1:
            return (i for i in "ab")
        case 2:
            os._exit(3)
        case 3:
            raise KeyError("x")
    return {"loss": 0.5}


def test_statuses_and_outcomes() -> None:
    run = launch(end_in_every_way, nprocs=5, check=False)
    assert [r.status for r in run.ranks] == ["stopped", "unsendable", "died", "raised", "returned"]
    assert run.values == [None, None, None, None, {"loss": 0.5}]
    outcomes = [r.outcome() for r in run.ranks]
    assert outcomes[0].startswith("stopped at ")
    assert outcomes[1:] == [
        "returned a value that cannot be sent back",
        "died: exit code 3",
        "raised KeyError: 'x'",
        "returned {'loss': 0.5}",
    ]
    assert not run.ok
    assert isinstance(run.ranks[3].exception, KeyError)
    assert repr(run).splitlines() == [
        "Run of end_in_every_way on 5 ranks:",
        *[f"  rank {r} {outcome}" for r, outcome in enumerate(outcomes)],
    ]


def returned(rank: int, value: Any, **more: Any) -> RankResult:
    now: dict[str, Any] = {"began_ns": 0, "started_ns": 0, "ended_ns": 1, "spans": ()}
    end: dict[str, Any] = {"status": "returned", "output": "", "error": None, "exitcode": 0}
    return RankResult(rank=rank, value=value, **{**now, **end, **more})


def test_of_many_ranks_those_that_ended_alike_share_a_row() -> None:
    died = {"status": "died", "exitcode": -9}
    ranks = [returned(r, "even", **(died if r == 63 else {})) for r in range(200)]
    run = Run("work", ranks, begin_ns=0)
    assert repr(run).splitlines() == [
        "Run of work on 200 ranks:",
        "  ranks 0 to 62 and 64 to 199 returned 'even'",
        "  rank 63 died: SIGKILL",
    ]
    assert run._repr_html_().count("<tr>") == 3
    few = Run("work", ranks[:16], begin_ns=0)
    assert len(repr(few).splitlines()) == 17


def test_of_many_ranks_that_differ_some_are_shown() -> None:
    run = Run("work", [returned(r, r) for r in range(64)], begin_ns=0)
    lines = repr(run).splitlines()
    assert lines[1] == "  rank 0 returned 0"
    assert lines[9] == "  [... 48 rows left out ...]"
    assert lines[-1] == "  rank 63 returned 63"
    assert "[... 48 rows left out ...]" in run._repr_html_()


def test_text_is_the_same_on_every_run() -> None:
    def work(rank: int) -> Any:
        time.sleep(0.02 * (2 - rank))
        print("output is not part of the text")
        return list(range(10_000)) if rank else "x" * 10_000

    first, second = launch(work), launch(work)
    assert repr(first) == repr(second)
    assert first._repr_html_() == second._repr_html_()
    assert len(repr(first)) < 600
    failed = [launch(end_in_every_way, nprocs=4, check=False) for _ in "ab"]
    assert repr(failed[0]) == repr(failed[1])


def test_html_escapes_what_came_from_the_learner() -> None:
    def work(rank: int) -> str:
        if rank == 1:
            raise ValueError(EVIL)
        return EVIL

    work.__name__ = EVIL
    html = launch(work, check=False)._repr_html_()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt; &amp; ") == 3
    assert html.count("<tr>") == 3
    assert "✓" in html
    assert "✗" in html


def test_seconds_are_those_of_the_function() -> None:
    def work(rank: int) -> float:
        began = time.perf_counter()
        while time.perf_counter() - began < 0.05 * (1 + rank):
            pass
        return time.perf_counter() - began

    began = time.perf_counter()
    run = launch(work)
    whole = time.perf_counter() - began
    for rank in run.ranks:
        assert rank.value <= rank.seconds < whole


def test_a_function_that_was_never_called_took_no_time() -> None:
    class DoesNotLoad:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    run = launch(lambda rank, x: x, args=(DoesNotLoad(),), check=False)
    assert [r.seconds for r in run.ranks] == [0.0, 0.0]
    assert [r.started_ns for r in run.ranks] == [None, None]
    assert {s.name for s in run.spans()} == {"start-up"}
    assert "invalid literal for int()" in run.explain()


def test_spans_of_all_ranks_on_one_clock() -> None:
    before = time.perf_counter_ns()
    run = launch(greet, nprocs=3)
    after = time.perf_counter_ns()
    spans = run.spans()
    starts = [span.t0_ns for span in spans]
    assert starts == sorted(starts)
    assert before < starts[0]
    assert max(span.t1_ns or 0 for span in spans) < after
    for rank in run.ranks:
        start_up, function = (s for s in spans if s.rank == rank.rank)
        assert (start_up.name, function.name) == ("start-up", "greet")
        assert start_up.t0_ns < start_up.t1_ns == function.t0_ns  # type: ignore[operator]
        assert function.t1_ns is not None
        assert (function.t1_ns - function.t0_ns) / 1e9 == pytest.approx(rank.seconds)
        assert rank.spans == (start_up, function)


def test_explain() -> None:
    assert launch(greet).explain() == "Both ranks returned."
    assert launch(greet, nprocs=1).explain() == "The rank returned."
    failed = launch(lambda rank: 1 // rank, check=False)
    assert failed.explain().startswith("WorkerFailed: rank 0 of 2 raised ZeroDivisionError")


def test_raise_for_failure() -> None:
    launch(greet).raise_for_failure()
    failed = launch(lambda rank: 1 // rank, check=False)
    with pytest.raises(WorkerFailed) as caught:
        failed.raise_for_failure()
    assert caught.value is failed.error
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def noisy(rank: int, noise: str) -> None:
    print("before")
    os.write(2, f"{noise}\n".encode())
    print("after")


@pytest.mark.parametrize("noise", NOISE)
def test_what_torch_logs_with_the_time_of_day_is_kept_but_not_shown(noise: str) -> None:
    run = launch(noisy, (noise,), nprocs=1)
    assert run.output_lines() == ["[rank 0] before", "[rank 0] after"]
    assert run.ranks[0].output == f"before\n{noise}\nafter\n"


def test_nor_is_what_monitored_barrier_logs_besides_its_exception() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.monitored_barrier(timeout=timedelta(seconds=0.2))
        time.sleep(0.5)

    run = launch(work, check=False)
    assert "monitoredBarrier" in run.ranks[0].output
    assert run.output_lines() == []
    assert "Rank 1 failed to pass monitoredBarrier" in run.explain()


def test_nor_is_it_in_the_story_of_a_dead_rank() -> None:
    def work(rank: int) -> None:
        noisy(rank, NOISE[0])
        os._exit(1)

    with pytest.raises(WorkerDied) as caught:
        launch(work, nprocs=1)
    assert "after" in str(caught.value)
    assert "hostname" not in str(caught.value)


def test_a_run_knows_its_name() -> None:
    runs: list[Run] = [launch(greet), launch(lambda rank: None)]
    assert [run.name for run in runs] == ["greet", "<lambda>"]
    assert "&lt;lambda&gt; on 2 ranks" in runs[1]._repr_html_()
