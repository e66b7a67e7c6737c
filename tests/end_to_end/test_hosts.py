"""The two hosts of tests/support/hosts.py: they reach each other, and their clocks differ."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.support.hosts import Host, two_hosts

pytestmark = pytest.mark.system

ANSWER = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, (peer, _) = server.accept()
    connection.sendall(peer.encode())
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    print(connection.recv(100).decode())
"""


def test_each_reaches_the_other_by_its_address() -> None:
    with two_hosts() as (one, other):
        command = one.command(sys.executable, "-c", ANSWER, one.address)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            assert _output(other, ASK, one.address, port) == other.address


def test_a_clock_of_its_own() -> None:
    with two_hosts() as (_, other):
        asked = "import time; print(time.monotonic())"
        command = other.command(sys.executable, "-c", asked, clock_ahead=5000)
        there = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        assert 4000 < there - time.monotonic() < 6000


def test_nothing_of_them_is_left() -> None:
    with two_hosts() as hosts:
        assert all(host.namespace in _namespaces() for host in hosts)
    assert not any(host.namespace in _namespaces() for host in hosts)


def _output(host: Host, script: str, *arguments: str) -> str:
    command = host.command(sys.executable, "-c", script, *arguments)
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=30)
    return done.stdout.strip()


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
