"""Code keeps its file names on the way to a rank and back, whatever cloudpickle does."""

from __future__ import annotations

import inspect
import json.decoder
import pickle
import re
import subprocess
import sys
import types
import xml.dom.minidom
import xml.etree.ElementTree
import xml.sax.handler
from collections.abc import Callable, Iterator
from typing import Any
from xml import dom

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.nn
import torch.distributed.tensor.parallel
from cloudpickle import cloudpickle as parts

from ddp_lessons.wire import pickling
from tests.support.kernels import Cell, Kernel

pytestmark = pytest.mark.system

# Makes a kernel's cloudpickle do what 3.1.3 does, whichever version is installed.
TAKE_NAMES_AWAY = """
import types
from ddp_lessons.wire import pickling
_reduce_code = pickling._reduce_code

def without_names(code):
    make, args, *rest = _reduce_code(code)
    assert make is types.CodeType
    return make, tuple("<dynamic-code>" if a is code.co_filename else a for a in args), *rest

pickling._reduce_code = without_names
assert "<dynamic-code>" in without_names((lambda: 0).__code__)[1]
"""
# Makes names get lost outside our own pickler.
LOSE_NAMES = """
from ddp_lessons.wire import unfiled
unfiled.place_of = lambda code: ("<lost>", code.co_firstlineno)
"""
FAILURES = {
    "function": """
def work(rank):
    return 1 / rank  # here
""",
    "lambda": """
work = lambda rank: (
    1 / rank  # here
)
""",
    "closure": """
def make(one):
    def work(rank):
        return one / rank  # here
    return work

work = make(1)
""",
    "nested": """
def work(rank):
    def inner():
        return (lambda: 1 / rank)()  # here
    return inner()
""",
    "helper": """
def divide(rank):
    return 1 / rank  # here

def work(rank):
    return divide(rank)
""",
    "method": """
class Trainer:
    one = 1

    def work(self, rank):
        return self.one / rank  # here

work = Trainer().work
""",
    "callable": """
class Trainer:
    def __call__(self, rank):
        return 1 / rank  # here

work = Trainer()
""",
    "class": """
class Model:
    def __init__(self, rank):
        self.weight = 1 / rank  # here

def work(rank):
    Model(rank)
""",
    "static method": """
class Trainer:
    @staticmethod
    def work(rank):
        return 1 / rank  # here

work = Trainer.work
""",
    "property": """
class Model:
    rank = 0

    @property
    def weight(self):
        return 1 / self.rank  # here

def work(rank):
    return Model().weight
""",
    "decorated": """
import functools

def logged(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper

@logged
@logged
def work(rank):
    return 1 / rank  # here
""",
    "partial": """
import functools

def divide(one, rank):
    return one / rank  # here

work = functools.partial(divide, 1)
""",
    "comprehension": """
def work(rank):
    return [
        1 / r  # here
        for r in range(rank, 3)
    ]
""",
    "generator": """
def numbers(rank):
    yield 1
    yield 1 / rank  # here

def work(rank):
    return list(numbers(rank))
""",
    "coroutine": """
import asyncio

async def divide(rank):
    await asyncio.sleep(0)
    return 1 / rank  # here

def work(rank):
    return asyncio.run(divide(rank))
""",
}
HANG = """
import torch, torch.distributed as dist
def work(rank):
    dist.init_process_group("gloo")
    if rank == 1:
        dist.broadcast(torch.ones(1), src=0)  # there
    dist.barrier()  # here
launch(work, timeout=30)
"""


