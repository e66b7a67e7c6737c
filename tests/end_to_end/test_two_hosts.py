"""torchrun over two hosts: network namespaces with a cable between them, and two clocks."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ddp_lessons import Run, launch, load_run
from tests.support import torchrun
from tests.support.hosts import Host, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("hosts")]

AHEAD = 5000  # seconds by which the second host's clock is ahead of the first one's
RECORD = "record"
RATE = 50_000_000  # bits a second of a slow link

SIZES = """
    import os, time
    import torch, torch.distributed as dist
    import ddp_lessons

    dist.init_process_group("gloo")
    slow = dist.new_group([0, 1])
    for group in (dist.group.WORLD, slow):
        while group is slow and not os.path.exists("slow"):
            time.sleep(0.05)
        for n in (1_000, 50_000, 100_000, 200_000) * 3:
            dist.all_reduce(torch.ones(n), group=group)
        print("done", flush=True)
    dist.destroy_process_group()
"""
ENDLESS = """
    import datetime, os
    import torch, torch.distributed as dist
    import ddp_lessons

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    while True:
        dist.all_reduce(torch.ones(10))
        print("once more", flush=True)
"""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def end_all_on(host: Host) -> None:
    """What a test has left running: an agent that is killed leaves its ranks."""
    listed = subprocess.run(
        ["ip", "netns", "pids", host.namespace], check=True, capture_output=True, text=True
    )
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


@contextmanager
def agents(
    hosts: tuple[Host, Host], script: Path, nprocs: int = 1
) -> Iterator[list[subprocess.Popen[str]]]:
    """An agent on each host; ranks record on each host into a folder of its own."""
    endpoint = f"{hosts[0].address}:29400"  # any port is free in a new namespace
    options = ("--nnodes=2", f"--nproc-per-node={nprocs}", "--rdzv-backend=c10d")
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                torchrun.agent(
                    script,
                    *options,
                    f"--rdzv-endpoint={endpoint}",
                    f"--local-addr={host.address}",
                    f"--rdzv-conf=is_host={number == 0}",  # no name server knows these addresses
                    env=variables(host, number),
                    prefix=tuple(host.command(*named(number), clock_ahead=AHEAD * number)),
                )
            )
            for number, host in enumerate(hosts)
        ]
        for host in hosts:
            stack.callback(end_all_on, host)
        yield started


def named(number: int) -> list[str]:
    """Run what follows where the host has a name of its own."""
    name_it = f'hostname host{number} && exec "$@"'
    return ["unshare", "--uts", "sh", "-c", name_it, "sh"]


def variables(host: Host, number: int) -> Mapping[str, str]:
    return {"GLOO_SOCKET_IFNAME": host.device, "DDP_LESSONS_RECORD": f"{RECORD}{number}"}


def written(folder: Path, text: str) -> Path:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(text).lstrip())
    return script


def ended(both: list[subprocess.Popen[str]]) -> str:
    """Wait until both agents have come to their right end; what their ranks printed."""
    texts = [agent.communicate(timeout=torchrun.PATIENCE)[0] for agent in both]
    assert [agent.returncode for agent in both] == [0, 0], texts
    return "".join(texts)


def record_of(folder: Path) -> Run:
    """The records of both hosts, copied into one folder."""
    together = folder / "together"
    together.mkdir()
    for number in (0, 1):
        for file in (folder / f"{RECORD}{number}").iterdir():
            file.rename(together / file.name)
    return load_run(together)


class OnTwoHosts(NamedTuple):
    """A training of two ranks on each of two hosts."""

    folder: Path
    text: str  # what the ranks printed
    run: Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> OnTwoHosts:
    folder = tmp_path_factory.mktemp("trained")
    script = written(folder, torchrun.TRAIN)
    with two_hosts() as hosts, agents(hosts, script, nprocs=2) as both:
        text = ended(both)
    return OnTwoHosts(folder, text, record_of(folder))


def test_two_hosts_train_as_one_does(trained: OnTwoHosts) -> None:
    train = runpy.run_path(str(trained.folder / "train.py"))["train"]
    values = launch(train, args=(5,), nprocs=4).values
    assert torchrun.returned(trained.text) == values


def test_two_agents_are_two_nodes(trained: OnTwoHosts) -> None:
    assert [rank.group_rank for rank in trained.run.ranks] == [0, 0, 1, 1]
    assert trained.run.world_size == 4


def test_both_hosts_are_on_one_clock(trained: OnTwoHosts) -> None:
    run = trained.run
    assert run.ok
    clocks = [facts_of(trained.folder / "together", rank)["clock"] for rank in (2, 3)]
    # How the clocks differ is known here: what was measured holds what it claims.
    for clock in clocks:
        assert abs(abs(clock["behind_ns"]) - AHEAD * 10**9) <= clock["within_ns"] < 100_000_000
    within_ns = sum(clock["within_ns"] for clock in clocks)  # for two ranks on the second host
    for step in range(5):
        buckets = [s for s in run.spans() if s.lane == "buckets" and s.step == step]
        assert len(buckets) == 4
        # Nobody has the sum before all have come, give or take how well the clocks are known.
        assert min(s.t1_ns or 0 for s in buckets) > max(s.t0_ns for s in buckets) - within_ns


def facts_of(folder: Path, rank: int) -> dict[str, Any]:
    (file,) = folder.glob(f"rank_{rank}.*.jsonl")
    facts: dict[str, Any] = {}
    for line in file.read_text().splitlines():
        facts.update(json.loads(line))
    return facts


def test_a_slow_link_is_seen(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    with agents(hosts, written(tmp_path, SIZES)) as both:
        await_line(both[0], "done")
        slow_down(hosts[0], RATE)
        (tmp_path / "slow").touch()
        ended(both)
    slow, quick = sorted(record_of(tmp_path).bandwidth(), key=lambda link: link.group == "world")
    assert (slow.op, quick.op) == ("all_reduce", "all_reduce")
    # With 2 ranks, each sends and receives as much as the tensor holds.
    assert 0.5 < slow.bytes_per_second / (RATE / 8) < 2
    assert quick.bytes_per_second > 4 * slow.bytes_per_second


def slow_down(host: Host, rate: int) -> None:
    """Limit what leaves a host to a rate in bits a second; skips where the kernel cannot."""
    limit = ["tbf", "rate", f"{rate}bit", "burst", "32kb", "latency", "400ms"]
    command = ["tc", "-n", host.namespace, "qdisc", "add", "dev", host.device, "root", *limit]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"tc cannot slow the link here: {tried.stderr.strip()}")


def test_a_host_that_is_cut_off_is_explained(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    with agents(hosts, written(tmp_path, ENDLESS)) as both:
        await_line(both[0], "once more")
        cut = ["ip", "-n", hosts[1].namespace, "link", "set", hosts[1].device, "down"]
        subprocess.run(cut, check=True)
        # The ranks give up after 5 s; their agents, which have lost each other, much later.
        while not all(raised(tmp_path / f"{RECORD}{number}") for number in (0, 1)):
            time.sleep(0.1)
    run = record_of(tmp_path)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("no route", (0, 1))
    assert run.verdict.frame is not None
    assert run.verdict.frame.lineno == 7
    assert "on several machines, but the call never ended" in run.explain()
    assert [rank.host for rank in run.ranks] == ["host0", "host1"]


def await_line(agent: subprocess.Popen[str], text: str) -> None:
    """Wait until one of its ranks has printed this."""
    assert agent.stdout is not None
    while text not in (line := agent.stdout.readline()):
        assert line, "it ended"


def raised(folder: Path) -> bool:
    return any('"raised"' in file.read_text() for file in folder.glob("*.jsonl"))
