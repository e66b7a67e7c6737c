"""The first mismatch of ranks' calls: hangs that it explains, and silently wrong numbers."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, WorkersHung, launch
from ddp_lessons.diagnosis import mismatch
from ddp_lessons.diagnosis.calls import Calls
from ddp_lessons.diagnosis.rank_state import handled
from ddp_lessons.wire.records import ErrorRecord
from tests.support.by_hand import CLOSED, SCRIPT, call, error, record, run_of

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def hung(fn: Any, nprocs: int = 3) -> Run:
    with pytest.raises(WorkersHung) as caught:
        launch(fn, nprocs=nprocs, timeout=30)
    assert isinstance(caught.value.run, Run)
    return caught.value.run


def kind(run: Run) -> tuple[str, tuple[int, ...]]:
    assert run.verdict is not None
    return run.verdict.kind, run.verdict.ranks


def source(run: Run) -> str:
    assert run.verdict is not None
    assert run.verdict.frame is not None
    return run.verdict.frame.source


def test_a_barrier_for_rank_zero_only() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()
        dist.all_reduce(torch.ones(1))

    run = hung(work)
    assert kind(run) == ("skipped collective", (0,))
    assert source(run) == "dist.barrier()"
    assert "rank 0 calls barrier at" in run.explain()
    assert "which ranks 1 and 2 skipped" in run.explain()


def test_a_barrier_that_one_rank_skips_in_a_loop() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(3):
            if (rank, step) != (1, 2):
                dist.all_reduce(torch.ones(1))
            dist.barrier()

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    assert source(run) == "dist.all_reduce(torch.ones(1))"


@pytest.mark.parametrize("size", [1, 2])
def test_a_call_that_one_rank_makes_more_in_a_loop(size: int) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(3):
            dist.broadcast(torch.ones(1), 0)
            dist.all_reduce(torch.ones(1))
            if (rank, step) == (2, 1):
                dist.all_reduce(torch.ones(size))  # alone

    run = hung(work)
    assert kind(run) == ("skipped collective", (2,))
    assert source(run) == "dist.all_reduce(torch.ones(size))  # alone"
    assert "rank 2 calls all_reduce at" in run.explain()


def test_a_call_that_one_rank_makes_more_before_calls_differ() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for _ in range(3):
            dist.all_reduce(torch.ones(1))
            if rank == 2:
                dist.all_reduce(torch.ones(1))  # alone
        dist.barrier()

    run = hung(work)
    assert kind(run) == ("skipped collective", (2,))
    assert source(run) == "dist.all_reduce(torch.ones(1))  # alone"


def test_branches_in_another_order() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        x = torch.ones(1)
        if rank == 1:
            dist.broadcast(x, 0)
            dist.all_reduce(x)
        else:
            dist.all_reduce(x)
            dist.broadcast(x, 0)

    run = hung(work)
    assert kind(run) == ("different collectives", (1,))
    assert "ranks 0 and 2 call all_reduce and rank 1 calls broadcast from rank 0" in run.explain()


def test_of_two_ranks_neither_is_blamed() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.barrier()
        else:
            dist.all_reduce(torch.ones(1))

    run = hung(work, 2)
    assert kind(run) == ("different collectives", (0, 1))
    assert run.error is not None
    assert run.error.rank is None


def test_roots_that_differ() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.broadcast(torch.ones(1), 1 if rank == 2 else 0)

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("different collectives", (2,))
    assert "rank 2 calls broadcast from rank 1" in run.explain()


def test_tensors_of_another_size() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(3 if rank == 1 else 2))
        dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("tensor mismatch", (1,))
    assert "float32 (2,) on ranks 0 and 2 and float32 (3,) on rank 1" in run.explain()
    assert "rank 1 calls all_reduce with float32 (3,): " in run.explain()


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tensors_of_other_bytes_where_a_rank_has_returned(odd: int, ranks: int) -> None:
    """The rank with more bytes is done with what it got; gloo aborts those that got too much."""

    def work(rank: int) -> Any:
        dist.init_process_group("gloo")
        x = torch.tensor(3) if rank == odd else torch.tensor(2.0)
        dist.all_reduce(x)
        dist.destroy_process_group()
        return x.item()

    for _ in range(3):  # who ends how is chance
        run = launch(work, nprocs=ranks, check=False)
        assert kind(run) == ("tensor mismatch", (0, 1) if ranks == 2 else (odd,))
        assert source(run) == "dist.all_reduce(x)"
        assert f"int64 () on rank {odd}" in run.explain()


def test_calls_that_changed_places_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> tuple[float, float]:
        dist.init_process_group("gloo")
        ones, hundreds = torch.ones(1), torch.full((1,), 100.0)
        if rank == 1:
            dist.all_reduce(hundreds)
            dist.all_reduce(ones)
        else:
            dist.all_reduce(ones)
            dist.all_reduce(hundreds)
        dist.destroy_process_group()
        return ones.item(), hundreds.item()

    run = launch(work, nprocs=3)
    assert run.values[0] == (102.0, 201.0)
    (warning,) = run.warnings
    assert (warning.kind, warning.ranks) == ("different collectives", (1,))
    assert str(warning).startswith("Warning: call 1 was not the same on all ranks")
    assert "dist.all_reduce(hundreds)" in warning.text
    assert capsys.readouterr().out == f"{warning}\n"
    assert run.explain().endswith(str(warning))


def test_dtypes_that_differ_are_warned_of() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(2, dtype=torch.int32 if rank else torch.float32))
        dist.destroy_process_group()

    (warning,) = launch(work).warnings
    assert "float32 (2,) on rank 0 and int32 (2,) on rank 1" in warning.text


def test_a_skip_that_shifts_all_later_calls() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(3):
            if (rank, step) != (0, 1):
                dist.all_reduce(torch.ones(1))
            dist.all_reduce(torch.zeros(1))

    run = launch(work, nprocs=3, check=False)  # rank 0 returns, one call short
    assert kind(run) == ("skipped collective", (0,))
    assert source(run) == "dist.all_reduce(torch.ones(1))"


def healthy_roles(rank: int) -> None:
    dist.init_process_group("gloo")
    x = torch.ones(2)
    for root in range(dist.get_world_size()):
        if rank == root:
            dist.broadcast(x, root)
        else:
            dist.broadcast(x.clone(), root)
    if rank == 0:
        dist.all_reduce(x)
    else:
        dist.all_reduce(x * 2)
    dist.all_reduce(x.view(1, 2) if rank else x)  # another shape of the same size is fine
    dist.destroy_process_group()


def healthy_turns(rank: int) -> None:
    dist.init_process_group("gloo")
    for step in range(4):
        if (step + rank) % 2:
            dist.all_reduce(torch.ones(1))
        else:
            dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def healthy_helpers(rank: int) -> None:
    def mean(x: torch.Tensor) -> torch.Tensor:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return x / 2

    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    for _ in range(3):
        mean(torch.ones(3))
        if rank < 2:
            dist.barrier(pair)
    dist.all_gather_object([None] * dist.get_world_size(), "x" * rank)  # of several sizes
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [healthy_roles, healthy_turns, healthy_helpers])
def test_healthy_programs_give_no_warning(work: Any) -> None:
    run = launch(work, nprocs=3)
    assert run.ok
    assert run.warnings == []


def test_leaving_the_group_is_for_all() -> None:
    def work(rank: int, leavers: tuple[int, ...]) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank in leavers:
            dist.destroy_process_group()

    (warning,) = launch(work, ((0, 2),), nprocs=3).warnings
    assert "rank 1 returned without destroy_process_group" in warning.text
    assert launch(work, ((),), nprocs=3).warnings == []


def test_a_subgroup_may_be_left_by_some() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        pair = dist.new_group([0, 1])
        if rank == 1:
            dist.destroy_process_group(pair)
        dist.barrier()
        dist.destroy_process_group()

    assert launch(work, nprocs=3).warnings == []


def test_a_call_in_an_except_block_shows_what_is_handled_there() -> None:
    """The checkpoint of a rank that failed alone would hide why it failed."""

    def save() -> None:
        dist.all_gather_into_tensor(torch.ones(3), torch.ones(1))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            for step in range(3):
                save()  # now its line is known
                if (rank, step) == (1, 2):
                    raise ValueError("bad sample 17")
                dist.all_reduce(torch.ones(1))
        except ValueError:
            save()
            raise

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    text = run.explain()
    assert "rank 1 called it while handling ValueError: bad sample 17: " in text
    assert 'raise ValueError("bad sample 17")' in text
    assert "An exception that a rank handles alone" in text
    assert [rank.handling is None for rank in run.ranks] == [True, False, True]
    # The stop of another rank may have ended its call before it was stopped itself.
    closed = ErrorRecord("RuntimeError", "RuntimeError: Connection closed by peer", ())
    told = handled(replace(run.ranks[1], error=closed))
    assert told is not None
    assert told.summary == "ValueError: bad sample 17"


def test_a_line_that_was_called_while_handling_is_called_again_without() -> None:
    """The ranks agree on a flag, also where one handles an exception, as they should."""

    def agree(good: bool) -> None:
        dist.all_reduce(torch.tensor(float(good)))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for turn in range(4):
            try:
                if (rank, turn) == (0, 0):
                    raise ValueError("bad sample 17")
                agree(True)
            except ValueError:
                agree(False)
            if (rank, turn) == (1, 2):
                dist.barrier()

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    assert "ValueError" not in run.explain()
    assert "An exception that a rank handles alone" not in run.explain()


def test_what_was_handled_before_is_no_evidence() -> None:
    """Every rank handles an exception on the way; the hang has another reason."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            raise FileNotFoundError("no checkpoint yet")
        except FileNotFoundError:
            dist.barrier()
        if rank == 0:
            dist.barrier()
        dist.all_reduce(torch.ones(1))

    run = hung(work)
    assert kind(run) == ("skipped collective", (0,))
    assert "FileNotFoundError" not in run.explain()


