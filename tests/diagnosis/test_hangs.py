"""Verdicts on hangs: real ranks with a missing one, long before the timeout."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, launch
from ddp_lessons.exercises import barriers
from tests.support.by_hand import SECOND, TIMED_OUT, error, made, record, run_of

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LONG = 60.0  # seconds; a run that takes it was not proved to be stuck


def explained(fn: Any, nprocs: int = 3, timeout: float = LONG, **options: Any) -> Run:
    """The run, which must end long before its timeout."""
    began = time.monotonic()
    run: Run = launch(fn, nprocs=nprocs, timeout=timeout, check=False, **options)
    assert time.monotonic() - began < LONG / 2
    assert run.verdict is not None
    return run


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def _gather(rank: int) -> None:
    dist.gather(torch.ones(1), [torch.ones(1) for _ in range(3)], dst=rank)


def _scatter(rank: int) -> None:
    dist.scatter(torch.ones(1), [torch.ones(1) for _ in range(3)], src=rank)


@pytest.mark.parametrize(
    ("call", "root"),
    [
        (lambda rank: dist.broadcast(torch.ones(1), src=rank), "src"),
        (lambda rank: dist.broadcast(torch.ones(1), src=(rank + 1) % 3), "src"),
        (lambda rank: dist.broadcast_object_list([rank], src=rank), "src"),
        (_scatter, "src"),
        (_gather, "dst"),
        (lambda rank: dist.gather_object(rank, [None] * 3, dst=rank), "dst"),
    ],
    ids=["broadcast", "of the next", "broadcast_object_list", "scatter", "gather", "gather_object"],
)
def test_ranks_that_each_name_a_root_of_their_own(call: Any, root: str) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        call(rank)

    run = explained(work)
    assert kind(run) == ("different collectives", (0, 1, 2))
    assert f"must name the same {root}: `{root}=0`, say, not `{root}=rank`" in run.explain()


def test_a_rank_that_returned_early_is_told_which_call_it_missed() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        if rank == 1:
            return
        dist.broadcast(torch.ones(1), 0)

    run = explained(work)
    assert kind(run) == ("returned early", (1,))
    assert "rank 1 has returned before broadcast at" in run.explain()


def test_a_rank_that_is_busy_and_never_joins() -> None:
    def work(rank: int) -> None:
        while rank == 1:
            sum(range(1000))
        dist.init_process_group("gloo")

    run = explained(work, timeout=2)
    assert kind(run) == ("never joined", (1,))
    assert "ranks 0 and 2 wait in init_process_group, but rank 1 is busy at" in run.explain()
    assert "sum(range(1000))" in run.explain()


def test_a_rank_that_left_the_group() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 2:
            dist.destroy_process_group()
            time.sleep(LONG)
        dist.all_reduce(torch.ones(1))

    run = explained(work, timeout=2)
    assert kind(run) == ("left the group", (2,))
    assert "rank 2 has left the group at" in run.explain()


def test_a_recv_that_nobody_answers() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            dist.recv(torch.ones(1), 2)
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("unmatched recv", (1,))
    assert "rank 1 waits in recv from rank 2, which does not send" in run.explain()


@pytest.mark.parametrize("rank_of_recv", [0, 1])
def test_a_tag_that_nobody_answers(rank_of_recv: int) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for tag in (0, 1):
            if rank == rank_of_recv:
                dist.recv(torch.ones(1), 1 - rank, tag=2 * tag)
            else:
                dist.send(torch.ones(1), 1 - rank, tag=tag)
        dist.barrier()

    run = explained(work, nprocs=2)
    sender, receiver = 1 - rank_of_recv, rank_of_recv
    assert kind(run) == ("unmatched send", (0, 1))
    text = run.explain()
    assert f"rank {sender} sends to rank {receiver} with tag 1, and rank {receiver} rec" in text
    assert f"receives from rank {sender} with tag 2" in text
    assert "with the same tag" in text


def test_waiting_for_asynchronous_work_is_waiting_for_ranks() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            received = dist.irecv(torch.ones(1), 1)
            received.wait()
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("unmatched recv", (0,))
    assert "rank 0 waits in irecv from rank 1, which does not send" in run.explain()
    assert "received.wait()" in run.explain()


def test_a_rank_that_loses_its_partner_while_it_waits_for_asynchronous_work() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank != 1:
            dist.all_reduce(torch.ones(1), async_op=True).wait()

    run = explained(work)
    assert kind(run) == ("returned early", (1,))
    assert "ranks 0 and 2 waited in all_reduce, but rank 1 has returned" in run.explain()
    assert "async_work" not in run.explain()


def test_tags_in_another_order_are_no_mismatch() -> None:
    def work(rank: int) -> list[float]:
        dist.init_process_group("gloo")
        got = [torch.zeros(1), torch.zeros(1)]
        if rank == 0:
            works = [dist.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in (1, 2)]
        else:
            works = [dist.irecv(got[tag - 1], 0, tag=tag) for tag in (2, 1)]
        for work in works:
            work.wait()
        dist.barrier()
        dist.destroy_process_group()
        return [tensor.item() for tensor in got]

    run = launch(work)
    assert run.values[1] == [1.0, 2.0]
    assert run.warnings == []
    pairs = {(s.op, s.tag): s.seq for rank in run.ranks for s in rank.spans if s.tag is not None}
    assert set(pairs.values()) == {0}


def test_what_an_exercise_calls_itself_is_called_so() -> None:
    """A rank that leaves the learner's function early misses the call that the check makes."""

    @contextlib.contextmanager
    def leaves(rank: int) -> Iterator[None]:
        if rank == 0:
            raise SystemExit(0)
        yield

    run = explained(barriers._enter, args=(leaves, (0.0,) * 3, (0.0,) * 3))
    assert kind(run) == ("returned early", (0,))
    assert run.verdict is not None
    assert run.verdict.title.endswith("before all_reduce at a line of the check")
    assert run.verdict.frame is not None
    assert run.verdict.frame.source == "raise SystemExit(0)"
    assert not any("<string>" in str(span.site) for rank in run.ranks for span in rank.spans)


