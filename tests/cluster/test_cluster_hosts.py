"""launch() on engines of two hosts with different clocks: namespaces of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import two_hosts

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("hosts")]

AHEAD = 5000  # seconds, of the second host's clock
# A notebook on the first host, with the controller and two engines; it prints how to connect more.
NOTEBOOK = """
import json, os, sys, time
import ipyparallel, torch, torch.distributed as dist
from ddp_lessons import launch, span

directory, address = sys.argv[1:]
cluster = ipyparallel.Cluster(n=2, profile_dir=directory, controller_ip=address, log_level=40)
client = cluster.start_and_connect_sync()
print(f"{directory}/security/ipcontroller-{cluster.cluster_id}-engine.json", flush=True)
client.wait_for_engines(4, timeout=60, interactive=False)
try:
    print(json.dumps(body(client)), flush=True)
finally:
    client.shutdown(block=False)  # the reply of an engine that ends may be lost
    deadline = time.monotonic() + 30
    while client.ids and time.monotonic() < deadline:
        time.sleep(0.1)
    client.close()
    cluster.stop_cluster_sync()
"""
MEET = """
def meet(rank):
    dist.init_process_group("gloo")
    for _ in range(10):
        dist.barrier()
    x = torch.full((1000,), float(rank))
    dist.all_reduce(x)
    dist.destroy_process_group()
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    names += ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return x.mean().item(), {name: os.environ.get(name) for name in names}
"""


def on_two_hosts(directory: Path, body: str) -> Any:
    """What `body(client)` returns on the first of two hosts with two engines each."""
    script = MEET + textwrap.dedent(body) + NOTEBOOK
    environment = {**os.environ, "IPYTHONDIR": str(directory)}
    with two_hosts() as (one, other):
        command = one.command(sys.executable, "-c", script, str(directory), one.address)
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as notebook:
            assert notebook.stdout is not None
            file = notebook.stdout.readline().strip()
            engine = [sys.executable, "-m", "ipyparallel.engine", f"--file={file}"]
            command = other.command(*engine, f"--profile-dir={directory}", clock_ahead=AHEAD)
            engines = [_quiet(command, environment) for _ in range(2)]
            told = notebook.stdout.readlines()
            for process in engines:
                process.wait(30)
    return json.loads(told[-1])


def _quiet(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=null, stderr=null)


@pytest.mark.slow
def test_ranks_by_host_on_one_clock(tmp_path: Path) -> None:
    told = on_two_hosts(
        tmp_path,
        """
        def body(client):
            run = launch(meet, nprocs=2, nnodes=2, cluster=client)
            barriers = [span for span in run.spans() if span.op == "barrier"]
            met = [[(s.rank, s.t0_ns, s.t1_ns) for s in barriers if s.seq == i] for i in range(10)]
            ranks = [(r.began_ns, r.started_ns, r.ended_ns) for r in run.ranks]
            return run.values, met, run.begin_ns, ranks
        """,
    )
    values, met, begin_ns, ranks = told
    assert [value for value, _ in values] == [6.0] * 4
    places = [{n: v for n, v in variables.items() if "RANK" in n} for _, variables in values]
    assert [int(p["RANK"]) for p in places] == [0, 1, 2, 3]
    assert [int(p["LOCAL_RANK"]) for p in places] == [0, 1, 0, 1]
    assert [int(p["GROUP_RANK"]) for p in places] == [0, 0, 1, 1]
    for _, variables in values:
        assert variables["MASTER_ADDR"] == "10.77.0.1"
        assert variables["LOCAL_WORLD_SIZE"] == "2"
        assert variables["GLOO_SOCKET_IFNAME"] in ("veth1", "veth2")
        assert variables["NCCL_SOCKET_IFNAME"] == variables["GLOO_SOCKET_IFNAME"]
    for spans in met:  # no rank leaves a barrier before the last has come
        assert len(spans) == 4
        assert max(t0 for _, t0, _ in spans) <= min(t1 for *_, t1 in spans)
    for began_ns, started_ns, ended_ns in ranks:
        assert begin_ns <= began_ns < started_ns < ended_ns < begin_ns + 120e9
