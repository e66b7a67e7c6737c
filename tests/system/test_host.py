"""The addresses and interfaces of this host."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from ddp_lessons.system.host import interface_of, network_id, own_address
from tests.support.hosts import Host, two_hosts

ASK = """
import json, sys
from ddp_lessons.system import host
address = host.own_address(sys.argv[1] or None)
print(json.dumps([address, address and host.interface_of(address), host.network_id()]))
"""


def asked(host: Host, towards: str) -> list[str | None]:
    command = host.command(sys.executable, "-c", ASK, towards)
    told = subprocess.run(command, capture_output=True, check=True, text=True)
    found: list[str | None] = json.loads(told.stdout)
    return found


@pytest.mark.system
def test_the_way_to_another_host() -> None:
    with two_hosts() as (one, other):
        names = set()
        for here, there in ((one, other), (other, one)):
            for towards in (there.address, "127.0.0.1", "", "no such host"):
                address, interface, name = asked(here, towards)
                assert (address, interface) == (here.address, here.device)
            names.add(name)
        assert len(names | {network_id()}) == 3


def test_here() -> None:
    address = own_address("127.0.0.1")
    if address is not None:
        assert interface_of(address) in psutil.net_if_addrs()
    assert interface_of("203.0.113.1") is None
    assert network_id() == network_id()