def test_two_groups_in_different_order() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        groups = [dist.new_group(), dist.new_group()]
        for group in groups[::-1] if rank == 2 else groups:
            dist.barrier(group)

    assert kind(explained(work)) == ("groups in different order", (2,))


class Branches(nn.Module):  # type: ignore[misc]
    """A second layer that is only used at times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if both else x


@pytest.mark.parametrize("nprocs", [4, 8])
def test_a_backward_that_one_rank_skips(nprocs: int) -> None:
    """DDP orders its buckets anew then, by broadcasts that go from rank to rank."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        if rank != 1:
            model(torch.ones(2, 4)).sum().backward()
        dist.barrier()

    run = explained(work, nprocs=nprocs)
    assert kind(run) == ("skipped collective", (1,))


def test_a_backward_to_which_one_rank_comes_late() -> None:
    """The others stand as in the hang above, but nothing proves it: the rank only sleeps."""

    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        if rank == 1:
            time.sleep(4)
        model(torch.ones(2, 4)).sum().backward()
        dist.barrier()
        dist.destroy_process_group()
        return rank

    assert launch(work, nprocs=8).values == list(range(8))


def test_a_layer_that_one_rank_does_not_use() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(Branches())
        model(torch.ones(2, 4), rank != 1).sum().backward()
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("skipped collective", (1,))
    assert "ranks 0 and 2 call DDP's all_reduce at" in run.explain()
    assert "rank 1 skipped" in run.explain()
    assert "model.module" in run.explain()


def test_a_model_called_on_rank_zero_only() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        model(torch.ones(2, 4)).sum().backward()
        if rank == 0:
            model(torch.ones(2, 4))
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("skipped collective", (0,))
    assert "rank 0 calls DDP's broadcast at" in run.explain()
    assert "rank 0 waits in DistributedDataParallel" in run.explain()


def test_ddps_own_calls_that_do_not_match() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        for _ in range(2):
            model(torch.ones(16, 4)).sum().backward()
            if rank == 0:
                model(torch.ones(16, 4))  # its buffers meet the gradients of rank 1
        dist.barrier()

    run = explained(work, 2)
    assert kind(run) == ("skipped collective", (0, 1))
    assert run.error is not None
    assert run.error.rank is None
    assert "rank 0 calls DDP's broadcast at" in run.explain()
    assert "model.module" in run.explain()


def test_a_rank_that_computes_for_ever_is_named_busy() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        while rank == 1:
            sum(range(1000))
        dist.barrier()

    run = explained(work, timeout=2)
    assert kind(run) == ("computing", (1,))
    assert run.ranks[1].activity == "busy"
    assert run.ranks[0].activity == "idle"


def test_a_collective_in_a_thread_of_the_learners() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")

        def meet() -> None:
            if rank == 0:
                dist.all_reduce(torch.ones(1))
            dist.barrier()

        thread = threading.Thread(target=meet)
        thread.start()
        thread.join()

    run = explained(work)
    assert kind(run) == ("skipped collective", (0,))


