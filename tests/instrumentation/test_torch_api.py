"""Each entry of the table of differences between releases fits the installed torch."""

from __future__ import annotations

import sys
from datetime import timedelta

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.instrumentation import torch_api
from ddp_lessons.wire import ops
from ddp_lessons.wire.ops import COLLECTIVES, GROUP_CALLS, RECVS, SENDS

cloudpickle.register_pickle_by_value(sys.modules[__name__])

INSTALLED = torch_api.release(torch.__version__)


def test_the_installed_torch_is_supported() -> None:
    assert INSTALLED >= torch_api.OLDEST


@pytest.mark.parametrize("name", torch_api.SINCE)
def test_a_function_is_there_from_the_release_that_is_named(name: str) -> None:
    assert (torch_api.public(name) is not None) == (torch_api.SINCE[name] <= INSTALLED)


@pytest.mark.parametrize("name", sorted({*COLLECTIVES, *SENDS, *RECVS, *GROUP_CALLS}))
def test_every_other_function_that_we_know_is_there(name: str) -> None:
    assert torch_api.public(name) is not None or name in torch_api.SINCE


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0+cpu", (2, 13)), ("2.6.0", (2, 6)), ("2.15.0.dev20261101+cu130", (2, 15))],
)
def test_releases(version: str, release: tuple[int, int]) -> None:
    assert torch_api.release(version) == release


# Collectives that are not in LIKE, each with the reason.
MAY_DIFFER = {
    "all_gather_coalesced": "a list",
    "all_gather_object": "objects",
    "all_reduce_coalesced": "a list",
    "all_to_all": "the pieces may differ",
    "all_to_all_single": "the pieces may differ",
    "barrier": "no tensor",
    "broadcast_object_list": "objects",
    "gather_object": "objects",
    "monitored_barrier": "no tensor",
    "scatter": "what is recorded is the rank's own piece",
    "scatter_object_list": "objects",
}


def test_every_collective_is_judged_or_it_is_said_why_not() -> None:
    """A collective that torch adds must be added to all lists, not only to the first."""
    assert {*ops.LIKE, *MAY_DIFFER} == set(COLLECTIVES)
    assert not {*ops.LIKE} & {*MAY_DIFFER}
    rooted = {name for name in COLLECTIVES if {"gather", "scatter"} & {*name.split("_")[:1]}}
    assert rooted <= {*ops.TO_ROOT, *ops.FROM_ROOT}


@pytest.mark.parametrize("name", torch_api.NCCL)
def test_every_nccl_is_streamed(name: str) -> None:
    assert name in torch_api.STREAMED


@pytest.mark.ranks
@pytest.mark.skipif(torch_api.public("set_timeout") is None, reason="torch is older")
def test_a_timeout_that_is_set_later_is_the_learners_own() -> None:
    """launch lets the learner's own timeout expire, because the ranks may catch the error."""

    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        dist.set_timeout(timedelta(seconds=3))
        try:
            dist.broadcast(torch.ones(1), src=1 - rank)
        except RuntimeError:
            return "caught"
        return "met"

    assert launch(work, timeout=20).values == ["caught", "caught"]
