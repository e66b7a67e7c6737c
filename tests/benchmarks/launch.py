"""What fresh ranks cost, in seconds and in memory, with `launch` and with other launchers.

Run by hand, on a quiet Linux machine: `python -m tests.benchmarks.launch`. Times are those of one
process that has torch imported and is idle, as a kernel would be; the launchers take turns in it.
Memory is that of real kernels. Needs accelerate (the extra `bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Nothing here imports ddp_lessons or torch at once: a kernel that measures a peer must not have the
# forkserver, and the process that looks at kernels must not share torch's pages with them.

# launch() sets the same for its ranks. The last one: a silent name server must not count.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RES_OPTIONS": "timeout:1 attempts:1",
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
MEMORY_RANKS = 4
SPAWN_ROUNDS = 3  # mp.spawn takes over a second a rank
MB = 1e6  # bytes

NOTES = f"""\
Medians, in seconds, from the call until all ranks have ended. Every rank joins a gloo group,
all_reduces one number and leaves. The launchers take turns, every second round in reverse.
Ratios: the median of the ratios of each round.

- `launch` is warm: its forkserver has imported torch.
- `notebook_launcher` forks the kernel and asks every 0.1 s whether the ranks have ended: the time
  of few ranks is mostly that pause. For one rank it starts no process. On CPU it works, although
  it says "CUDAs".
- `debug_launcher` forks the kernel and does less: ranks meet in a file, and they cannot leave the
  group, because the last to leave would remove that file and the launcher then fails.
- `mp.spawn` runs {SPAWN_ROUNDS} rounds at most, and not on more ranks than `--most-slow`.
- Hung: some rank had not ended after 30 s and 5 s a rank; such runs are not in the median.
"""
MEMORY_NOTES = f"""\
Memory in MB, of a notebook's kernel that has imported torch, with {MEMORY_RANKS} ranks that have joined and wait.
In all: the sum of PSS (shared pages are shared out) of the kernel, its ranks and helpers.
A rank: the median of USS (private pages) of the ranks. DDP: of `nn.Linear(10, 10)`.
"""

Body = Callable[..., None]
Times = dict[tuple[str, int], list[float]]  # (launcher, ranks): seconds by round, inf if it hung


@dataclass(frozen=True)
class Launcher:
    """A launcher, the numbers of ranks that it is measured with, and how often at most."""

    name: str
    run: Callable[[Body, tuple[Any, ...], int], None]  # (body, args, ranks)
    fewest: int = 1
    most: int = 256
    rounds: int = 1000

    def takes_part(self, ranks: int, turn: int) -> bool:
        return self.fewest <= ranks <= self.most and turn < self.rounds


@dataclass(frozen=True)
class Memory:
    """Bytes that a kernel and its ranks hold."""

    pss: int  # of all together
    uss: int  # of one rank, the median


@dataclass(frozen=True)
class Goal:
    """A goal and what was measured for it, None if nothing was."""

    text: str
    most: float
    value: float | None

    def __str__(self) -> str:
        if self.value is None:
            return f"- not measured: {self.text} at most {self.most:g}"
        verdict = "met" if self.value <= self.most else "MISSED"
        return f"- {verdict}: {self.text} at most {self.most:g}: {self.value:.3g}"


def by_launch(body: Body, args: tuple[Any, ...], ranks: int) -> None:
    """Our own launcher."""
    from ddp_lessons import launch

    launch(lambda _, *rest: body(*rest), args, nprocs=ranks)


def by_spawn(body: Body, args: tuple[Any, ...], ranks: int) -> None:
    """torch.multiprocessing.spawn, with the rendezvous of its documentation."""
    import torch.multiprocessing as mp

    mp.spawn(spawned, args=(ranks, free_port(), body, args), nprocs=ranks)


def spawned(rank: int, ranks: int, port: int, body: Body, args: tuple[Any, ...]) -> None:
    """A rank of mp.spawn: set what `env://` reads, then go on as the others."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    body(*args)


def by_notebook_launcher(body: Body, args: tuple[Any, ...], ranks: int) -> None:
    """accelerate's launcher for notebooks; it sets RANK and the rest itself."""
    from accelerate import notebook_launcher

    with contextlib.redirect_stdout(io.StringIO()):
        notebook_launcher(body, args, num_processes=ranks, use_port=str(free_port()))


