"""What is said of ranks whose record just stops; records are made by hand."""

from __future__ import annotations

from ddp_lessons import Run, WorkerDied, WorkerFailed, WorkersHung
from ddp_lessons.loading import INTERRUPTED
from tests.by_hand import error, lost, made, record, run_of


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def statuses(run: Run) -> list[str]:
    return [rank.status for rank in run.ranks]


def two_nodes(*, hosts: tuple[str, str]) -> Run:
    """Both ranks of node 1 are silent, and those of node 0 lost them."""
    first = [lost(made(r, "barrier", "all_reduce"), r, 4, host=hosts[0]) for r in (0, 1)]
    gone = [record(made(r, "barrier"), r, 4, node=1, host=hosts[1]) for r in (2, 3)]
    return run_of([*first, *gone])


def test_one_rank_that_is_gone_is_the_cause() -> None:
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(made(1, "barrier"), 1, 2)])
    assert statuses(run) == ["raised", "died"]
    assert kind(run) == ("killed", (1,))
    assert isinstance(run.error, WorkerDied)
    text = run.explain()
    assert "rank 1 of 2 ended without a word" in text
    assert "Its last call was barrier: /home/learner/train.py, line 7" in text
    assert "Rank 0 lost its partner by that, waiting in all_reduce" in text


def test_a_rank_that_was_killed_in_a_call() -> None:
    calls = made(1, "barrier", "all_reduce", open=True)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(calls, 1, 2)])
    assert kind(run) == ("killed", (1,))
    assert "It was in all_reduce: /home/learner/train.py, line 8" in run.explain()


def test_a_rank_that_was_killed_when_it_was_ahead() -> None:
    ahead = made(1, "barrier", "all_reduce", "barrier", open=True)
    run = run_of([lost(made(0, "barrier", "all_reduce"), 0, 2), record(ahead, 1, 2)])
    assert statuses(run) == ["raised", "died"]  # its call could not be met, but this is no hang
    assert kind(run) == ("killed", (1,))


def test_the_earliest_of_two_silent_ranks_on_two_nodes_is_the_cause() -> None:
    first = [lost(made(0, "barrier", "all_reduce", "barrier"), 0, 4), record(made(1), 1, 4)]
    second = [
        record(made(2, "barrier", "all_reduce"), 2, 4, node=1, host="host1"),
        lost(made(3, "barrier", "all_reduce", "barrier"), 3, 4, node=1, host="host1"),
    ]
    run = run_of([*first, *second])
    assert kind(run) == ("killed", (1,))
    assert "rank 1 of 4 ended without a word" in run.explain()
    assert "rank 2 failed later" in run.explain()


def test_all_ranks_of_a_node_are_told_as_one() -> None:
    run = two_nodes(hosts=("host0", "host1"))
    assert kind(run) == ("killed", (2, 3))
    text = run.explain()
    assert "node 1 (host1) is gone: ranks 2 and 3 of 4 ended without a word" in text
    assert "its agent (torchrun)" in text.lower()
    assert "after barrier at /home/learner/train.py, line 7" in text
    assert "Ranks 0 and 1 lost their partner by that, waiting in all_reduce" in text


def test_a_host_that_has_two_nodes_does_not_tell_them_apart() -> None:
    text = two_nodes(hosts=("host0", "host0")).explain()
    assert "node 1 is gone" in text
    assert "host0" not in text


def test_all_ranks_of_all_nodes() -> None:
    where = [(0, "host0"), (0, "host0"), (1, "host1"), (1, "host1")]
    run = run_of(
        record(made(rank, "barrier"), rank, 4, node=node, host=host)
        for rank, (node, host) in enumerate(where)
    )
    assert statuses(run) == ["died"] * 4
    assert kind(run) == ("killed", (0, 1, 2, 3))
    assert "all 4 ranks ended without a word" in run.explain()
    assert "ranks 0, 1, 2 and 3 ended outside torch.distributed, after barrier" in run.explain()
    assert "node 1" not in run.explain()


def test_the_only_rank() -> None:
    run = run_of([record(made(0, "barrier"), 0, 1)])
    assert kind(run) == ("killed", (0,))
    assert "the rank ended without a word" in run.explain()


def test_beside_a_rank_that_raised_its_own_error_it_was_stopped() -> None:
    raised = error("ValueError: a bad batch", 9)
    run = run_of([record(made(0, "barrier"), 0, 2), record([], 1, 2, raised=raised)])
    assert statuses(run) == ["stopped", "raised"]
    assert kind(run) == ("raised", (1,))
    assert isinstance(run.error, WorkerFailed)
    assert "rank 1 of 2 raised ValueError: a bad batch" in run.explain()
    assert "rank 0 was stopped" in run.explain()


def test_beside_an_interrupted_rank_it_was_stopped() -> None:
    raised = error("KeyboardInterrupt", 9)
    run = run_of([record(made(r, "barrier"), r, 2, raised=raised if r else None) for r in (0, 1)])
    assert statuses(run) == ["stopped", "stopped"]
    assert [rank.exitcode for rank in run.ranks] == [None, INTERRUPTED]
    assert isinstance(run.error, WorkersHung)
    assert "rank 0 is outside torch.distributed, after barrier at" in run.explain()
    assert "rank 1 is idle: /home/learner/train.py, line 9" in run.explain()


def test_calls_that_can_never_be_met_are_a_hang_that_was_killed() -> None:
    run = run_of(
        [
            record(made(0, "barrier", "all_reduce", open=True), 0, 2),
            record(made(1, "barrier", "broadcast", open=True), 1, 2),
        ]
    )
    assert statuses(run) == ["stopped", "stopped"]
    assert kind(run)[0] == "different collectives"
    assert isinstance(run.error, WorkersHung)
    assert "rank 0 waits in all_reduce: /home/learner/train.py, line 8" in run.explain()
    assert "rank 1 waits in broadcast: /home/learner/train.py, line 8" in run.explain()


def test_a_rank_that_returned_while_another_waits_is_a_hang_that_was_killed() -> None:
    waits = record(made(0, "barrier", "all_reduce", open=True), 0, 2)
    run = run_of([waits, record(made(1, "barrier"), 1, 2, returned=True)])
    assert statuses(run) == ["stopped", "returned"]
    assert kind(run) == ("returned early", (1,))


def test_calls_that_were_being_met_are_no_hang() -> None:
    run = run_of(record(made(r, "barrier", "all_reduce", open=True), r, 2) for r in (0, 1))
    assert statuses(run) == ["died", "died"]
    assert kind(run) == ("killed", (0, 1))
    assert "ranks 0 and 1 ended in all_reduce" in run.explain()


def test_a_job_that_still_hangs_tells_how_to_look_into_the_awaited_rank() -> None:
    waits = record(made(0, "barrier", open=True), 0, 2, alive=True)
    away = record([], 1, 2, alive=True)
    run = run_of([waits, away])
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("no answer", (1,))
    assert "rank 0 still runs, waiting in barrier" in repr(run)
    assert "`py-spy dump --pid 101` on host0 tells where rank 1 is now" in run.explain()
