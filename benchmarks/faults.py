"""A campaign of faults: is each explained, and is anything left?

    python -m benchmarks.faults --runs 1000 --seed 0

A run's seed decides the fault (tests/support/faults.py), the number of ranks, the faulty rank and
the moment. Another process, the host, launches the runs as a notebook's kernel does; this one looks
at the machine from outside: processes, temp files, shared memory, the host's open files and memory.
After every fault a plain launch must work in the host.

compared.py runs the same faults with other launchers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import faults

TIMEOUT = 3.0  # seconds without progress, for runs that only a timeout ends
PATIENCE = 30.0  # seconds after which the host itself counts as hung
SETTLE = 3.0  # seconds for processes to end once the host was killed
MARKER = "DDP_LESSONS_FAULTS"  # an environment variable that marks our processes
SHARED = "/dev/shm"


class Plan(NamedTuple):
    """One run of the campaign."""

    seed: int
    fault: str
    world_size: int
    victim: int
    moment: int
    delay: float  # seconds from the start to the action from outside
    setting: str  # of faults.SETTINGS


def plan(seed: int) -> Plan:
    """The run that follows from a seed."""
    draw = random.Random(seed)
    world_size = draw.randint(2, 8)
    return Plan(
        seed,
        draw.choice(list(faults.FAULTS)),
        world_size,
        draw.randrange(world_size),
        draw.randrange(faults.STEPS),
        draw.uniform(0.0, 1.5),
        draw.choice(faults.SETTINGS) if draw.random() < 0.5 else "plain",
    )


# The host: launches runs and reports


def host() -> None:
    """Read plans, one a line, and print the result of each."""
    from ddp_lessons import launch

    def fine(rank: int) -> int:
        return rank

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    launch(fine, nprocs=2)
    print("ready", flush=True)
    for line in sys.stdin:
        todo = Plan(*json.loads(line))
        report: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                report.update(_run(todo))
            except KeyboardInterrupt:
                report["outcome"] = "interrupted"
            except Exception as error:
                report["outcome"] = f"{type(error).__name__}: {error}"
            report["next"] = launch(fine, nprocs=2, timeout=TIMEOUT).values == [0, 1]
        report["files"] = len(os.listdir("/proc/self/fd"))
        report["memory_mb"] = _resident_mb()
        print(json.dumps(report), flush=True)


def _run(todo: Plan) -> dict[str, Any]:
    from ddp_lessons import launch

    done = threading.Event()
    timer = threading.Timer(todo.delay, _kill_forkserver, [done])
    if todo.fault == "forkserver killed":
        timer.start()
    began = time.perf_counter_ns()
    try:
        run = launch(
            faults.program(todo.setting),
            (todo.fault, todo.victim, todo.moment, todo.setting),
            nprocs=todo.world_size,
            env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"} if todo.setting == "detail" else None,
            timeout=PATIENCE / 2 if todo.fault in faults.SLOW else TIMEOUT,
            check=False,
        )
        ended = time.perf_counter_ns()
    finally:
        done.set()
        if timer.is_alive():
            timer.join()
    happened = [s.t0_ns for s in run.ranks[todo.victim].spans if s.name == faults.MARK] or [began]
    return {
        "outcome": run.verdict.kind if run.verdict else "fine",
        "wrong": faults.judge(todo.fault, todo.victim, todo.world_size, run, todo.setting),
        "seconds": (ended - happened[0]) / 1e9,
        "text": run.explain()[:3000],
    }


def _kill_forkserver(done: threading.Event) -> None:
    """Kill it, and until the run is `done` again: where ranks still start, it is started anew."""
    from ddp_lessons.processes import forkserver

    deadline = time.monotonic() + PATIENCE  # in a new host it must start first
    while (pid := forkserver.server().pid) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    while pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if done.wait(PATIENCE / 3):  # a new one imports torch first
            break
        pid = forkserver.server().pid


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The campaign: looks from outside


class Host:
    """The process that launches; faults may kill it, and then it is restarted."""

    def __init__(self, folder: str, marker: str) -> None:
        environment = {**os.environ, MARKER: marker, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.faults", "--host"]
        self.marker = marker
        self.shared = set(os.listdir(SHARED))
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # waits until it is ready

    def ask(self, todo: Plan) -> dict[str, Any]:
        """Carry out one plan and return the result."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(todo) + "\n")
        self.process.stdin.flush()
        timers = [threading.Timer(PATIENCE, self.process.kill)]
        number = {"parent interrupted": signal.SIGINT, "parent killed": signal.SIGKILL}
        if todo.fault in number:
            timers.append(
                threading.Timer(todo.delay, self.process.send_signal, [number[todo.fault]])
            )
        for timer in timers:
            timer.start()
        line = self.process.stdout.readline()
        for timer in timers:
            timer.cancel()
        if not line:
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            killed = todo.fault == "parent killed"
            return {"outcome": "killed" if killed else "the host hung or died"}
        report: dict[str, Any] = json.loads(line)
        return report

    def close(self) -> None:
        """End the host as a kernel ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()

    def left_behind(self) -> list[str]:
        """Marked processes except the host and its helpers, and files in shared memory.

        Both have a moment to go away.
        """
        deadline = time.monotonic() + SETTLE
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _left(self) -> list[str]:
        return [*processes_of(self.marker, self.process), *(set(os.listdir(SHARED)) - self.shared)]


def processes_of(marker: str, process: subprocess.Popen[Any]) -> list[str]:
    """The processes with this marker, except `process` and its helpers."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == process.pid:
            continue
        with contextlib.suppress(OSError):
            if wanted not in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                continue
            command = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
            helper = "forkserver" in command or "resource_tracker" in command
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            if process.poll() is None and helper and parent == process.pid:
                continue  # the forkserver lives as long as the host
            found.append(f"{entry} {command[:80]}")
    return found


