"""The addresses and interfaces of this host, and its processors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ddp_lessons.system.host import interface_of, network_id, own_address, processor_ns
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")
def test_the_processor_s_time_of_a_thread() -> None:
    used_before, queued_before = processor_ns("/proc/self/schedstat")
    clock = time.thread_time_ns()
    while time.thread_time_ns() < clock + 50_000_000:
        pass
    used, queued = processor_ns("/proc/self/schedstat")
    slack = 10_000_000  # the kernel counts every few ms
    assert 50_000_000 - slack <= used - used_before <= time.thread_time_ns() - clock + slack
    assert queued >= queued_before


def test_no_processor_s_time_where_the_kernel_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "schedstat").write_text("0 0 0\n")
    with pytest.raises(ValueError, match="does not count"):
        processor_ns(str(tmp_path / "schedstat"))
    with pytest.raises(FileNotFoundError):
        processor_ns(str(tmp_path / "no such file"))
