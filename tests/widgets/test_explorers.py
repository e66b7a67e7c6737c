"""Explorers: a move of a control launches real ranks and draws what they did."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import plots
from ddp_lessons.widgets import (
    barriers,
    batch_size_and_lr,
    collectives,
    data_parallel_by_hand,
    data_streams,
    ddp_timing,
    distributed_sampler,
    hang_clinic,
    honest_metrics,
    init_process_group,
    pipeline,
    rank_zero,
    same_batch,
    scaling,
    sharding,
    spawn,
    sync_batchnorm,
    uneven_work,
)
from ddp_lessons.widgets import explorer as explorer_module
from ddp_lessons.widgets.explorer import Explorer, one_of, run_ranks, switch, whole
from tests.support.kernels import Cell, Kernel

pytestmark = pytest.mark.ranks

matplotlib.use("agg")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not import it

SETUP = """
import os, time
import torch.distributed as dist
from ddp_lessons.widgets.barriers import explore

def arrive(rank, delays):
    dist.init_process_group("gloo")
    time.sleep(delays[rank])
    dist.barrier()
    dist.destroy_process_group()

explorer = explore(arrive)
explorer
"""


def meet(rank: int, title: str) -> str:
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    if title == "broken":
        raise RuntimeError("<b>meant</b>")
    return title


def make() -> Explorer:
    return Explorer(
        {
            "nprocs": whole("ranks", 1, 0, 3),
            "title": one_of("title", ["one", "two", "broken"], "one"),
            "big": switch("big", False),
        },
        lambda nprocs, title, big: run_ranks(meet, (title,), nprocs),
        lambda run, nprocs, title, big: plots.timeline(run, title=f"{title} on {nprocs}"),
    )


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The displays that an explorer shows and updates, outside a notebook."""
    bundles: list[dict[str, Any]] = []

    class Handle:
        def update(self, data: dict[str, Any], **_: Any) -> None:
            bundles.append(data)

    def display(data: dict[str, Any], **_: Any) -> Handle:
        if "application/vnd.jupyter.widget-view+json" not in data:
            bundles.append(data)
        return Handle()

    beyond: list[tuple[str, list[float]]] = []

    made = explorer_module._png

    def png_of(figure: Any) -> bytes:
        png = made(figure)
        width, height = figure.get_size_inches()
        box = figure.get_tightbbox()
        if min(box.x0, box.y0, width - box.x1, height - box.y1) < -0.02:  # inches
            beyond.append((figure.axes[0].get_title("left"), [*box.extents, width, height]))
        return png

    monkeypatch.setattr("ddp_lessons.widgets.explorer.display", display)
    monkeypatch.setattr("ddp_lessons.widgets.explorer._png", png_of)
    yield bundles
    assert not beyond, "a part of the picture is cut off"
    assert not plt.get_fignums()


def test_a_move_launches_ranks_and_draws_them(shown: list[dict[str, Any]]) -> None:
    explorer = make()
    explorer._ipython_display_()
    explorer.controls["nprocs"].value = 3
    assert [bundle["text/plain"] for bundle in shown] == ["one on 1", "one on 3"]
    assert all(base64.b64decode(b["image/png"]).startswith(b"\x89PNG") for b in shown)
    assert explorer.run is not None
    assert explorer.run.values == ["one"] * 3


def test_a_failure_is_explained_and_the_next_move_repairs_it(shown: list[dict[str, Any]]) -> None:
    explorer = make()
    explorer._ipython_display_()
    explorer.controls["title"].value = "broken"
    failure = explorer.panel.children[1]
    assert "RuntimeError: &lt;b&gt;meant&lt;/b&gt;" in failure.value
    explorer.controls["title"].value = "two"
    assert failure.value == ""
    explorer.controls["nprocs"].value = 0
    assert "nprocs" in failure.value
    explorer._draw = lambda run, **values: plots.buckets(run)
    explorer.controls["nprocs"].value = 1
    assert "ValueError: no buckets were recorded" in failure.value
    assert [bundle["text/plain"] for bundle in shown] == ["one on 1", "two on 1"]


def test_a_picture_after_a_failure_at_first_has_its_place(shown: list[dict[str, Any]]) -> None:
    explorer = make()
    explorer.controls["title"].value = "broken"
    explorer._ipython_display_()
    assert shown == [{"text/plain": ""}]
    explorer.controls["title"].value = "two"
    assert [bundle["text/plain"] for bundle in shown] == ["", "two on 1"]


def test_every_control_has_a_label() -> None:
    for control in make().controls.values():
        assert control.description
        assert isinstance(control, ipywidgets.ValueWidget)


def place(rank: int) -> list[str]:
    import os

    return [os.environ[name] for name in ("GROUP_RANK", "LOCAL_RANK")]


