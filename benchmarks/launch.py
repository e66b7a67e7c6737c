"""Measures the time and memory of fresh ranks, with `launch` and with other launchers.

Run it by hand on a quiet Linux machine: `python -m benchmarks.launch`. Each launcher has an idle
process of its own that has imported torch, like a kernel; they take turns. Memory is that of real
kernels. Needs accelerate (the extra `bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.tables import machine, table

# This module does not import ddp_lessons or torch: a kernel that measures another launcher must not
# have the forkserver, and the process that measures kernels must not share torch's pages.

# launch() sets the same for its ranks. RES_OPTIONS: a silent name server must not count. The last
# one: this script keeps as many spares as a kernel.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RES_OPTIONS": "timeout:1 attempts:1",
    "DDP_LESSONS_SPARES": "64",
}
REST, REST_PER_RANK = 0.3, 0.03  # seconds between two launches, as between cells, for spares
PEER = "notebook_launcher"
RANKS = "1,2,4,8,16,32,64"
MEMORY_RANKS = 4
SPAWN_ROUNDS = 3  # mp.spawn takes over a second a rank
PATIENCE, PATIENCE_PER_RANK = 10.0, 1.0  # seconds until a launch counts as hung
MEMORY_PATIENCE = 60.0  # seconds that ranks stay while memory is measured
MEMORY_ATTEMPTS = 3
MB = 1e6  # bytes

NOTES = f"""\
Medians, in seconds, from the call until all ranks have ended. Every rank joins a gloo group,
all_reduces one number and leaves. The launchers take turns, every second round in reverse; each has
an idle process of its own, as a notebook's kernel has one launcher.
Ratios: the median of the ratios of each round.

- `launch` is warm: its forkserver has imported torch, and has forked the ranks since the launch
  before, in a pause ({REST:g} s and {REST_PER_RANK:g} s a rank, before each measurement).
- `notebook_launcher` forks the kernel and asks every 0.1 s whether the ranks have ended: the time
  of few ranks is mostly that pause. For one rank it starts no process. It may hang: while it forks,
  a thread of its own store may hold a lock, and the fork copies it locked.
- `debug_launcher` forks the kernel and does less: ranks meet in a file, and they cannot leave the
  group, because the last to leave would remove that file and the launcher then fails.
- `mp.spawn` runs {SPAWN_ROUNDS} rounds at most, and not on more ranks than `--most-slow`.
- Hung: ranks had not ended after {PATIENCE:g} s and {PATIENCE_PER_RANK:g} s a rank. Such runs are
  not in the medians.
"""
MEMORY_NOTES = f"""\
Memory of a notebook's kernel that has imported torch and of {MEMORY_RANKS} ranks that wait, joined.
In all: the sum of PSS (a page that k processes share counts 1/k in each) of the kernel, the ranks
and what helps them, such as the forkserver. A rank: its private memory (USS), the median of the
ranks. DDP: every rank has made a DistributedDataParallel of `nn.Linear(10, 10)`.
"""

Body = Callable[..., None]
Times = dict[tuple[str, int], list[float]]  # (launcher, ranks): seconds by round, inf if it hung


@dataclass(frozen=True)
class Memory:
    """Bytes that a kernel and its ranks hold."""

    pss: int  # of all together
    uss: int  # of one rank, the median


@dataclass(frozen=True)
class Goal:
    """A goal and its measured value, None if there is none."""

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
    """A rank of mp.spawn: set the variables of `env://`, then call the body."""
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


LAUNCHERS = {
    "launch": by_launch,
    "notebook_launcher": by_notebook_launcher,
    "debug_launcher": by_debug_launcher,
    "mp.spawn": by_spawn,
}


def takes_part(name: str, ranks: int, turn: int, most_slow: int) -> bool:
    """False if a launcher starts no process, or would take too long."""
    if name == "notebook_launcher":
        return ranks > 1
    return name != "mp.spawn" or (ranks <= most_slow and turn < SPAWN_ROUNDS)


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def visit(joined: str = "", with_ddp: bool = False) -> None:
    """The body of a rank: join, all_reduce, stay if it gets a directory to report to, leave."""
    import torch
    import torch.distributed as dist

    joined_already = dist.is_initialized()  # by debug_launcher; then it must not leave, see NOTES
    if not joined_already:
        dist.init_process_group("gloo")
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == dist.get_world_size()
    if joined:
        stay(joined, with_ddp)
    if not joined_already:
        dist.destroy_process_group()


def stay(directory: str, with_ddp: bool) -> None:
    """Report that this rank has joined, by a file named after its process; wait to be killed."""
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(nn.Linear(10, 10)) if with_ddp else None
    Path(directory, str(os.getpid())).touch()
    time.sleep(MEMORY_PATIENCE)
    del model


class Idle:
    """An idle process that has imported torch, like a kernel; it launches when it is told to.

    In one process for all, those that fork it would make the others copy its memory bit by bit.
    """

    def __init__(self, launcher: str) -> None:
        command = [sys.executable, "-m", "benchmarks.launch", "--serve", launcher]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def seconds_of(self, ranks: int) -> float:
        """The wall time of one launch; infinite if it hung."""
        asked, told = self._process.stdin, self._process.stdout
        assert asked is not None
        assert told is not None
        print(ranks, file=asked, flush=True)
        return float(told.readline())


def serve(launcher: str) -> None:
    """Launch as many ranks as each line says, and print the seconds. `Idle` runs this."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print
    import torch.distributed  # noqa: F401  as a notebook has, before it launches

    if launcher == "launch":  # not in `seconds_of`: the forkserver's socket must outlive that
        by_launch(visit, (), 2)
    elif launcher != "mp.spawn":  # their first call imports, too
        seconds_of(launcher, 2)
    for line in sys.stdin:
        print(seconds_of(launcher, int(line)), file=replies, flush=True)