# Messages: a send and its recv


def pass_on(how: str, rank: int, sent: torch.Tensor, taken: torch.Tensor) -> None:
    """Rank 0 sends to rank 1, which receives; rank 2 looks on."""
    group = dist.new_group([1, 0]) if how == "in a group" else None
    if rank == 0:
        match how:
            case "at once":
                dist.isend(sent, 1).wait()
            case "in a batch":
                for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, 1)]):
                    work.wait()
            case _:
                dist.send(sent, 1, group=group, tag=3 * (how == "with a tag"))
    if rank == 1:
        match how:
            case "at once":
                dist.irecv(taken, 0).wait()
            case "in a batch":
                for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, taken, 0)]):
                    work.wait()
            case "from any":
                dist.recv(taken)
            case "from any, at once":
                dist.irecv(taken).wait()
            case _:
                dist.recv(taken, 0, group=group, tag=3 * (how == "with a tag"))


WAYS = (
    "plainly", "at once", "in a batch", "with a tag", "in a group", "from any", "from any, at once",
)  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_a_message_that_is_too_long_for_its_recv(how: str) -> None:
    """Gloo aborts the receiver; the ranks that then lose it are not to blame."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        pass_on(how, rank, torch.ones(2), torch.zeros(2))
        pass_on(how, rank, torch.ones(4), torch.zeros(2))
        dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("tensor mismatch", (0, 1))
    assert "irecv" in source(run) or "recv(taken" in source(run)
    text = run.explain()
    assert "rank 0 sends float32 (4,) to rank 1, whose " in text
    assert "expects float32 (2,)" in text
    assert " to rank 1 with float32 (4,): " in text
    assert " with float32 (2,): " in text
    assert "of the shape and dtype that is sent" in text


@pytest.mark.parametrize(
    ("how", "sent", "taken", "consequence"),
    [
        ("plainly", "float32 (2,)", "float32 (4,)", "the rest of that tensor keeps its old values"),
        ("in a batch", "float32 (4,)", "float64 (4,)", "the numbers are mixed up"),
        ("at once", "float32 (4,)", "float64 (2,)", "the numbers are mixed up"),
        ("from any", "float32 (4,)", "int32 (4,)", "the numbers are mixed up"),
        ("from any, at once", "int64 ()", "float64 ()", "the numbers are mixed up"),
    ],
)
def test_a_message_that_fits_but_is_another_is_warned_of(
    how: str, sent: str, taken: str, consequence: str
) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        pass_on(how, rank, made_as(sent), made_as(taken))
        dist.barrier()
        dist.destroy_process_group()

    (warning,) = launch(work, nprocs=3).warnings
    assert f"rank 0 sends {sent} to rank 1, whose " in str(warning)
    assert f"expects {taken}, so {consequence}, and nothing failed: rank 0 calls " in str(warning)


def made_as(tensor: str) -> torch.Tensor:
    dtype, _, shape = tensor.partition(" ")
    return torch.ones(eval(shape), dtype=getattr(torch, dtype))


@pytest.mark.parametrize("how", WAYS)
def test_messages_that_are_meant_so_give_no_warning(how: str) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for sent, taken in (
            ("float32 (2, 3)", "float32 (6,)"),
            ("uint8 (16,)", "float32 (4,)"),
            ("complex64 (2,)", "float32 (2, 2)"),
            ("bool (4,)", "uint8 (4,)"),
            ("int16 (4,)", "bfloat16 (4,)"),
        ):
            pass_on(how, rank, made_as(sent), made_as(taken))
            dist.barrier()
        dist.destroy_process_group()

    assert launch(work, nprocs=3).warnings == []


@pytest.mark.parametrize("recvs", [1, 2])
def test_objects_that_are_received_as_a_tensor(recvs: int) -> None:
    """The first recv gets the object's size; the rest of it fits no tensor, or nobody takes it."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.send_object_list([{"lr": 0.1}], 1)
        for _ in range(recvs if rank == 1 else 0):
            dist.recv(torch.zeros(1, dtype=torch.int64), 0)
        dist.barrier()

    run = launch(work, nprocs=3, timeout=3, check=False)
    assert kind(run) == ("unmatched send", (0, 1))
    assert "rank 0 calls send_object_list to rank 1, which calls recv" in run.explain()
    assert "must be received by recv_object_list" in run.explain()


