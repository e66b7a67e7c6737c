"""What the definitions of a notebook cost a launch, and that a rank loads each by its name."""

from __future__ import annotations

import linecache
import sys
import types
from typing import Any

import pytest

from ddp_lessons.processes import packing
from ddp_lessons.worker.main_module import replace_main

DEFINED = """
import torch

class Base:
    def name(self):
        return type(self).__name__

class Child(Base):
    def make(self):
        return Child()

def first(n):
    return torch.ones(n).sum().item()

def second(n):
    return 10 * first(n)

other_name = second

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def countdown(n, base=Base()):
    return [base.name(), *([] if n == 0 else countdown(n - 1))]

def cannot_travel(lock=__import__("threading").Lock()):
    pass

def uses_it():
    return cannot_travel

big = torch.ones(1 << 20)

def heavy():
    return big.sum()
"""


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module in the place of `__main__`, for one test."""
    module = types.ModuleType("__main__")
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_rank_loads_each_definition_by_its_name(main: types.ModuleType) -> None:
    exec(DEFINED, vars(main))
    definitions = packing._definitions()
    for left_out in ("cannot_travel", "uses_it", "heavy"):
        assert definitions.pop(left_out, None) is None

    of = {name: replace_main(definitions, {}) for name in definitions}  # each loads one at first
    assert of["second"].second(4) == of["other_name"].other_name(4) == 40
    assert [of["even"].even(n) for n in (3, 4)] == [of["odd"].odd(n) for n in (4, 3)]
    assert of["countdown"].countdown(1) == ["Base", "Base"]
    for loaded in (of["Child"], of["Base"]):
        child = loaded.Child()
        assert isinstance(child, loaded.Base)
        assert type(child.make()) is loaded.Child
        assert child.name() == "Child"


def test_only_the_cells_that_the_function_comes_from_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {
        "/tmp/ipykernel_1/11.py": "def helper():\n    return lambda: '/tmp/ipykernel_1/13.py'\n",
        "/tmp/ipykernel_1/12.py": "def work(rank):\n    return helper()\n",
        "/tmp/ipykernel_1/13.py": "def other():\n    return 5\n",
    }
    cells = {name: (len(text), None, [text], name) for name, text in texts.items()}
    monkeypatch.setattr(linecache, "cache", cells)
    variables: dict[str, Any] = {}
    for name, text in texts.items():
        exec(compile(text, name, "exec"), variables)
    task = packing.pack(variables["work"], {}, profile=False, notes=False, post_mortem=False)
    texts.pop("/tmp/ipykernel_1/13.py")
    assert task.sources == texts


def chain(length: int) -> str:
    """Functions of which each calls the one before, as the cells of a lesson do."""
    first = "import torch\n\ndef f0(x):\n    return torch.nn.functional.relu(x)\n"
    return first + "".join(
        f"\ndef f{n}(x):\n    return f{n - 1}(torch.sigmoid(x))\n" for n in range(1, length)
    )


def test_each_definition_is_pickled_once(main: types.ModuleType) -> None:
    exec(chain(10), vars(main))
    few = sum(map(len, packing._definitions().values()))
    exec(chain(40), vars(main))
    many = sum(map(len, packing._definitions().values()))
    assert many < 5 * few
    assert replace_main(packing._definitions(), {}).f39 is not None
