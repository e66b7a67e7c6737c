"""Workers that misbehave have the promised outcome, and every worker is a fresh process."""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import Run, WorkerDied, WorkerFailed, launch

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def join_and_wait(rank: int) -> None:
    """Do nothing wrong: join, and wait for the other ranks."""
    dist.init_process_group("gloo")
    dist.barrier()


def test_raises() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("no such\nrank")
        join_and_wait(rank)

    with pytest.raises(WorkerFailed, match="rank 1 of 3 raised ValueError: no such") as caught:
        launch(work, nprocs=3)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__cause__.args == ("no such\nrank",)
    text = str(caught.value)
    assert "in work" in text
    assert "---->" in text
    assert 'raise ValueError("no such\\nrank")' in text
    assert "ddp_lessons" not in text
    run = caught.value.run
    assert run is not None
    assert [r.status for r in run.ranks] == ["stopped", "raised", "stopped"]
    assert run.ranks[1].exitcode == 1


def test_check_false_returns_the_same_record() -> None:
    run = launch(lambda rank: 1 // rank, check=False)
    assert not run.ok
    assert run.values == [None, 1]
    assert run.ranks[0].error is not None
    assert run.ranks[0].error.type_name == "ZeroDivisionError"
    assert "ZeroDivisionError" in run.explain()
    with pytest.raises(WorkerFailed):
        run.raise_for_failure()


def test_every_rank_raises_the_same() -> None:
    with pytest.raises(WorkerFailed, match="ranks 0, 1 and 2 of 3 raised KeyError"):
        launch(lambda rank: dict[str, int]()["x"], nprocs=3)


def test_an_exception_that_cannot_be_pickled_or_rebuilt() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("odd")
            self.generator = (i for i in "x")

    def work(rank: int) -> None:
        raise Odd(1, 2)

    with pytest.raises(WorkerFailed, match=r"raised \S*Odd: odd"):
        launch(work)


class BadBatch(Exception):
    batch: torch.Tensor


@pytest.mark.parametrize("size", [3, 1 << 26])
def test_an_exception_with_much_data_takes_no_more_memory(size: int) -> None:
    def most() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def work(rank: int) -> None:
        error = BadBatch("bad sample 17")
        error.batch = torch.ones(size)
        before = most()
        atexit.register(lambda: print(most() / before < 1.2))
        raise error

    (rank,) = launch(work, nprocs=1, check=False).ranks
    assert rank.lines == ["True"]
    assert rank.error is not None
    assert "bad sample 17" in rank.error.text
    assert isinstance(rank.exception, BadBatch) == (size == 3)


def test_chained_exceptions() -> None:
    def work(rank: int) -> None:
        try:
            os.environ["NO_SUCH_KEY"]
        except KeyError as error:
            raise RuntimeError("no key") from error

    with pytest.raises(WorkerFailed) as caught:
        launch(work, nprocs=1)
    text = str(caught.value)
    assert text.startswith("the rank raised RuntimeError: no key")
    assert text.index("KeyError: 'NO_SUCH_KEY'") < text.index("That caused") < text.rindex("no key")


def test_long_messages_and_stacks_are_cut() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            raise ValueError("x" * 1_000_000)
        work(rank)

    run = launch(work, check=False)
    assert run.ranks[0].error is not None
    assert len(run.ranks[0].error.text) < 20_100
    assert "980,012 characters left out" in run.ranks[0].error.text
    assert len(run.ranks[0].error.summary) < 600
    with pytest.raises(WorkerFailed, match="RecursionError") as caught:
        launch(lambda rank: work(1), nprocs=1)
    assert "frames left out" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 60


def test_a_closed_stdout_does_no_harm() -> None:
    run = launch(lambda rank: sys.stdout.close())
    assert run.ok
    assert [r.exitcode for r in run.ranks] == [0, 0]
    assert run.ranks[0].output == ""


class Writes:
    """A learner's stdout that lacks much of a file."""

    def __init__(self) -> None:
        self.console = sys.stdout

    def write(self, text: str) -> None:
        self.console.write(text)


class Flushes(Writes):
    def flush(self) -> None:
        self.console.flush()


class Refuses(Writes):
    def flush(self) -> None:
        raise OSError("the log is full")


@pytest.mark.parametrize("kind", [Writes, Flushes, Refuses])
def test_another_stdout_does_no_harm(kind: Any) -> None:
    def work(rank: int) -> None:
        sys.stdout = kind()
        print("hello", end="")

    run = launch(work, nprocs=1, check=False)
    assert run.ok
    assert (run.ranks[0].exitcode, run.ranks[0].output) == (0, "hello")


def test_no_stdout_does_no_harm() -> None:
    run = launch(lambda rank: setattr(sys, "stdout", None), nprocs=1, check=False)
    assert run.ok
    assert run.ranks[0].exitcode == 0


def test_sys_exit() -> None:
    with pytest.raises(WorkerFailed, match="rank 0 of 2 raised SystemExit: 3") as caught:
        launch(lambda rank: sys.exit(3) if rank == 0 else None)
    assert caught.value.run is not None
    assert caught.value.run.ranks[0].exitcode == 3
    assert launch(lambda rank: sys.exit(0)).values == [None, None]


def test_os_exit() -> None:
    with pytest.raises(WorkerDied, match="rank 1 of 2 ended with exit code 7") as caught:
        launch(lambda rank: os._exit(7) if rank == 1 else join_and_wait(rank))
    assert "os._exit(7)" in str(caught.value)
    assert caught.value.run is not None
    assert caught.value.run.ranks[1].exitcode == 7


def test_os_exit_zero_is_a_death_too() -> None:
    with pytest.raises(WorkerDied, match="exit code 0"):
        launch(lambda rank: os._exit(0))


def test_sigkill() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(WorkerDied, match="rank 1 of 3 was ended by SIGKILL") as caught:
        launch(work, nprocs=3)
    assert "no out-of-memory kill" in str(caught.value)
    assert "Ranks 0 and 2 then lost their partner" in str(caught.value)
    assert caught.value.run is not None
    assert caught.value.run.ranks[1].exitcode == -9


def test_abort_in_cpp() -> None:
    def work(rank: int) -> None:
        print("no such kernel", flush=True)
        os.abort()

    with pytest.raises(WorkerDied, match="SIGABRT") as caught:
        launch(work)
    assert "C or C++ code, or os.abort(), ended the process" in str(caught.value)
    assert "no such kernel" in str(caught.value)


def test_peers_of_a_rank_that_returned_early() -> None:
    def work(rank: int) -> str:
        dist.init_process_group("gloo")
        if rank == 1:
            return "early"
        dist.barrier()
        return "late"

    with pytest.raises(WorkerFailed) as caught:
        launch(work)
    assert "rank 0 waited in barrier, but rank 1 has returned before barrier" in str(caught.value)
    assert caught.value.rank == 1
    assert "dist.barrier()" in str(caught.value)


def test_prints_200_mb(capsys: pytest.CaptureFixture[str]) -> None:
    before = psutil.Process().memory_info().rss

    def flood(rank: int) -> str:
        if rank == 0:
            line = "x" * 999 + "\n"
            for _ in range(200):
                sys.stdout.write(line * 1000)
            print("the last line")
        return "done"

    run = launch(flood)
    assert run.values == ["done", "done"]
    assert len(run.ranks[0].output) <= (1 << 20) + 100
    assert run.ranks[0].lines[-1] == "the last line"
    left_out = next(line for line in run.ranks[0].lines if "left out" in line)
    assert 198_000_000 < int(left_out.split()[1].replace(",", "")) < 200_000_000
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 1001
    assert "left out" in "".join(shown)
    assert shown[-1] == "[rank 0] the last line"
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_prints_bytes_that_are_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    launch(lambda rank: os.write(1, b"caf\xe9 \xff\n"), nprocs=1)
    assert capsys.readouterr().out == "[rank 0] caf\\xe9 \\xff\n"


def test_prints_html() -> None:
    evil = "<script>alert(1)</script>"

    def work(rank: int) -> str:
        print(evil)
        if rank == 1:
            raise ValueError(evil)
        return evil

    run = launch(work, check=False)
    assert run.ranks[0].lines == [evil]
    assert evil not in run._repr_html_()
    assert "&lt;script&gt;" in run._repr_html_()


def test_stderr_and_cpp_output_are_captured(capsys: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> None:
        print("to stderr", file=sys.stderr)
        os.write(2, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)

    launch(work, nprocs=1)
    assert capsys.readouterr().out.splitlines() == [
        "[rank 0] to stderr",
        "[rank 0] from C",
        "[rank 0] from a child",
    ]


def test_progress_bars_leave_their_last_state(capsys: pytest.CaptureFixture[str]) -> None:
    launch(lambda rank: print("\r10%\r50%\r100%\r\nend", end=""), nprocs=1)
    assert capsys.readouterr().out.splitlines() == ["[rank 0] 100%", "[rank 0] end"]


@pytest.mark.alone
def test_threads_and_children_end_with_the_rank() -> None:
    def work(rank: int) -> list[int]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        child = subprocess.Popen(["sleep", "61"])
        stubborn = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        return [child.pid, stubborn.pid]

    began = time.monotonic()
    run = launch(work)
    assert time.monotonic() - began < 10
    for pid in [pid for pids in run.values for pid in pids]:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


STUBBORN = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(62)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody adopts it")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_child_in_a_session_of_its_own_ends_too(method: str) -> None:
    def work(rank: int) -> int:
        return subprocess.Popen(["sleep", "63"], start_new_session=True).pid

    for pid in launch(work, nprocs=1, start_method=method).values:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_a_dataloader_with_workers_inside_a_rank() -> None:
    def work(rank: int) -> int:
        from torch.utils.data import DataLoader

        return sum(int(b.sum()) for b in DataLoader(list(range(10)), batch_size=3, num_workers=2))

    assert launch(work).values == [45, 45]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "times"), [("forkserver", 30), ("spawn", 1)])