def uneven(rank: int, how: str, then: str) -> None:
    """Train; rank 1 has a batch less, or does something more or less within step 3."""
    dist.init_process_group("gloo")
    net = nn.Linear(2, 2)
    model = DistributedDataParallel(net) if how == "ddp" else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _epoch in range(2):
        for step in range(4 if rank == 1 and "step" not in then else 5):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            for parameter in model.parameters() if how != "ddp" else ():
                dist.all_reduce(parameter.grad)
            if (rank, step, then) == (1, 2, "more in a step"):
                report()
            optimizer.step()
            if (rank, step, then) != (1, 2, "less in a step"):
                dist.barrier()
        if then == "return":
            break
        if then == "barrier":
            dist.barrier()
        if then == "report":
            report()
    if then == "leave":
        dist.destroy_process_group()


def report() -> None:
    dist.broadcast(torch.ones(1), 0)


@pytest.mark.parametrize("how", ["ddp", "by hand"])
@pytest.mark.parametrize("then", ["return", "barrier", "report"])
def test_unequal_steps_are_counted(how: str, then: str) -> None:
    run = explained(uneven, args=(how, then), timeout=5)
    assert kind(run)[1] == (1,)
    assert "Rank 1 made 4 steps; ranks 0 and 2 began 5." in run.explain()
    assert ("Join([model])" in run.explain()) == (how == "ddp")


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, then: str) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    for parameter in model.parameters() if then == "" else ():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    if then == "a loss that is summed":
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(("then", "others"), [("", "began 5"), ("a loss that is summed", "made 5")])
def test_unequal_steps_of_a_function_are_counted(then: str, others: str) -> None:
    def train(rank: int) -> None:
        dist.init_process_group("gloo")
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _step in range(4 if rank == 1 else 5):
            make_step(model, optimizer, then)

    run = explained(train, timeout=5)
    assert kind(run)[1] == (1,)
    assert f"Rank 1 made 4 steps; ranks 0 and 2 {others}." in run.explain()


def two_optimizers(rank: int, loops: str) -> None:
    dist.init_process_group("gloo")
    first, second = (DistributedDataParallel(nn.Linear(2, 2)) for _ in range(2))
    for_first = torch.optim.SGD(first.parameters(), lr=0.1)
    for_second = torch.optim.SGD(second.parameters(), lr=0.1)
    fewer = 4 if rank == 1 else 5
    if loops == "two":
        for _step in range(7):
            first(torch.ones(1, 2)).sum().backward()
            for_first.step()
        for _step in range(fewer):
            second(torch.ones(1, 2)).sum().backward()
            for_second.step()
    for _step in range(fewer if loops == "one" else 0):
        first(torch.ones(1, 2)).sum().backward()
        for_first.step()
        second(torch.ones(1, 2)).sum().backward()
        for_second.step()
    for _step in range(fewer if loops == "nested" else 0):
        for _ in range(3):
            first(torch.ones(1, 2)).sum().backward()
            for_first.step()
        first.zero_grad()
        second(torch.ones(1, 2)).sum().backward()
        for_second.step()


@pytest.mark.parametrize(
    ("loops", "told"),
    [
        ("one", "Rank 1 made 4 steps; ranks 0 and 2 began 5."),
        ("two", ""),  # the steps of the first optimizer count, and these are the second's
        ("nested", "Rank 1 made 12 steps; ranks 0 and 2 began 13."),
    ],
)
def test_steps_of_two_optimizers(loops: str, told: str) -> None:
    run = explained(two_optimizers, args=(loops,), timeout=5)
    assert kind(run)[1] == (1,)
    assert told in run.explain()
    assert (" steps; ranks 0 and 2 " in run.explain()) == bool(told)


@pytest.mark.parametrize("how", ["ddp", "by hand"])
@pytest.mark.parametrize("then", ["less in a step", "more in a step"])
def test_a_call_that_is_skipped_within_a_step_is_no_matter_of_steps(how: str, then: str) -> None:
    run = explained(uneven, args=(how, then), timeout=5)
    assert kind(run) == ("skipped collective", (1,))
    assert "steps" not in run.explain()