def arrive_late(rank: int, late: int, delay: float) -> None:
    time.sleep(delay if rank == late else 0)
    dist.init_process_group("gloo")
    dist.destroy_process_group()


def collective(rank: int, op: str, size: int) -> tuple[list[int], list[int] | None]:
    return list(range(size)), [rank] * size if op == "all" or rank == 0 else None


def arrive(rank: int, delays: list[float]) -> None:
    dist.init_process_group("gloo")
    time.sleep(delays[rank])
    dist.barrier()
    dist.destroy_process_group()


def see(
    rank: int, total: int, shuffle: bool, drop_last: bool, set_epoch: bool, epoch: int
) -> list[list[int]]:
    from torch.utils.data import DistributedSampler

    dist.init_process_group("gloo")
    sampler = DistributedSampler(range(total), shuffle=shuffle, drop_last=drop_last)
    dist.destroy_process_group()
    return [list(sampler)] * (2 if set_epoch else 1)


def train(rank: int, bucket_cap_mb: float, link: Any, late_ms: int) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from ddp_lessons import steps, watch_ddp

    dist.init_process_group("gloo")
    layer = torch.nn.Linear(500, 500)
    model = watch_ddp(DistributedDataParallel(layer, bucket_cap_mb=bucket_cap_mb), link)
    for _ in steps(range(3)):
        time.sleep(late_ms / 1000 if rank == 1 else 0)
        model(torch.ones(1, 500)).sum().backward()
    dist.destroy_process_group()


def train_unevenly(rank: int, counts: tuple[int, int], join: bool) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from ddp_lessons import steps

    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    with model.join(enable=join):
        for _ in steps(range(counts[rank])):
            model(torch.ones(1, 1)).sum().backward()
    dist.destroy_process_group()


def train_and_die(rank: int, path: str, kill_at: int | None, keys: set[str]) -> Any:
    import os
    import signal

    import torch

    if rank == 1 and kill_at is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0, 0.5], torch.tensor([float(len(keys))])


def call_with_a_bug(rank: int, bug: str, odd: int) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == odd and bug == "one call less":
        return
    if rank == odd and bug == "one call more":
        dist.all_reduce(torch.ones(1))
    dist.barrier()
    dist.destroy_process_group()


def keep(rank: int, stage: str, optimizer: str) -> dict[str, int]:
    return {"parameters": 100, "optimizer": 200 if optimizer == "Adam" else 0}


def take_items(rank: int, shards: list[range], rule: Callable[..., Any], workers: int) -> Any:
    return [rule(shards, rank, worker) for worker in range(workers)]


RULES: dict[str, Callable[..., Any]] = {
    "everything": lambda shards, rank, worker: [item for shard in shards for item in shard],
    "one shard": lambda shards, rank, worker: shards[0] if rank + worker == 0 else [],
}


def train_a_stage(rank: int, schedule: str, micro_batches: int) -> None:
    from ddp_lessons import span, steps

    for _ in steps(range(2)):
        for name in ("forward", "backward"):
            for _ in range(micro_batches):
                with span(name):
                    time.sleep(0.001)


def predict_step(size: str, way: str, gpus: int, gigabytes: float) -> dict[str, float] | None:
    if (size, way) == ("large", "one"):
        return None
    return {"arithmetic": 8 / gpus, "bytes": 1 / gigabytes, "steps": 1e-6 * gpus}


