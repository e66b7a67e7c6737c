"""Every public call of torch.distributed is recorded once, with its facts."""

from __future__ import annotations

import atexit
import inspect
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn
from torch.distributed import all_reduce, distributed_c10d

from ddp_lessons import Run, WorkerFailed, launch, span
from ddp_lessons.instrumentation import collectives, ddp_traffic, recording, torch_api
from ddp_lessons.wire.ops import COLLECTIVES, GROUP_CALLS, RECVS, SENDS
from ddp_lessons.wire.records import Span

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

BYTES = 4 * 6  # of one rank's tensor, below


def x() -> torch.Tensor:
    return torch.ones(6)


def pieces() -> list[torch.Tensor]:
    return [torch.zeros(6), torch.zeros(6)]


# The call of rank r, and the bytes and the root that its span should have.
CALLS: dict[str, tuple[Callable[[int, Any], Any], int | None, int | None]] = {
    "all_reduce": (lambda r, o: dist.all_reduce(x(), **o), BYTES, None),
    "broadcast": (lambda r, o: dist.broadcast(x(), 1, **o), BYTES, 1),
    "reduce": (lambda r, o: dist.reduce(x(), dst=1, **o), BYTES, 1),
    "all_gather": (lambda r, o: dist.all_gather(pieces(), x(), **o), BYTES, None),
    "all_gather_into_tensor": (
        lambda r, o: dist.all_gather_into_tensor(torch.zeros(12), x(), **o),
        BYTES,
        None,
    ),
    "gather": (
        lambda r, o: dist.gather(x(), pieces() if r == 0 else None, dst=0, **o),
        BYTES,
        0,
    ),
    "scatter": (
        lambda r, o: dist.scatter(x(), pieces() if r == 1 else None, src=1, **o),
        BYTES,
        1,
    ),
    "reduce_scatter": (lambda r, o: dist.reduce_scatter(x(), pieces(), **o), BYTES, None),
    "reduce_scatter_tensor": (
        lambda r, o: dist.reduce_scatter_tensor(x(), torch.zeros(12), **o),
        BYTES,
        None,
    ),
    "all_to_all_single": (
        lambda r, o: dist.all_to_all_single(torch.zeros(6), x(), **o),
        BYTES,
        None,
    ),
    "all_to_all": (lambda r, o: dist.all_to_all(pieces(), pieces(), **o), 2 * BYTES, None),
    "all_gather_single": (
        lambda r, o: distributed_c10d.all_gather_single(torch.zeros(12), x(), **o),
        BYTES,
        None,
    ),
    "reduce_scatter_single": (
        lambda r, o: distributed_c10d.reduce_scatter_single(x(), torch.zeros(12), **o),
        BYTES,
        None,
    ),
    "all_gather_coalesced": (
        lambda r, o: dist.all_gather_coalesced([[x(), x()], [x(), x()]], [x(), x()], **o),
        2 * BYTES,
        None,
    ),
    "all_reduce_coalesced": (lambda r, o: dist.all_reduce_coalesced([x(), x()], **o), 48, None),
    "barrier": (lambda r, o: dist.barrier(**o), None, None),
}
BLOCKING: dict[str, tuple[Callable[[int, Any], Any], int | None, int | None]] = {
    "monitored_barrier": (lambda r, o: dist.monitored_barrier(), None, None),
    "all_gather_object": (lambda r, o: dist.all_gather_object([None] * 2, r), None, None),
    "gather_object": (
        lambda r, o: dist.gather_object(r, [None] * 2 if r == 0 else None, dst=0),
        None,
        0,
    ),
    "broadcast_object_list": (lambda r, o: dist.broadcast_object_list([r], src=1), None, 1),
    "scatter_object_list": (
        lambda r, o: dist.scatter_object_list([None], [1, 2] if r == 0 else None, src=0),
        None,
        0,
    ),
}


NOT_OF_GLOO = ("gather_into_tensor", "gather_single")


def skip_without(name: str) -> None:
    if torch_api.public(name) is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")


def marks(run: Run, rank: int = 0) -> list[Span]:
    """The spans of one rank's calls, except for joining and leaving."""
    return [s for s in run.ranks[rank].spans if s.op not in (None, *GROUP_CALLS)]


