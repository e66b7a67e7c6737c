"""launch() on the engines of a real ipyparallel cluster does the same as on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import ipyparallel
import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import (
    BadLaunch,
    CannotSend,
    LaunchError,
    WorkerDied,
    WorkerFailed,
    launch,
    plots,
    span,
)
from ddp_lessons.cluster import remote_worker
from ddp_lessons.cluster.engine import RemoteCall
from tests.support import clusters
from tests.support.clusters import Cluster, as_soon_as, cluster_of, wait_until
from tests.support.kernels import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.xdist_group("cluster")]

cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(clusters)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster"), 4) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Any:
    return cluster.client


def average(rank: int, n: int) -> float:
    dist.init_process_group("gloo")
    with span("fill"):
        x = torch.full((n,), float(rank))
    dist.all_reduce(x)
    mean = x.mean().item() / dist.get_world_size()
    dist.destroy_process_group()
    print(f"the mean of {n} is {mean}")
    return float(mean)


def test_the_same_run_as_here(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here = launch(average, (1000,), 4)
    printed = capsys.readouterr().out
    there = launch(average, (1000,), 4, cluster=client)
    assert capsys.readouterr().out == printed
    assert there.values == here.values == [1.5] * 4
    assert repr(there) == repr(here)
    assert {(s.rank, s.lane, s.name) for s in there.spans()} == {
        (s.rank, s.lane, s.name) for s in here.spans()
    }
    assert len({(share.rank, share.op, share.seq) for share in there.waits()}) == 4


def torchruns_variables(rank: int) -> dict[str, str]:
    prefixes = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "MASTER_ADDR", "OMP_", "GLOO_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


@pytest.mark.parametrize(("nprocs", "nnodes"), [(4, 1), (2, 2)])
def test_the_same_variables_as_here(client: Any, nprocs: int, nnodes: int) -> None:
    here = launch(torchruns_variables, (), nprocs, nnodes=nnodes)
    there = launch(torchruns_variables, (), nprocs, nnodes=nnodes, cluster=client)
    assert there.values == here.values


def test_each_rank_is_a_fresh_process_of_its_own_engine(client: Any) -> None:
    def look(rank: int) -> tuple[int, int, bool]:
        return os.getpid(), os.getsid(0), "ddp_lessons.worker.preload" in sys.modules

    values = launch(look, nprocs=4, cluster=client).values
    assert all(pid == session and forked for pid, session, forked in values)
    assert len({pid for pid, *_ in values}) == 4
    ((*_, forked),) = launch(look, nprocs=1, cluster=client, start_method="spawn").values
    assert not forked


def join() -> None:
    """Join the group, and go on when all have."""
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))


def raises(rank: int) -> None:
    join()
    if rank == 1:
        raise ValueError("a bad sample")
    dist.barrier()


def leaves(rank: int) -> None:
    join()
    if rank == 2:
        os._exit(7)
    dist.barrier()


def is_killed(rank: int) -> None:
    join()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def skips_a_barrier(rank: int) -> None:
    join()
    if rank != 1:
        dist.barrier()
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()


def returns_early(rank: int) -> None:
    join()
    if rank == 0:
        return
    dist.barrier()


def returns_what_cannot_travel(rank: int) -> Any:
    return threading.Lock() if rank == 1 else rank


@pytest.mark.parametrize(
    "fault",
    [raises, leaves, is_killed, skips_a_barrier, returns_early, returns_what_cannot_travel],
)
def test_the_same_verdict_as_here(client: Any, fault: Callable[[int], Any]) -> None:
    here = launch(fault, (), 4, check=False)
    there = launch(fault, (), 4, check=False, cluster=client)
    assert there.verdict is not None
    assert here.verdict is not None
    assert there.verdict.kind == here.verdict.kind
    assert there.verdict.ranks == here.verdict.ranks
    assert there.verdict.title == here.verdict.title
    assert there.verdict.frame == here.verdict.frame
    assert type(there.error) is type(here.error)


def test_errors_are_raised_with_their_cause(client: Any) -> None:
    with pytest.raises(WorkerFailed, match="a bad sample") as caught:
        launch(raises, cluster=client)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_rank_that_computes_forever_is_told_by_the_timeout(client: Any) -> None:
    def spin(rank: int) -> None:
        while rank == 0:
            pass

    run = launch(spin, cluster=client, timeout=2, check=False)
    assert run.verdict is not None
    assert run.verdict.kind == "computing"
    assert run.verdict.ranks == (0,)
    assert run.verdict.frame is not None
    assert run.verdict.frame.filename == __file__


def write_pid(rank: int, directory: str) -> None:
    part = Path(directory, f".rank{rank}")
    part.write_text(str(os.getpid()))
    part.rename(Path(directory, f"rank{rank}"))


def writes_its_pid(rank: int, directory: str) -> None:
    write_pid(rank, directory)
    time.sleep(100)


def pids(directory: Path) -> list[int]:
    """The process ids of the ranks that have written theirs."""
    texts = [file.read_text() for file in directory.glob("rank*")]
    return [int(text) for text in texts if text]  # a file is there before its text


def all_have_begun(directory: Path, ranks: int) -> Callable[[], bool]:
    return lambda: len(pids(directory)) == ranks


def all_end(directory: Path, ranks: int) -> None:
    assert len(pids(directory)) == ranks
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids(directory)))


def test_stop_ends_the_ranks(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        as_soon_as(all_have_begun(tmp_path, 3), lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        launch(writes_its_pid, (str(tmp_path),), nprocs=3, cluster=client)
    assert "Stopped." in capsys.readouterr().out
    all_end(tmp_path, 3)  # the forkserver may still have to reap a rank
    assert launch(average, (10,), 4, cluster=client).ok


def test_what_is_on_the_engines_stays_as_it_was(client: Any) -> None:
    view = client[:]
    view.push({"x": 7}, block=True)
    before, history = view.apply_sync(clusters.state), list(client.history)
    launch(average, (10,), 4, env={"SECRET": "1"}, cluster=client)
    assert [m for m in client.history if m not in history] == []
    assert view.apply_sync(clusters.state) == before
    assert view.pull("x", block=True) == [7] * 4


def test_some_of_the_engines(client: Any) -> None:
    view = client[[1, 3]]
    pids = view.apply_sync(os.getpid)
    assert launch(lambda rank: os.environ["RANK"], cluster=view).values == ["0", "1"]
    assert view.apply_sync(os.getpid) == pids
    with pytest.raises(BadLaunch, match=r"\(1, 3\)"):
        launch(average, (10,), 3, cluster=view)


def test_a_busy_engine_is_named(client: Any, tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    busy = client[2].apply_async(clusters.until_there, str(enough))
    with pytest.raises(BadLaunch, match="engine 2 is busy"):
        launch(average, (10,), 4, cluster=client)
    enough.touch()
    busy.get()
    assert launch(average, (10,), 4, cluster=client).ok


def test_what_is_no_client(client: Any, cluster: Cluster) -> None:
    for wrong in ("profile", 4, [client]):
        with pytest.raises(BadLaunch, match="not a client"):
            launch(average, (10,), cluster=wrong)
    with pytest.raises(BadLaunch, match="connect_client_sync"):
        launch(average, (10,), cluster=ipyparallel.Cluster(n=1))


def test_a_lock_cannot_travel_to_another_machine(client: Any) -> None:
    lock = torch.multiprocessing.get_context("spawn").Lock()
    with pytest.raises(CannotSend, match=r"args\[0\]"):
        launch(average, (lock,), cluster=client)


def test_without_ipyparallel_it_is_said_what_to_install() -> None:
    script = """
    import sys
    sys.modules["ipyparallel"] = None
    from ddp_lessons import launch
    launch(print, cluster="a client")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert "pip install ipyparallel" in done.stderr
    assert "BadLaunch" in done.stderr