EXPLORERS: dict[str, tuple[Callable[[], Explorer], dict[str, Any]]] = {
    "spawn": (lambda: spawn.explore(place), {"nnodes": 1, "nprocs": 1}),
    "init_process_group": (
        lambda: init_process_group.explore(arrive_late),
        {"late": 3, "delay_ms": 0},
    ),
    "collectives": (
        lambda: collectives.explore(collective, ops=["all", "one"]),
        {"op": "one", "nprocs": 4, "size": 6},
    ),
    "barriers": (lambda: barriers.explore(arrive), {"rank0": 180, "rank3": 0}),
    "distributed_sampler": (
        lambda: distributed_sampler.explore(see),
        {
            "total": 1,
            "nprocs": 4,
            "shuffle": False,
            "drop_last": True,
            "set_epoch": False,
            "epoch": 3,
        },
    ),
    "data_parallel_by_hand": (
        lambda: data_parallel_by_hand.explore(lambda rank, first: {"mean": [first / 240]}),
        {"first": 120},
    ),
    "batch_size_and_lr": (
        lambda: batch_size_and_lr.explore(lambda rank, lr, optimizer: [lr, lr / 2]),
        {"nprocs": 2, "rule": "square root", "optimizer": "SGD"},
    ),
    "sync_batchnorm": (
        lambda: sync_batchnorm.explore(lambda rank, n, shift: ([rank * shift, 1.0], [n, 1.0])),
        {"n": 1, "percent": 100},
    ),
    "hang_clinic": (
        lambda: hang_clinic.explore(call_with_a_bug),
        {"bug": "none", "odd": 2},
    ),
    "sharding": (
        lambda: sharding.explore(keep, limit=400),
        {"stage": "ZeRO 3", "nprocs": 2, "optimizer": "SGD"},
    ),
    "pipeline": (
        lambda: pipeline.explore(train_a_stage),
        {"schedule": "GPipe", "stages": 1, "micro_batches": 12},
    ),
    "uneven_work": (
        lambda: uneven_work.explore(train_unevenly),
        {"extra": 0, "join": False},
    ),
    "rank_zero": (
        lambda: rank_zero.explore(train_and_die),
        {"kill_at": 29, "loaded": "only model and step"},
    ),
    "same_batch": (
        lambda: same_batch.explore(lambda rank, counts: {"equal": 0.5, "of_all": 0.0}),
        {"ranks": 4, "micro_batches": 1, "longest": 4},
    ),
    "data_streams": (
        lambda: data_streams.explore(take_items, RULES),
        {"shards": 8, "nprocs": 3, "workers": 1, "rule": "everything"},
    ),
    "honest_metrics": (
        lambda: honest_metrics.explore(
            lambda rank, positives, by_class: {"mean": (0.5, 0.6), "counts": (0.6, 0.6)}
        ),
        {"ranks": 1, "positives": 50, "by_class": True},
    ),
    "scaling": (
        lambda: scaling.explore(predict_step, sizes=["small", "large"], ways=["one", "other"]),
        {"size": "large", "gpus": 10_000, "gigabytes": 5},
    ),
    "ddp_timing": (
        lambda: ddp_timing.explore(train),
        {"bucket_cap_mb": 0.5, "late_ms": 10, "megabytes": 300},
    ),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_each_explorer_draws_every_setting(name: str, shown: list[dict[str, Any]]) -> None:
    explore, moves = EXPLORERS[name]
    explorer = explore()
    explorer._ipython_display_()
    for control, value in moves.items():
        before = len(shown)
        explorer.controls[control].value = value
        assert explorer.panel.children[1].value == ""
        assert len(shown) == before + 1
        assert shown[-1]["text/plain"]
    assert explorer.run is not None
    assert explorer.run.ok


@pytest.mark.parametrize("name", EXPLORERS)
def test_each_list_shows_what_is_chosen(name: str) -> None:
    """ipywidgets takes the value None for no choice, and leaves the list blank."""
    explore, _ = EXPLORERS[name]
    for control in explore().controls.values():
        if isinstance(control, ipywidgets.Dropdown):
            assert control.label, control.description


def test_a_bug_is_drawn_and_explained(shown: list[dict[str, Any]]) -> None:
    explorer = hang_clinic.explore(call_with_a_bug)
    explorer._ipython_display_()
    assert "rank 1 has returned before barrier" in explorer.panel.children[1].value
    explorer.controls["bug"].value = "one call more"
    explorer.controls["odd"].value = 2
    explorer.controls["bug"].value = "none"
    assert explorer.panel.children[1].value == ""
    said = [bundle["text/plain"] for bundle in shown]
    assert "one call less on rank 1: ranks 0 and 2 waited" in said[0]
    assert "rank 1 calls all_reduce" in said[1]
    assert "rank 2 calls all_reduce" in said[2]
    assert said[3] == "every rank came to every call"


def test_ranks_that_work_equally_long_are_named_together(shown: list[dict[str, Any]]) -> None:
    explorer = barriers.explore(arrive)
    explorer._ipython_display_()
    for rank in (2, 1, 0):
        explorer.controls[f"rank{rank}"].value = 180
    assert [bundle["text/plain"] for bundle in shown] == [
        "Rank 3 comes last; the others wait for it",
        "Ranks 2 and 3 work longest; the others wait for them",
        "Ranks 1, 2 and 3 work longest; the others wait for them",
        "All ranks work equally long",
    ]


def test_uneven_work_that_fails_is_drawn_and_explained(shown: list[dict[str, Any]]) -> None:
    explorer = uneven_work.explore(train_unevenly)
    explorer._ipython_display_()
    explorer.controls["join"].value = False
    assert "rank 1 waited in backward, but rank 0 has returned" in explorer.panel.children[1].value
    titles = [bundle["text/plain"] for bundle in shown]
    assert titles == ["3 and 5 batches, with join", "3 and 5 batches, without join"]
    explorer.controls["join"].value = True
    assert explorer.panel.children[1].value == ""


def test_recipes_are_compared_for_all_micro_batches(shown: list[dict[str, Any]]) -> None:
    explorer = same_batch.explore(lambda rank, counts: {str(counts[rank]): 1e-7})
    explorer._ipython_display_()
    explorer.controls["ranks"].value = 1
    assert [bundle["text/plain"] for bundle in shown] == [
        "tokens of 2 ranks: 4 + 16, 28 + 40",
        "tokens of 1 rank: 4 + 40",
    ]


def test_a_metric_that_is_nan_is_drawn_too(shown: list[dict[str, Any]]) -> None:
    nan = float("nan")
    explorer = honest_metrics.explore(lambda rank, positives, by_class: {"mean": (nan, 0.6)})
    explorer._ipython_display_()
    explorer.controls["by_class"].value = True
    assert [bundle["text/plain"] for bundle in shown] == [
        "4 in 100 are positive, 4 ranks",
        "4 in 100 are positive, 4 ranks, sorted by class",
    ]


def test_a_resumed_training_is_compared_with_the_undisturbed_one(
    shown: list[dict[str, Any]],
) -> None:
    explorer = rank_zero.explore(train_and_die)
    explorer._ipython_display_()
    assert shown[-1]["text/plain"].endswith("17, resumed with everything: the same weights")
    explorer.controls["loaded"].value = "all but rng"
    assert shown[-1]["text/plain"].endswith("resumed with all but rng: weights off by 1.00")


def open_subshell(kernel: Kernel) -> str:
    """Open a subshell (a second message thread), as JupyterLab does; "" if unsupported."""
    channel = kernel.client.control_channel
    channel.send(kernel.client.session.msg("create_subshell_request", {}))
    return str(channel.get_msg(timeout=10)["content"].get("subshell_id", ""))


def move(kernel: Kernel, model_id: str, value: int, subshell: str = "") -> None:
    """Send the kernel a control's move, as the frontend does."""
    data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
    session = kernel.client.session
    message = session.msg("comm_msg", {"comm_id": model_id, "data": data})
    if subshell:
        message["header"]["subshell_id"] = subshell
    kernel.client.shell_channel.send(message)


def pictures_until(kernel: Kernel, alt: str, timeout: float = 60.0) -> list[str]:
    """The alt texts of the pictures that are drawn, until one is `alt`."""
    texts: list[str] = []
    deadline = time.monotonic() + timeout
    while alt not in texts:
        message = kernel.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
        if message["msg_type"] == "update_display_data":
            texts.append(message["content"]["data"]["text/plain"])
    return texts


def shown_in(kernel: Kernel, live: str = "0") -> tuple[Cell, str]:
    kernel.run(f"import os; os.environ['DDP_LESSONS_LIVE'] = '{live}'")
    cell = kernel.run(SETUP)
    assert not cell.error, cell.error
    return cell, kernel.run("print(explorer.controls['rank0'].model_id)").stdout.strip()


@pytest.mark.slow
@pytest.mark.xdist_group("an explorer")
def test_in_a_notebook_the_picture_is_a_display_of_its_own(shared_kernel: Kernel) -> None:
    cell, _ = shown_in(shared_kernel)
    controls, picture = cell.displays
    assert "application/vnd.jupyter.widget-view+json" in controls
    labels = "rank 0, ms; rank 1, ms; rank 2, ms; rank 3, ms"
    assert controls["text/plain"] == f"Controls, in a running notebook: {labels}"
    assert picture["text/plain"] == "Rank 3 comes last; the others wait for it"
    assert "image/png" in picture
    assert "text/html" not in picture
    assert not cell.result


@pytest.mark.xdist_group("an explorer")
def test_where_somebody_looks_the_controls_and_the_picture_have_names(
    shared_kernel: Kernel,
) -> None:
    cell, _ = shown_in(shared_kernel, live="1")
    _, names, picture = cell.displays
    assert "aria-label" in names["application/javascript"]
    assert '<img alt="Rank 3 comes last; the others wait for it"' in picture["text/html"]
    assert picture["image/png"]


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
def test_quick_moves_never_pile_up(kernel: Kernel, threaded: bool) -> None:
    _, model_id = shown_in(kernel)
    subshell = open_subshell(kernel) if threaded else ""
    for value in [*range(0, 200, 5), 200]:
        move(kernel, model_id, value, subshell)
        time.sleep(0.02 if threaded else 0)  # some come while ranks run
    texts = pictures_until(kernel, "Rank 0 comes last; the others wait for it")
    assert len(texts) <= 10  # of 41 moves
    assert kernel.run("print(explorer.values['rank0'])").stdout == "200\n"


@pytest.mark.slow
def test_a_kernel_killed_in_the_middle_of_a_move_leaves_nothing(kernel: Kernel) -> None:
    _, model_id = shown_in(kernel)
    kernel.run("arrive.__code__ = (lambda rank, delays: time.sleep(60)).__code__")
    move(kernel, model_id, 100)
    deadline = time.monotonic() + 30
    while len(kernel.children()) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = kernel.children()
    kernel.manager.shutdown_kernel(now=True)
    while any(rank.is_running() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(rank.is_running() for rank in ranks)
