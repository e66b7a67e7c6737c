"""launch() from a plain process: values, places, environment, bad and unpicklable arguments."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import BadLaunch, CannotSend, launch, span
from ddp_lessons.processes import forkserver
from ddp_lessons.system import reaper

pytestmark = pytest.mark.ranks

# Pickle the functions of this file by value, like those of a notebook cell.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def average(rank: int, n: int) -> float:
    dist.init_process_group("gloo")
    x = torch.full((n,), float(rank))
    dist.all_reduce(x)
    mean = x.mean().item() / dist.get_world_size()
    dist.destroy_process_group()
    return float(mean)


@pytest.mark.parametrize("nprocs", [1, 2, 4])
def test_real_collective(nprocs: int) -> None:
    run = launch(average, args=(1000,), nprocs=nprocs)
    assert run.values == [(nprocs - 1) / 2] * nprocs
    assert run.ok
    assert [r.exitcode for r in run.ranks] == [0] * nprocs


def places(rank: int) -> dict[str, str]:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"]
    return {name: os.environ[name] for name in names}


def test_ranks_of_two_machines() -> None:
    values = launch(places, nprocs=2, nnodes=2).values
    assert [v["RANK"] for v in values] == ["0", "1", "2", "3"]
    assert [v["LOCAL_RANK"] for v in values] == ["0", "1", "0", "1"]
    assert [v["GROUP_RANK"] for v in values] == ["0", "0", "1", "1"]
    assert {(v["WORLD_SIZE"], v["LOCAL_WORLD_SIZE"]) for v in values} == {("4", "2")}


def test_environment_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LESSON_A", "LESSON_B", "RANK", "OMP_NUM_THREADS", "MASTER_ADDR")

    def look(rank: int) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    launch(look)  # the forkserver runs by now, with an older environment
    monkeypatch.setenv("LESSON_A", "now")
    monkeypatch.setenv("LESSON_B", "hidden")
    monkeypatch.setenv("RANK", "77")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = launch(look, env={"LESSON_B": "on top"})
    assert run.values == [["now", "on top", str(r), "1", "127.0.0.1"] for r in (0, 1)]
    monkeypatch.delenv("LESSON_A")
    assert launch(look, env={"RANK": "5"}).values[1][:3] == [None, "hidden", "5"]


def test_threads_follow_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert launch(lambda rank: torch.get_num_threads()).values == [2, 2]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch(lambda rank: torch.get_num_threads()).values == [1, 1]


@pytest.mark.parametrize("odd", ["\u00b2", "many", "0", "99999999999"])
def test_a_number_of_threads_that_openmp_ignores_is_ignored(odd: str) -> None:
    run = launch(lambda rank: torch.get_num_threads(), nprocs=1, env={"OMP_NUM_THREADS": odd})
    assert run.values == [os.cpu_count()]


def test_debug_level_follows_the_environment() -> None:
    run = launch(lambda rank: dist.get_debug_level().name, env={"TORCH_DISTRIBUTED_DEBUG": "INFO"})
    assert run.values == ["INFO", "INFO"]


@pytest.mark.slow
def test_variables_that_are_read_only_at_the_start_are_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def string_hash(rank: int) -> int:
        return hash("ranks")

    (seven,) = set(launch(string_hash, env={"PYTHONHASHSEED": "7"}).values)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert launch(string_hash, nprocs=1).values == [seven]
    monkeypatch.setenv("PYTHONHASHSEED", "8")
    assert launch(string_hash, nprocs=1).values != [seven]
    assert os.environ["PYTHONHASHSEED"] == "8"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the forkserver")
def test_a_forkserver_that_ended_holds_no_variables_to_obey(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_forked() -> bool:
        (parent,) = launch(lambda rank: os.getppid(), nprocs=1).values
        return bool(parent == forkserver.server().pid)

    if pid := forkserver.server().pid:
        reaper.kill_and_wait(pid)
    monkeypatch.setenv("MALLOC_OF_A_TEST", "1")
    assert is_forked()
    monkeypatch.delenv("MALLOC_OF_A_TEST")
    assert not is_forked()
    reaper.kill_and_wait(forkserver.server().pid or 0)
    assert is_forked()


def test_the_time_zone_follows_the_environment() -> None:
    run = launch(lambda rank: (time.tzname[0], time.timezone), env={"TZ": "NINE-9"})
    assert run.values == [("NINE", -9 * 3600)] * 2


def no_compiler(rank: int) -> bool:
    called = []
    torch.compile(torch.relu, backend=lambda *graph: called.append(graph))(torch.ones(1))
    return not called


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "fn"),
    [
        ({"PYTORCH_JIT": "0"}, lambda rank: not torch.jit._state._enabled.enabled),
        ({"TORCHDYNAMO_DISABLE": "1"}, no_compiler),
        ({"TORCH_COMPILE_DISABLE": "1"}, no_compiler),
    ],
)
def test_torchs_own_switches_are_obeyed(
    variable: dict[str, str], fn: Callable[[int], bool]
) -> None:
    assert launch(fn, nprocs=1, env=variable).values == [True]


def test_a_path_of_python_for_the_ranks(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "only_there.py").write_text(f"NAME = {folder.name!r}")
    run = launch(
        lambda rank: importlib.import_module("only_there").NAME,
        nprocs=1,
        env={"PYTHONPATH": os.pathsep.join(map(str, folders))},
        start_method="forkserver",
    )
    assert run.values == ["a"]


def test_ranks_are_forked_also_after_scikit_learn_was_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def is_forked(rank: int) -> bool:
        return "ddp_lessons.worker.preload" in sys.modules

    assert launch(is_forked).values == [True, True]
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "True")  # as the import does
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # as that of torch._dynamo does
    assert launch(is_forked).values == [True, True]
    monkeypatch.setenv("KMP_AFFINITY", "none")
    assert launch(is_forked, nprocs=1).values == [False]


def test_directory_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    run = launch(lambda rank: (os.getcwd(), sys.path[0]))
    assert run.values == [(str(tmp_path), str(tmp_path / "lib"))] * 2


def test_an_edited_module_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "learners_module.py"

    def use(rank: int) -> int:
        import learners_module  # type: ignore[import-not-found]

        return int(learners_module.ANSWER)

    for answer in (1, 2, 3):  # same size, within one second: what Python's own cache would miss
        module.write_text(f"ANSWER = {answer}\n")
        assert launch(use).values == [answer, answer]


EDITED = """
import torch, torch.distributed as dist
def work(rank):
    dist.init_process_group("gloo")
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    for turn in range(rank + 1):
        dist.all_reduce(torch.ones(1)){step}
    dist.destroy_process_group()