def many_calls(rank: int) -> float:
    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    all_reduce(ones)
    from torch.distributed import all_reduce as reduce_all

    reduce_all(ones)
    distributed_c10d.all_reduce(ones)
    dist.barrier()
    dist.all_gather_object([None] * dist.get_world_size(), {"rank": rank})
    dist.send(ones, 1) if rank == 0 else dist.recv(ones, 0)
    dist.all_reduce(ones, group=dist.new_group([0, 1]))
    dist.destroy_process_group()
    return float(ones.item())


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_calls_are_recorded_once_by_their_names(method: str) -> None:
    run = launch(many_calls, start_method=method)
    assert run.values == [2.0**5] * 2
    for rank, point_to_point in enumerate(("send", "recv")):
        spans = [s for s in run.ranks[rank].spans if s.lane != "process"]
        assert [s.op for s in spans] == [
            "init_process_group",
            *["all_reduce"] * 4,
            "barrier",
            "all_gather_object",
            point_to_point,
            "new_group",
            "all_reduce",
            "destroy_process_group",
        ]
        assert {(s.kind, s.lane) for s in spans} == {("comm", "main")}
        assert all(s.op == s.name for s in spans)


def test_a_collective_is_as_long_as_its_wait() -> None:
    def work(rank: int) -> tuple[int, int]:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            time.sleep(0.2)
        began = time.perf_counter_ns()
        dist.barrier()
        return began, time.perf_counter_ns()

    run = launch(work)
    early, late = (marks(run, rank)[-1] for rank in (0, 1))
    for barrier, (began, ended) in zip((early, late), run.values, strict=True):
        assert barrier.t1_ns is not None
        assert began <= barrier.t0_ns < barrier.t1_ns <= ended
        assert barrier.t1_ns >= late.t0_ns  # no rank leaves before the last has come
    assert (early.t1_ns or 0) - early.t0_ns > (late.t1_ns or 0) - late.t0_ns


def alone(rank: int, name: str, asynchronous: bool) -> bool:
    """Make one call; whether it returned something."""
    dist.init_process_group("gloo")
    call = {**CALLS, **BLOCKING}[name][0]
    work = call(rank, {"async_op": True} if asynchronous else {})
    if asynchronous:
        work.wait()
    dist.destroy_process_group()
    return work is not None


@pytest.mark.parametrize("name", [*CALLS, *BLOCKING])
def test_a_blocking_call_is_one_span(name: str) -> None:
    skip_without(name)
    run = launch(alone, args=(name, False))
    _, nbytes, peer = {**CALLS, **BLOCKING}[name]
    for rank in (0, 1):
        (mark,) = marks(run, rank)
        assert (mark.lane, mark.kind, mark.name, mark.op) == ("main", "comm", name, name)
        assert (mark.group, mark.seq, mark.nbytes, mark.peer) == ("world", 0, nbytes, peer)
        assert mark.t1_ns is not None
    assert run.values == [False, False]


@pytest.mark.parametrize("name", CALLS)
def test_an_asynchronous_call_is_its_issue_its_flight_and_its_wait(name: str) -> None:
    skip_without(name)
    run = launch(alone, args=(name, True))
    for rank in (0, 1):
        found = {s.kind: s for s in marks(run, rank)}
        if "coalesced" in name:  # it returns a Future, whose wait is not a Work's
            # The work may be done before the call that starts it returns.
            end_ns = max(found[kind].t1_ns or 0 for kind in ("issue", "comm"))
            found["wait"] = found["comm"]._replace(lane="main", t0_ns=end_ns, t1_ns=end_ns)
        assert {k: s.lane for k, s in found.items()} == {
            "issue": "main",
            "comm": "comm",
            "wait": "main",
        }
        assert {(s.op, s.group, s.seq) for s in found.values()} == {(name, "world", 0)}
        issue, flight, wait = found["issue"], found["comm"], found["wait"]
        assert issue.t1_ns is not None
        assert wait.t1_ns is not None
        assert flight.t0_ns <= issue.t0_ns <= issue.t1_ns <= wait.t0_ns <= wait.t1_ns
        assert flight.t1_ns is not None
    assert run.values == [True, True]


def test_every_call_that_is_recorded_is_tried_here() -> None:
    assert {*CALLS, *BLOCKING, *NOT_OF_GLOO} == {*COLLECTIVES}