def meets_forever(rank: int, directory: str) -> None:
    join()
    write_pid(rank, directory)
    while True:
        dist.barrier()
        time.sleep(0.01)


def test_an_engine_that_is_killed_is_named_and_takes_its_rank_along(
    cluster: Cluster, tmp_path: Path
) -> None:
    number = cluster.add()
    pid = cluster.pid(number)
    view = cluster.client[[0, 1, number]]
    with as_soon_as(all_have_begun(tmp_path, 3), lambda: os.kill(pid, signal.SIGKILL)):
        run = launch(meets_forever, (str(tmp_path),), 3, check=False, cluster=view)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("engine lost", (2,))
    assert f"engine {number}" in run.verdict.title
    assert isinstance(run.error, WorkerDied)
    all_end(tmp_path, 3)
    assert launch(average, (10,), 4, cluster=cluster.client).ok


def test_an_engine_that_was_killed_before_is_left_out(cluster: Cluster) -> None:
    number = cluster.add()
    os.kill(cluster.pid(number), signal.SIGKILL)
    assert launch(average, (10,), 4, cluster=cluster.client).ok


def test_an_engine_that_ended_after_it_was_chosen(cluster: Cluster) -> None:
    number = cluster.add()
    view = cluster.client[[0, number]]
    cluster.kill(number)
    assert launch(average, (10,), 1, cluster=view).ok
    with pytest.raises(BadLaunch, match=rf"for nprocs=1\.\nMeanwhile engine {number} has ended"):
        launch(average, (10,), 2, cluster=view)


