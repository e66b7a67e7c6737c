"""`__main__` in ranks, and processes that ranks start: in a script and in a notebook."""

from __future__ import annotations

import ast
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.kernels import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

HEAD = """
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

from ddp_lessons import launch

torch.set_default_dtype(torch.float64)
STATE = None

class Point:
    def __init__(self, x):
        self.x = x

class Squares(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor(float(i * i)), type(self).__module__

def prepare(value):
    global STATE
    STATE = value

def scaled(x):
    return Point(STATE * x)

def report(i, queue):
    queue.put((i, "RANK" in os.environ, Point.__name__))

def with_loader(method):
    loader = DataLoader(Squares(), batch_size=2, num_workers=1, multiprocessing_context=method)
    return [(batch.tolist(), str(batch.dtype)) for batch, _ in loader]

def with_pool(method):
    context = multiprocessing.get_context(method)
    with context.Pool(1, prepare, (10,)) as pool:
        point, = pool.map(scaled, [4])
    return point.x, isinstance(point, Point)

def with_executor(method):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context, prepare, (10,)) as pool:
        point = pool.submit(scaled, 5).result()
    return point.x, isinstance(point, Point)

def with_spawn(method):
    queue = multiprocessing.get_context(method).SimpleQueue()
    torch.multiprocessing.start_processes(report, (queue,), nprocs=1, start_method=method)
    return queue.get()

KINDS = [with_loader, with_pool, with_executor, with_spawn]

def work(rank, method):
    return {kind.__name__: kind(method) for kind in KINDS}
"""
EXPECTED = {
    "with_loader": [([0.0, 1.0], "torch.float64"), ([4.0, 9.0], "torch.float64")],
    "with_pool": (40, True),
    "with_executor": (50, True),
    "with_spawn": (0, True, "Point"),
}
METHODS = ["spawn", "forkserver"]
LAUNCHES = f"[launch(work, (method,), nprocs=1).values[0] for method in {METHODS}]"


def in_script(tmp_path: Path, head: str, last: str, guard: str = "") -> str:
    """What a script prints that ends with `print(last)`."""
    script = tmp_path / "script.py"
    script.write_text(f"{head}\n{guard or 'if True:'}\n    print({last})\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_notebook(kernels: Callable[[], Kernel], head: str, last: str) -> str:
    """What a cell prints that ends with `print(last)`, after one with the definitions."""
    kernel = kernels()
    for code in (head, f"print({last})"):
        cell = kernel.run(code)
        assert not cell.error, cell.error
    return cell.stdout


@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":'])
def test_processes_that_a_rank_of_a_script_starts(guard: str, tmp_path: Path) -> None:
    printed = in_script(tmp_path, HEAD, LAUNCHES, guard)
    assert ast.literal_eval(printed) == [EXPECTED] * len(METHODS)


def test_processes_that_a_rank_of_a_notebook_starts(kernels: Callable[[], Kernel]) -> None:
    printed = in_notebook(kernels, HEAD, LAUNCHES)
    assert ast.literal_eval(printed) == [EXPECTED] * len(METHODS)


START_METHODS = """
import multiprocessing
from ddp_lessons import launch

def method(rank):
    return multiprocessing.get_start_method()

before = launch(method, nprocs=1).values
multiprocessing.set_start_method("spawn", force=True)
"""


def test_processes_start_by_the_method_that_the_script_has_set(tmp_path: Path) -> None:
    printed = in_script(tmp_path, START_METHODS, "before + launch(method, nprocs=1).values")
    assert ast.literal_eval(printed) == [multiprocessing.get_all_start_methods()[0], "spawn"]


LOADS = (
    HEAD
    + """
class Net(torch.nn.Linear):
    pass

def double(x):
    return 2 * x

big = torch.zeros(1_000_000)

def brings_data():
    return big

unsendable = (i for i in "x")

def cannot_travel():
    return unsendable

saved = {"net": pickle.dumps(Net(1, 1)), "double": pickle.dumps(double)}

def load(rank, saved):
    net, again = pickle.loads(saved["net"]), pickle.loads(saved["net"])
    main = sys.modules["__main__"]
    names = ["double", "brings_data", "cannot_travel", "nothing"]
    return type(net) is type(again), pickle.loads(saved["double"])(4), [
        hasattr(main, name) for name in names
    ]
"""
)
LOADED = "launch(load, (saved,), nprocs=1).values[0]"


def test_what_a_rank_of_a_script_loads_by_name(tmp_path: Path) -> None:
    printed = in_script(tmp_path, LOADS, LOADED)
    assert ast.literal_eval(printed) == (True, 8, [True, False, False, False])


def test_what_a_rank_of_a_notebook_loads_by_name(kernels: Callable[[], Kernel]) -> None:
    printed = in_notebook(kernels, LOADS, LOADED)
    assert ast.literal_eval(printed) == (True, 8, [True, False, False, False])


def test_a_class_that_no_rank_knows_is_explained(tmp_path: Path) -> None:
    head = """
import pickle
from ddp_lessons import launch
class Net:
    pass
data = pickle.dumps(Net())
del Net
def load(rank):
    pickle.loads(data)
"""
    printed = in_script(tmp_path, head, "launch(load, check=False).explain()")
    assert "a module of its own" in printed


RECORDS = """
import os
from ddp_lessons import launch
os.environ["DDP_LESSONS_RECORD"] = "record"

class Point:
    pass

def child(i):
    assert Point()

def work(rank):
    import torch.multiprocessing as mp
    mp.start_processes(child, nprocs=1, start_method="spawn")
"""


def test_processes_of_a_rank_record_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_script(tmp_path, RECORDS, "launch(work, nprocs=1).values")
    assert not (tmp_path / "record").exists()
