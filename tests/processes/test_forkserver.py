"""Ranks can be started whatever happens to the forkserver, and from any process or thread."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import util
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

from ddp_lessons import BadLaunch, LaunchError, launch
from ddp_lessons.processes import forkserver
from ddp_lessons.processes.local import WorkerProcess
from ddp_lessons.system import reaper
from tests.support.checkout import ROOT
from tests.support.clusters import wait_until

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no forkserver")


def ident(rank: int) -> int:
    return rank


def running(method: str = "forkserver") -> forkserver.Forkserver:
    """The running forkserver; the warm one has just started ranks."""
    if method == "forkserver":
        assert launch(ident).values == [0, 1]
    found = forkserver.server(forkserver.WARM if method == "forkserver" else forkserver.BARE)
    found.ensure_running()
    assert found.pid is not None
    return found


def suspend(server: forkserver.Forkserver) -> None:
    os.kill(server.pid or 0, signal.SIGSTOP)


def kill(server: forkserver.Forkserver) -> None:
    assert server.pid is not None
    reaper.kill_and_wait(server.pid)  # until it has ended, spares of its become ranks


def feed_garbage(server: forkserver.Forkserver) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server._server._forkserver_address)
        client.sendall(b"garbage")


def kill_and_remove_its_folder(server: forkserver.Forkserver) -> None:
    kill(server)
    folder = Path(util.get_temp_dir())
    for socket_ in folder.iterdir():
        socket_.unlink()
    folder.rmdir()


def remove_its_socket(server: forkserver.Forkserver) -> None:
    Path(server._server._forkserver_address).unlink(missing_ok=True)  # it went with the folder


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("method", "nprocs"), [("forkserver", 2), ("spawn", 1)])
@pytest.mark.parametrize(
    "harm", [suspend, kill, feed_garbage, kill_and_remove_its_folder, remove_its_socket]
)
def test_the_next_launch_works(harm: Any, method: str, nprocs: int) -> None:
    harm(running(method))
    assert launch(ident, nprocs=nprocs, start_method=method).values == [*range(nprocs)]
    if method == "forkserver":  # with the other, the next test finds what this one leaves
        assert launch(ident).values == [0, 1]


@linux
def test_ranks_have_imported_what_checks_need_and_nothing_of_a_notebook() -> None:
    def imported(rank: int) -> list[bool]:
        names = ("ddp_lessons.exercises.framework", "matplotlib", "ipywidgets", "IPython")
        return [name in sys.modules for name in names]

    assert launch(imported, nprocs=1).values == [[True, False, False, False]]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_forkserver_that_ends_while_ranks_start(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How the ranks end that it has started, nobody can tell; a run of these and others is none."""
    server, start = running(method), WorkerProcess.start

    def start_and_kill(worker: WorkerProcess, *args: Any) -> None:
        start(worker, *args)
        if worker.rank == 0:
            kill(server)

    with monkeypatch.context() as patched:
        patched.setattr(WorkerProcess, "start", start_and_kill)
        with pytest.raises(LaunchError, match="was ended before it had started rank 1"):
            launch(ident, start_method=method)
    assert launch(ident, start_method=method).values == [0, 1]


@pytest.mark.slow
@linux
def test_a_forkserver_that_is_suspended_while_ranks_run() -> None:
    """It cannot tell how they ended; what they returned is there, and the next launch works."""

    def suspends(rank: int) -> int:
        if rank == 0:
            os.kill(os.getppid(), signal.SIGSTOP)
        return rank

    assert launch(suspends, timeout=20).values == [0, 1]
    assert launch(ident).values == [0, 1]


@pytest.mark.slow
def test_new_interpreters_where_there_is_no_forkserver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(forkserver, "default_start_method", lambda: "spawn")
    env = {"ONLY_FOR_RANKS": "a = b, with spaces"}
    run = launch(lambda rank: (os.environ["ONLY_FOR_RANKS"], sys.argv), env=env)
    assert run.values == [("a = b, with spaces", sys.argv)] * 2
    assert not launch(lambda rank: 1 / rank, nprocs=1, check=False).ok


def test_one_that_does_not_start_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process id 0 would mean this process's own group."""
    killed: list[int] = []
    monkeypatch.setattr(reaper, "kill_and_wait", killed.append)
    one = forkserver.Forkserver(forkserver.BARE)
    monkeypatch.setattr(one, "ensure_running", lambda: None)

    def fails(server: Any) -> Any:
        raise OSError("the forkserver did not start")

    with pytest.raises(OSError, match="did not start"):
        one.start(fails)
    assert killed == []


@pytest.mark.slow
@linux
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_forkserver_whose_end_the_learners_code_has_reaped(method: str) -> None:
    launch(ident, start_method=method)
    pid = running(method).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert launch(ident, start_method=method).values == [0, 1]
    assert running(method).pid != pid


@pytest.mark.slow
def test_a_broken_scikit_learn(tmp_path: Path) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise ValueError('broken')")
    script = "from ddp_lessons import launch\nprint(launch(lambda rank: rank).values)"
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