def test_two_threads_that_call_in_one_group_in_another_order() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        saver = threading.Thread(target=dist.broadcast, args=(torch.ones(2), 0), name="saver")
        if rank == 0:
            saver.start()
            time.sleep(0.5)
        dist.all_reduce(torch.ones(1))
        if rank != 0:
            saver.start()
        saver.join()

    run = explained(work, timeout=3)
    assert kind(run) == ("different collectives", (0,))
    text = run.explain()
    assert "call all_reduce and rank 0 calls broadcast from rank 0 in thread 'saver'" in text
    assert "rank 0 waits in broadcast in thread 'saver'" in text
    assert "a group of its own: dist.new_group()" in text


def test_a_skip_in_the_only_thread_that_calls_is_no_matter_of_threads() -> None:
    def loop(rank: int) -> None:
        for step in range(3):
            if (rank, step) != (1, 2):
                dist.all_reduce(torch.ones(1))
            dist.barrier()

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        thread = threading.Thread(target=loop, args=(rank,), name=f"trainer of {rank}")
        thread.start()
        thread.join()

    run = explained(work)
    assert kind(run) == ("skipped collective", (1,))
    assert "new_group" not in run.explain()
    assert "rank 1 waits in barrier in thread 'trainer of 1': " in run.explain()


def test_a_thread_has_its_own_name_though_an_earlier_one_had_its_identifier() -> None:
    def save(rank: int) -> None:
        if (rank, threading.current_thread().name) != (1, "saver 4"):
            dist.all_reduce(torch.ones(1))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for number in range(5):
            thread = threading.Thread(target=save, args=(rank,), name=f"saver {number}")
            thread.start()
            thread.join()
        dist.recv(torch.ones(1), 0)

    run = explained(work, timeout=3)
    assert "ranks 0 and 2 wait in all_reduce in thread 'saver 4': " in run.explain()
    assert len(run.ranks[0].threads) < 5  # identifiers were used again


def feed(rank: int, samples: queue.Queue[torch.Tensor]) -> None:
    for number in range(4):
        if (rank, number) == (1, 2):
            raise ValueError("bad sample 2")
        samples.put(torch.ones(1))


def train(rank: int, hook: bool = False) -> int:
    """Sum samples that a thread reads."""
    seen: list[Any] = []
    if hook:
        threading.excepthook = seen.append
    samples: queue.Queue[torch.Tensor] = queue.Queue()
    thread = threading.Thread(target=feed, args=(rank, samples), name="feeder")
    thread.start()
    dist.init_process_group("gloo")
    for _ in range(2 if hook else 4):
        dist.all_reduce(samples.get())
    thread.join()
    dist.destroy_process_group()
    return len(seen)


def test_a_thread_that_an_exception_ended_is_told() -> None:
    run = explained(train, timeout=2)
    assert kind(run) == ("blocked in Python", (1,))
    text = run.explain()
    assert "thread 'feeder' of rank 1 died of ValueError: bad sample 2: " in text
    assert 'raise ValueError("bad sample 2")' in text
    assert "ThreadPoolExecutor" in text
    assert "Exception in thread feeder" in run.ranks[1].output  # as Python shows it


def test_the_learners_own_hook_for_threads_is_theirs() -> None:
    run = launch(train, (True,))
    assert run.values == [0, 1]
    assert run.warnings == []


def test_a_thread_that_died_in_a_run_that_went_well_is_warned_of() -> None:
    def work(rank: int) -> None:
        def save() -> None:
            if rank == 2:
                sys.exit()
            raise OSError("disk full")

        thread = threading.Thread(target=save, name="saver")
        thread.start()
        thread.join()

    (warning,) = launch(work, nprocs=3).warnings
    assert (warning.kind, warning.ranks) == ("thread died", (0, 1))
    assert warning.text.startswith("thread 'saver' of ranks 0 and 1 died of OSError: disk full")


def test_a_thread_that_will_still_come_is_waited_for() -> None:
    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        beside = dist.new_group()

        def come_late() -> None:
            time.sleep(3)
            dist.barrier(beside)

        if rank == 0:
            thread = threading.Thread(target=come_late)
            thread.start()
            dist.barrier()
            thread.join()
        else:
            dist.barrier(beside)
            dist.barrier()
        dist.destroy_process_group()
        return "met"

    assert launch(work).values == ["met", "met"]


@pytest.mark.parametrize("nprocs", [2, 3])
def test_a_late_rank_is_named_not_those_who_gave_up(nprocs: int) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=1))
        time.sleep(2 if rank == 1 else 0)
        dist.barrier()

    run = explained(work, nprocs)
    assert kind(run) == ("gave up waiting", (1,))
    assert "rank 1 came to barrier when others had given up" in run.explain()