def test_the_last_engine_has_ended(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 1) as cluster:
        view = cluster.client[0]
        cluster.kill(0)
        with pytest.raises(BadLaunch, match=r"the cluster has no engines.*\nMeanwhile engine 0"):
            launch(average, (10,), 1, cluster=view)


LAUNCHES = """
import sys, time
import ipyparallel
from ddp_lessons import launch

def write(rank, directory):
    import os
    with open(f"{directory}/.rank{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{directory}/rank{rank}")
    time.sleep(100)

launch(write, (sys.argv[2],), cluster=ipyparallel.Client(sys.argv[1]))
"""


def test_ranks_end_when_the_notebook_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    cluster.shorten_leases()
    command = [sys.executable, "-c", LAUNCHES, cluster.connection_file, str(tmp_path)]
    notebook = subprocess.Popen(command)
    wait_until(all_have_begun(tmp_path, 2))
    notebook.kill()
    notebook.wait()
    all_end(tmp_path, 2)
    assert launch(average, (10,), 4, cluster=cluster.client).ok


def test_in_a_notebook(cluster: Cluster, kernel: Kernel, tmp_path: Path) -> None:
    kernel.run("launch(lambda rank: rank)")  # its own forkserver would end only once it is ready
    kernel.run(f"""
        import ipyparallel, time
        client = ipyparallel.Client({cluster.connection_file!r})
    """)
    failed = kernel.run("""
        def work(rank):
            print("hello", rank)
            return 1 / (rank - 1)

        launch(work, nprocs=3, cluster=client)
    """)
    assert "WorkerFailed: rank 1 of 3 raised ZeroDivisionError" in failed.error
    assert re.search(r"Cell In\[\d+\], line 3, in work", failed.error)
    assert "[rank 0] hello 0\n[rank 1] hello 1\n[rank 2] hello 2" in failed.stdout
    cell = kernel.start(f"""
        import os, pathlib
        def wait(rank):
            time.sleep(1)  # until the notebook has heard that the function was called
            pathlib.Path({str(tmp_path)!r}, f"rank{{rank}}").touch()
            time.sleep(60)

        launch(wait, nprocs=4, cluster=client)
    """)
    wait_until(lambda: len(list(tmp_path.glob("rank*"))) == 4)
    kernel.manager.interrupt_kernel()
    stopped = kernel.finish(cell)
    assert stopped.error_name == "KeyboardInterrupt"
    assert "rank 3 stopped at Cell In" in stopped.stdout
    assert (
        kernel.run("launch(lambda rank: rank, nprocs=4, cluster=client).values").result[
            "text/plain"
        ]
        == "[0, 1, 2, 3]"
    )