def measure_times(counts: Sequence[int], rounds: int, most_slow: int) -> Times:
    """Time the launchers in turns."""
    names = list(LAUNCHERS)
    times: Times = {(name, n): [] for name in names for n in counts}
    with contextlib.ExitStack() as stack:
        idle = {name: stack.enter_context(Idle(name)) for name in names}
        for n in counts:
            for turn in range(rounds):
                print(f"ranks: {n}, round {turn + 1} of {rounds}", file=sys.stderr)
                for name in names if turn % 2 == 0 else names[::-1]:
                    if takes_part(name, n, turn, most_slow):
                        time.sleep(REST + REST_PER_RANK * n)
                        times[name, n].append(idle[name].seconds_of(n))
    return times


def seconds_of(name: str, ranks: int) -> float:
    """The wall time of one launch; infinite if it hung."""
    patience = PATIENCE + PATIENCE_PER_RANK * ranks
    with own_temporary_directory(), ranks_ended_after(patience):
        began = time.perf_counter()
        try:
            LAUNCHERS[name](visit, (), ranks)
        except Exception:  # each launcher raises its own error for killed ranks
            if time.perf_counter() - began < patience:
                raise
            return math.inf
        return time.perf_counter() - began


@contextlib.contextmanager
def own_temporary_directory() -> Iterator[str]:
    """A directory for files that launchers leave behind, here or in kernels started now.

    notebook_launcher leaves a directory at every call.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        here = mock.patch.object(tempfile, "tempdir", directory)
        with here, mock.patch.dict(os.environ, TMPDIR=directory):
            yield directory


@contextlib.contextmanager
def ranks_ended_after(seconds: float) -> Iterator[None]:
    """Kill the processes started in the block if it takes longer.

    Uses an alarm: launchers fork this process, so it must not have another thread.
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


def measure_memory(name: str, with_ddp: bool) -> Memory:
    """Measure one launch; once more where its ranks hung, as those of notebook_launcher may."""
    for _ in range(MEMORY_ATTEMPTS - 1):
        with contextlib.suppress(TimeoutError):
            return memory_in_kernel(name, with_ddp)
    return memory_in_kernel(name, with_ddp)


def memory_in_kernel(name: str, with_ddp: bool) -> Memory:
    """Launch ranks in a fresh kernel, and measure all its processes while they wait."""
    import psutil

    from tests.support.kernels import Kernel

    print(f"memory of {name}{' with DDP' * with_ddp}", file=sys.stderr)
    with own_temporary_directory() as temporary, Kernel(first_cell="import torch") as kernel:
        directory = tempfile.mkdtemp(dir=temporary)
        kernel.client.execute(
            "from benchmarks import launch as b\n"
            f"b.LAUNCHERS[{name!r}](b.visit, ({directory!r}, {with_ddp}), {MEMORY_RANKS})"
        )
        try:
            return memory_of(kernel.pid, ranks_in(directory))
        finally:
            for process in psutil.Process(kernel.pid).children(recursive=True):
                process.kill()