ENDS_AT_ONCE = """
    import os, signal
    from ddp_lessons.processes import forkserver
    forkserver.server({imports!r}).ensure_running()
    print(*os.listdir(os.environ["TMPDIR"]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("imports", [forkserver.WARM, forkserver.BARE])
def test_one_whose_parent_dies_before_it_has_begun(imports: str, tmp_path: Path) -> None:
    script = textwrap.dedent(ENDS_AT_ONCE).format(imports=imports)
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.stdout.startswith("pymp-")
    wait_until(lambda: not any(tmp_path.iterdir()))


NO_FOLDER = """
    import shutil, tempfile
    from ddp_lessons import launch
    for _ in range(2):
        print(launch(lambda rank: rank).values)
        shutil.rmtree(tempfile.gettempdir())
"""


@pytest.mark.slow
def test_after_the_temporary_folder_itself_was_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(NO_FOLDER)]
    env = {**os.environ, "TMPDIR": str(tmp_path / "gone"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.stdout == "[0, 1]\n" * 2, done.stderr


FEW_FILES = """
    import resource
    import psutil
    from ddp_lessons import LaunchError, launch
    def ident(rank):
        return rank
    launch(ident, nprocs=1, start_method={method!r})
    process = psutil.Process()
    before = process.num_fds()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for more in range(24, 30):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + more, most))
        try:
            launch(ident, nprocs=32, start_method={method!r})
        except LaunchError as error:
            print(more, "Too many open files" in str(error))
        print(process.num_fds() - before)
    print(launch(ident, start_method={method!r}).values, process.num_fds() - before)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_no_more_open_files_than_allowed(method: str) -> None:
    """Too many ranks for the open files allowed: the error says so, and fewer ranks still start.

    Nothing is left open, whichever file cannot be opened.
    """
    script = textwrap.dedent(FEW_FILES.format(method=method))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    failures = "".join(f"{more} True\n0\n" for more in range(24, 30))
    assert (done.stdout, done.stderr) == (f"{failures}[0, 1] 0\n", "")


@pytest.mark.slow
def test_launching_in_a_forked_child() -> None:
    """As in a Pool, whose processes are daemons. Afterwards this process can still launch."""
    running()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(in_forked_child) == [0, 1]
    assert launch(ident).values == [0, 1]


def in_forked_child() -> list[Any]:
    return launch(ident).values


