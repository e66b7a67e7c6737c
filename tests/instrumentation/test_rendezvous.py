"""No other process can take the reserved port, and ranks join at it without delay."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ddp_lessons import launch
from ddp_lessons.instrumentation import rendezvous, torch_api
from ddp_lessons.instrumentation.rendezvous import await_store, rank_of
from ddp_lessons.system.host import reserve_port

FOREVER = 600.0  # seconds; a wait that should not happen would run into the test's own timeout


@pytest.fixture
def port() -> Iterator[int]:
    """A reserved port, on which nobody listens."""
    with contextlib.closing(reserve_port()) as holder:
        yield int(holder.getsockname()[1])


def seconds_in_await(init_method: str | None, rank: int, timeout: float = FOREVER) -> float:
    began = time.monotonic()
    await_store(init_method, rank, timeout)
    return time.monotonic() - began


def test_the_port_is_held_against_others(port: int) -> None:
    with socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))


def test_it_is_on_loopback_only_and_does_not_listen() -> None:
    with contextlib.closing(reserve_port()) as holder:
        host, port = holder.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5)


def test_the_system_gives_it_to_nobody_else() -> None:
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(reserve_port()) for _ in range(200)]
        ports = {holder.getsockname()[1] for holder in holders}
        assert len(ports) == 200
        for _ in range(200):
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            assert free.getsockname()[1] not in ports


def test_the_store_of_rank_zero_can_still_listen_on_it(port: int) -> None:
    for _ in range(3):
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        client = dist.TCPStore("127.0.0.1", port, is_master=False)
        client.set("key", "value")
        assert store.get("key") == b"value"
        del client, store


def test_once_given_back_it_is_free() -> None:
    holder = reserve_port()
    port = holder.getsockname()[1]
    holder.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


@pytest.mark.alone
@pytest.mark.parametrize(
    ("init_method", "rank"),
    [
        (None, 0),
        ("env://", 0),
        (None, -1),
        ("tcp://127.0.0.1:{port}", 0),
        ("file:///tmp/never-made", 1),
        ("tcp://192.0.2.1:{port}", 1),
        ("tcp://example.invalid:{port}", 1),
        ("tcp://127.0.0.1", 1),
        ("tcp://127.0.0.1:no-number", 1),
        ("nonsense", 1),
    ],
)
def test_who_has_nothing_to_wait_for_goes_on(
    port: int, init_method: str | None, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    method = init_method and init_method.format(port=port)
    assert seconds_in_await(method, rank) < 1


@pytest.mark.alone
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_PORT": "1"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
        {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"},
    ],
)
def test_missing_and_foreign_addresses_are_left_to_torch(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert seconds_in_await(None, 1) < 1


@pytest.mark.alone
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_waits_until_the_store_listens(port: int, host: str) -> None:
    waiting = threading.Thread(target=await_store, args=(f"tcp://{host}:{port}", 1, FOREVER))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    waiting.join(30)
    assert not waiting.is_alive()
    del store
    assert seconds_in_await(f"tcp://{host}:{port}", 1, timeout=0) < 1  # the last store is gone
    assert not rendezvous._connections


@pytest.mark.alone
def test_gives_up_after_its_timeout(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert 0.2 <= seconds_in_await("env://", 1, timeout=0.2) < 5
    assert seconds_in_await(None, 1, timeout=0) < 1


def test_rank_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert rank_of(None, -1) == 3
    assert rank_of("env://", 0) == 0
    assert rank_of("tcp://127.0.0.1:1", 2) == 2
    assert rank_of("tcp://127.0.0.1:1", -1) == -1
    monkeypatch.setenv("RANK", "three")
    assert rank_of(None, -1) == -1
    monkeypatch.delenv("RANK")
    assert rank_of(None, -1) == -1


def arrive(rank: int) -> tuple[int, int]:
    """When this rank had connected to the others, and when init_process_group returned, in ns."""
    connect, connected_ns = distributed_c10d._new_process_group_helper, 0

    def connect_late(*args: Any, **kwargs: Any) -> Any:
        nonlocal connected_ns
        made = connect(*args, **kwargs)
        time.sleep(0.2 * rank)
        connected_ns = time.perf_counter_ns()
        return made

    distributed_c10d._new_process_group_helper = connect_late
    dist.init_process_group("gloo")
    joined_ns = time.perf_counter_ns()
    dist.destroy_process_group()
    return connected_ns, joined_ns


@pytest.mark.ranks
def test_no_rank_may_leave_while_another_still_connects() -> None:
    connected, joined = zip(*launch(arrive, nprocs=3).values, strict=True)
    assert min(joined) > max(connected)


def listening() -> list[str]:
    """The addresses on which this process listens."""
    found = psutil.Process().net_connections("tcp")
    return sorted(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)


def joins(rank: int, address: str) -> list[list[str]]:
    """Join three times; the addresses on which this rank listens each time."""
    found = []
    for _ in range(3):
        dist.init_process_group("gloo", address, rank=rank, world_size=2)
        dist.barrier()
        found.append(listening())
        dist.destroy_process_group()
    return found


@pytest.mark.ranks
def test_the_store_listens_on_loopback_only() -> None:
    if not torch_api.store_takes_a_socket():
        pytest.skip("the store takes no socket")
    for found in launch(joins, ("env://",), timeout=20).values[0]:
        assert found
        assert {*found} == {"127.0.0.1"}


@pytest.mark.ranks
def test_so_it_does_on_a_port_of_the_learners(port: int) -> None:
    if not torch_api.store_takes_a_socket():
        pytest.skip("the store takes no socket")
    variables = {"MASTER_PORT": str(port)}
    assert {*launch(joins, ("env://",), env=variables).values[0][0]} == {"127.0.0.1"}
    assert {*launch(joins, (f"tcp://127.0.0.1:{port}",)).values[0][0]} == {"127.0.0.1"}


@pytest.mark.ranks
def test_another_address_is_left_as_it_is(port: int) -> None:
    assert "::" in launch(joins, (f"tcp://localhost:{port}",)).values[0][0]


@pytest.mark.ranks
def test_a_port_that_is_taken_is_told_by_torch() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {"MASTER_PORT": str(taken.getsockname()[1])}
        run = launch(joins, ("env://",), nprocs=1, env=variables, check=False)
    assert "EADDRINUSE" in run.explain()


@pytest.mark.ranks
def test_a_store_by_hand_may_be_shared_with_the_group() -> None:
    def work(rank: int) -> str:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = (
            dist.TCPStore(host, port, 2, rank == 0, multi_tenant=True, wait_for_workers=False)
            if rank == 0
            else None
        )
        dist.init_process_group("gloo")
        if store is None:
            store = dist.TCPStore(host, port, 2, False)
        store.set(str(rank), f"of {rank}")
        other = store.get(str(1 - rank))
        dist.barrier()
        dist.destroy_process_group()
        return bytes(other).decode()

    assert launch(work, timeout=20).values == ["of 1", "of 0"]