def test_a_tensor_that_is_received_as_objects_is_no_want_of_memory() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            dist.send(torch.ones(2), 1)
        if rank == 1:
            dist.recv_object_list([None], 0)
        dist.barrier()

    run = launch(work, nprocs=3, timeout=3, check=False)
    assert kind(run) == ("unmatched send", (0, 1))
    assert "rank 0 calls send to rank 1, which calls recv_object_list" in run.explain()
    assert "fewer ranks" not in run.explain()


def test_a_short_message_is_no_reason_for_what_comes_later() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        pass_on("plainly", rank, torch.ones(2), torch.zeros(4))
        if rank == 1:
            dist.recv(torch.zeros(4), 0)
        dist.barrier()

    run = launch(work, nprocs=3, timeout=30, check=False)
    assert kind(run) == ("unmatched recv", (1,))


def test_a_message_too_long_is_found_in_the_record_of_a_script() -> None:
    """Only the calls are recorded, not gloo's last words."""
    message: dict[str, Any] = {"lane": "main", "tag": 0}
    sent = call(0, "send", 0, 7, peer=1, nbytes=16, tensor="float32 (4,)")
    taken = call(1, "recv", 0, 9, peer=0, nbytes=8, tensor="float32 (2,)", open=True)
    barrier = call(0, "barrier", 0, 11)._replace(failed=True)
    records = [
        record([sent._replace(**message), barrier], 0, 2, raised=error(CLOSED, 11, "barrier")),
        record([taken._replace(**message)], 1, 2),
    ]
    run = run_of(records)
    assert kind(run) == ("tensor mismatch", (0, 1))
    assert f"{SCRIPT}, line 9" in run.explain()


