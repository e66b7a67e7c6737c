"""From a real notebook kernel: what a learner's cells launch, see, stop and break."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.kernels import Kernel, gone, wait_for_workers

pytestmark = pytest.mark.system

KINDS = {
    "function": ("def work(rank): return rank + 1", "work"),
    "lambda": ("", "lambda rank: rank + 1"),
    "closure over a notebook variable": (
        "offset = 1\ndef work(rank): return rank + offset",
        "work",
    ),
    "decorated function": (
        "def plus(fn): return lambda rank: fn(rank) + 1\n@plus\ndef work(rank): return rank",
        "work",
    ),
    "method": (
        "class Job:\n    step = 1\n    def work(self, rank): return rank + self.step",
        "Job().work",
    ),
    "function calling another": (
        "def one(): return 1\ndef work(rank): return rank + one()",
        "work",
    ),
}


@pytest.mark.xdist_group("shared kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cell_launches(shared_kernel: Kernel, kind: str) -> None:
    define, expression = KINDS[kind]
    cell = shared_kernel.run(f"{define}\nprint(launch({expression}).values)")
    assert not cell.error, cell.error
    assert cell.stdout == "[1, 2]\n"


@pytest.mark.xdist_group("shared kernel")
def test_cannot_send_from_a_cell(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("launch(print, args=((i for i in 'ab'),))")
    assert cell.error_name == "CannotSend"
    assert cell.error.startswith("CannotSend: args[0] is a generator")
    cell = shared_kernel.run("log = open('/dev/null')\ndef work(rank): log.read()\nlaunch(work)")
    assert "work uses the variable 'log', a TextIOWrapper" in cell.error


@pytest.mark.xdist_group("shared kernel")
def test_a_failure_shows_the_cells_own_lines_and_nothing_else(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        def helper(x):
            return 1 / x

        def work(rank):
            y = rank
            return helper(y)

        launch(work)
    """)
    assert cell.error_name == "WorkerFailed"
    lines = cell.error.splitlines()
    assert lines[0] == "WorkerFailed: rank 0 of 2 raised ZeroDivisionError: division by zero"
    assert "---->   2     return 1 / x" in lines
    assert "---->   6     return helper(y)" in lines
    assert any(line.startswith("Cell In[") and line.endswith("line 6, in work") for line in lines)
    assert "launcher/api.py" not in cell.error
    assert "ipykernel" not in cell.error


@pytest.mark.xdist_group("shared kernel")
def test_a_worker_sees_its_cells_source(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        import inspect, warnings
        def work(rank):
            warnings.warn("mind the gap")
            return inspect.getsource(work).splitlines()[0]
        print(launch(work, nprocs=1).values)
    """)
    assert "['def work(rank):']" in cell.stdout
    assert 'warnings.warn("mind the gap")' in cell.stdout


@pytest.mark.xdist_group("shared kernel")
def test_classes_of_a_cell_pickle_inside_a_worker(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        import pickle
        import torch.distributed as dist

        class Note:
            def __init__(self, rank): self.rank = rank

        def work(rank):
            dist.init_process_group("gloo")
            notes = [None] * dist.get_world_size()
            dist.all_gather_object(notes, Note(rank))
            dist.destroy_process_group()
            return [note.rank for note in notes]

        print(launch(work).values)
    """)
    assert cell.stdout == "[[0, 1], [0, 1]]\n", cell.error


@pytest.mark.xdist_group("shared kernel")
def test_environment_directory_and_modules_of_this_moment(
    shared_kernel: Kernel, tmp_path: Path
) -> None:
    cell = shared_kernel.run(f"""
        import os, pathlib
        os.chdir({str(tmp_path)!r})
        module = pathlib.Path("notes.py")
        def work(rank):
            import notes
            return notes.WORD, os.environ.get("LESSON"), os.getcwd()
        for word in ("one", "two"):
            module.write_text(f"WORD = {{word!r}}")
            os.environ["LESSON"] = word
            print(launch(work, nprocs=1).values)
    """)
    assert cell.stdout.splitlines() == [f"[('{w}', '{w}', '{tmp_path}')]" for w in ("one", "two")]


