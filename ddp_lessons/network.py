"""By which address and interface other hosts reach this one. Runs in the engines of a cluster."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator

ANYWHERE = "192.0.2.1"  # an address for documentation (RFC 5737): the way to it is the default one
_PORT = 9  # nothing is sent there


def name() -> str:
    """What tells this process's network from others of the same machine, such as a container's."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        return ""


def own_address(towards: str | None) -> str | None:
    """The own address of this host on the way to another one; None if it is connected to none.

    Where the way to it stays inside this machine, it is the address on the way to anywhere.
    """
    for target in (towards, ANYWHERE):
        found = _source(target) if target else None
        if found is not None and not _is_loopback(found):
            return found
    import psutil

    up = psutil.net_if_stats()
    return next((own for name, own in _addresses() if name in up and up[name].isup), None)


def interface_of(address: str) -> str | None:
    """The name of the network interface that holds an address of this host."""
    return next((name for name, own in _addresses() if own == address), None)


def _source(target: str) -> str | None:
    """The address from which a packet to `target` would be sent. None is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _PORT))
        except OSError:  # no way there, or no such host
            return None
        return str(probe.getsockname()[0])


def _addresses() -> Iterator[tuple[str, str]]:
    """The interfaces, except loopback, and their IPv4 addresses."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and not _is_loopback(one.address):
                yield name, one.address


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