def test_calls_that_changed_places_in_code_whose_text_is_unknown() -> None:
    """As below `%%time`, where nobody knows the text any more."""
    code = """
def reduce_ones():
    dist.all_reduce(torch.ones(1))

def reduce_hundreds():
    dist.all_reduce(torch.full((1,), 100.0))

def work(rank):
    dist.init_process_group("gloo")
    for reduce in (reduce_ones, reduce_hundreds)[:: -1 if rank == 1 else 1]:
        reduce()
    """
    names: dict[str, Any] = {"dist": dist, "torch": torch, "__name__": "__main__"}
    exec(compile(code, "<timed exec>", "exec"), names)
    (warning,) = launch(names["work"], nprocs=3).warnings
    assert (warning.kind, warning.ranks) == ("different collectives", (1,))


def test_thousands_of_messages_with_tags_of_their_own_take_no_time() -> None:
    facts: dict[str, Any] = {"lane": "main", "nbytes": 8, "tensor": "float32 (2,)"}
    send, recv = call(0, "send", 0, 7, peer=1), call(1, "recv", 0, 9, peer=0)
    spans = [[span._replace(**facts, tag=tag) for tag in range(5000)] for span in (send, recv)]
    spans[1][17] = spans[1][17]._replace(nbytes=4, tensor="float32 (1,)")
    begun = time.process_time()
    (found,) = mismatch.messages(Calls(spans))
    assert (found.why, found.calls[0].tag) == ("sent", 17)
    assert time.process_time() - begun < 3  # seconds; it takes a twentieth of one