@pytest.mark.parametrize("debug", ["OFF", "DETAIL"])
@pytest.mark.parametrize("seconds", [None, 2])
def test_the_verdict_is_the_same_with_debug_and_own_timeout(
    debug: str, seconds: int | None
) -> None:
    def work(rank: int) -> None:
        timeout = timedelta(seconds=seconds) if seconds else None
        dist.init_process_group("gloo", timeout=timeout)
        if rank != 1:
            dist.all_reduce(torch.ones(1))
        dist.broadcast(torch.ones(1), 0)

    run = explained(work, env={"TORCH_DISTRIBUTED_DEBUG": debug})
    assert kind(run) == ("skipped collective", (1,))


SOON = timedelta(seconds=2)


def of_the_world(rank: int) -> None:
    dist.init_process_group("gloo", timeout=SOON)
    dist.new_group(timeout=SOON)
    sleep_on_rank_1(rank)
    dist.all_reduce(torch.ones(1))


def of_a_group(rank: int) -> None:
    dist.init_process_group("gloo", timeout=SOON)
    group = dist.new_group(None, SOON)
    sleep_on_rank_1(rank)
    dist.all_reduce(torch.ones(1), group=group)


def of_a_barrier(rank: int) -> None:
    dist.init_process_group("gloo")
    sleep_on_rank_1(rank)
    dist.monitored_barrier(timeout=SOON)


def of_a_wait(rank: int) -> None:
    dist.init_process_group("gloo")
    sleep_on_rank_1(rank)
    dist.all_reduce(torch.ones(1), async_op=True).wait(SOON)


def of_the_join(rank: int) -> None:
    sleep_on_rank_1(rank)
    dist.init_process_group("gloo", timeout=SOON)


def of_the_world_in_ddp(rank: int) -> None:
    dist.init_process_group("gloo", timeout=SOON)
    model = DistributedDataParallel(nn.Linear(2, 2))
    sleep_on_rank_1(rank)
    model(torch.ones(1, 2)).sum().backward()


def of_one_of_two_groups(rank: int) -> None:
    dist.init_process_group("gloo")
    dist.new_group(timeout=SOON)
    group = dist.new_group(timeout=SOON)
    sleep_on_rank_1(rank)
    dist.barrier(group)


def sleep_on_rank_1(rank: int) -> None:
    if rank == 1:
        time.sleep(LONG)


@pytest.mark.parametrize(
    ("work", "whose"),
    [
        (of_the_world, " that init_process_group got at"),
        (of_a_group, " that new_group got at"),
        (of_a_barrier, " that monitored_barrier got at"),
        (of_a_wait, " that Work.wait got at"),
        (of_the_join, " that init_process_group got at"),
        (of_the_world_in_ddp, " that init_process_group got at"),
        (of_one_of_two_groups, " ran out"),  # nobody can say of which
    ],
)
def test_which_timeout_of_the_learners_ran_out(work: Any, whose: str) -> None:
    run = explained(work)
    assert kind(run)[1] == (1,)
    text = run.explain()
    assert f"The timeout of 2 s{whose}" in text
    assert "launch(timeout" not in text
    assert "raise it" in text or work is of_the_join


def test_the_timeout_of_launch_that_ran_out() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=LONG))
        sleep_on_rank_1(rank)
        dist.barrier()

    text = explained(work, timeout=2).explain()
    assert "No rank made progress for 2 s" in text
    assert "launch(timeout=...)" in text
    assert "init_process_group got" not in text


def test_a_caught_timeout_is_the_learners_own_affair() -> None:
    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        try:
            if rank == 0:
                dist.monitored_barrier(timeout=timedelta(seconds=2))
            else:
                dist.recv(torch.ones(1), 0)
        except RuntimeError:
            return "caught"
        return "met"

    assert launch(work, timeout=LONG).values == ["caught", "caught"]


def test_the_innocent_of_a_killed_rank_are_not_blamed() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 0:
            os.kill(os.getpid(), 9)
        dist.all_reduce(torch.ones(1))

    run = explained(work)
    assert kind(run) == ("killed", (0,))
    assert "Its last call was barrier" in run.explain()
    assert "Connection" not in run.explain().splitlines()[0]


def all_gave_up(*hosts: str) -> Run:
    """A run made by hand: all ranks timed out in one all_reduce."""
    raised = error(TIMED_OUT, 8, "all_reduce")
    calls = [made(rank, "barrier", "all_reduce") for rank in range(len(hosts))]
    broken = [[*before, last._replace(failed=True)] for *before, last in calls]
    return run_of(
        record(broken[rank], rank, len(hosts), raised=raised, node=rank, host=host)
        for rank, host in enumerate(hosts)
    )


