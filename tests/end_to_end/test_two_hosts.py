"""torchrun over two hosts: network namespaces with a cable between them, and two clocks."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons import Run, launch, load_run
from tests.support import torchrun
from tests.support.hosts import Host, two_hosts

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("hosts")]

AHEAD = 5000  # seconds by which the second host's clock is ahead of the first one's
RECORD = "record"
RATE = 50_000_000  # bits a second of a slow link

SIZES = """
    import os
    import torch, torch.distributed as dist
    import ddp_lessons

    dist.init_process_group("gloo")
    for n in (1_000, 50_000, 100_000, 200_000) * 3:
        dist.all_reduce(torch.ones(n))
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


def carried_out(hosts: tuple[Host, Host], script: Path, nprocs: int = 1) -> str:
    """Run a script on both hosts to its end; what its ranks printed."""
    with agents(hosts, script, nprocs) as both:
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


def test_two_hosts_train_as_one_does(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    script = written(tmp_path, torchrun.TRAIN)
    text = carried_out(hosts, script, nprocs=2)
    values = launch(runpy.run_path(str(script))["train"], args=(5,), nprocs=4).values
    assert torchrun.returned(text) == values


def test_both_hosts_are_on_one_clock(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    carried_out(hosts, written(tmp_path, torchrun.TRAIN))
    run = record_of(tmp_path)
    assert [rank.group_rank for rank in run.ranks] == [0, 1]
    assert run.ok
    rank = facts_of(tmp_path / "together", 1)
    # How the clocks differ is known here: what was measured holds what it claims.
    clock = rank["clock"]
    assert abs(abs(clock["behind_ns"]) - AHEAD * 10**9) <= clock["within_ns"] < 100_000_000
    buckets = [span for span in run.spans() if span.lane == "buckets"]
    for step in range(5):
        mine, others = (s for s in buckets if s.step == step)
        # Nobody has the sum before both have come, give or take how well the clocks are known.
        assert min(mine.t1_ns or 0, others.t1_ns or 0) > others.t0_ns - clock["within_ns"]


def facts_of(folder: Path, rank: int) -> dict[str, Any]:
    (file,) = folder.glob(f"rank_{rank}.*.jsonl")
    facts: dict[str, Any] = {}
    for line in file.read_text().splitlines():
        facts.update(json.loads(line))
    return facts


def test_a_slow_link_is_seen(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    script = written(tmp_path, SIZES)
    carried_out(hosts, script)
    (quick,) = record_of(tmp_path).bandwidth()
    slow_down(hosts[0], RATE)
    (tmp_path / "together").rename(tmp_path / "quick")
    carried_out(hosts, script)
    (slow,) = record_of(tmp_path).bandwidth()
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
        assert both[0].stdout is not None
        while "once more" not in both[0].stdout.readline():
            pass
        cut = ["ip", "-n", hosts[1].namespace, "link", "set", hosts[1].device, "down"]
        subprocess.run(cut, check=True)
        # The ranks give up after 5 s; their agents, which have lost each other, much later.
        while not all(raised(tmp_path / f"{RECORD}{number}") for number in (0, 1)):
            pass
    run = record_of(tmp_path)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("no route", (0, 1))
    assert run.verdict.frame is not None
    assert run.verdict.frame.lineno == 7
    assert "no data gets from one machine to the other" in run.explain()
    assert [rank.host for rank in run.ranks] == ["host0", "host1"]


def raised(folder: Path) -> bool:
    return any('"raised"' in file.read_text() for file in folder.glob("*.jsonl"))