def test_calls_in_a_file_with_a_long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("目录" * 35) / ("f" * 100)
    folder.mkdir(parents=True)
    (folder / "turns.py").write_text(
        "import torch\n"
        "import torch.distributed as dist\n"
        "def work(rank):\n"
        '    dist.init_process_group("gloo")\n'
        "    if rank == 1:\n"
        "        dist.barrier()\n"
        "    dist.all_reduce(torch.ones(1))\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    run = hung(importlib.import_module("turns").work)
    assert kind(run) == ("skipped collective", (1,))
    assert source(run) == "dist.barrier()"
    assert {s.site for s in run.spans() if s.op == "barrier"} == {f"{folder / 'turns.py'}:6"}


def ahead_in_the_file() -> None:
    dist.broadcast(torch.ones(1), 0)


def test_of_lines_in_two_functions_the_upper_one_is_not_the_earlier() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for step in range(4):
            if not (rank == 1 and step == 2):
                further_down()
            ahead_in_the_file()

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    assert source(run) == "further_down()"
    assert "which rank 1 skipped" in run.explain()


def further_down() -> None:
    dist.all_reduce(torch.ones(1))


def test_a_call_skipped_right_before_one_like_it() -> None:
    """Its next one is taken for it, until the calls differ."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        first, then = torch.ones(2), torch.ones(2)
        for step in range(4):
            if not (rank == 1 and step == 2):
                dist.all_reduce(first)
            if step >= 0:
                dist.all_reduce(then)
            dist.broadcast(first, 0)

    run = hung(work)
    assert kind(run) == ("skipped collective", (1,))
    assert source(run) == "dist.all_reduce(first)"


def gathers_by_kind(rank: int, then: str) -> list[float]:
    dist.init_process_group("gloo")
    x = torch.full((2,), float(rank))
    pieces = torch.empty(4)
    if rank == 0:
        dist.all_gather_into_tensor(pieces, x)
    else:
        dist.all_gather(list(pieces.chunk(2)), x)
    if (rank, then) == (1, "skips"):
        dist.all_reduce(x)
    dist.barrier()
    return list(pieces.tolist())


@pytest.mark.ranks
def test_functions_that_send_the_same_go_together() -> None:
    run = launch(gathers_by_kind, ("ends",))
    assert run.values == [[0, 0, 1, 1]] * 2
    assert [w for w in run.warnings if w.kind != "left the group"] == []
    assert [a.last_rank is not None for a in run.arrivals()] == [True, True]
    hung = launch(gathers_by_kind, ("skips",), check=False)
    assert hung.verdict is not None
    assert hung.verdict.kind == "skipped collective"
    assert hung.verdict.title.startswith("rank 1 calls all_reduce at ")