def test_a_ddp_model_may_outlive_its_group(method: str, times: int) -> None:
    def work(rank: int) -> bool:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
        dist.destroy_process_group()
        return bool(model.training)  # the model is freed only now, after its group

    for _ in range(times):
        assert launch(work, timeout=10, start_method=method).values == [True, True]


def test_joining_again_after_training() -> None:
    def train() -> None:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.randn(2, 4)).sum().backward()
        dist.destroy_process_group()

    def work(rank: int) -> None:
        train()
        train()

    assert launch(work, timeout=10).ok


def test_joining_again_where_ranks_are_not_in_step() -> None:
    def work(rank: int) -> None:
        for time_ahead in range(4):
            dist.init_process_group("gloo")
            time.sleep(0.05 * ((rank + time_ahead) % 2))
            dist.destroy_process_group()

    assert launch(work, nprocs=3, timeout=10).ok


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize("kept", ["a subgroup", "a DDP model"])
def test_joining_again_with_something_of_the_last_time(kept: str, late: int | None) -> None:
    def work(rank: int) -> list[int]:
        sums, keep = [], []
        for _ in range(2):
            dist.init_process_group("gloo")
            if kept == "a subgroup":
                keep.append(dist.new_group([0, 1]))
            else:
                keep.append(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4)))
            total = torch.tensor(rank + 1)
            dist.all_reduce(total)
            sums.append(int(total))
            dist.destroy_process_group()
            time.sleep(0.3 * (rank == late))
        return sums

    assert launch(work, timeout=10).values == [[3, 3], [3, 3]]