@pytest.mark.xdist_group("shared kernel")
def test_the_notebooks_own_state_stays_behind(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        secret, wanted = "x" * 10, 5
        def work(rank):
            import __main__
            return [n for n in vars(__main__) if not n.startswith("__")], wanted
        print(launch(work, nprocs=1).values)
    """)
    assert cell.stdout == "[(['wanted'], 5)]\n"


@pytest.mark.xdist_group("shared kernel")
def test_run_is_shown_as_a_table(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("""
        def work(rank):
            print("<b>hello</b>")
            return "<script>alert(1)</script>"
        launch(work)
    """)
    assert cell.stdout == "[rank 0] <b>hello</b>\n[rank 1] <b>hello</b>\n"
    assert "<script>" not in cell.result["text/html"]
    assert "&lt;script&gt;" in cell.result["text/html"]
    assert cell.result["text/plain"].startswith("Run of work on 2 ranks:")


BARRIER = """
    import time
    import torch.distributed as dist
    def work(rank):
        dist.init_process_group("gloo")
        print("joined", flush=True)
        if rank == 0:
            dist.barrier()
        time.sleep(60)
    launch(work, nprocs=3)
"""


@pytest.mark.slow
@pytest.mark.alone
def test_stop_during_a_barrier(kernel: Kernel) -> None:
    message = kernel.start(BARRIER)
    workers = wait_for_workers(kernel.process, 3)
    time.sleep(0.5)
    began = time.monotonic()
    kernel.manager.interrupt_kernel()
    cell = kernel.finish(message)
    assert time.monotonic() - began < 20
    assert cell.error == cell.error_name == "KeyboardInterrupt"
    assert "rank 0 stopped, waiting in barrier, Cell In[2], line 7" in cell.stdout
    assert "rank 1 stopped at Cell In[2], line 8" in cell.stdout
    assert gone(workers)
    assert kernel.run("print(launch(lambda rank: rank).values)").stdout == "[0, 1]\n"


@pytest.mark.slow
def test_stop_while_ranks_are_starting(kernel: Kernel) -> None:
    for delay in (0.0, 0.01, 0.03, 0.06):
        message = kernel.start("""
            import time
            print("go", flush=True)
            launch(lambda rank: time.sleep(60), nprocs=8)
        """)
        kernel.await_output()
        time.sleep(delay)
        kernel.manager.interrupt_kernel()
        assert kernel.finish(message).error_name == "KeyboardInterrupt"
    deadline = time.monotonic() + 5
    while len(family := kernel.children()) > 2 and time.monotonic() < deadline:
        time.sleep(0.02)  # what has just been forked becomes a spare
    assert len(family) <= 2


@pytest.mark.slow
def test_sigkill_of_the_kernel(kernel: Kernel) -> None:
    kernel.start("""
        import subprocess, time
        import torch.distributed as dist
        def work(rank):
            dist.init_process_group("gloo")
            subprocess.Popen(["sleep", "64"])
            subprocess.Popen(["sleep", "65"], start_new_session=True)
            print("joined", flush=True)
            if rank == 0:
                dist.barrier()
            while True:
                pass
        launch(work, nprocs=3)
    """)
    wait_for_workers(kernel.process, 3)
    time.sleep(1.0)
    family = kernel.children()
    assert sum("sleep" in " ".join(p.cmdline()) for p in family) == 6
    temporary = Path(tempfile.gettempdir())
    folders = {p for p in temporary.glob("pymp-*") if any(p.glob("listener-*"))}
    os.kill(kernel.pid, signal.SIGKILL)
    assert gone(family)
    assert len({p for p in folders if p.exists()}) == len(folders) - 1  # its own has gone


@pytest.mark.slow
def test_four_kernels_launch_at_once(kernels: Callable[[], Kernel]) -> None:
    four = [kernels() for _ in range(4)]
    messages = [
        kernel.start(f"""
            import torch, torch.distributed as dist
            def work(rank):
                dist.init_process_group("gloo")
                x = torch.tensor([{number}.0])
                dist.all_reduce(x)
                dist.destroy_process_group()
                return x.item()
            for _ in range(10):
                assert launch(work, nprocs=3).values == [{3 * number}.0] * 3
            print("done")
        """)
        for number, kernel in enumerate(four)
    ]
    for kernel, message in zip(four, messages, strict=True):
        cell = kernel.finish(message)
        assert cell.stdout == "done\n", cell.error


@pytest.mark.slow
def test_a_killed_forkserver_is_started_again(kernel: Kernel) -> None:
    kernel.run("launch(lambda rank: rank)")
    server = next(p for p in kernel.children() if "forkserver" in " ".join(p.cmdline()))
    server.kill()
    assert gone([server])
    cell = kernel.run("print(launch(lambda rank: rank).values)")
    assert cell.stdout == "[0, 1]\n", cell.error


@pytest.mark.slow
def test_forkserver_killed_during_a_run(kernel: Kernel) -> None:
    message = kernel.start("import time\nlaunch(lambda rank: time.sleep(60))")
    workers = wait_for_workers(kernel.process, 2)
    time.sleep(0.3)
    server = next(p for p in kernel.children() if "forkserver" in " ".join(p.cmdline()))
    server.kill()
    cell = kernel.finish(message, timeout=20)
    assert cell.error_name == "WorkerDied"
    assert "process that starts the ranks" in cell.error
    assert gone(workers)


def test_import_warms_the_forkserver() -> None:
    with Kernel(first_cell="import ddp_lessons") as kernel:
        assert any("forkserver" in " ".join(p.cmdline()) for p in kernel.children())
        cell = kernel.run("import sys; print('torch' in sys.modules)")
        assert cell.stdout == "False\n"


@pytest.mark.slow
def test_live_panel_of_a_longer_run(kernel: Kernel) -> None:
    code = """
        import time
        def work(rank):
            for i in range(8):
                print("step <", i)
                time.sleep(0.25)
        launch(work, nprocs=2);
    """
    cell = kernel.run(code)
    panel, log, _ = cell.displays
    assert "<table>" in panel["text/html"]
    assert log["text/plain"].startswith("Tab(")
    assert "step &lt; " in "".join(update["text/html"] for update in cell.updates)
    assert cell.updates[-1]["text/html"] == ""
    assert "no rank has made" not in "".join(update["text/html"] for update in cell.updates)
    waits = kernel.run("launch(lambda rank: time.sleep(7), timeout=30);")
    shown = "".join(update["text/html"] for update in waits.updates)
    assert "no rank has made progress for 6 s; after 30 s the run is given up" in shown
    quiet = kernel.run("import os; os.environ['DDP_LESSONS_LIVE'] = '0'\n" + "launch(work);")
    assert quiet.displays == []


@pytest.mark.slow
def test_a_run_whose_cell_gives_up_its_output(kernel: Kernel) -> None:
    """`redirect_stdout(None)` discards what is printed; IPython displays nothing below it."""
    code = """
        import time
        from contextlib import redirect_stdout
        from IPython.display import Markdown, display
        def work(rank):
            for i in range(8):
                print("step <", i)
                time.sleep(0.25)
            display(Markdown("done"))
            return rank
        with redirect_stdout(None):
            run = launch(work, nprocs=2)
        print(run.values, len(run.ranks[1].displays))
    """
    cell = kernel.run(code)
    assert cell.stdout == "[0, 1] 1\n"
    assert cell.displays == []
    late = kernel.run("""
        running = launch(work, nprocs=2, wait=False)
        time.sleep(0.8)  # its panel is there by now
        with redirect_stdout(None):
            run = running.wait()
        print(run.values)
    """)
    assert late.stdout.endswith("[0, 1]\n")