"""


def test_an_edited_module_is_explained_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "learners_training.py"

    def use(rank: int) -> None:
        import learners_training  # type: ignore[import-not-found]

        learners_training.work(rank)

    for step, counts in (("", False), ("\n        optimizer.step()", True)):
        module.write_text(EDITED.format(step=step))
        told = launch(use, check=False).explain()
        assert ("Rank 0 made 1 step; rank 1 began 2." in told) == counts
        assert (" 8         optimizer.step()" in told) == counts
        assert (" 8     dist.destroy_process_group()" in told) != counts


def plain(rank: int) -> int:
    return rank * 10


def decorated(fn: Callable[[int], int]) -> Callable[[int], int]:
    @functools.wraps(fn)
    def inner(rank: int) -> int:
        return fn(rank) + 1

    return inner


class Worker:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def work(self, rank: int) -> int:
        return rank * self.factor

    __call__ = work


def closure(factor: int) -> Callable[[int], int]:
    return lambda rank: rank * factor


@pytest.mark.parametrize(
    ("fn", "second"),
    [
        (plain, 10),
        (lambda rank: rank + 4, 5),
        (closure(7), 7),
        (decorated(plain), 11),
        (Worker(3).work, 3),
        (Worker(4), 4),
        (functools.partial(lambda offset, rank: rank + offset, 100), 101),
        (abs, 1),
    ],
    ids=["function", "lambda", "closure", "decorated", "method", "callable", "partial", "builtin"],
)
def test_what_launches(fn: Callable[[int], int], second: int) -> None:
    assert launch(fn).values[1] == second


def test_main_holds_only_what_the_function_needs() -> None:
    def names(rank: int) -> list[str]:
        return sorted(n for n in vars(sys.modules["__main__"]) if not n.startswith("__"))

    assert launch(names).values == [[], []]


def test_shared_tensor_queue_and_event_travel_as_with_spawn() -> None:
    context = multiprocessing.get_context("spawn")
    queue, event = context.SimpleQueue(), context.Event()
    shared = torch.zeros(2).share_memory_()

    def use(rank: int, queue: Any, event: Any, shared: torch.Tensor) -> None:
        shared[rank] = rank + 1
        event.set() if rank == 0 else event.wait(10)
        queue.put(rank)

    launch(use, args=(queue, event, shared))
    assert sorted([queue.get(), queue.get()]) == [0, 1]
    assert event.is_set()
    assert shared.tolist() == [1, 2]
    queue.close()


def test_every_rank_and_run_draws_its_own_random_numbers() -> None:
    draws = [launch(lambda rank: (np.random.rand(), torch.rand(1).item())).values for _ in "ab"]
    for numbers in zip(*[value for values in draws for value in values], strict=True):
        assert len(set(numbers)) == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"nprocs": 0}, "nprocs is 0"),
    ({"nprocs": -1}, "nprocs is -1"),
    ({"nprocs": "4"}, "nprocs is '4'"),
    ({"nprocs": True}, "nprocs is True"),
    ({"nprocs": 10_000}, "10,000 ranks"),
    ({"nnodes": 0}, "nnodes is 0"),
    ({"timeout": 0}, "timeout is 0"),
    ({"timeout": -1.5}, "timeout is -1.5"),
    ({"timeout": "60"}, "timeout is '60'"),
    ({"timeout": float("nan")}, "timeout is nan"),
    ({"fn": 42}, "fn is 42"),
    ({"args": [1]}, "args=([1],)"),
    ({"args": 7}, "args=(7,)"),
    ({"env": {"N": 3}}, "env['N'] is 3"),
    ({"env": "RANK=3"}, "env is 'RANK=3'"),
    ({"start_method": "fork"}, "'forkserver' or 'spawn'"),
]


@pytest.mark.alone
@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_launch(arguments: dict[str, Any], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadLaunch) as caught:
        launch(**{"fn": plain, **arguments})
    assert time.monotonic() - began < 5
    assert said in str(caught.value)
    assert caught.value.run is None


def test_a_bad_launch_is_told_in_few_words() -> None:
    many: Any = list(range(300_000))
    for arguments in ({"fn": many}, {"args": many}, {"env": many}, {"env": {"A": many}}):
        with pytest.raises(BadLaunch) as caught:
            launch(**{"fn": plain, **arguments})
        assert len(str(caught.value)) < 500


def test_launch_inside_a_worker() -> None:
    def nested(rank: int) -> str:
        from ddp_lessons import BadLaunch, launch

        try:
            launch(lambda rank: None)
        except BadLaunch as error:
            return str(error)
        return "it ran"

    assert all("inside a worker" in text for text in launch(nested).values)


def test_cannot_send_names_the_argument(tmp_path: Path) -> None:
    def work(rank: int, steps: int, batches: Any) -> None: ...

    with pytest.raises(CannotSend, match=r"args\[1\] \(parameter 'batches' of work\).*generator"):
        launch(work, args=(3, (i for i in range(3))))
    path = tmp_path / "data.txt"
    path.write_text("x")
    with path.open() as file, pytest.raises(CannotSend, match=r"args\[1\].*TextIOWrapper"):
        launch(work, args=(3, file))
    with path.open("rb") as raw, pytest.raises(CannotSend, match=r"args\[0\].*BufferedReader"):
        launch(work, args=(raw, None))


def test_cannot_send_names_the_variable_of_the_function() -> None:
    log = (i for i in range(3))

    def work(rank: int) -> None:
        next(log)

    with pytest.raises(CannotSend, match="work uses the variable 'log', a generator"):
        launch(work)

    def waits(rank: int) -> None:
        next(log if rank else later)

    with pytest.raises(CannotSend, match="waits uses the variable 'log', a generator"):
        launch(waits)
    later = log

    class Trainer:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def train(self, rank: int) -> None: ...

    with pytest.raises(CannotSend, match=r"self\.lock, a lock"):
        launch(Trainer().train)


def test_cannot_send_names_rank_and_type_of_a_return_value() -> None:
    with pytest.raises(
        CannotSend, match="rank 1 of 2 returned a value of type generator"
    ) as caught:
        launch(lambda rank: (i for i in "ab") if rank else 5)
    assert caught.value.run is not None
    assert caught.value.run.values == [5, None]
    assert caught.value.rank == 1


def test_a_value_whose_class_does_not_load_here() -> None:
    def work(rank: int) -> Any:
        class Bad:
            def __reduce__(self) -> Any:
                return int, ("not a number",)

        return Bad()

    with pytest.raises(CannotSend, match="rank 0 of 2"):
        launch(work)


def test_classes_keep_their_identity_both_ways() -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    def move(rank: int, point: Point) -> Point:
        assert isinstance(point, Point)
        return Point(point.x + rank)

    values = launch(move, args=(Point(5),)).values
    assert [v.x for v in values] == [5, 6]
    assert all(isinstance(v, Point) for v in values)


def test_init_methods_of_the_learners_own(tmp_path: Path) -> None:
    def join(rank: int, url: str) -> float:
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=3)
        x = torch.ones(1)
        dist.all_reduce(x)
        dist.destroy_process_group()
        return float(x.item())

    def join_by_hand(rank: int, path: str) -> float:
        store = dist.FileStore(path, 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
        x = torch.ones(1)
        dist.all_reduce(x)
        dist.destroy_process_group()
        return float(x.item())

    def join_as_the_tutorial_does(rank: int, port: str) -> float:
        os.environ["MASTER_ADDR"] = "localhost"
        os.environ["MASTER_PORT"] = port
        return join(rank, "env://")

    ports = [str(29_500 + os.getpid() % 500 + i) for i in (0, 1)]
    assert launch(join, args=(f"tcp://127.0.0.1:{ports[0]}",), nprocs=3).values == [3.0] * 3
    assert launch(join, args=(f"file://{tmp_path}/store",), nprocs=3).values == [3.0] * 3
    assert launch(join_by_hand, args=(f"{tmp_path}/by-hand",), nprocs=3).values == [3.0] * 3
    assert launch(join_as_the_tutorial_does, args=(ports[1],), nprocs=3).values == [3.0] * 3


@pytest.mark.alone
def test_joining_early_costs_no_quarter_second() -> None:
    def join(rank: int) -> float:
        if rank == 0:
            time.sleep(0.15)  # rank 1 tries to connect before the store listens
        dist.init_process_group("gloo")
        now = time.perf_counter()
        dist.destroy_process_group()
        return now

    run = launch(join)
    join_spans = {s.rank: s for s in run.spans() if s.name == "init_process_group"}
    late, early = join_spans[0], join_spans[1]
    assert late.t1_ns is not None
    assert early.t1_ns is not None
    # Both return together, so the early rank was not asleep when the store opened.
    assert abs(late.t1_ns - early.t1_ns) < 0.1e9


@pytest.mark.slow
def test_three_hundred_launches_in_a_row(capfd: pytest.CaptureFixture[str]) -> None:
    process = psutil.Process()
    for _ in range(20):
        launch(plain)
    gc.collect()  # beside all that pytest keeps, cycles are rarely looked for
    fds, memory = process.num_fds(), process.memory_info().rss
    for i in range(280):
        run = launch(plain, nprocs=1) if i % 10 else launch(average, (1,))
        assert run.ok
    gc.collect()
    assert process.num_fds() <= fds
    assert process.memory_info().rss - memory < 3 << 20


def test_launches_from_several_threads_do_not_mix() -> None:
    values: dict[int, list[Any]] = {}

    def one(number: int) -> None:
        values[number] = launch(lambda rank: (number, average(rank, 4))).values

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {n: [(n, 0.5), (n, 0.5)] for n in range(4)}


@pytest.mark.slow
@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":'])
def test_as_a_script(tmp_path: Path, guard: str) -> None:
    script = tmp_path / "torchrun.py"
    script.write_text(
        textwrap.dedent(f"""
        import torch.distributed as dist
        from ddp_lessons import launch

        print("this line runs once")

        def work(rank):
            dist.init_process_group("gloo")
            print("of", dist.get_world_size())
            dist.destroy_process_group()
            return rank

        {guard or "if True:"}
            print(launch(work).values)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines() == [
        "this line runs once",
        "[rank 0] of 2",
        "[rank 1] of 2",
        "[0, 1]",
    ], done.stderr


