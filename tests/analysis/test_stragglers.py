"""The rank that keeps the others waiting, and why: exact numbers from made-up runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Cause, Run, launch, plots
from ddp_lessons.analysis.stragglers import NEVER_CAME
from ddp_lessons.wire.records import Span
from tests.analysis.test_metrics import span, step
from tests.analysis.test_wait_states import call, run_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Pieces = Mapping[str, int]  # ns that a rank spends in each way before each all_reduce


def stepped(late: dict[int, int], ranks: int = 3, delay: int = 60) -> list[Span]:
    """Steps of 100 ns with an all_reduce, to which rank `late[step]` comes `delay` ns later."""
    spans = []
    for number, culprit in late.items():
        for rank in range(ranks):
            begin = 100 * number + 1
            spans.append(step(rank, number, begin, begin + 99))
            came = begin + 20 + delay * (rank == culprit)
            spans.append(call(rank, came, begin + 90, seq=number, step=number))
    return spans


def test_a_chronic_straggler() -> None:
    verdict = run_of(*stepped(dict.fromkeys(range(8), 2))).straggler()
    assert verdict[:4] == ("chronic", 2, 1.0, dict.fromkeys(range(2, 8), 2))


def test_rotating_stragglers() -> None:
    verdict = run_of(*stepped({n: n % 3 for n in range(8)})).straggler()
    assert (verdict.kind, verdict.rank) == ("rotating", None)
    assert verdict.share == pytest.approx(1 / 3)
    assert verdict.late_by_step == {n: n % 3 for n in range(2, 8)}


@pytest.mark.parametrize("lane", ["cuda", "buckets"])
def test_a_straggler_for_whom_gpus_wait(lane: str) -> None:
    """With NCCL no main thread is blocked: the call returns at once."""
    spans = stepped(dict.fromkeys(range(8), 2))
    spans = [s._replace(lane=lane) if s.kind == "comm" else s for s in spans]
    verdict = run_of(*spans).straggler()
    assert verdict[:4] == ("chronic", 2, 1.0, dict.fromkeys(range(2, 8), 2))


def test_no_straggler_where_waiting_is_little() -> None:
    verdict = run_of(*stepped(dict.fromkeys(range(8), 2), delay=3)).straggler()
    assert (verdict.kind, verdict.rank) == ("none", None)
    assert run_of().straggler()[:4] == ("none", None, 0.0, {})


def test_the_warm_up_does_not_count_where_there_are_steps_enough() -> None:
    warm_up = {0: 0, 1: 0}
    verdict = run_of(*stepped({**warm_up, **dict.fromkeys(range(2, 8), 2)})).straggler()
    assert verdict.share == 1.0
    few = run_of(*stepped({**warm_up, 2: 2})).straggler()
    assert few.late_by_step == {0: 0, 1: 0, 2: 2}


def test_what_is_outside_the_steps_does_not_count() -> None:
    meeting = [call(rank, 900 + 50 * (rank == 0), 990, seq=99) for rank in range(3)]
    verdict = run_of(*stepped(dict.fromkeys(range(8), 2)), *meeting).straggler()
    assert verdict.share == 1.0


def test_without_steps_everything_counts() -> None:
    spans = [call(rank, 100 + 300 * (rank == 1), 500) for rank in range(3)]
    verdict = run_of(*spans).straggler()
    assert verdict[:4] == ("chronic", 1, 1.0, {})


@pytest.mark.parametrize(("op", "late"), [("broadcast", 1), ("gather", 2)])
def test_a_late_root_and_a_root_that_waits(op: str, late: int) -> None:
    """All wait for the root of a broadcast; the root of a gather waits for all."""
    spans = [call(r, 100 + 700 * (r == late), 900, op, peer=1) for r in range(3)]
    assert run_of(*spans).straggler()[:4] == ("chronic", late, 1.0, {})


def test_a_rank_that_waited_itself_is_not_blamed_for_it() -> None:
    """Rank 1 is late for a broadcast, for which rank 0 waits; in the all_reduce 2 waits for 0."""
    spans = []
    for number in range(8):
        begin = 1000 * number + 1
        spans += [step(rank, number, begin, begin + 999) for rank in range(3)]
        sent = {0: (10, 420), 1: (400, 430), 2: (10, 20)}
        met = {0: (820, 900), 1: (810, 900), 2: (410, 900)}
        for place, (op, times) in enumerate({"broadcast": sent, "all_reduce": met}.items()):
            for rank, (t0, t1) in times.items():
                made = call(rank, begin + t0, begin + t1, op, 2 * number + place, step=number)
                spans.append(made._replace(peer=0 if op == "broadcast" else None))
    verdict = run_of(*spans).straggler()
    assert verdict[:2] == ("chronic", 1)
    assert verdict.late_by_step == dict.fromkeys(range(2, 8), 1)
    blamed = 6 * (390 + 390)  # by rank 0 in the broadcast, by rank 2 in the all_reduce
    assert verdict.seconds == pytest.approx(blamed / 1e9)
    assert verdict.share == pytest.approx(blamed / (blamed + 6 * (20 + 10)))


def test_nobody_is_said_to_be_on_time_where_ranks_wait_for_sends() -> None:
    spans = [call(0, 100, 900, "recv", peer=1), call(1, 800, 900, "send", peer=0)]
    verdict = run_of(*spans).straggler()
    assert (verdict.kind, verdict.rank, verdict.unseen) == ("unknown", None, ("sends and recvs",))
    spans = [call(0, 100, 900, "recv", peer=1), call(1, 101, 900, "send", peer=0)]
    assert run_of(*spans).straggler().kind == "none"


def joins_by_rpc(rank: int, folder: str) -> None:
    """By a file: rank 0 would take its store along when it ends."""
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/meeting")
    rpc.init_rpc(f"worker{rank}", None, rank, 2, options)
    rpc.shutdown()


def calls_a_method(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    dist.group.WORLD.allreduce([torch.ones(1)]).wait()


def wraps_over_another_backend(rank: int, folder: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    model = DistributedDataParallel(nn.Linear(2, 1))
    model(torch.ones(1, 2))


def hangs_after_rpc(rank: int, folder: str) -> None:
    joins_by_rpc(rank, folder)
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (joins_by_rpc, "RPC"),
        (calls_a_method, "a process group's own methods"),
        (wraps_over_another_backend, "DDP over fake"),
        (hangs_after_rpc, "RPC"),
    ],
)
def test_what_was_not_recorded_is_said(
    fn: Callable[[int, str], None], what: str, tmp_path: Path, figures_closed: None
) -> None:
    run = launch(fn, (str(tmp_path),), nprocs=2, check=False)
    assert run.unseen == [what]
    in_vain = () if run.ok else (NEVER_CAME,)  # which took how long, depends on the machine
    assert run.straggler().unseen in ((what,), (what, *in_vain))
    assert run.straggler().kind in ("unknown", "rotating", "chronic")
    for picture in (plots.timeline, plots.waits):
        assert f"not recorded: {what}" in picture(run).get_xlabel()
    assert run.ok or f"not recorded: {what}" in run.explain()


@pytest.mark.ranks
def test_what_is_recorded_whole_is_not_said_to_be_unseen() -> None:
    """DDP's buckets and buffers, with hooks and without, and what optimizers and FSDP send."""

    def work(rank: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.optim import ZeroRedundancyOptimizer

        dist.init_process_group("gloo")
        for hook in (None, default_hooks.allreduce_hook):
            net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            model = DistributedDataParallel(net)
            if hook is not None:
                model.register_comm_hook(None, hook)
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            with model.join():
                for _ in range(2 + rank):
                    model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
        sharded = fully_shard(nn.Linear(4, 4))
        sharded(torch.ones(1, 4)).sum().backward()

    run = launch(work, nprocs=2)
    assert run.unseen == []


def lived(*ranks: Pieces, read: Sequence[int] = (0, 1), lane: str = "main") -> Run:
    """A run of six all_reduces; before each, every rank spends its time as told.

    Ways are "compute", "queue" and "sleep"; "data", and names of spans within spans such as
    "outer/inner", in which it sleeps. Only the ranks in `read` read their processor's time.
    """
    spans: list[Span] = []
    used, queued, release = [7, 900], [50, 3], 10
    for seq in range(6):
        came = [release, release]
        for rank, pieces in enumerate(ranks):
            for way, ns in pieces.items():
                begin, end = came[rank], came[rank] + ns
                used[rank] += ns * (way == "compute")
                queued[rank] += ns * (way == "queue")
                came[rank] = end
                if way == "data":
                    spans.append(span(rank, "main", "data", begin, end))
                elif way not in ("compute", "queue", "sleep"):
                    for name in way.split("/"):
                        kind = "data" if name == "data" else "compute"
                        made = span(rank, "main", kind, begin, end)
                        spans.append(made._replace(name=name))
        release = max(came) + 5
        for rank, at in enumerate(came):
            spans.append(call(rank, at, release, seq=seq, lane=lane))
            if rank in read:
                spans[-1] = spans[-1]._replace(cpu_ns=used[rank], queued_ns=queued[rank])
    spans += [call(rank, 1, 10, "init_process_group", None, group=None) for rank in (0, 1)]
    spans[-2:] = [
        s._replace(cpu_ns=(7, 900)[s.rank], queued_ns=(50, 3)[s.rank]) if s.rank in read else s
        for s in spans[-2:]
    ]
    return run_of(*spans, ranks=2)


@pytest.mark.parametrize(
    ("usual", "late", "cause"),
    [
        ({"compute": 20}, {"compute": 20, "sleep": 60}, ("blocked", 1.0, None)),
        ({"compute": 20}, {"compute": 80}, ("compute", 1.0, None)),
        ({"compute": 20}, {"compute": 20, "queue": 80}, ("starved", 1.0, None)),
        ({"compute": 20}, {"compute": 20, "data": 60}, ("input", 1.0, None)),
        ({"compute": 20, "data": 80}, {"compute": 80, "data": 80}, ("compute", 1.0, None)),
        ({"compute": 20, "sleep": 50}, {"compute": 20, "sleep": 100}, ("blocked", 1.0, None)),
        ({"compute": 20}, {"compute": 20, "augment": 60}, ("span", 1.0, "augment")),
        ({"augment": 20}, {"augment": 80}, ("span", 1.0, "augment")),
        ({"compute": 20}, {"compute": 20, "step/augment": 60}, ("span", 1.0, "augment")),
        ({"compute": 20}, {"compute": 20, "load/data": 60}, ("input", 1.0, None)),
        ({"compute": 20}, {"compute": 28, "augment": 54, "sleep": 2}, ("span", 54 / 64, "augment")),
    ],
)  # fmt: skip
def test_what_the_late_rank_spends_more_time_on_is_the_cause(
    usual: Pieces, late: Pieces, cause: tuple[str, float, str | None]
) -> None:
    verdict = lived(usual, late).straggler()
    assert verdict[:3] == ("chronic", 1, 1.0)
    assert verdict.seconds == pytest.approx(6e-9 * (sum(late.values()) - sum(usual.values())))
    assert verdict.cause is not None
    assert verdict.cause.share == pytest.approx(cause[1])
    assert (verdict.cause.kind, verdict.cause.span) == (cause[0], cause[2])


@pytest.mark.parametrize(
    ("usual", "late"),
    [
        ({"compute": 20}, {"compute": 50, "sleep": 30}),
        ({"compute": 20}, {"compute": 20, "queue": 30, "sleep": 30}),
        ({"compute": 20}, {"compute": 60, "data": 40}),
        ({"compute": 20}, {"compute": 60, "augment": 20}),
        ({"compute": 60}, {"sleep": 100}),  # other work: the 40 ns are no part of it
        ({"other": 60}, {"compute": 80, "a": 20, "b": 0}),
    ],
)  # fmt: skip
def test_where_nothing_explains_four_fifths_it_is_not_known(usual: Pieces, late: Pieces) -> None:
    verdict = lived(usual, late).straggler()
    assert verdict.kind == "chronic"
    assert verdict.cause is None
    assert "; why is not known" in str(verdict)


def test_two_spans_apart_that_both_explain_it_are_none() -> None:
    """Each is as long as the whole wait, and the other rank has as much of something else."""
    verdict = lived({"x": 60}, {"a": 60, "b": 60}, read=()).straggler()
    assert verdict.kind == "chronic"
    assert verdict.cause is None


def test_a_rank_that_computes_more_and_so_queues_more_computes() -> None:
    """On a machine with too few processors all ranks queue alike."""
    alike = lived({"compute": 10, "queue": 10}, {"compute": 40, "queue": 40}).straggler()
    assert alike.cause == ("compute", 1.0, None)
    quick = lived({"compute": 10, "queue": 10}, {"compute": 80, "queue": 0}).straggler()
    assert quick.cause == ("compute", 1.0, None)


def test_lack_of_a_processor_is_told_before_where_it_shows() -> None:
    """A starved rank takes longer in all its spans, and in fetching batches."""
    run = lived({"compute": 20, "sleep": 1}, {"compute": 20, "queue": 80})
    times = [(s.t0_ns - 101, s.t0_ns) for s in run.ranks[1].spans if s.op == "all_reduce"]
    marked = [
        span(1, "main", kind, begin, end) for begin, end in times for kind in ("compute", "data")
    ]
    spans = [*marked, *(s for rank in run.ranks for s in rank.spans)]
    verdict = run_of(*spans, ranks=2).straggler()
    assert verdict.cause is not None
    assert verdict.cause.kind == "starved"


@pytest.mark.parametrize("read", [(), (0,)])
def test_without_readings_only_what_is_marked_is_known(read: Sequence[int]) -> None:
    """Of records in an older format, outside Linux, and where CUDA is used."""
    for late in ({"compute": 90}, {"compute": 30, "queue": 60}, {"compute": 30, "sleep": 60}):
        assert lived({"compute": 30}, late, read=read).straggler().cause is None
    verdict = lived({"compute": 30}, {"compute": 30, "data": 60}, read=read).straggler()
    assert verdict.cause == ("input", 1.0, None)


def test_what_the_other_rank_may_have_spent_alike_is_no_cause() -> None:
    """Whatever rank 0 did in its 30 ns, rank 1 computes 60 ns more, but may sleep only 30 more."""
    computes = lived({"compute": 30}, {"compute": 90}, read=(1,)).straggler()
    assert computes.cause == ("compute", 1.0, None)
    sleeps = lived({"compute": 30}, {"compute": 30, "sleep": 60}, read=(1,)).straggler()
    assert sleeps.cause is None


def test_ranks_for_whom_gpus_wait() -> None:
    run = lived({"compute": 20}, {"compute": 20, "data": 60}, read=(), lane="cuda")
    assert run.straggler().cause == ("input", 1.0, None)
    run = lived({"compute": 20}, {"compute": 20, "sleep": 60}, read=(), lane="cuda")
    assert run.straggler().cause is None


def test_the_warm_up_explains_nothing() -> None:
    """The late rank sleeps in the first two steps, and then computes."""
    spans = []
    used = 0
    for number in range(8):
        begin = 100 * number + 1
        for rank in (0, 1):
            took = 10 + 70 * (rank == 1)
            used += took * (rank == 1 and number > 1)
            cpu_ns = used if rank == 1 else 10 * (number + 1)
            spans.append(step(rank, number, begin, begin + 99))
            arrival = call(rank, begin + took, begin + 99, seq=number, step=number)
            spans.append(arrival._replace(cpu_ns=cpu_ns, queued_ns=0))
    verdict = run_of(*spans, ranks=2).straggler()
    assert verdict.cause is not None
    assert verdict.cause.kind == "compute"


def test_waiting_in_turns_has_no_cause() -> None:
    assert run_of(*stepped({n: n % 3 for n in range(8)})).straggler().cause is None


def test_it_is_said_in_words() -> None:
    assert str(Cause("span", 0.936, "augment")) == "94 % of it in its span 'augment'"
    verdict = lived({"compute": 20}, {"compute": 20, "data": 60}).straggler()
    text = "rank 1 makes the others wait (1.2 s in all): 100 % of it fetching batches"
    assert str(verdict._replace(seconds=1.23)) == text
    assert "(45 ms in all)" in str(verdict._replace(seconds=0.0451))


def test_calls_to_which_a_rank_never_came_are_not_judged() -> None:
    """As in a run that hung: that nobody is late for the others says little."""
    early = [call(rank, 10 + rank, 20, seq=0) for rank in range(3)]
    verdict = run_of(*early, *[call(rank, 30, None, seq=1) for rank in (0, 2)]).straggler()
    assert (verdict.kind, verdict.rank) == ("unknown", None)
    assert verdict.unseen == ("calls to which a rank never came",)
    assert str(verdict) == "not judged: calls to which a rank never came"


def test_where_spans_were_dropped_nobody_is_said_to_be_on_time() -> None:
    run = run_of(*[call(rank, 10, 20, seq=0) for rank in range(3)])
    ranks = [replace(rank, dropped=5 * (rank.rank == 1)) for rank in run.ranks]
    verdict = Run("work", ranks, begin_ns=run.begin_ns).straggler()
    assert (verdict.kind, verdict.unseen) == ("unknown", ("dropped spans",))
