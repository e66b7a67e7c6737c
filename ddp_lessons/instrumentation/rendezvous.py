"""Connects ranks to rank 0's store on time, on loopback only, and keeps them until all have joined.

Runs in workers. install.py wraps torch's rendezvous with `on_time`, worker/main.py puts
`meet_apart` and `listen_on_loopback` in place, and process_groups.py calls `await_others` when a
rank has joined.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ddp_lessons.instrumentation import recording, torch_api
from ddp_lessons.system.host import LOOPBACK, LOOPBACK_NAMES

if TYPE_CHECKING:
    import torch.distributed as dist

_BACKLOG = 2048  # connections that may wait at once, as in torch's own store
PATIENCE = timedelta(seconds=10)  # for a rank that does not take part
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.016  # seconds between two attempts to connect
_OLD_STORE = 2.0  # seconds that the store of an earlier group may take to end, unless it is kept
_STOPS_LISTENING = 0.05  # seconds that it may take from its last connection's end
_connections: list[socket.socket] = []  # of this process, to the stores by which it joined
_uses = itertools.count()  # numbers the uses of the store, so that each has its own keys


def await_store(
    init_method: str | None, rank: int, timeout: float, known_host: str = LOOPBACK
) -> None:
    """Wait until rank 0's store listens, at most `timeout` seconds.

    torch's own client pauses 0.25 s and more after a refused connection, so that a rank a
    millisecond early joins a quarter of a second late. And when ranks join again, one that is ahead
    would connect to the last store, which is about to end. This changes when a rank connects, never
    to what. It waits for stores on this machine, or on the host where launch() has put rank 0; for
    any other rendezvous (file://, a store by hand, another host) it returns at once.
    """
    address = _store_address(init_method, known_host)
    if rank <= 0 or address is None:
        return
    _leave_last_store()
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while not _knock(address) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def on_time(rendezvous: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's rendezvous, by which init_process_group finds the others: wait for the store.

    torch calls it when it has checked all arguments.
    """

    @functools.wraps(rendezvous)
    def wait_first(url: str, rank: int = -1, *args: Any, **kwargs: Any) -> Any:
        if (recorder := recording.current()) is not None:
            longest = recording.seconds(kwargs.get("timeout")) or 1800.0
            await_store(url, rank_of(url, rank), longest, recorder.host_of_rank_zero)
        return rendezvous(url, rank, *args, **kwargs)

    return wait_first


def meet_apart() -> None:
    """Prefix the store's keys anew at each join, so that a rank never reads stale addresses.

    A group or a DDP model that is kept keeps the store, too, and with it the addresses by which the
    ranks found each other. torch uses the same keys again: a rank that is ahead finds the old
    address of another, and joining fails ("Connection refused"). The first join gets no prefix.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    rendezvous = distributed_c10d.rendezvous
    times: Counter[tuple[str, int]] = Counter()  # by address

    @functools.wraps(rendezvous)
    def apart(*args: Any, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
        for store, rank, world_size in rendezvous(*args, **kwargs):
            if isinstance(store, dist.TCPStore):
                address = store.host, store.port
                if number := times[address]:
                    store = dist.PrefixStore(f"ddp_lessons/join/{number}", store)
                times[address] += 1
            yield store, rank, world_size

    distributed_c10d.rendezvous = apart


def listen_on_loopback() -> None:
    """Have rank 0's store listen on 127.0.0.1 alone, where that is the address of env:// or tcp://.

    torch's store listens on all addresses of the machine, and accepts anybody. Any other address,
    and a store made by hand, are left as they are.
    """
    if not torch_api.store_takes_a_socket():
        return
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    make = module.TCPStore

    @functools.wraps(make)
    def on_loopback(*args: Any, **options: Any) -> dist.TCPStore:
        if options.get("is_master") and options["host_name"] == LOOPBACK and options["port"]:
            # If the port is taken, torch says so, or shares a store of this process.
            with contextlib.suppress(OSError):
                options["master_listen_fd"] = _listener(options["port"])
        return make(*args, **options)

    module.TCPStore = on_loopback


def _listener(port: int) -> int:
    """The descriptor of a new socket that listens on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as new:
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        new.bind((LOOPBACK, port))
        new.listen(_BACKLOG)
        return new.detach()


@contextlib.contextmanager
def store_of_the_group(purpose: str) -> Iterator[dist.Store]:
    """The store of the default group, under keys of its own and with a timeout of `PATIENCE`.

    A rank that does not take part makes the others raise RuntimeError.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    default = _get_default_store()
    before = default.timeout
    store = dist.PrefixStore(f"ddp_lessons/{purpose}/{next(_uses)}", default)
    store.set_timeout(PATIENCE)
    try:
        yield store
    finally:
        store.set_timeout(before)


def await_others() -> None:
    """Return once all ranks have joined, so that none leaves while others are still joining.

    gloo connects every two ranks. A rank that has all its connections may end while two others
    still connect, which then fail: "Connection closed by peer" (1 in 100 runs on a busy machine,
    for a function that hardly does more than join). Rank 0, which holds the store, leaves last.
    With torch's own barrier, TORCH_DIST_INIT_BARRIER=1, rank 0 may leave first.
    """
    import torch.distributed as dist

    rank, others = dist.get_rank(), range(1, dist.get_world_size())
    if not others:
        return
    with contextlib.suppress(RuntimeError), store_of_the_group("met") as store:
        if rank == 0:
            store.wait([f"here/{other}" for other in others])
            store.set("all are here", "")
            store.wait([f"gone/{other}" for other in others])
        else:
            store.set(f"here/{rank}", "")
            store.wait(["all are here"])
            store.set(f"gone/{rank}", "")


def rank_of(init_method: str | None, rank: Any) -> int:
    """The rank that this call of init_process_group joins as; -1 if that cannot be told."""
    if rank == -1 and init_method in (None, "env://"):
        rank = os.environ.get("RANK", "-1")
    try:
        return int(rank)
    except (TypeError, ValueError):
        return -1


def _store_address(init_method: str | None, known_host: str) -> tuple[str, int] | None:
    try:
        url = urlparse(init_method or "env://")
        if url.scheme == "env":
            if "world_size=" not in url.query:
                _ = os.environ["WORLD_SIZE"]  # torch reads it before it looks for the store
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        elif url.scheme == "tcp" and url.hostname and url.port:
            host, port = url.hostname, url.port
        else:
            return None
    except (KeyError, ValueError):
        return None  # torch explains a missing or malformed address better
    return (host, port) if host in (*LOOPBACK_NAMES, known_host) else None


def _knock(address: tuple[str, int]) -> bool:
    """Whether the store listens. Keeps the connection, which closes when the store ends."""
    try:
        _connections.append(socket.create_connection(address, timeout=1.0))
    except OSError:
        return False
    return True


def _leave_last_store() -> None:
    """Wait until the store of the last join is gone, but not long, as something may keep it."""
    while _connections:
        with _connections.pop() as last:
            if wait([last], _OLD_STORE):
                time.sleep(_STOPS_LISTENING)  # until then one could still connect to it