IN_CHILD = """
    import multiprocessing
    from ddp_lessons import launch
    def ident(rank):
        return rank
    def child(results):
        results.put(launch(ident).values)
    if __name__ == "__main__":
        launch(ident)
        context = multiprocessing.get_context({method!r})
        results = context.SimpleQueue()
        process = context.Process(target=child, args=(results,))
        process.start()
        print(results.get(), process.join(), launch(ident).values, launch(ident).values)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_launching_in_a_child_of_another_kind(method: str, tmp_path: Path) -> None:
    script = tmp_path / "experiment.py"
    script.write_text(textwrap.dedent(IN_CHILD.format(method=method)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert done.stdout == "[0, 1] None [0, 1] [0, 1]\n", done.stderr
    assert done.stderr == ""


def mine(rank: int, n: int) -> tuple[int, str | None]:
    return n, os.environ.get("ONLY_FOR_RANKS")


@pytest.mark.slow
def test_launches_side_by_side_from_threads() -> None:
    """Each launch has its own ranks, values and variables; this process's variables stay."""
    running()
    wrong: list[Any] = []
    seen: collections.Counter[Any] = collections.Counter()

    def launches(n: int) -> None:
        for number in range(15):
            env = {"ONLY_FOR_RANKS": str(n)} if number % 2 else None
            run = launch(mine, (n,), env=env, check=False, timeout=30)
            expected = (n, str(n) if number % 2 else None)
            if run.values != [expected] * 2:
                wrong.append(run.explain())

    threads = [threading.Thread(target=launches, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    main = sys.modules["__main__"]
    names = {name: vars(main).get(name) for name in ("__file__", "__spec__")}
    while any(thread.is_alive() for thread in threads):
        seen[os.environ.get("ONLY_FOR_RANKS")] += 1
        assert {name: vars(main).get(name) for name in names} == names
        assert multiprocessing.active_children() == []
        time.sleep(0.001)
    assert wrong == []
    assert list(seen) == [None]


@pytest.mark.slow
def test_variables_reach_a_new_interpreter_and_nobody_else() -> None:
    def look(rank: int) -> tuple[int, str]:
        return hash("x"), os.environ["ONLY_FOR_RANKS"]

    env = {"ONLY_FOR_RANKS": "a = b, with spaces", "PYTHONHASHSEED": "0"}
    (first,), (second,) = (launch(look, nprocs=1, env=env).values for _ in "ab")
    assert first == second
    assert first[1] == "a = b, with spaces"
    assert "PYTHONHASHSEED" not in os.environ
    assert "ONLY_FOR_RANKS" not in os.environ


@pytest.mark.slow
@linux
def test_what_the_learners_own_forkserver_left_is_the_learners(tmp_path: Path) -> None:
    """A learner's process called "rank 0", and its daemon, outlive a run beside them."""
    script = tmp_path / "own.py"
    script.write_text(textwrap.dedent(OWN_FORKSERVER))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"daemon": True, "rank 0": True, "orphans": False}, done.stderr


OWN_FORKSERVER = """
    import json, multiprocessing, os, subprocess, time
    import psutil
    from ddp_lessons import launch
    def leaves(rank):
        return subprocess.Popen(["sleep", "61"], start_new_session=True).pid
    def daemon(results):
        results.put(subprocess.Popen(["sleep", "62"], start_new_session=True).pid)
    if __name__ == "__main__":
        context = multiprocessing.get_context("forkserver")
        results = context.SimpleQueue()
        one = context.Process(target=daemon, args=(results,))
        one.start()
        left = results.get()
        one.join()
        other = context.Process(target=time.sleep, args=(60,), name="rank 0")
        other.start()
        orphans = launch(leaves).values
        told = {
            "daemon": psutil.pid_exists(left),
            "rank 0": other.is_alive(),
            "orphans": any(map(psutil.pid_exists, orphans)),
        }
        other.kill()
        other.join()
        os.kill(left, 9)
        print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("random", "cannot import name 'Random' from 'random'"),
        ("numpy", "'numpy' has no attribute"),
    ],
)
@linux
def test_a_file_that_hides_a_module_is_named(module: str, said: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("x = 1\n")
    script = f"""
        import os, sys, torch
        from ddp_lessons import LaunchError, launch
        os.chdir({str(tmp_path)!r})
        try:
            launch(lambda rank: rank)
        except LaunchError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "Here a new Python does not get as far as torch" in done.stdout
    assert said in done.stdout


def test_a_directory_that_was_deleted(tmp_path: Path) -> None:
    before = os.getcwd()
    folder = tmp_path / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        with pytest.raises(BadLaunch, match=r"working directory.*was deleted.*os\.chdir"):
            launch(ident)
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_a_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Longer than the address of a socket may be."""
    folder = tmp_path / ("x" * 96)
    folder.mkdir()
    code = "from ddp_lessons import launch; print(launch(lambda rank: rank).values)"
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[0, 1]\n", done.stderr
    assert list(folder.iterdir()) == []


def test_whole_numbers_of_other_libraries() -> None:
    options: dict[str, Any] = {"nprocs": np.int64(2), "nnodes": np.uint8(1)}
    assert launch(ident, **options).values == [0, 1]


async def sleeps(rank: int) -> None: ...


def yields(rank: int) -> Any:
    yield rank


async def yields_later(rank: int) -> Any:
    yield rank


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (sleeps, "an async function"),
        (yields, "a generator function"),
        (yields_later, "an async generator function"),
    ],
)
def test_functions_that_a_call_does_not_run(fn: Any, kind: str) -> None:
    with pytest.raises(BadLaunch, match=f"fn is {kind}: calling it runs none of its lines"):
        launch(fn)


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": "x\0y"}, {"A\0": "x"}])
def test_variables_that_no_process_can_have(env: dict[str, str]) -> None:
    with pytest.raises(BadLaunch, match="name of a variable cannot be empty"):
        launch(ident, env={"GOOD": "1", **env})
    assert "GOOD" not in os.environ


def at_its_first_import(folder: Path) -> str:
    """Have the forkserver stand there; an expression that is true when it has come."""
    text = "from pathlib import Path\nimport time\nPath('come').touch()\ntime.sleep(60)\n"
    (folder / "numpy.py").write_text(text)
    return "os.path.exists('come')"


def at_the_digits(folder: Path) -> str:
    """After all imports, of which that of torch._dynamo has made a temporary directory."""
    data = folder / "sklearn" / "datasets" / "data"
    data.mkdir(parents=True)
    (folder / "sklearn" / "__init__.py").touch()
    os.mkfifo(data / "digits.csv.gz")
    return "glob.glob(os.environ['TMPDIR'] + '/torchinductor_*')"


@linux
@pytest.mark.parametrize("stands", [at_its_first_import, at_the_digits])
def test_a_forkserver_that_is_not_ready_yet_ends_with_its_parent(
    stands: Any, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = f"""
        import glob, os, time
        from ddp_lessons.processes import forkserver
        forkserver.warm()
        print(forkserver.server().pid, flush=True)
        while not {stands(tmp_path)}:
            time.sleep(0.1)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # torch's compiler, once it was imported here, has told its folder to all children.
        env={k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
        | {"TMPDIR": str(temporary)},
        timeout=60,
    )
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("takes_its_place", [False, True])
def test_a_parent_without_standard_streams(
    closed: str, takes_its_place: bool, tmp_path: Path
) -> None:
    """As a daemon or a job of cron is started; a file of its own may have the free number."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        kept = open({str(tmp_path / "values")!r}, "w") if {takes_its_place} else None
        from ddp_lessons import launch

        def work(rank):
            print("hello")
            return rank

        values = [launch(work, start_method=one).values for one in ("forkserver", "spawn")]
        print(values, file=kept or open({str(tmp_path / "values")!r}, "w"))
        """)
    )
    command = ["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(script)]
    subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, timeout=250)
    assert (tmp_path / "values").read_text() == "[[0, 1], [0, 1]]\n"
