"""The variables where a rank failed: kept on request, short, whatever their repr does."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ddp_lessons import WorkerFailed, launch
from ddp_lessons.worker.post_mortem import LONGEST, MOST_FRAMES, frames_of, text_of


class Raises:
    def __repr__(self) -> str:
        raise KeyError("no repr")


class Endless:
    def __repr__(self) -> str:
        return "line\n" * 10_000


class Attributes(dict[str, Any]):
    __getattr__ = dict.__getitem__


class OfItsOwn(torch.Tensor):  # type: ignore[misc]
    """As DTensor, of which ranks hold parts: reading a number needs them all."""

    def tolist(self) -> Any:
        raise AssertionError("its numbers were read")

    item = __getitem__ = detach = tolist


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        ("text", "'text'"),
        (torch.tensor(2.5), "tensor of float32: 2.5"),
        (torch.ones(2, 3), "tensor of shape (2, 3), float32: 1, 1, 1, ..."),
        (torch.arange(3), "tensor of shape (3,), int64: 0, 1, 2"),
        (torch.empty(0, 3), "tensor of shape (0, 3), float32"),
        (torch.empty(5, device="meta"), "tensor of shape (5,), float32 on meta"),
        (torch.eye(2).to_sparse(), "tensor of shape (2, 2), float32"),
        (nn.Parameter(torch.zeros(1)), "tensor of shape (1,), float32: 0"),
        (OfItsOwn(2, 3), "OfItsOwn of shape (2, 3), float32"),
        (np.arange(6).reshape(2, 3), "array of shape (2, 3), int64: 0, 1, 2, ..."),
        (np.float32(1.5), "np.float32(1.5)"),
        ({"x": torch.ones(2)}, "{'x': tensor of shape (2,), float32: 1, 1}"),
        (nn.Linear(3, 4), "Linear, a module with 16 parameters"),
        ([Attributes(rate=0.1)], "[{'rate': 0.1}]"),
        (Raises(), "<Raises, whose repr raised KeyError>"),
        ([Raises()], "<list, whose repr raised KeyError>"),
    ],
)
def test_a_value_as_text(value: Any, text: str) -> None:
    assert text_of(value) == text


def test_a_long_value_is_cut_and_stays_in_its_line() -> None:
    for value in (Endless(), "x" * 10_000, list(range(10_000)), {n: n for n in range(10_000)}):
        text = text_of(value)
        assert len(text) <= LONGEST
        assert "\n" not in text


def test_of_a_recursion_the_innermost_frames_are_kept() -> None:
    def down(depth: int) -> None:
        if depth == 0:
            raise ValueError("ground")
        down(depth - 1)

    with pytest.raises(ValueError, match="ground") as caught:
        down(100)
    frames = frames_of(caught.value)
    assert len(frames) == MOST_FRAMES
    assert dict(frames[-1].variables)["depth"] == "0"


def divide(whole: torch.Tensor, parts: int) -> torch.Tensor:
    size = len(whole)
    return whole.reshape(parts, size // parts)


def work(rank: int, name: str) -> None:
    batch = torch.arange(6.0) + rank
    if rank == 1:
        divide(batch, 4)


@pytest.mark.ranks
def test_the_error_shows_the_innermost_functions_variables_and_the_run_has_all() -> None:
    with pytest.raises(WorkerFailed) as caught:
        launch(work, ("resnet",), post_mortem=True)
    shown = str(caught.value).partition("The variables of rank 1 there")[2]
    assert "parts = 4" in shown
    assert "whole = tensor of shape (6,), float32: 1, 2, 3, 4, 5, 6" in shown
    assert "resnet" not in shown
    run = caught.value.run
    assert run is not None
    outer, inner = run.ranks[1].frames
    assert dict(outer.variables)["name"] == "'resnet'"
    assert dict(inner.variables)["size"] == "6"
    text = repr(run.ranks[1].frames)
    assert "in work:  divide(batch, 4)\n    rank = 1\n    name = 'resnet'\n" in text
    assert repr(run.ranks[0].frames).startswith("no frames")


def fails_with_a_part(rank: int) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)])
    if rank == 1:
        raise ValueError(f"bad shape {weight.shape}")
    dist.barrier()


@pytest.mark.ranks
def test_a_tensor_of_which_ranks_hold_parts_is_not_fetched() -> None:
    run = launch(fails_with_a_part, post_mortem=True, check=False, timeout=30)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", (1,))
    assert "weight = DTensor of shape (4, 2), float32" in run.explain()


class Waits:
    def __repr__(self) -> str:
        threading.Event().wait()
        return ""


def fails_with_what_waits(rank: int) -> None:
    never = Waits()
    raise ValueError(f"bad sample of {id(never)}")


@pytest.mark.ranks
def test_a_repr_that_never_ends_hides_no_failure() -> None:
    run = launch(fails_with_what_waits, nprocs=1, post_mortem=True, check=False, timeout=30)
    assert run.verdict is not None
    assert run.verdict.kind == "raised"
    assert "ValueError: bad sample of" in run.explain()


@pytest.mark.ranks
def test_without_asking_nothing_is_kept() -> None:
    run = launch(work, ("resnet",), check=False)
    assert run.ranks[1].frames == ()
    assert "resnet" not in run.explain()


def asks(rank: int) -> None:
    input("who? ")


def stops(rank: int) -> None:
    breakpoint()


@pytest.mark.ranks
@pytest.mark.parametrize("fn", [asks, stops])
def test_a_rank_that_waits_for_the_keyboard_says_what_to_do(fn: Any) -> None:
    said = launch(fn, nprocs=1, check=False).explain()
    assert "A rank has no keyboard." in said
    assert "launch(fn, args, nprocs=1, in_process=True)" in said