def by_debug_launcher(body: Body, args: tuple[Any, ...], ranks: int) -> None:
    """accelerate's launcher for tests; it joins the group itself."""
    from accelerate import debug_launcher

    debug_launcher(body, args, num_processes=ranks)


def launchers(most_slow: int) -> list[Launcher]:
    """All that are compared, ours first; the slow ones with `most_slow` ranks at most."""
    return [
        Launcher("launch", by_launch),
        Launcher("notebook_launcher", by_notebook_launcher, fewest=2),
        Launcher("debug_launcher", by_debug_launcher),
        Launcher("mp.spawn", by_spawn, most=most_slow, rounds=SPAWN_ROUNDS),
    ]


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def visit(stay: Callable[[], None] | None = None) -> None:
    """What a rank does: join, all_reduce, stay if asked to, leave."""
    import torch
    import torch.distributed as dist

    joined_already = dist.is_initialized()  # by debug_launcher; then it must not leave, see NOTES
    if not joined_already:
        dist.init_process_group("gloo")
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == dist.get_world_size()
    if stay is not None:
        stay()
    if not joined_already:
        dist.destroy_process_group()


def stay_until_released(directory: str, with_ddp: bool) -> None:
    """Tell that this rank has joined, by a file named after its process, and wait for another."""
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(nn.Linear(10, 10)) if with_ddp else None
    Path(directory, f"joined-{os.getpid()}").touch()
    while not Path(directory, "released").exists():
        time.sleep(0.02)
    del model


def measure_times(peers: list[Launcher], counts: Sequence[int], rounds: int) -> Times:
    """Have the launchers take turns."""
    import torch.distributed  # noqa: F401  as a notebook has, before it launches

    for peer in peers:
        if peer.name != "mp.spawn":  # it keeps nothing from one call to the next
            peer.run(visit, (), 2)
    times: Times = {(peer.name, n): [] for peer in peers for n in counts}
    for n in counts:
        for turn in range(rounds):
            print(f"{n} ranks, round {turn + 1} of {rounds}", file=sys.stderr)
            for peer in peers if turn % 2 == 0 else peers[::-1]:
                if peer.takes_part(n, turn):
                    times[peer.name, n].append(seconds_of(peer, n))
    return times


def seconds_of(launcher: Launcher, ranks: int) -> float:
    """The wall time of one launch; infinite if it hung."""
    patience = 30.0 + 5.0 * ranks
    began = time.perf_counter()
    try:
        with ranks_ended_after(patience):
            launcher.run(visit, (), ranks)
    except Exception:  # each launcher has its own for ranks that were killed
        if time.perf_counter() - began < patience:
            raise
        return math.inf
    return time.perf_counter() - began