def test_hosts_between_which_nothing_comes_through_are_cut_off() -> None:
    run = all_gave_up("host0", "host1", "host1")
    assert kind(run) == ("no route", (0, 1, 2))
    assert "on several machines, but the call never ended" in run.explain()
    assert "Timed out waiting" in run.explain()
    assert run.verdict is not None
    assert run.verdict.frame is not None
    assert run.verdict.frame.lineno == 8


def test_one_host_is_not_cut_off_from_itself() -> None:
    assert kind(all_gave_up("host0", "host0")) == ("gave up waiting", (0, 1))


def test_hosts_are_not_cut_off_where_a_rank_did_not_come() -> None:
    late = made(1, "barrier", "all_reduce")[:1]
    raised = error(TIMED_OUT, 8, "all_reduce")
    waited = [c._replace(failed=c.op == "all_reduce") for c in made(0, "barrier", "all_reduce")]
    one = record(waited, 0, 2, raised=raised)
    run = run_of([one, record(late, 1, 2, returned=True, node=1, host="host1")])
    assert kind(run) == ("returned early", (1,))


def test_a_rank_that_joins_when_the_others_have_given_up() -> None:
    raised = error("DistStoreError: Timed out after 3 seconds", 7, "init_process_group")
    files = []
    for rank, came in enumerate((1, 1, 5)):
        (join,) = made(rank, "init_process_group")
        join = join._replace(group=None, seq=None, t0_ns=came * SECOND, failed=True)
        join = join._replace(t1_ns=(came + 3) * SECOND)
        files.append(
            dataclasses.replace(record([join], rank, 3, raised=raised), ended_ns=join.t1_ns)
        )
    run = run_of(files)
    assert kind(run) == ("gave up waiting", (2,))
    assert "came to init_process_group when others had given up waiting for it" in run.explain()


def test_a_group_that_is_made_when_rank_0_has_ended_and_with_it_the_store() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        time.sleep(0.5 * (rank > 0))
        dist.new_group([1, 2])

    run = explained(work)
    assert kind(run) == ("returned early", (0,))
    assert "Have all ranks meet before they end: dist.barrier()." in run.explain()


def test_torchs_check_counts_sends_as_calls_of_all_ranks() -> None:
    def work(rank: int, ranks_that_send: list[int] | None) -> None:
        dist.init_process_group("gloo")
        group = dist.new_group(ranks_that_send) if ranks_that_send else None
        if rank == 0:
            dist.send(torch.ones(2), 1, group)
        if rank == 1:
            dist.recv(torch.ones(2), 0, group)
        dist.all_reduce(torch.ones(1))

    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    run = launch(work, (None,), nprocs=3, env=detail, check=False)
    assert kind(run) == ("gave up waiting", (0, 1, 2))
    assert "torch's own check stopped ranks whose calls agree" in run.explain()
    assert "new_group([0, 1])" in run.explain()
    assert launch(work, ([0, 1],), nprocs=3, env=detail).verdict is None  # as it advises
    assert launch(work, (None,), nprocs=3).verdict is None


def test_objects_of_which_a_tensor_took_the_size() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.send_object_list([{"a": 1}], 1)
        if rank == 1:
            dist.recv(torch.zeros(1, dtype=torch.int64), 0)
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("unmatched send", (0, 1))
    assert "rank 0 calls send_object_list to rank 1, which calls recv" in run.explain()


def test_a_rank_that_is_alone_waits_for_nobody_else() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.recv(torch.ones(1))

    run = explained(work, nprocs=1, timeout=2)
    assert kind(run) == ("waiting for each other", (0,))
    assert "rank 0 waits in recv, and there is no other rank" in run.explain()
    assert "each other" not in run.explain()


@pytest.mark.parametrize("code", [None, 0])
def test_a_rank_that_leaves_by_sys_exit_is_told_with_its_line(code: int | None) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            sys.exit(code)
        dist.barrier()

    run = explained(work)
    assert kind(run) == ("returned early", (1,))
    assert run.verdict is not None
    assert run.verdict.frame is not None
    assert run.verdict.frame.source == "sys.exit(code)"
    assert re.search(r"rank 1 has left by sys.exit\(\) at .* before barrier at", run.explain())
    assert "rank 1 left by sys.exit()" in run.explain()
