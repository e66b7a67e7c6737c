"""By which address and interface other hosts reach this one. Runs in the engines of a cluster."""

from __future__ import annotations

import ipaddress
import os
import socket

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
        if found is not None and not ipaddress.ip_address(found).is_loopback:
            return found
    return next(iter(_addresses().values()), None)


def interface_of(address: str) -> str | None:
    """The name of the network interface that holds an address of this host."""
    return next((name for name, own in _addresses().items() if own == address), None)


def _source(target: str) -> str | None:
    """The address from which a packet to `target` would be sent. None is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _PORT))
        except OSError:  # no way there, or no such host
            return None
        return str(probe.getsockname()[0])


def _addresses() -> dict[str, str]:
    """The IPv4 addresses of the interfaces that are up, except loopback, by interface."""
    import psutil

    up = psutil.net_if_stats()
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
        and name in up
        and up[name].isup
        and not ipaddress.ip_address(address.address).is_loopback
    }
