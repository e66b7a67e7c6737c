"""Running torchrun for the tests: scripts with real agents, on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ddp_lessons.exercises.script_runner import TORCHRUN, VARIABLES
from ddp_lessons.system.host import reserve_port

QUIET = {**VARIABLES, "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
PATIENCE = 90.0  # seconds
# A training in DDP, whose ranks print what they return: the last loss, to the last bit.
TRAIN = """
    import os
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP
    from ddp_lessons import span, watch_ddp

    def train(rank, steps):
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = watch_ddp(DDP(torch.nn.Linear(50, 50)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1 + rank)
        for _ in range(steps):
            with span("forward"):
                loss = model(torch.randn(8, 50)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.destroy_process_group()
        return loss.double().item().hex()

    if __name__ == "__main__":
        rank = int(os.environ["RANK"])
        print(f"rank {rank} returned {train(rank, 5)}\\n", end="")
"""


def command(script: Path, *options: str) -> list[str]:
    """The command line of an agent whose logs lie beside the script."""
    return [*TORCHRUN, f"--log-dir={script.parent / 'logs'}", *options, str(script)]


def environment(script: Path, more: Mapping[str, str]) -> dict[str, str]:
    """The variables for a script: ours, those above, and more."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(script.parent / "cache")}  # DDP's imports make it
    return {**os.environ, **QUIET, **cache, **more}


@contextlib.contextmanager
def agent(
    script: Path, *options: str, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """An agent with its ranks, which ends at the latest with the block."""
    process = subprocess.Popen(
        [*prefix, *command(script, *options)],
        cwd=script.parent,
        env=environment(script, env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=40)
        process.kill()
        process.communicate()


@contextlib.contextmanager
def two_agents(
    script: Path, nprocs: int, env: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two agents with so many ranks each, on two addresses of this machine."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(contextlib.closing(reserve_port())).getsockname()[1]
        options = [
            "--nnodes=2",
            f"--nproc-per-node={nprocs}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
        ]
        yield [
            stack.enter_context(agent(script, *options, f"--local-addr={address}", env=env))
            for address in ("127.0.0.1", "127.0.0.2")
        ]


def run(
    script: Path, *options: str, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit code of one agent on this machine, and all that it and its ranks printed."""
    with agent(script, "--standalone", *options, env=env) as process:
        text, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, text


def alone(
    script: Path, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> tuple[int, str]:
    """The same of a script that is the only rank and has no agent."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [*prefix, sys.executable, str(script)],
        cwd=script.parent,
        env=environment(script, {**rank, **(env or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout


def returned(text: str) -> list[str]:
    """What the ranks returned, by rank: loss after loss as a hexadecimal number."""
    found = dict(re.findall(r"rank (\d) returned (-?0x[0-9a-f.]+p[+-]\d+)", text))
    return [found[rank] for rank in sorted(found)]