def test_profile_and_timeline(client: Any, figures_closed: None) -> None:
    run = launch(average, (1000,), 2, profile=True, cluster=client)
    assert any(span.lane == "gloo" for span in run.spans())
    assert plots.timeline(run).get_title(loc="left") == "average on 2 ranks"


def test_another_clients_task_only_delays(cluster: Cluster, tmp_path: Path) -> None:
    def work(rank: int, directory: str) -> None:
        write_pid(rank, directory)
        time.sleep(0.5)

    other = ipyparallel.Client(cluster.connection_file)
    given: list[Any] = []

    def give() -> None:  # longer than the lease
        given.append(other[1].apply_async(time.sleep, 2.5))

    cluster.shorten_leases()
    with as_soon_as(all_have_begun(tmp_path, 2), give):
        run = launch(work, (str(tmp_path),), nprocs=2, cluster=cluster.client)
    assert given[0].done()
    other.close()
    assert run.ok


def test_much_output_is_neither_lost_nor_kept(client: Any) -> None:
    def flood(rank: int) -> str:
        for number in range(30_000):
            print(f"{number:1000}")
        return "x" * 10_000_000

    run = launch(flood, cluster=client)
    assert [len(value) for value in run.values] == [10_000_000] * 2
    assert all(rank.lines[-1].strip() == "29999" for rank in run.ranks)
    assert all("bytes left out" in rank.output for rank in run.ranks)


def test_an_engine_that_cannot_start_its_rank_is_named(client: Any) -> None:
    limit = """
import os, resource
before = resource.getrlimit(resource.RLIMIT_NOFILE)
os.environ["LIMIT"] = str(before[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, before[1]))
"""
    give_back = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ.pop("LIMIT")), hard))
"""
    client[1].apply_sync(exec, limit, {})
    try:
        with pytest.raises(LaunchError, match=r"rank 1 could not be started by engine 1.*OSError"):
            launch(average, (10,), 2, cluster=client)
    finally:
        client[1].apply_sync(exec, give_back, {})
    assert launch(average, (10,), 2, cluster=client).ok


def test_an_engine_knows_the_way_to_its_controller(client: Any) -> None:
    assert client[0].apply_sync(RemoteCall("_controller")) == "127.0.0.1"


def test_an_engine_without_this_package_is_told_what_to_install(client: Any) -> None:
    hide = "import sys; sys.modules['ddp_lessons.cluster.engine'] = {}"
    keep = "import sys; sys.kept = sys.modules['ddp_lessons.cluster.engine']"
    client[1].apply_sync(exec, keep, {})
    client[1].apply_sync(exec, hide.format("None"), {})
    try:
        with pytest.raises(BadLaunch, match=r"engine 1 cannot use[^$]*pip install git"):
            launch(average, (10,), 2, cluster=client)
    finally:
        client[1].apply_sync(exec, hide.format("sys.__dict__.pop('kept')"), {})
    assert launch(average, (10,), 2, cluster=client).ok


def test_a_lost_controller_is_told_and_engines_end_their_ranks(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: it ends the controller that the others need, too."""
    monkeypatch.setattr(remote_worker, "SILENT", 1.0)
    cluster.shorten_leases()
    with as_soon_as(all_have_begun(tmp_path, 2), cluster.kill_controller):
        run = launch(writes_its_pid, (str(tmp_path),), check=False, cluster=cluster.client)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("engine lost", (0, 1))
    assert "controller" in run.verdict.title
    all_end(tmp_path, 2)