@pytest.fixture(scope="module", params=["as installed", "without names"])
def session(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with Kernel() as kernel:
        assert not kernel.run("import torch.distributed; launch(lambda rank: rank)").error
        if request.param == "without names":
            assert not kernel.run(TAKE_NAMES_AWAY).error
        yield kernel


def marked(cell: Cell) -> list[str]:
    return [line for line in cell.error.splitlines() if line.startswith("---->")]


@pytest.mark.xdist_group("pickling")
@pytest.mark.parametrize("kind", FAILURES)
def test_the_line_of_a_failure(session: Kernel, kind: str) -> None:
    cell = session.run(f"{FAILURES[kind]}\nlaunch(work, nprocs=1)")
    assert "ZeroDivisionError" in cell.error
    assert marked(cell)[-1].endswith("# here"), cell.error
    assert re.search(r"Cell In\[\d+\], line \d+, in ", cell.error)


@pytest.mark.slow
@pytest.mark.xdist_group("pickling")
@pytest.mark.alone
def test_the_lines_of_a_hang(session: Kernel) -> None:
    cell = session.run(HANG)
    assert cell.error_name == "WorkersHung"
    assert cell.seconds < 15  # it was proved: the timeout is longer
    assert "dist.barrier()  # here" in cell.error
    assert "dist.broadcast(torch.ones(1), src=0)  # there" in cell.error


@pytest.mark.xdist_group("pickling")
def test_the_lines_of_functions_that_come_back(session: Kernel) -> None:
    cell = session.run(
        """
        def work(rank):
            def made():
                return 1 / 0  # here
            return made
        launch(work, nprocs=1).values[0]()
        """
    )
    assert "return 1 / 0  # here" in cell.error
    assert re.search(r"Cell In\[\d+\]", cell.error)


@pytest.mark.xdist_group("pickling")
def test_the_lines_of_an_exception_that_comes_back(session: Kernel) -> None:
    cell = session.run(
        """
        def work(rank):
            class Mine(Exception):
                def tell(self):
                    return 1 / 0  # here
            raise Mine("no")
        launch(work, nprocs=1, check=False).ranks[0].exception.tell()
        """
    )
    assert "return 1 / 0  # here" in cell.error


@pytest.mark.slow
@pytest.mark.alone
def test_names_that_are_lost_leave_function_and_line(kernel: Kernel) -> None:
    assert not kernel.run(LOSE_NAMES).error
    cell = kernel.run(HANG)
    assert cell.error_name == "WorkersHung"
    assert cell.seconds < 20  # including the start of the ranks; the timeout is 30 s
    assert "rank 0 waits in barrier: <lost>, line 6, in work" in cell.error
    cell = kernel.run(f"{FAILURES['function']}\nlaunch(work, nprocs=1)")
    assert "<lost>, line 2, in work" in cell.error
    assert "ZeroDivisionError" in cell.error


def test_a_cloudpickle_with_another_way_of_its_own_is_left_alone() -> None:
    code = (
        "import types, cloudpickle\n"
        "del cloudpickle.Pickler.dispatch_table.maps[0][types.CodeType]\n"
        "from ddp_lessons.wire import pickling\n"
        "print(pickling.dumps([1, 'two']) == cloudpickle.dumps([1, 'two']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def codes(code: types.CodeType) -> list[types.CodeType]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *(deeper for c in inner for deeper in codes(c))]


def outer(x: int) -> Callable[[], Any]:
    def middle() -> Any:
        return [(lambda: y + x)() for y in range(3)]

    return middle


def test_nothing_else_of_the_code_changes() -> None:
    function = outer(1)
    copy = pickle.loads(pickling.dumps(_by_value(function)))
    assert copy() == function() == [1, 2, 3]
    for one, other in zip(codes(function.__code__), codes(copy.__code__), strict=True):
        assert one == other
        assert one.co_filename == other.co_filename == __file__
        assert list(one.co_positions()) == list(other.co_positions())


def _by_value(function: Any) -> Any:
    """The same function, under a name that its module lacks, so that it is pickled by value."""
    made = types.FunctionType(
        function.__code__, {}, function.__name__, function.__defaults__, function.__closure__
    )
    made.__module__ = "__main__"
    return made


def test_a_module_of_a_class_of_its_own_is_imported() -> None:
    import torch

    for module in (torch.backends.cudnn, torch.backends.mkldnn, torch.ops):
        assert type(module) is not types.ModuleType
        assert pickle.loads(pickling.dumps(module)) is module


def uses_packages() -> list[Any]:
    return [
        lambda: xml.dom.minidom.parseString(""),
        lambda: xml.etree.ElementTree.parse,
        lambda: xml.etree,
        lambda: torch.nn.functional.relu,
        lambda: torch.nn.parallel.DistributedDataParallel,
        lambda: torch.distributed.nn.functional.all_reduce,
        lambda: dist.fsdp.fully_shard,
        lambda: (dom.minidom, xml.sax.handler, torch.utils.data),
        lambda: dist.tensor.parallel.parallelize_module,
        lambda: json.decoder,
    ]


def test_the_modules_that_a_function_reaches_are_those_that_cloudpickle_finds() -> None:
    for function in uses_packages():
        used = inspect.getclosurevars(function).globals.values()
        code = function.__code__
        theirs = parts._find_imported_submodules(code, used)
        assert set(pickling.submodules(code, used)) == set(theirs)
    assert len(theirs) == 1  # of the last


def test_a_function_brings_the_modules_that_it_reaches() -> None:
    assert b"xml.dom.minidom" in pickling.dumps(uses_packages()[0])
    ours, theirs = (kind._dynamic_function_reduce for kind in (pickling.Pickler, parts.Pickler))
    assert ours is not theirs  # cloudpickle still has the parts that pickling.py takes from it