def test_a_thread_that_must_finish_does() -> None:
    def work(rank: int) -> None:
        def write_late() -> None:
            time.sleep(0.3)
            print("written late")

        threading.Thread(target=write_late).start()

    assert launch(work).ranks[0].lines == ["written late"]


def test_returns_200_mb() -> None:
    run = launch(lambda rank: torch.full((50_000_000,), float(rank)) if rank else None)
    assert run.values[0] is None
    assert run.values[1].shape == (50_000_000,)
    assert run.values[1].sum().item() == 50_000_000
    assert not run.values[1].is_shared()


def test_returns_none() -> None:
    run = launch(lambda rank: None)
    assert run.values == [None, None]
    assert run.ok


@pytest.mark.alone
def test_a_rank_that_ignores_signals_is_stopped() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            raise RuntimeError("first")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(WorkerFailed):
        launch(work)
    assert time.monotonic() - began < 20


def test_a_stopped_rank_is_ended() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        raise RuntimeError("first")

    with pytest.raises(WorkerFailed, match="rank 0 of 2 raised RuntimeError"):
        launch(work)


def test_closing_every_descriptor() -> None:
    def work(rank: int) -> None:
        os.closerange(3, 200)

    with pytest.raises(WorkerDied):
        launch(work, nprocs=1)