@contextlib.contextmanager
def ranks_ended_after(seconds: float) -> Iterator[None]:
    """Kill the processes started in the block if it takes longer.

    By an alarm: a thread in this process would not do any good to launchers that fork it.
    """
    import psutil

    me = psutil.Process()
    before = set(me.children(recursive=True))

    def end(*_: object) -> None:
        for process in set(me.children(recursive=True)) - before:
            process.kill()

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def measure_memory(launcher: Launcher, with_ddp: bool) -> Memory:
    """Have ranks join in a fresh kernel, and look at all its processes while they wait."""
    from tests.kernels import Kernel

    print(f"memory of {launcher.name}{' with DDP' * with_ddp}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory, Kernel(first_cell="import torch") as kernel:
        kernel.client.execute(
            f"from functools import partial; from tests.benchmarks.launch import *\n"
            f"stay = partial(stay_until_released, {directory!r}, {with_ddp})\n"
            f"{launcher.run.__name__}(visit, (stay,), {MEMORY_RANKS})"
        )
        ranks = joined(directory, MEMORY_RANKS)
        try:
            return memory_of(kernel.pid, ranks)
        finally:
            release(directory, ranks)


def joined(directory: str, ranks: int, patience: float = 120.0) -> list[int]:
    """The process ids of the ranks, once all have joined."""
    deadline = time.monotonic() + patience
    while len(found := list(Path(directory).glob("joined-*"))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(found)} of {ranks} ranks joined in {patience:.0f} s")
        time.sleep(0.05)
    return [int(path.name.removeprefix("joined-")) for path in found]


def memory_of(kernel: int, ranks: list[int]) -> Memory:
    """Sum up a kernel and all processes below it."""
    import psutil

    parent = psutil.Process(kernel)
    used = {p.pid: p.memory_full_info() for p in [parent, *parent.children(recursive=True)]}
    return Memory(
        pss=sum(info.pss for info in used.values()),
        uss=int(statistics.median(used[rank].uss for rank in ranks)),
    )


def release(directory: str, ranks: list[int]) -> None:
    """Let the ranks go, and wait until they have gone."""
    import psutil

    Path(directory, "released").touch()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def ended(seconds: list[float]) -> list[float]:
    """The times of the runs that did not hang."""
    return [s for s in seconds if math.isfinite(s)]


def median_of(times: Times, name: str, ranks: int) -> float | None:
    finite = ended(times.get((name, ranks), []))
    return statistics.median(finite) if finite else None


def ratio_of(times: Times, peer: str, ranks: int) -> float | None:
    """The time of launch over that of a peer: the median over the rounds that both ended."""
    pairs = zip(times.get(("launch", ranks), []), times.get((peer, ranks), []), strict=False)
    ratios = [ours / theirs for ours, theirs in pairs if math.isfinite(ours + theirs)]
    return statistics.median(ratios) if ratios else None


def time_table(times: Times, names: list[str], counts: Sequence[int]) -> str:
    def cell(name: str, n: int) -> str:
        median, hung = median_of(times, name, n), times[name, n].count(math.inf)
        text = "" if median is None else f"{median:.3f}"
        return f"{text} ({hung} of {len(times[name, n])} hung)" if hung else text

    def ratio(name: str, n: int) -> str:
        value = ratio_of(times, name, n)
        return "" if value is None else f"{value:.3f}"

    rows = [[f"`{name}`", *(cell(name, n) for n in counts)] for name in names]
    rows += [[f"`launch` / `{name}`", *(ratio(name, n) for n in counts)] for name in names[1:]]
    return table(["seconds", *(f"{n} rank{'s' * (n > 1)}" for n in counts)], rows)


def memory_table(memory: dict[str, tuple[Memory, Memory]]) -> str:
    rows = [
        [f"`{name}`", *(f"{b / MB:.0f}" for b in (plain.pss, ddp.pss, plain.uss, ddp.uss))]
        for name, (plain, ddp) in memory.items()
    ]
    return table(["MB", "in all", "in all, with DDP", "a rank", "a rank, with DDP"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def goals(times: Times, memory: dict[str, tuple[Memory, Memory]]) -> list[Goal]:
    few, many = (median_of(times, "launch", n) for n in (8, 64))
    growth = many / 64 / (few / 8) if few and many else None
    plain, ddp = memory["launch"]
    return [
        Goal("4 ranks, launch / notebook_launcher", 0.75, ratio_of(times, "notebook_launcher", 4)),
        Goal("4 ranks, launch / mp.spawn", 1 / 40, ratio_of(times, "mp.spawn", 4)),
        Goal("time a rank with 64 ranks / with 8", 1.5, growth),
        Goal("MB that DDP adds to a rank", 40, (ddp.uss - plain.uss) / MB),
        Goal("MB of kernel and 4 ranks with DDP", 1000, ddp.pss / MB),
    ]


def machine() -> str:
    """One line on what this was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate"))
    return (
        f"{date.today()}: {len(os.sched_getaffinity(0))} cores, {(names or ['?'])[0]}, {versions}, "
        f"Python {platform.python_version()}. Load before: {os.getloadavg()[0]:.2f}.\n"
    )


def report(counts: Sequence[int], rounds: int, most_slow: int) -> str:
    """Measure everything; Markdown."""
    peers, head = launchers(most_slow), machine()
    memory = {
        peer.name: (measure_memory(peer, False), measure_memory(peer, True))
        for peer in peers
        if peer.name != "debug_launcher"
    }
    times = measure_times(peers, counts, rounds)
    table = time_table(times, [peer.name for peer in peers], counts)
    verdicts = "\n".join(map(str, goals(times, memory)))
    return "\n".join([head, table, NOTES, memory_table(memory), MEMORY_NOTES, verdicts])


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = partial(map, int)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--most-slow", type=int, default=8, help="most ranks of mp.spawn")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # notebook_launcher leaves a directory behind at every call.
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        text = report([*numbers(options.ranks.split(","))], options.rounds, options.most_slow)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