def campaign(runs: int, seed: int) -> int:
    """Carry out the runs, print the report, and return the number of errors."""
    marker = f"{os.getpid()}"
    cache = tempfile.mkdtemp()  # which torch.compile leaves where a rank is killed
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    results: list[tuple[Plan, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        current = Host(folder, marker)
        first: dict[str, Any] = {}
        for number in range(runs):
            todo = plan(seed + number)
            report = current.ask(todo)
            report["left"] = current.left_behind()
            if current.process.poll() is not None:
                report["left"] += os.listdir(folder)
                current, first = Host(folder, marker), {}
            elif not first and number > 20:
                first.update(report)
            report["grown_mb"] = report.get("memory_mb", 0) - first.get("memory_mb", 1e9)
            report["grown_files"] = report.get("files", 0) - first.get("files", 1e9)
            report["problem"] = _problem(todo, report)
            if report["problem"]:
                print(
                    f"seed {todo.seed}: {todo.fault}, {todo.setting}: {report['problem']}",
                    flush=True,
                )
            results.append((todo, report))
        current.close()
        remaining = [*current.left_behind(), *os.listdir(folder)]
    shutil.rmtree(cache)
    _print(results, remaining)
    return sum(bool(report["problem"]) for _, report in results) + len(remaining)


def _problem(todo: Plan, report: dict[str, Any]) -> str:
    if report["left"]:
        return f"left behind: {report['left']}"
    if todo.fault == "parent killed":
        return "" if report["outcome"] in ("killed", "fine") else str(report["outcome"])
    if todo.fault == "parent interrupted" and report["outcome"] not in ("interrupted", "fine"):
        return f"the interrupt came to {report['outcome']}"
    if not report.get("next"):
        return f"{report['outcome']}, and no launch after it"
    return str(report.get("wrong", "") or "")


def _print(results: list[tuple[Plan, dict[str, Any]]], remaining: list[str]) -> None:
    judged = [(todo, r) for todo, r in results if "seconds" in r and todo.fault != "slow start"]
    right = sum(not r["wrong"] for _, r in judged)
    print(f"\n{len(results)} runs; {len(judged)} verdicts, {right / len(judged):.1%} right")
    print(f"problems: {sum(bool(r['problem']) for _, r in results)}; left at the end: {remaining}")
    grown = [(r["grown_mb"], r["grown_files"]) for _, r in results if r["grown_mb"] > -1e8]
    if grown:
        print(f"growth of the host: {max(g[0] for g in grown):.0f} MB, "
              f"{max(g[1] for g in grown):.0f} files at most")  # fmt: skip
    print("\nfault                          runs  right  median s  worst s  verdicts")
    for fault in faults.FAULTS:
        mine = [r for todo, r in results if todo.fault == fault]
        if not mine:
            continue
        good = sum(not r["problem"] for r in mine)
        seconds = sorted(r["seconds"] for r in mine if "seconds" in r) or [float("nan")]
        kinds = ", ".join(
            f"{k} {n}"
            for k, n in Counter(r["outcome"].partition(":")[0] for r in mine).most_common()
        )
        print(
            f"{fault:30} {len(mine):4}  {good:5}  {statistics.median(seconds):8.2f}  "
            f"{seconds[-1]:7.2f}  {kinds}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="a campaign of faults")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        host()
    else:
        sys.exit(min(1, campaign(options.runs, options.seed)))


if __name__ == "__main__":
    main()