SIGNALS = {s for s in signal.Signals if s.name not in {"SIGKILL", "SIGSTOP"}}
PROBES: dict[str, Any] = {
    "environment": lambda rank: {
        k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "MASTER_PORT"}
    },
    "directory": lambda rank: os.getcwd(),
    "argv": lambda rank: sys.argv,
    "path": lambda rank: sys.path,
    "signals": lambda rank: {
        s.name: str(signal.getsignal(s)) for s in sorted(signal.valid_signals()) if s in SIGNALS
    },
    "blocked signals": lambda rank: sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "descriptors": lambda rank: descriptors(),
    "threads": lambda rank: (threading.active_count(), len(os.listdir("/proc/self/task"))),
    "torch threads": lambda rank: torch.get_num_threads(),
    "main": lambda rank: sorted(vars(sys.modules["__main__"])),
    "session": lambda rank: os.getsid(0) == os.getpid() == os.getpgrp(),
    "daemon": lambda rank: __import__("multiprocessing").current_process().daemon,
    "cuda": lambda rank: torch.cuda.is_initialized(),
    "group": lambda rank: dist.is_initialized(),
    "umask": lambda rank: os.umask(os.umask(0o22)),
    "limits": lambda rank: __import__("resource").getrlimit(__import__("resource").RLIMIT_NOFILE),
    "stdin": lambda rank: sys.stdin.read(),
    "gc": lambda rank: (__import__("gc").isenabled(), __import__("gc").get_threshold()),
    "recursion": lambda rank: sys.getrecursionlimit(),
    "warnings": lambda rank: sys.warnoptions,
    "encoding": lambda rank: (sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering),
}
DRAWS: dict[str, Any] = {
    "random": lambda rank: __import__("random").random(),
    "numpy": lambda rank: __import__("numpy").random.rand(),
    "torch": lambda rank: torch.rand(1).item(),
}


def descriptors() -> list[str]:
    """The kind of each open file descriptor, without numbers that differ between runs."""
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        except FileNotFoundError:
            continue  # the listing's own
    return sorted(kinds)


@pytest.fixture(scope="module")
def probed() -> dict[str, dict[str, Any]]:
    def probe(rank: int) -> dict[str, Any]:
        return {name: fn(rank) for name, fn in {**PROBES, **DRAWS}.items()}

    runs: dict[str, Run] = {m: launch(probe, start_method=m) for m in ("forkserver", "spawn")}
    return {
        method: {name: [value[name] for value in run.values] for name in (*PROBES, *DRAWS)}
        for method, run in runs.items()
    }


@pytest.mark.xdist_group("probed")
@pytest.mark.parametrize("name", PROBES)
def test_same_under_forkserver_and_spawn(probed: Any, name: str) -> None:
    assert probed["forkserver"][name] == probed["spawn"][name]


@pytest.mark.xdist_group("probed")
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_differ_or_agree_as_under_spawn(probed: Any, name: str) -> None:
    agree = {method: len(set(probed[method][name])) == 1 for method in probed}
    assert agree["forkserver"] == agree["spawn"]


@pytest.mark.xdist_group("probed")
def test_no_stray_threads(probed: Any) -> None:
    assert probed["forkserver"]["threads"] == [(1, 1), (1, 1)]