def ranks_in(directory: str) -> list[int]:
    """The process ids of the ranks, once all have joined."""
    deadline = time.monotonic() + MEMORY_PATIENCE
    while len(found := os.listdir(directory)) < MEMORY_RANKS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(found)} of {MEMORY_RANKS} ranks joined")
        time.sleep(0.05)
    return [int(name) for name in found]


def memory_of(kernel: int, ranks: list[int]) -> Memory:
    """Sum up a kernel and all processes below it."""
    import psutil

    parent = psutil.Process(kernel)
    used = {p.pid: p.memory_full_info() for p in [parent, *parent.children(recursive=True)]}
    return Memory(
        pss=sum(info.pss for info in used.values()),
        uss=int(statistics.median(used[rank].uss for rank in ranks)),
    )


def median_of(times: Times, name: str, ranks: int) -> float | None:
    """The median of the runs that did not hang."""
    ended = [s for s in times.get((name, ranks), []) if math.isfinite(s)]
    return statistics.median(ended) if ended else None


def ratio_of(times: Times, peer: str, ranks: int) -> float | None:
    """The time of launch over that of another launcher: the median of rounds that both ended."""
    pairs = zip(times.get(("launch", ranks), []), times.get((peer, ranks), []), strict=False)
    ratios = [ours / theirs for ours, theirs in pairs if math.isfinite(ours + theirs)]
    return statistics.median(ratios) if ratios else None


def time_table(times: Times, counts: Sequence[int]) -> str:
    def cell(name: str, n: int) -> str:
        median, hung = median_of(times, name, n), times[name, n].count(math.inf)
        text = "" if median is None else f"{median:.3f}"
        return f"{text} ({hung} of {len(times[name, n])} hung)" if hung else text

    def ratio(name: str, n: int) -> str:
        value = ratio_of(times, name, n)
        return "" if value is None else f"{value:.3f}"

    peers = [name for name in LAUNCHERS if name != "launch"]
    rows = [[f"`{name}`", *(cell(name, n) for n in counts)] for name in LAUNCHERS]
    rows += [[f"`launch` / `{name}`", *(ratio(name, n) for n in counts)] for name in peers]
    return table(["seconds", *(f"{n} rank{'s' * (n > 1)}" for n in counts)], rows)


def memory_table(memory: dict[str, tuple[Memory, Memory]]) -> str:
    rows = [
        [f"`{name}`", *(f"{b / MB:.0f}" for b in (plain.pss, ddp.pss, plain.uss, ddp.uss))]
        for name, (plain, ddp) in memory.items()
    ]
    return table(["MB", "in all", "in all, with DDP", "a rank", "a rank, with DDP"], rows)


def goals(times: Times, memory: dict[str, tuple[Memory, Memory]]) -> list[Goal]:
    few, many = (median_of(times, "launch", n) for n in (8, 64))
    growth = many / 64 / (few / 8) if few and many else None
    plain, ddp = memory["launch"]
    return [
        *(
            Goal(f"{n} ranks, launch / notebook_launcher", most, ratio_of(times, PEER, n))
            for n, most in ((2, 0.5), (4, 0.5), (8, 0.5), (32, 0.8), (64, 0.8))
        ),
        Goal("4 ranks, launch / mp.spawn", 1 / 40, ratio_of(times, "mp.spawn", 4)),
        Goal("time a rank with 64 ranks / with 8", 1.5, growth),
        Goal("MB that DDP adds to a rank", 40, (ddp.uss - plain.uss) / MB),
        Goal("MB of kernel and 4 ranks with DDP", 600, ddp.pss / MB),
    ]


def report(counts: Sequence[int], rounds: int, most_slow: int) -> str:
    """Measure everything; return Markdown."""
    head = machine("torch", "accelerate")
    memory = {
        name: (measure_memory(name, False), measure_memory(name, True))
        for name in ("launch", "notebook_launcher", "mp.spawn")
    }
    times = measure_times(counts, rounds, most_slow)
    seconds, verdicts = time_table(times, counts), map(str, goals(times, memory))
    return "\n".join([head, seconds, NOTES, memory_table(memory), MEMORY_NOTES, *verdicts])


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description=__doc__)
    parser.add_argument("--ranks", default=RANKS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--most-slow", type=int, default=8, help="most ranks of mp.spawn; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--serve", choices=LAUNCHERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if options.serve:
        serve(options.serve)
        return
    counts = [int(count) for count in options.ranks.split(",")]
    text = report(counts, options.rounds, options.most_slow)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
