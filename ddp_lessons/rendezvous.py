"""Finding a free port without a race (parent), and not being late because of it (worker)."""

from __future__ import annotations

import os
import socket
import time
from typing import Any
from urllib.parse import urlparse

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.016  # seconds between two knocks


def reserve_port(address: str = "127.0.0.1") -> socket.socket:
    """A socket that holds a free port of this machine for rank 0's store to listen on.

    Asking for a free port and closing the socket leaves a gap in which another job may take it.
    This one stays bound for the whole run but never listens; with SO_REUSEADDR on both sides the
    store may bind the same port, while the system gives it to nobody else.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.bind((address, 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def await_store(
    init_method: str | None, rank: int, timeout: float, known_host: str = "127.0.0.1"
) -> None:
    """Wait until rank 0's store listens, at most `timeout` seconds.

    torch's own client pauses 0.25 s and more after a refused connection, so that a rank a
    millisecond early joins a quarter of a second late. This changes when a rank connects, never to
    what. It is for stores on this machine, or on the host where launch() has put rank 0. Any other
    way to rendezvous (file://, a store by hand, another host) returns at once.
    """
    address = _store_address(init_method, known_host)
    if rank <= 0 or address is None:
        return
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while not _listens(address) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def rank_of(init_method: str | None, options: dict[str, Any]) -> int:
    """The rank that this call of init_process_group joins as; -1 if that cannot be told."""
    rank = options.get("rank", -1)
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
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        elif url.scheme == "tcp" and url.hostname and url.port:
            host, port = url.hostname, url.port
        else:
            return None
    except (KeyError, ValueError):
        return None  # torch explains a missing or malformed address better
    return (host, port) if host in ("localhost", "127.0.0.1", "::1", known_host) else None


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return False
    return True