@pytest.mark.parametrize("name", NOT_OF_GLOO)
def test_a_call_that_gloo_does_not_have_is_recorded_as_failed(name: str) -> None:
    skip_without(name)

    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        try:
            getattr(dist, name)(x(), torch.zeros(12) if rank == 0 else None, dst=0)
        except RuntimeError as error:
            return str(error)
        return ""

    run = launch(work)
    assert "does not support" in run.values[0]
    (mark,) = marks(run)
    assert (mark.op, mark.failed, mark.peer, mark.nbytes) == (name, True, 0, BYTES)


# All ways to write the same call: the root by global rank or by place in the group.
WAYS: dict[str, Callable[[int, Any, Any], Any]] = {
    "by position": lambda r, t, g: dist.broadcast(t, 3, g, False),
    "by name": lambda r, t, g: dist.broadcast(async_op=False, group=g, src=3, tensor=t),
    "by place": lambda r, t, g: dist.broadcast(t, group=g, group_src=1),
    "asynchronous by position": lambda r, t, g: dist.broadcast(t, 3, g, True).wait(),
    "by a number of NumPy's": lambda r, t, g: dist.broadcast(t, np.int64(3), g),
    "reduce": lambda r, t, g: dist.reduce(t, 3, dist.ReduceOp.SUM, g),
    "gather by place": lambda r, t, g: dist.gather(
        t, pieces() if r == 3 else None, group=g, group_dst=1
    ),
    "scatter by place": lambda r, t, g: dist.scatter(
        t, pieces() if r == 3 else None, group=g, group_src=1
    ),
    "send and recv": lambda r, t, g: dist.send(t, 3, g) if r == 1 else dist.recv(t, 1, g),
    "by place there, too": lambda r, t, g: (
        dist.send(t, group=g, group_dst=1) if r == 1 else dist.recv(t, group=g, group_src=0)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_call_is_understood(way: str) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        group = dist.new_group([1, 3])
        if rank in (1, 3):
            WAYS[way](rank, x(), group)
        dist.barrier()  # rank 0's process keeps the store, by which the others make the group
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    for rank in (1, 3):
        (mark,) = (s for s in marks(run, rank) if s.kind == "comm" and s.op != "barrier")
        assert mark.lane == ("comm" if "asynchronous" in way else "main")
        assert (mark.group, mark.seq, mark.nbytes) == ("ranks 1 3", 0, BYTES)
        assert mark.peer == (1 if mark.op == "recv" else 3)


def test_pieces_of_unequal_size() -> None:
    def work(rank: int) -> Any:
        dist.init_process_group("gloo")
        out, mine = torch.zeros(3), torch.full((2 * rank + 2,), float(rank))
        dist.all_to_all_single(out, mine, [1, 2], [rank + 1] * 2)
        dist.destroy_process_group()
        return out.tolist()

    run = launch(work)
    assert run.values == [[0, 1, 1], [0, 1, 1]]
    assert [marks(run, rank)[0].nbytes for rank in (0, 1)] == [8, 16]


def test_results_are_those_of_plain_torch() -> None:
    def work(rank: int) -> list[bool]:
        dist.init_process_group("gloo")
        same = []
        for call in (dist.all_reduce, dist.reduce, dist.broadcast):
            results = []
            for each in (call, call.__wrapped__):
                torch.manual_seed(rank)
                results.append(torch.randn(1000))
                each(results[-1], *([] if call is dist.all_reduce else [1]))
            same.append(torch.equal(*results))
        return same

    run = launch(work)
    assert run.values == [[True] * 3] * 2
    assert len(marks(run)) == 3  # plain torch's calls are not recorded


def test_all_calls_keep_their_names_signatures_and_documentation() -> None:
    def described() -> dict[str, tuple[str, str, str | None]]:
        found = {}
        for name in (*COLLECTIVES, *SENDS, *RECVS, *GROUP_CALLS, "batch_isend_irecv"):
            for module in (dist, distributed_c10d):
                call = getattr(module, name, None)
                if call is not None:
                    key = f"{module.__name__}.{name}"
                    assert pickle.loads(pickle.dumps(call)) is call
                    found[key] = (call.__name__, str(inspect.signature(call)), call.__doc__)
        return found

    (there,) = launch(lambda rank: described(), nprocs=1).values
    assert len(there) > 50
    assert there == described()


def test_a_call_that_fails_on_one_rank_alone_does_not_count() -> None:
    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        other = 1 - rank
        wrong: list[Callable[[], Any]] = [
            lambda: dist.all_reduce("no tensor"),
            lambda: dist.all_reduce("no tensor", async_op=True),
            lambda: dist.broadcast(x(), 7),
            lambda: dist.broadcast(x(), 2**40),
            lambda: dist.send("no tensor", other),
            lambda: dist.isend("no tensor", other),
            lambda: dist.irecv("no tensor", other),
            lambda: dist.send(x(), 2**40),
            lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, x(), other)] * 2 + ["x"]),
        ]
        failed = 0
        for call in wrong if rank == 0 else []:
            try:
                call()
            except (TypeError, ValueError, RuntimeError):
                failed += 1
        dist.all_reduce(x())
        handle = dist.isend(x(), other)
        dist.recv(x(), other)
        handle.wait()
        dist.barrier()
        dist.destroy_process_group()
        return failed

    run = launch(work)
    assert run.values == [9, 0]
    last = [[(s.op, s.seq) for s in marks(run, rank) if s.kind == "comm"][-4:] for rank in (0, 1)]
    assert last[0] == last[1] == [("all_reduce", 0), ("isend", 0), ("recv", 0), ("barrier", 1)]
    arrivals = [a for a in run.arrivals() if a.op in ("all_reduce", "barrier")]
    assert [a.last_rank is not None for a in arrivals] == [True, True]


