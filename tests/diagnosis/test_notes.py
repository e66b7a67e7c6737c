"""Notes on request say where ranks differ, or do the same, that may be meant; else nothing."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from ddp_lessons import Finding, Run, launch, load_run, steps
from ddp_lessons.diagnosis import notes
from ddp_lessons.wire.records import Batches, Noted, Span
from tests.analysis.test_wait_states import call, run_of
from tests.support import torchrun

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DATA = TensorDataset(torch.arange(24.0).reshape(12, 2), torch.arange(12))


def train(
    rank: int,
    rate: Callable[[int], float] = lambda rank: 0.1,
    after: Callable[[int, DistributedDataParallel], object] = lambda rank, model: None,
) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    optimizer = torch.optim.SGD(model.parameters(), rate(rank))
    for x, _ in DataLoader(DATA, 2, sampler=DistributedSampler(DATA)):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    after(rank, model)
    dist.destroy_process_group()


class Augmented(Dataset[torch.Tensor]):  # type: ignore[misc]
    """Adds a random number to each sample, drawn by torch, Python or NumPy."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index + self.draw()])


class Stream(IterableDataset[torch.Tensor]):  # type: ignore[misc]
    """The same samples on all ranks, unless it chooses by rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.part = range(rank, 30, size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(torch.tensor, map(float, self.part))


def load(rank: int, make: Callable[[int], DataLoader[Any]], seed: bool | None = None) -> int:
    """Read a loader with ranks seeded alike (True), by rank (False), or not at all."""
    if seed is not None:
        torch.manual_seed(0 if seed else rank)
        random.seed(0 if seed else rank)
    return sum(1 for _ in make(rank))


def noted(fn: Callable[..., Any], *args: Any) -> list[Finding]:
    """The notes but the last, which says what was compared."""
    run = launch(fn, args, nprocs=3, notes=True)
    assert run.warnings == []
    *notes, compared = run.notes
    assert compared.kind == "compared"
    assert all(str(note).startswith("Note: ") for note in run.notes)
    return notes


def test_nothing_is_noted_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(train, (lambda rank: 0.1 + rank,))
    assert run.notes == []
    assert capsys.readouterr().out == ""
    assert all(rank.noted is None for rank in run.ranks)


def test_what_was_compared_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(train, notes=True)
    (note,) = run.notes
    assert str(note) == (
        "Note: compared between the ranks: the weights of 1 DDP model, the learning rates of 1 "
        "optimizer and the batches of 1 DataLoader."
    )
    assert capsys.readouterr().out == f"{note}\n"
    assert run.explain().endswith(str(note))
    (nothing,) = launch(lambda rank: None, notes=True).notes
    assert nothing.text.startswith("no rank had a DDP model")


def change_weight(rank: int, model: DistributedDataParallel) -> None:
    if rank == 2:
        with torch.no_grad():
            next(iter(model.module[1].parameters()))[0, 0] += 1e-6


def test_weights_that_differ() -> None:
    (note,) = noted(train, lambda rank: 0.1, change_weight)
    assert (note.kind, note.ranks) == ("weights differ", (2,))
    assert "rank 2 differs from ranks 0 and 1. 1 parameter of 4 differ, first 1.weight" in note.text


def test_learning_rates_that_differ() -> None:
    weights, rates = noted(train, lambda rank: 0.1 if rank else 0.2)
    assert (weights.kind, weights.ranks) == ("weights differ", (0,))
    assert (rates.kind, rates.ranks) == ("learning rates differ", (0,))
    assert "0.1 on ranks 1 and 2 and 0.2 on rank 0" in rates.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_that_gives_all_ranks_the_same(workers: int) -> None:
    (note,) = noted(load, lambda rank: DataLoader(Stream(), 4, num_workers=workers))
    assert (note.kind, note.ranks) == ("same samples", (0, 1, 2))
    assert "all 3 ranks got the same 30 samples" in note.text
    assert note.frame is not None
    assert note.frame.source == "return sum(1 for _ in make(rank))"
    assert noted(load, lambda rank: DataLoader(Stream(rank, 3), 4, num_workers=workers)) == []


class Plain(IterableDataset[object]):  # type: ignore[misc]
    """Numbers, texts and tensors without dimensions, the same on all ranks or every third."""

    def __init__(self, make: Callable[[int], object], rank: int = 0, size: int = 1) -> None:
        self.make = make
        self.part = range(rank, 30, size)

    def __iter__(self) -> Iterator[object]:
        return map(self.make, self.part)


@pytest.mark.parametrize(
    "make",
    [int, float, str, torch.tensor, lambda n: (n, n / 2), lambda n: {"path": f"{n}.png", "n": n}],
    ids=["int", "float", "str", "tensor", "tuple", "dict"],
)
def test_samples_that_are_no_tensors_with_rows(make: Callable[[int], object]) -> None:
    (note,) = noted(load, lambda rank: DataLoader(Plain(make), batch_size=None))
    assert note.kind == "same samples"
    assert "the same 30 samples" in note.text
    assert noted(load, lambda rank: DataLoader(Plain(make, rank, 3), batch_size=None)) == []


def test_batches_of_texts_and_of_what_is_left_as_it_is() -> None:
    for collate in (None, list):
        make = functools.partial(DataLoader, batch_size=4, collate_fn=collate)
        (note,) = noted(load, lambda rank, make=make: make(Plain(str)))
        assert "the same 30 samples" in note.text
        assert noted(load, lambda rank, make=make: make(Plain(str, rank, 3))) == []


def test_a_sampler_that_was_forgotten() -> None:
    (note,) = noted(load, lambda rank: DataLoader(DATA, 4, shuffle=True), False)
    assert note.kind == "same samples"
    assert (
        noted(load, lambda rank: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 3, rank)))
        == []
    )


def by_numpy() -> float:
    import numpy as np

    return float(np.random.rand())


def by_torch() -> float:
    return float(torch.rand(()))


def by_python() -> float:
    return random.random()


@pytest.mark.parametrize("draw", [by_torch, by_python])
def test_the_same_random_augmentation(draw: Callable[[], float]) -> None:
    def loader(rank: int) -> DataLoader[torch.Tensor]:
        data = Augmented(draw)
        return DataLoader(data, 2, sampler=DistributedSampler(data, 3, rank))

    (note,) = noted(load, loader, True)
    assert (note.kind, note.ranks) == ("same random numbers", (0, 1, 2))
    assert "all 3 ranks drew the same random numbers" in note.text
    assert noted(load, loader, False) == []
    assert noted(load, loader, None) == []


def test_the_same_random_augmentation_by_numpy() -> None:
    def work(rank: int, alike: bool) -> int:
        import numpy as np

        np.random.seed(0 if alike else rank)
        data = Augmented(by_numpy)
        loader = DataLoader(data, 2, sampler=DistributedSampler(data, 3, rank))
        return sum(1 for _ in steps(loader))

    assert [note.kind for note in noted(work, True)] == ["same random numbers"]
    assert noted(work, False) == []


def test_workers_that_begin_with_the_same_seeds() -> None:
    def loader(rank: int) -> DataLoader[torch.Tensor]:
        data = Augmented(by_torch)
        return DataLoader(data, 2, sampler=DistributedSampler(data, 3, rank), num_workers=1)

    (note,) = noted(load, loader, True)
    assert note.kind == "same random numbers"
    assert "the workers of the DataLoader at" in note.text
    assert noted(load, loader, False) == []


def test_what_cannot_be_summed_up_is_left_out() -> None:
    class Plain(torch.optim.Optimizer):  # type: ignore[misc]
        def step(self) -> None:
            """Do nothing; it has no learning rate."""

    def work(rank: int) -> None:
        for _ in DataLoader([torch.eye(4).to_sparse(), object(), None], batch_size=None):
            pass
        Plain([torch.zeros(1)], {}).step()

    assert noted(work) == []


def test_one_rank_that_evaluates_alone_is_no_news() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            for _ in DataLoader(DATA, 4):
                pass

    assert noted(work) == []


NAMES = ["weight", "bias"]


def noted_by_hand(batches: tuple[list[Batches], list[Batches]], *spans: Span) -> Run:
    """Two ranks that returned, and noted these batches."""
    run = run_of(*spans, ranks=2)
    run.ranks[:] = [
        replace(rank, noted=Noted((), (), tuple(own)))
        for rank, own in zip(run.ranks, batches, strict=True)
    ]
    return run


def test_two_notes_of_one_line_as_in_a_damaged_record() -> None:
    line, other = (Batches(f"train.py:{n}", 3, 12, 5, 0, 0, 0) for n in (7, 8))
    twice = [line._replace(digest=6), other, line]
    found = notes.notes(noted_by_hand(([line, other], twice)))
    assert [note.kind for note in found] == ["same samples", "same samples", "compared"]


def test_each_line_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(notes, "frame_of", seen.append)
    sites = ("train.py:7", "train.py:8")
    spans = [call(n % 2, n, n + 1, seq=n, site=sites[n % 3 % 2]) for n in range(100)]
    assert [note.kind for note in notes.notes(noted_by_hand(([], []), *spans))] == ["compared"]
    assert sorted(seen) == list(sites)


def over_a_set(rank: int) -> None:
    for _ in set(NAMES):
        dist.all_reduce(torch.ones(1))


def over_a_named_set(rank: int) -> None:
    names = {name.upper() for name in NAMES} | {"scale"}
    for number, name in enumerate(names):
        for _ in range(2):
            dist.all_reduce(torch.ones(1))
        print(number, name)


def over_a_sorted_set(rank: int) -> None:
    names = set(NAMES)
    ordered = sorted(names)
    for _ in ordered:
        dist.all_reduce(torch.ones(1))
    for _ in names:
        pass
    dist.all_reduce(torch.ones(1))


def over_what_may_be_one(rank: int) -> None:
    names: Any = set(NAMES)
    names = list(reversed(NAMES))
    for _ in names:
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("body", [over_a_set, over_a_named_set])
def test_a_loop_over_a_set(body: Callable[[int], None]) -> None:
    (note,) = noted(in_group, body)
    assert (note.kind, note.ranks) == ("order of a set", (0, 1, 2))
    assert note.frame is not None
    assert "dist.all_reduce" in note.frame.source


@pytest.mark.parametrize("body", [over_a_sorted_set, over_what_may_be_one])
def test_a_loop_that_is_in_order(body: Callable[[int], None]) -> None:
    assert noted(in_group, body) == []


def in_group(rank: int, body: Callable[[int], None]) -> None:
    dist.init_process_group("gloo")
    body(rank)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.system
def test_a_script_notes_by_a_variable(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch, ddp_lessons\n"
        "import torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "from torch.utils.data import DataLoader\n"
        "dist.init_process_group('gloo')\n"
        "model = DistributedDataParallel(torch.nn.Linear(1, 1))\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1 + dist.get_rank())\n"
        "for x in DataLoader(torch.arange(4.0).reshape(4, 1), 2):\n"
        "    model(x).sum().backward()\n"
        "    optimizer.step()\n"
        "dist.barrier()\n"
    )
    env = {"DDP_LESSONS_RECORD": "record", "DDP_LESSONS_NOTES": "1"}
    code, text = torchrun.run(script, "--nproc-per-node=2", env=env)
    assert code == 0, text
    run = load_run(tmp_path / "record")
    kinds = [note.kind for note in run.notes]
    assert kinds == ["weights differ", "learning rates differ", "same samples", "compared"]
    assert "train.py, line 8" in run.explain()
