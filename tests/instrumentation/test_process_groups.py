"""What torch refuses is refused by torch: the same exception, text and moment as without us."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch
from ddp_lessons.system.host import reserve_port

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Call = Callable[[], object]
Refusal = tuple[str, str]

BEFORE: dict[str, Call] = {
    "timeout": lambda: dist.init_process_group("gloo", timeout=30),
    "positional timeout": lambda: dist.init_process_group("gloo", None, 30),
    "backend": lambda: dist.init_process_group("glooo"),
    "method": lambda: dist.init_process_group("gloo", "carrier-pigeon://here"),
    "store and method": lambda: dist.init_process_group("gloo", "env://", store=dist.HashStore()),
    "no group yet": lambda: dist.all_reduce(torch.ones(1)),
    "leave": lambda: dist.destroy_process_group(),
}
JOINED: dict[str, Call] = {
    "twice": lambda: dist.init_process_group("gloo"),
    "new_group": lambda: dist.new_group([0], timeout=30),
    "ranks": lambda: dist.new_group([0, 7]),
    "monitored_barrier": lambda: dist.monitored_barrier(timeout=30),
    "wait": lambda: dist.all_reduce(torch.ones(1), async_op=True).wait(timeout=30),
    "no tensor": lambda: dist.all_reduce([1, 2]),
    "root": lambda: dist.broadcast(torch.ones(1), src=7),
    "no root": lambda: dist.broadcast(torch.ones(1)),
    "operation": lambda: dist.all_reduce(torch.ones(1), op="sum"),
    "group": lambda: dist.all_reduce(torch.ones(1), group="world"),
    "sizes": lambda: dist.all_gather([torch.ones(2)], torch.ones(1)),
    "peer": lambda: dist.send(torch.ones(1), dst=dist.get_rank()),
    "argument": lambda: dist.barrier(patience=3),
}


def refusal(call: Call) -> Refusal:
    """The type and text of what a call raises, without addresses of objects; at once."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    assert time.monotonic() - began < 10
    return caught.type.__name__, re.sub("0x[0-9a-f]+", "0x", str(caught.value))


def refusals(rank: int) -> dict[str, Refusal]:
    found = {name: refusal(call) for name, call in BEFORE.items()}
    dist.init_process_group("gloo")
    found |= {name: refusal(call) for name, call in JOINED.items()}
    total = torch.ones(1)
    dist.all_reduce(total)  # all ranks are still together
    assert total.item() == dist.get_world_size()
    dist.destroy_process_group()
    return found


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, where torch is as it is, is the only rank of env://."""
    with reserve_port() as port:
        place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port.getsockname()[1]}
        place |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        yield
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # what was raised and its frames hold each other, and a store with its sockets


def test_what_torch_refuses_it_refuses_here(one_rank: None) -> None:
    plain = refusals(0)
    (ours,) = launch(refusals, nprocs=1).values
    assert ours == plain


def joins_at_last(rank: int) -> list[Refusal]:
    found = [refusal(call) for call in BEFORE.values()]
    dist.init_process_group("gloo")
    found.append(refusal(JOINED["twice"]))
    dist.destroy_process_group()
    return found


def test_every_rank_is_refused_at_once() -> None:
    """Rank 1 does not wait for a store that rank 0 never opens."""
    first, second = launch(joins_at_last).values
    assert first == second


def skips_after_a_refusal(rank: int) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 1:
        for call in ("no tensor", "sizes", "root", "peer"):
            with contextlib.suppress(Exception):
                JOINED[call]()
        time.sleep(100)
    dist.all_reduce(torch.ones(1))


def test_a_call_that_was_refused_is_no_call_that_others_skipped() -> None:
    verdict = launch(skips_after_a_refusal, timeout=2, check=False).verdict
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("blocked in Python", (1,))


def compiled(rank: int) -> list[float]:
    dist.init_process_group("gloo")

    @torch.compile(backend="eager", fullgraph=True)
    def add(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    out: list[float] = add(torch.ones(2) * (rank + 1)).tolist()
    dist.destroy_process_group()
    return out


@pytest.mark.slow
def test_a_collective_is_compiled_without_a_graph_break() -> None:
    assert launch(compiled).values == [[7.0, 7.0]] * 2