@pytest.mark.parametrize("how", ["blocking", "asynchronous", "batched", "joining"])
def test_an_error_shows_no_line_of_the_recorder(how: str) -> None:
    def work(rank: int) -> None:
        if how == "joining":
            dist.init_process_group("nonsense")
        dist.init_process_group("gloo")
        if how == "blocking":
            dist.monitored_barrier(timeout="soon")
        elif how == "asynchronous":
            dist.all_reduce("no tensor", async_op=True)
        else:
            dist.batch_isend_irecv("nothing")

    with pytest.raises(WorkerFailed) as caught:
        launch(work)
    text = str(caught.value)
    assert "def work" not in text
    assert "dist." in text
    assert "ddp_lessons" not in text


def test_what_autograd_and_functional_collectives_call() -> None:
    def work(rank: int) -> tuple[float, float]:
        dist.init_process_group("gloo")
        weight = torch.ones(1, requires_grad=True)
        dist.nn.functional.all_reduce(weight).sum().backward()
        total = functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD)
        assert weight.grad is not None
        result = (weight.grad.item(), float(total))
        dist.destroy_process_group()
        return result

    run = launch(work)
    assert run.values[0] == (2.0, 2.0)
    assert {(s.op, s.seq) for s in marks(run)} == {("all_reduce", seq) for seq in range(3)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_public_call_that_communicates_is_recorded() -> None:
    quiet = {  # these only look something up, or make groups by calls that are recorded
        *("get_backend", "get_backend_config", "get_global_rank", "get_group_rank"),
        *("get_process_group_ranks", "get_rank", "get_world_size", "new_subgroups"),
        *("new_subgroups_by_enumeration", "split_group", "shrink_group"),
        *("get_backend_impl", "set_timeout"),
    }
    known = {*COLLECTIVES, *SENDS, *RECVS, *GROUP_CALLS, *quiet}
    names = {*distributed_c10d.__all__, *(n for n in dir(dist) if n[0] != "_")}
    calls = {n: getattr(distributed_c10d, n, None) for n in names if n[0] != "_"}
    with_group = {
        name
        for name, call in calls.items()
        if inspect.isfunction(call) and "group" in inspect.signature(call).parameters
    }
    assert with_group <= known


def test_sends_and_recvs_belong_together() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.send(torch.ones(2), 1)
            dist.send(torch.ones(3), dst=1)
            dist.isend(torch.ones(4), 1).wait()
            dist.send_object_list(["x"], dst=1)
        else:
            for size in (2, 3):
                dist.recv(torch.zeros(size), 0)
            dist.irecv(torch.zeros(4), 0).wait()
            dist.recv_object_list([None], src=0)
        dist.destroy_process_group()

    run = launch(work)
    pairs = [[(s.seq, s.peer, s.nbytes) for s in marks(run, r) if s.kind == "comm"] for r in (0, 1)]
    sizes = (8, 12, 16, None)
    assert pairs == [[(n, peer, size) for n, size in enumerate(sizes)] for peer in (1, 0)]
    assert [s.last_rank is not None for s in run.waits()] == [True] * 8


def test_a_recv_from_whoever_sends_first_learns_who_it_was() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 1:
            dist.recv(torch.zeros(1))
            dist.irecv(torch.zeros(1)).wait()
        elif rank == 2:
            dist.send(torch.ones(1), 1)
            dist.send(torch.ones(1), 1)
        dist.destroy_process_group()

    run = launch(work, nprocs=3)
    received = [(s.op, s.seq, s.peer) for s in marks(run, 1) if s.kind == "comm"]
    assert received == [("recv", 0, 2), ("irecv", 1, 2)]
    assert [share.last_rank is not None for share in run.waits()] == [True] * 4


def test_batched_sends_and_recvs() -> None:
    def work(rank: int) -> float:
        dist.init_process_group("gloo")
        got = torch.zeros(2)
        ops = [
            dist.P2POp(dist.isend, torch.full((2,), rank + 1.0), 1 - rank),
            dist.P2POp(dist.irecv, got, 1 - rank),
        ]
        for each in dist.batch_isend_irecv(ops):
            each.wait()
        dist.destroy_process_group()
        return float(got.sum())

    run = launch(work)
    assert run.values == [4.0, 2.0]
    flights = [(s.op, s.seq, s.peer) for s in marks(run) if s.kind == "comm"]
    assert flights == [("isend", 0, 1), ("irecv", 0, 1)]
    assert [s.name for s in marks(run) if s.kind == "issue"] == ["batch_isend_irecv"]


def test_subgroups_have_names_and_numbers_of_their_own() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        even, odd = dist.new_group([0, 2]), dist.new_group([1, 3], group_desc="odd")
        dist.all_reduce(x())
        for _ in range(2):
            dist.all_reduce(x(), group=even if rank % 2 == 0 else odd)
        again = dist.new_group([0, 2])
        if rank % 2 == 0:
            dist.barrier(again)
            dist.broadcast(x(), src=2, group=even)
        dist.destroy_process_group()

    run = launch(work, nprocs=4)
    numbers = [[(s.group, s.seq) for s in marks(run, rank)] for rank in range(4)]
    assert (
        numbers[0]
        == numbers[2]
        == [
            ("world", 0),
            ("ranks 0 2", 0),
            ("ranks 0 2", 1),
            ("ranks 0 2 #2", 0),
            ("ranks 0 2", 2),
        ]
    )
    assert (
        numbers[1]
        == numbers[3]
        == [
            ("world", 0),
            ("odd: ranks 1 3", 0),
            ("odd: ranks 1 3", 1),
        ]
    )
    assert marks(run)[-1].peer == 2


def test_a_group_that_is_left_and_made_again() -> None:
    def work(rank: int) -> None:
        for _ in range(3):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            dist.all_reduce(x())
            dist.destroy_process_group()

    run = launch(work, nprocs=1)
    assert [(s.group, s.seq) for s in marks(run)] == [
        ("world", 0),
        ("world #2", 0),
        ("world #3", 0),
    ]


def test_a_rank_outside_a_group_is_no_part_of_it() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        group = dist.new_group([0])
        dist.all_reduce(x(), group=group)  # torch warns on rank 1 and goes on
        dist.destroy_process_group()

    run = launch(work)
    assert [(s.group, s.seq) for s in marks(run, 0)] == [("ranks 0", 0)]
    assert [(s.group, s.seq) for s in marks(run, 1)] == [(None, None)]


class Forgetful(dict[Any, Any]):
    """Keeps no plans, so each call is recorded as if its line made it for the first time."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def lines_that_call_again(rank: int, forgetful: bool) -> list[int]:
    recorder = recording.current()
    assert recorder is not None
    if forgetful:
        recorder.plans = Forgetful()
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    in_library: dict[str, Any] = {"dist": dist}
    exec(compile("def reduce(t): dist.all_reduce(t)", torch.__file__, "exec"), in_library)
    tensors = [torch.ones(6), torch.ones(2, 3), torch.ones(6).double(), torch.ones(6)]
    failed = 0
    for tensor in tensors * 2:
        dist.all_reduce(tensor)
        for call, size in ((dist.all_gather_into_tensor, 12), (dist.all_to_all_single, 6)):
            call(torch.zeros(size), x())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        dist.all_reduce(tensor, dist.ReduceOp.SUM, pair)
        dist.all_gather([torch.zeros_like(tensor) for _ in range(2)], tensor)
        dist.broadcast(tensor, src=int(tensor.dim() > 1))
        for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)[: 2 - rank]:
            try:
                dist.all_reduce(tensor.cfloat(), operation)
            except ValueError:  # complex numbers have no maximum: only rank 0 fails
                failed += 1
        in_library["reduce"](tensor)  # the calling line is the same, the learner's line is not
        in_library["reduce"](tensor)

    def in_a_thread() -> None:
        for _ in range(3):
            dist.all_reduce(tensors[0])

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    in_a_thread()
    planned = len(recorder.plans)
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    in_a_thread()
    dist.destroy_process_group()
    return [failed, planned]


def test_what_a_line_calls_again_is_recorded_as_what_it_calls_first() -> None:
    def without_times(spans: list[Span]) -> list[Span]:
        ends = [0 if s.t1_ns else None for s in spans]
        return [
            s._replace(t0_ns=0, t1_ns=end, cpu_ns=None, queued_ns=None)
            for s, end in zip(spans, ends, strict=True)
        ]

    first, again = (launch(lines_that_call_again, (forgetful,)) for forgetful in (True, False))
    assert [value[0] for value in first.values] == [value[0] for value in again.values] == [8, 0]
    assert [value[1] for value in first.values] == [0, 0]
    assert all(value[1] > 10 for value in again.values)
    for rank in (0, 1):
        assert without_times(marks(again, rank)) == without_times(marks(first, rank))
        assert len({(s.tensor, s.site) for s in marks(again, rank)}) > 20


def test_work_that_is_waited_for_twice_and_asked_for() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        handle = dist.all_reduce(x(), async_op=True)
        while not handle.is_completed():
            time.sleep(0.001)
        handle.wait()
        handle.wait(timedelta(seconds=5))
        dist.destroy_process_group()

    found = marks(launch(work))
    assert [s.kind for s in found].count("wait") == 2
    assert len(found) == 4
    assert all(s.t1_ns is not None for s in found)


def test_collectives_of_two_threads() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]

        def many(group: Any) -> None:
            for _ in range(50):
                dist.all_reduce(x(), group=group)

        threads = [threading.Thread(target=many, args=(group,)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        dist.destroy_process_group()

    run = launch(work)
    for rank in (0, 1):
        found = marks(run, rank)
        assert {s.lane for s in found} == {"thread 1", "thread 2"}
        for lane in ("thread 1", "thread 2"):
            assert [s.seq for s in found if s.lane == lane] == list(range(50))
    assert all(share.last_rank is not None for share in run.waits())


def test_a_wait_in_another_thread() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        handle = dist.all_reduce(x(), async_op=True)
        thread = threading.Thread(target=handle.wait)
        thread.start()
        thread.join()
        dist.destroy_process_group()

    lanes = {s.kind: s.lane for s in marks(launch(work))}
    assert lanes == {"issue": "main", "comm": "comm", "wait": "thread 1"}


def test_a_call_that_fails_is_marked_and_leaves_nothing_open() -> None:
    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        calls: tuple[Callable[[], Any], ...] = (
            lambda: dist.broadcast(x(), 7),
            lambda: dist.all_reduce("no tensor"),
            lambda: dist.all_reduce("no tensor", async_op=True),
            lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, x(), 1 - rank), "nonsense"]),
        )
        for call in calls:
            try:
                call()
            except (ValueError, TypeError, RuntimeError):
                pass
            else:
                return 0
        dist.all_reduce(x())
        dist.destroy_process_group()
        return 1

    run = launch(work)
    assert run.values == [1, 1]
    assert all(s.t1_ns is not None for s in marks(run))
    last = [share for share in run.waits() if share.op == "all_reduce"][-1]
    assert last.last_rank is not None


def test_one_work_for_a_whole_batch_ends_all_of_it() -> None:
    """As NCCL returns it."""

    def work(rank: int) -> int:
        dist.init_process_group("gloo")

        def start(p2p_op_list: list[Any]) -> list[Any]:
            return [dist.all_reduce.__wrapped__(x(), async_op=True)]

        batch = collectives.batched("batch_isend_irecv", start)
        (handle,) = batch([dist.P2POp(call, x(), 1 - rank) for call in (dist.isend, dist.irecv)])
        handle.wait()
        dist.destroy_process_group()
        return 1

    run = launch(work)
    flights = [s for s in marks(run) if s.lane == "comm"]
    assert [s.op for s in flights] == ["isend", "irecv"]
    assert all(s.t1_ns is not None for s in flights)


def drawn(rank: int, seed: int) -> None:
    """A random program: all ranks draw the same calls, but each rank its own pauses."""
    dist.init_process_group("gloo")
    teams = [[0, 1, 2, 3], [0, 1], [2, 3], [0, 2, 3]]
    groups = [dist.new_group(team) for team in teams]
    numbers, mine, handles = random.Random(seed), random.Random(rank), []
    for _ in range(150):
        at, what, root = numbers.randrange(4), numbers.randrange(5), numbers.choice([0, 3])
        if mine.random() < 0.1:
            time.sleep(0.002)
        if rank not in teams[at]:
            continue
        group, source = groups[at], teams[at][min(root, len(teams[at]) - 1)]
        if what == 0:
            handles.append(dist.all_reduce(x(), group=group, async_op=True))
        elif what == 1:
            dist.broadcast(x(), source, group)
        elif what == 2:
            dist.reduce(x(), source, group=group)
        elif what == 3:
            dist.all_gather_object([None] * len(teams[at]), rank, group)
        elif rank in teams[at][:2]:
            first, second = teams[at][:2]
            dist.send(x(), second, group) if rank == first else dist.recv(x(), first, group)
    for handle in handles:
        handle.wait()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_of_a_random_program_every_call_finds_its_others(seed: int) -> None:
    run = launch(drawn, args=(seed,), nprocs=4)
    comm = [s for rank in range(4) for s in marks(run, rank) if s.kind == "comm"]
    shares = run.waits()
    assert len(shares) == len(comm) > 300
    assert all(share.last_rank is not None for share in shares)
    assert all(share.wait_ns + share.transfer_ns == share.t1_ns - share.t0_ns for share in shares)
    assert all(min(share.wait_ns, share.transfer_ns) >= 0 for share in shares)
    assert all(overlap.exposed_ns <= overlap.comm_ns for overlap in run.overlap())


def test_the_first_step_begins_after_groups_were_made() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        parameter = torch.nn.Parameter(x())
        parameter.grad = x()
        optimizer = torch.optim.SGD([parameter])
        for _ in range(2):
            dist.new_group([0, 1])
            for _ in range(2):
                dist.all_reduce(parameter.grad)  # in the second turn, this line has called before
        optimizer.step()
        dist.destroy_process_group()

    for rank, spans in enumerate(result.spans for result in launch(work).ranks):
        reduces = [s for s in spans if s.op == "all_reduce"]
        (step,) = (s for s in spans if s.lane == "steps")
        assert step.t0_ns == reduces[2].t0_ns, rank


def test_nested_marks_and_steps_of_an_optimizer() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(3):
            with span("backward"):
                weight.grad = torch.ones(1)
                dist.all_reduce(weight.grad)
            optimizer.step()
        dist.destroy_process_group()

    run = launch(work)
    assert [s.step for s in marks(run)] == [0, 1, 2]
    lanes = [s for s in run.ranks[0].spans if s.lane == "steps"]
    assert [s.name for s in lanes] == ["step 0", "step 1", "step 2"]
    for one, following in pairwise(lanes):
        assert one.t1_ns is not None
        assert one.t1_ns <= following.t0_ns


def shares_given_up(rank: int) -> tuple[bool, bool, bool]:
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    recorder = recording.current()
    assert recorder is not None
    kept = (len(recorder.groups), len(recorder.models)) == (2, 1)  # the group, and DDP's wrapper
    dist.destroy_process_group()
    ddp_traffic.release_groups(recorder)
    return kept, hasattr(model, "reducer"), bool(recorder.groups or recorder.models)


def test_a_script_gives_up_the_groups_of_its_models() -> None:
    assert launch(shares_given_up).values == [(True, False, False)] * 2


def test_calls_that_c_makes() -> None:
    """Handlers of atexit have no Python frame that calls them."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        x = torch.ones(1)
        atexit.register(dist.destroy_process_group)
        atexit.register(dist.barrier)
        atexit.register(dist.all_reduce(x, async_op=True).wait)
        atexit.register(dist.all_reduce, x, async_op=True)
        atexit.register(dist.all_reduce, x)
        atexit.register(dist.recv if rank else dist.send, torch.ones(1), 1 - rank)
        atexit.register(dist.new_group, [0, 1])

    run = launch(work)
    assert run.ranks[0].output == ""
    ended = [s.op for s in run.ranks[1].spans if s.kind == "comm" and s.t1_ns is not None]
    assert {"destroy_process_group", "barrier", "all_reduce", "recv", "new_group"} <= {*ended}