def test_output_is_printed_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    def talk(rank: int) -> None:
        for i in range(3):
            print(f"line {i}")
            time.sleep(0.01 * (2 - rank))

    launch(talk)
    assert capsys.readouterr().out.splitlines() == [
        f"[rank {rank}] line {i}" for rank in (0, 1) for i in range(3)
    ]


def test_characters_that_stdout_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    launch(lambda rank: print("loss \u2192 0.5"), nprocs=1)
    sys.stdout.flush()
    assert written.getvalue() == b"[rank 0] loss \\u2192 0.5\n"


def test_text_of_buffers_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    launch(lambda rank: print("ä€😀"), nprocs=1)
    assert capsys.readouterr().out == "[rank 0] ä€😀\n"
    assert isinstance(sys.stdout, io.TextIOBase)


def raise_late(rank: int) -> None:
    raise ValueError("late")


def kill_late(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_late(rank: int) -> None:
    time.sleep(60)


@pytest.mark.parametrize("end", [raise_late, kill_late, hang_late])
def test_what_a_failing_run_did_until_then_is_kept(end: Callable[[int], None]) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        for _ in range(3):
            dist.all_reduce(torch.ones(1))
        with span("the end"):
            if rank == 1:
                end(rank)
            dist.barrier()

    run = launch(work, nprocs=3, check=False, timeout=5)  # less may pass before they join
    assert not run.ok
    for rank in run.ranks:
        calls = [s for s in rank.spans if s.op == "all_reduce"]
        assert [s.seq for s in calls] == [0, 1, 2]
        assert all(s.t1_ns is not None for s in calls)
        (last,) = [s for s in rank.spans if s.name == "the end"]
        barriers = [s for s in rank.spans if s.op == "barrier"]
        assert len(barriers) == (rank.rank != 1)
        # Else it ended its span, as when another rank was stopped first and so the barrier failed.
        ended = any(barrier.t1_ns is not None for barrier in barriers)
        stopped = (rank.status == "stopped" and rank.error is None) or (rank.exitcode or 0) < 0
        if stopped and not ended:
            assert last.t1_ns is None
            assert all(s.t1_ns is None for s in barriers)
    stuck = [share for share in run.waits() if share.op == "barrier"]
    assert {share.rank for share in stuck} == {0, 2}
    assert all(share.last_rank is None for share in stuck)


def test_an_error_does_not_keep_the_arguments() -> None:
    class Unsendable:
        def __reduce__(self) -> str:
            raise TypeError("not this one")

    value = Unsendable()
    kept = weakref.ref(value)
    gc.disable()  # a cycle through the error's traceback would wait for a collection
    try:
        with contextlib.suppress(CannotSend):
            launch(lambda rank, value: None, (value,))
        del value
        assert kept() is None
    finally:
        gc.enable()
