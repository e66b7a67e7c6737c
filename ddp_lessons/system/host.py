"""A host: its clock and processors, free ports and sockets, its address for other hosts.

Parents, engines and ranks call it.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")
LOOPBACK_INTERFACE = {"linux": "lo", "darwin": "lo0"}  # by sys.platform
ANYWHERE = "192.0.2.1"  # for documentation (RFC 5737): packets to it take the default route
_PORT = 9  # nothing is sent there


def network_id() -> str:
    """The id of this process's network, as a container may have its own on the same machine."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        return ""


def blocking_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that block, whatever socket.setdefaulttimeout says."""
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(True)
    return ends


def processor_ns(schedstat: str) -> tuple[int, int]:
    """How long a thread has used a processor, and has waited for one, ready to run, in ns (Linux).

    `schedstat` is its file /proc/PID/task/TID/schedstat (kernel documentation, sched-stats); that
    of the main thread is /proc/PID/schedstat, too. Raises OSError without the file, and ValueError
    if this kernel does not count.
    """
    file = os.open(schedstat, os.O_RDONLY)
    try:
        used, queued, _ = map(int, os.read(file, 100).split())
    finally:
        os.close(file)
    if not used:
        raise ValueError("this kernel does not count")
    return used, queued


def own_address(towards: str | None) -> str | None:
    """The address of this host on the route to another one; None if it has no network.

    If that route stays inside this machine, the address on the default route.
    """
    for target in (towards, ANYWHERE):
        address = _source(target) if target else None
        if address is not None and not _is_loopback(address):
            return address
    import psutil

    up = psutil.net_if_stats()
    return next(
        (own for interface, own in _addresses() if interface in up and up[interface].isup), None
    )


def interface_of(address: str) -> str | None:
    """The name of the network interface that holds an address of this host."""
    return next((interface for interface, own in _addresses() if own == address), None)


def _source(target: str) -> str | None:
    """The address from which a packet to `target` would be sent. None is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _PORT))
        except OSError:  # no route to it, or no such host
            return None
        return str(probe.getsockname()[0])


def _addresses() -> Iterator[tuple[str, str]]:
    """The interfaces, except loopback, and their IPv4 addresses."""
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and not _is_loopback(one.address):
                yield interface, one.address


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def clock_id() -> str:
    """The id of this process's clock: the boot of the system, and the time namespace.

    Containers of one machine share a clock (time_namespaces(7)).
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # not Linux
        return platform.node()


def reserve_port(address: str = LOOPBACK) -> socket.socket:
    """A socket that holds a free port of this machine for rank 0's store to listen on.

    Asking for a free port and closing the socket leaves a gap in which another job may take it.
    This one stays bound for the whole run but never listens; with SO_REUSEADDR on both sides the
    store may bind the same port, while the system gives it to nobody else.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.bind((address, 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder
