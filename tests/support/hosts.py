"""Two hosts on one machine for tests: network namespaces that a cable joins, clocks of their own.

Processes in a namespace see only its interfaces: loopback, and one end of a veth pair. With a time
namespace, too, their monotonic clock counts from another moment, as on another machine. It takes
root; where that, or the kernel, does not allow it, the test is skipped with the reason.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tests.support.allowed import cannot

NETWORK = "10.77.0"
TOOLS = ("ip", "unshare")
_numbers = itertools.count()


class Host(NamedTuple):
    """A namespace that stands for a machine."""

    namespace: str
    device: str  # the interface that leads to the other host
    address: str  # the host's own, by which the other reaches it

    def command(self, *command: str, clock_ahead: int = 0) -> list[str]:
        """The command line that runs a command there, its monotonic clock so many seconds ahead."""
        clock = ["unshare", "--time", "--monotonic", str(clock_ahead), "--fork", "--kill-child"]
        there = ["ip", "netns", "exec", self.namespace]
        return [*there, *(clock if clock_ahead else ()), *command]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; they are gone at the end. Skips where that cannot be."""
    skip_where_not_allowed()
    name = f"ddpl{os.getpid()}n{next(_numbers)}"
    one, other = (Host(f"{name}{end}", f"veth{end}", f"{NETWORK}.{end}") for end in (1, 2))
    with ExitStack() as stack:
        for host in (one, other):
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
        _ip("link", "add", one.device, "netns", one.namespace, "type", "veth",
            "peer", "name", other.device, "netns", other.namespace)  # fmt: skip
        for host in (one, other):
            inside = ("-n", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in (host.device, "lo"):
                _ip(*inside, "link", "set", device, "up")
        for host in (one, other):
            _await_link(host)
        yield one, other


def _await_link(host: Host) -> None:
    """Wait until the cable carries: both of its ends are up, and the kernel has seen it."""
    deadline = time.monotonic() + 10
    while "LOWER_UP" not in _ip("-n", host.namespace, "link", "show", host.device):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def skip_where_not_allowed() -> None:
    """Skip the test where no namespaces can be made, saying why."""
    if sys.platform != "linux":
        cannot("network namespaces are Linux's")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        cannot(f"{missing[0]} is not installed")
    probe = ["unshare", "--net", "--time", "--monotonic", "1", "--fork", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    if tried.returncode:
        cannot(f"namespaces are not allowed here: {tried.stderr.strip()}")
    names = f"ddpl{os.getpid()}probe"
    tried = subprocess.run(["ip", "netns", "add", names], capture_output=True, text=True)
    if tried.returncode:
        cannot(f"network namespaces are not allowed here: {tried.stderr.strip()}")
    _ip("netns", "delete", names)
