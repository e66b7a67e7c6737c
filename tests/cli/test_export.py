"""Scripts made from functions of notebooks: what is in them, what is refused, and that they run."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import pytest

from ddp_lessons import launch
from ddp_lessons.cli.export import CannotExport, script
from ddp_lessons.cli.export.notebook import Notebook
from tests.cli.test_command import _command
from tests.support.checkout import ROOT
from tests.support.torchrun import QUIET

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LAUNCH = "from ddp_lessons import launch"

Export = Callable[..., str]
Tidy = Callable[..., None]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Writes a notebook of the given cells and exports the function `f` of it, or another."""

    def made(*sources: str, function: str = "f", args: str | None = None) -> str:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        path = tmp_path / "nb.ipynb"
        nbformat.write(notebook, path)
        return script(path, function, args)

    return made


@pytest.fixture
def tidy(tmp_path: Path) -> Tidy:
    """Asserts that ruff finds scripts clean, with the settings for the notebooks' own code.

    Imports stand in the notebook's order, whatever that is.
    """
    settings = ["--config", str(ROOT / "pyproject.toml"), "--config", f'src = ["{ROOT}"]']
    (folder := tmp_path / "notebooks").mkdir()

    def check(*scripts: str) -> None:
        for number, text in enumerate(scripts):
            (folder / f"script_{number}.py").write_text(text)
        for command in (["check", "--quiet", "--ignore", "I"], ["format", "--diff"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", *settings, "notebooks"]
            done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    return check


def _body(text: str) -> str:
    """What stands between the imports, of which there is only that of os, and the call."""
    return text.partition("import os\n")[2].partition("\n\n\nif __name__")[0].strip()


@pytest.mark.system
def test_a_script_is_what_a_person_would_write(export: Export, tidy: Tidy) -> None:
    text = export(
        "import os, torch, sys\nimport torch.distributed as dist\n"
        "from ddp_lessons import launch, span",
        "# how often\nTIMES = 3  # at least\n\n\n# Says a word.\ndef f(rank, word):\n"
        "    with span(word):\n        return dist, TIMES",
        'launch(f, args=("hi",), nprocs=3)',
    )
    assert text == (
        '"""The function f of nb.ipynb, as a script.\n\nRun it on one machine:\n\n'
        '    torchrun --nproc-per-node 3 f.py\n"""\n\n'
        "import os\nimport torch.distributed as dist\nfrom ddp_lessons import span\n\n"
        "# how often\nTIMES = 3  # at least\n\n\n# Says a word.\ndef f(rank, word):\n"
        "    with span(word):\n        return dist, TIMES\n\n\n"
        'if __name__ == "__main__":\n    rank = int(os.environ["RANK"])\n'
        '    value = f(rank, "hi")\n'
        "    # In one piece: torchrun's ranks write unbuffered, all to the same place.\n"
        '    print(f"rank {rank} returned {value}\\n", end="")\n'
    )
    tidy(text)


@pytest.mark.system
def test_a_function_without_a_value_is_just_called(export: Export, tidy: Tidy) -> None:
    text = export(
        "def f(rank):\n    def inner():\n        return 1\n\n    print(inner())\n    return"
    )
    assert text.endswith('if __name__ == "__main__":\n    f(int(os.environ["RANK"]))\n')
    tidy(text)


def test_imports_are_in_the_notebooks_order_and_only_the_needed_ones(export: Export) -> None:
    text = export(
        "from torch import nn\nimport torch, os.path as p, torch.utils.data, numpy as np\n"
        "from typing import List as L, Any, TYPE_CHECKING, cast\n"
        "from ddp_lessons.data import digits\nfrom torch import cuda\nimport json",
        "def f(rank: Any) -> 'nothing':\n"
        "    return torch, p, np, L, TYPE_CHECKING, cast, digits, cuda, nn",
    )
    assert (
        "import os\nfrom torch import nn, cuda\nimport torch\nimport os.path as p\n"
        "import torch.utils.data\nimport numpy as np\n"
        "from typing import List as L, Any, TYPE_CHECKING, cast\n"
        "from ddp_lessons.data import digits\n\n\ndef f"
    ) in text


def test_a_submodule_is_imported_with_its_package(export: Export) -> None:
    imports = "import torch\nimport torch.utils.data"
    text = export(imports, imports, "def f(rank):\n    return torch.utils.data.Dataset")
    assert f"{imports}\n\n\ndef" in text


def test_imports_from_the_future_come_first(export: Export) -> None:
    text = export("x = 1", "from __future__ import annotations", "def f(rank):\n    return x")
    assert "from __future__ import annotations\nimport os\n\nx = 1\n" in text
    compile(text, "script", "exec")


def test_the_notebooks_own_import_of_os_is_enough(export: Export) -> None:
    text = export("import os", "def f(rank):\n    return os.getpid()")
    assert text.count("import os") == 1


@pytest.mark.parametrize(
    ("sources", "kept"),
    [
        pytest.param(
            ["a, (b, *c) = 1, (2, 3)\nd: int = 4", "def f(rank, *, k=d):\n    return a, b, c"],
            "a, (b, *c) = 1, (2, 3)\nd: int = 4\n\n\ndef f(rank, *, k=d):\n    return a, b, c",
            id="tuples-and-annotated",
        ),
        pytest.param(
            ["a = 1", "b = a", "a = 2", "a = 3", "def f(rank):\n    return a, b"],
            "a = 1\n\nb = a\n\na = 3\n\n\ndef f(rank):\n    return a, b",
            id="each-name-as-of-its-use",
        ),
        pytest.param(
            ["d = {}\nd['a'] = 1\nd.update(b=2)\nn = 1\nn += 1", "def f(rank):\n    return d, n"],
            "d = {}\nd['a'] = 1\nd.update(b=2)\nn = 1\nn += 1\n\n\ndef f(rank):\n    return d, n",
            id="changes-count",
        ),
        pytest.param(
            ["if 1 > 0:\n    a = 1\nelse:\n    a = 2", "def f(rank):\n    return a"],
            "if 1 > 0:\n    a = 1\nelse:\n    a = 2\n\n\ndef f(rank):\n    return a",
            id="an-if-is-whole",
        ),
        pytest.param(
            ["a = 0", "a = 1", "if a > 5:\n    a = 2", "def f(rank):\n    return a"],
            "a = 1\n\nif a > 5:\n    a = 2\n\n\ndef f(rank):\n    return a",
            id="an-if-may-leave-what-was",
        ),
        pytest.param(
            [
                "try:\n    import apex\nexcept ImportError:\n    apex = None",
                "def f(rank):\n    return apex",
            ],
            "try:\n    import apex\nexcept ImportError:\n    apex = None\n\n\n"
            "def f(rank):\n    return apex",
            id="a-try-is-whole",
        ),
        pytest.param(
            [
                "n, m = 2, 3",
                "class A:\n    k = n\n\n    def of(self):\n        return late(m)",
                "a = A()",
                "def late(x):\n    return x",
                "n = 9",
                "def f(rank):\n    return a.of()",
            ],
            "n, m = 2, 3\n\n\n"
            "class A:\n    k = n\n\n    def of(self):\n        return late(m)\n\n\n"
            "a = A()\n\n\ndef late(x):\n    return x\n\n\ndef f(rank):\n    return a.of()",
            id="methods-are-called-later",
        ),
        pytest.param(
            [
                "x, y = 1, 2",
                "def f(rank):\n    x = 3\n\n    def g():\n        return x + sum(y for y"
                " in range(x))\n\n    return g(), 'y'",
            ],
            "def f(rank):\n    x = 3\n\n"
            "    def g():\n        return x + sum(y for y in range(x))\n\n"
            "    return g(), 'y'",
            id="own-names-are-not-the-notebook's",
        ),
        pytest.param(
            ["k = 1", "class A:\n    k = k", "def f(rank):\n    return A.k"],
            "k = 1\n\n\nclass A:\n    k = k\n\n\ndef f(rank):\n    return A.k",
            id="an-attribute-of-the-same-name",
        ),
        pytest.param(
            ["class A:\n    k = 1", "a = A()\nsetattr(a, 'k', 2)", "def f(rank):\n    return a.k"],
            "class A:\n    k = 1\n\n\na = A()\nsetattr(a, 'k', 2)\n\n\n"
            "def f(rank):\n    return a.k",
            id="changed-by-setattr",
        ),
        pytest.param(
            ["with open('a') as file:\n    a = file.read()", "def f(rank):\n    return a"],
            "with open('a') as file:\n    a = file.read()\n\n\ndef f(rank):\n    return a",
            id="a-with-is-whole",
        ),
        pytest.param(
            [
                "def fill(x):\n    x['a'] = 1",
                "a, b, k = {}, [k for k in (1, 2)], 3",
                "fill(a)\nprint(b)\nawait b",
                "def f(rank):\n    return a",
            ],
            "def fill(x):\n    x['a'] = 1\n\n\na, b, k = {}, [k for k in (1, 2)], 3\n\n"
            "fill(a)\n\n\ndef f(rank):\n    return a",
            id="changed-by-a-function",
        ),
        pytest.param(
            ["def f(rank):\n    return '''\n# text  \n\n x  \n'''"],
            "def f(rank):\n    return '''\n# text  \n\n x  \n'''",
            id="text-to-the-last-blank",
        ),
        pytest.param(
            [
                "counter = 0",
                "def f(rank):\n    global counter\n    counter += 1\n    return counter",
            ],
            "counter = 0\n\n\n"
            "def f(rank):\n    global counter\n    counter += 1\n    return counter",
            id="global-in-the-function",
        ),
        pytest.param(
            [
                "%matplotlib inline\n!true\na = 1; b = 2",
                "%%time\ndef f(rank):\n    return b",
                "%%bash\nf",
            ],
            "b = 2\n\n\ndef f(rank):\n    return b",
            id="magics-are-left-out",
        ),
        pytest.param(
            [
                "from time import sleep as time\nt = time",
                "import time",
                "def f(rank):\n    return t, time.time",
            ],
            "from time import sleep as time\nt = time\n\nimport time\n\n\n"
            "def f(rank):\n    return t, time.time",
            id="two-meanings-of-an-imported-name",
        ),
        pytest.param(
            ["def f(rank):\n    return 1\n    # at its end\n\n# of nothing", "what is this"],
            "def f(rank):\n    return 1\n    # at its end",
            id="comments-of-its-own-and-a-cell-that-does-not-parse",
        ),
    ],
)
def test_what_is_kept(export: Export, sources: list[str], kept: str) -> None:
    assert _body(export(*sources)) == kept


@pytest.mark.system
@pytest.mark.parametrize(
    ("call", "written", "command"),
    [
        ("launch(f, (1, n), 4)", "f(rank, 1, n)", "--nproc-per-node 4 f.py"),
        ("launch(f, args=[x := 1, 2])", "f(rank, 1, 2)", "--nproc-per-node 2 f.py"),
        ("run = launch(f, (1, 2), nprocs=n).values", "f(rank, 1, 2)", "--nproc-per-node 5 f.py"),
        ("for _ in (1, 2):\n    launch(fn=f, args=(n, 2))", "f(rank, n, 2)", "node 2 f.py"),
        ("launch(f, args=pair)", "f(rank, *pair)", "node 2 f.py"),
        ("n = 6\nlaunch(f, args=(n, n))\nlaunch(f, args=(8, 9))", "f(rank, n, n)", "node 2 f.py"),
        ("launch(f, (1, 2), nnodes=2)", "f(rank, 1, 2)", "HOST:29400 f.py"),
        ("import os\nos.environ['A'] = '1'\nlaunch(f, (1, 2))", "f(rank, 1, 2)", "# A=1 torchrun"),
        ("launch(f, (1, 2), env={'A': 'b c'})", "f(rank, 1, 2)", "\n    # A='b c' torchrun ..."),
    ],
)
def test_the_call_is_that_of_the_launch(
    export: Export, tidy: Tidy, call: str, written: str, command: str
) -> None:
    text = export(LAUNCH, "n = 5\npair = 1, 2", "def f(rank, a, b):\n    return a + b", call)
    assert f"    value = {written}\n" in text
    assert command in text
    tidy(text.replace("'", '"'))


def test_the_state_is_that_of_the_launch(export: Export) -> None:
    cells = [LAUNCH, "n = 1", "def f(rank):\n    return n", "n = 2", "launch(f)", "n = 3"]
    assert "n = 2" in export(*cells)
    assert "n = 3" not in export(*cells)
    assert "n = 1" in export(*cells[:-2])
    redefined = "def f(rank):\n    return -n"
    assert "n = 3" in export(*cells, redefined, "n = 4")
    assert "return -n" in export(*cells, redefined)


@pytest.mark.system
def test_arguments_can_be_given(export: Export, tidy: Tidy) -> None:
    cells = [LAUNCH, "n = 5", "def f(rank, a, b=1):\n    return a", "launch(f, args=(1, 2))"]
    text = export(*cells, args="'x', b=[n, 2],")
    assert "f(rank, 'x', b=[n, 2])" in text
    assert "n = 5" in text
    tidy(text.replace("'", '"'))
    long = export(*cells, args=f"'{'x' * 50}', b={'y' * 10 + ' + ' + 'z' * 30!r}")
    assert "value = f(\n        rank,\n        'xxx" in long
    tidy(long.replace("'", '"'))


@pytest.mark.system
def test_long_arguments_are_on_lines_of_their_own(export: Export, tidy: Tidy) -> None:
    items = [f'"{letter * 40}"' for letter in "abc"]
    call = "launch(\n    f,\n    args=(\n"
    call += "        {\n            1: 2,\n        },\n        3,\n    ),\n)"
    define = "def f(rank, *args):\n    return args"
    text = export(LAUNCH, define, call)
    assert "value = f(rank, {1: 2}, 3)\n" in text
    tidy(text)
    tidy(export(LAUNCH, define, f"launch(f, args=({', '.join(items)}))"))


def test_names_of_the_script_give_way_to_those_of_the_notebook(export: Export) -> None:
    text = export("rank = 3\nvalue = 4", "def f(rank, a):\n    return value", args="rank")
    assert "    value_ = f(rank_, rank)\n" in text


@pytest.mark.system
def test_the_functions_own_words_come_first(export: Export, tidy: Tidy) -> None:
    text = export('def f(rank):\n    """Add up.\n\n    All of it.\n    """\n    return 1')
    assert text.startswith('"""Add up.\n\nThe function f of nb.ipynb, as a script.\n')
    tidy(text)


REFUSED = [
    # the function itself
    (["def training(rank): pass", "def g(): pass"], ["no function 'f'", "training, g"]),
    (["def ff(rank): pass"], ["no function 'f'", "Did you mean 'ff'"]),
    (["x = = 1\ndef f(rank): pass"], ["may be in code cell 1, which does not parse", "none"]),
    (
        ["async def f(rank): pass"],
        ["not defined by a plain `def`", "async def f", "cell 1, line 1"],
    ),
    (["f = lambda rank: 1"], ["not defined by a plain `def`", "f = lambda", "cell 1, line 1"]),
    (["class f: pass"], ["not defined by a plain `def`", "class f:"]),
    (["class A:\n    def f(self): pass"], ["no function 'f' at the top level of a cell"]),
    (["from os import getcwd as f"], ["'f' is not defined", "from os import getcwd as f"]),
    (["f = max"], ["'f' is not defined by a plain `def`"]),
    ([LAUNCH, "def f(rank, n=1): pass", "launch(f, *[(2,)])"], ["launch(f, *[(2,)])", "--args"]),
    ([LAUNCH, "o = {}", "def f(rank): pass", "launch(f, **o)"], ["launch(f, **o)", "--args"]),
    (["def f(rank): yield 1"], ["generator"]),
    (["def f(rank):\n    # one line\n    ..."], ["no body yet"]),
    (["def f(): pass"], ["the first one must be the rank"]),
    # its arguments
    (["def f(rank, n): pass"], ["called as f(rank)", "no cell launches it", "'n'", "--args"]),
    (
        [LAUNCH, "def f(rank, n): pass", "launch(f, args=(1, 2))"],
        ["called as f(rank, 1, 2)", "cell 3"],
    ),
    (
        [LAUNCH, "def f(rank, n): pass", "for n in (1, 2):\n    launch(f, args=(n,))"],
        ["'n'", "around launch", "code cell 3, line 1", "--args"],
    ),
    (
        [LAUNCH, "def f(rank, n): pass", "[launch(f, args=(n,)) for n in (1, 2)]"],
        ["'n'", "comprehension", "--args"],
    ),
    (
        [
            LAUNCH,
            "def f(rank, n): pass",
            "for m in (1, 2):\n    a, b = (launch(f, args=(n,)) for n in (m, 2))",
        ],
        ["'n'", "comprehension", "--args"],
    ),
    (
        [
            LAUNCH,
            "import tempfile\ndef f(rank, path): pass",
            "launch(f, args=(tempfile.mkdtemp(),))",
        ],
        ["tempfile.mkdtemp", "each rank would make another", "--args"],
    ),
    # what it needs
    (
        ["def f(rank):\n    pass\n    return what"],
        ["'what'", "code cell 1, line 3", "not defined any"],
    ),
    (
        ["def g():\n    return what", "def f(rank): g()"],
        ["'g' needs 'what'", "code cell 1, line 2"],
    ),
    (["def f(rank): return late", "late = 1"], ["not defined until code cell 2, line 1"]),
    (["x = 1", "del x", "def f(rank): return x"], ["any more", "code cell 2, line 1 deletes it"]),
    (["x: int", "def f(rank): return x"], ["'x'", "not defined"]),
    (["x = = 1", "def f(rank): return x"], ["may be in code cell 1, which does not"]),
    (["for i in range(3):\n    pass", "def f(rank): return i"], ["'i'", "bound in a loop"]),
    (
        ["x = []\nfor i in range(3):\n    x.append(i)", "def f(rank): return x"],
        ["'x'", "changed in a loop", "code cell 1, line 2"],
    ),
    (
        [LAUNCH, "W = 1\ndef f(rank): return W", "for W in (1, 2):\n    launch(f)"],
        ["'W'", "around launch", "Bind it in a cell"],
    ),
    (["files = !ls", "def f(rank): return files"], ["'files'", "magic", "code cell 1"]),
    (["def f(rank):\n    !ls"], ["get_ipython", "only a notebook"]),
    (["def f(rank):\n    display(rank)"], ["'display'", "line 2", "only a notebook"]),
    (["from IPython.display import HTML", "def f(rank): HTML('')"], ["'HTML'", "IPython"]),
    (
        ["import ipywidgets as w\ns = w.IntSlider()", "def f(rank): return s.value"],
        ["'w'", "ipywidgets"],
    ),
    (["from math import *", "def f(rank): return sqrt(2)"], ["'sqrt'", "from math import *"]),
    (
        [LAUNCH, "run = launch(print)", "x = run.values", "def f(rank): return x"],
        ["'x' needs 'run'", "code cell 3", "calls launch()", "no notebook run"],
    ),
    (
        ["import ddp_lessons as d\nrun = d.launch(print)", "def f(rank): return run"],
        ["'f' needs 'run'", "calls launch()"],
    ),
    (
        [LAUNCH, "def g(rank): pass\ndef f(n): launch(g)"],
        ["'f'", "calls launch()", "Export the func"],
    ),
    (
        ["x = 1\ndef g():\n    global x\n    x = 2\ng()", "def f(rank): return x"],
        ["'x'", "g()", "`global`"],
    ),
    (["def g():\n    global x\n    x = 2\ng()", "def f(rank): return x"], ["'x'", "top level"]),
    (
        ["import torch\nx = torch.randn(3)", "def f(rank): return x"],
        ["'x'", "torch.randn", "seeds"],
    ),
    (
        [
            "from torch import nn\nclass A(nn.Module):\n    def __init__(self):\n"
            "        self.a = nn.Linear(1, 1)\nx = A()",
            "def f(rank): return x",
        ],
        ["torch.nn.Linear"],
    ),
]


@pytest.mark.parametrize(("sources", "facts"), REFUSED, ids=[facts[0] for _, facts in REFUSED])
def test_what_is_refused_and_why(export: Export, sources: list[str], facts: list[str]) -> None:
    with pytest.raises(CannotExport) as caught:
        export(*sources)
    for fact in facts:
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("1, 2, 3", "called as f(rank, 1, 2, 3)"),
        ("1) + (2", "no arguments"),
        ("what", "'what'"),
        ("1 +", "no arguments"),
        ("1, c=1", "unexpected"),
    ],
)
def test_wrong_arguments_are_refused(export: Export, args: str, said: str) -> None:
    with pytest.raises(CannotExport, match=re.escape(said)):
        export("def f(rank, a, b=1): pass", args=args)


def test_random_numbers_of_a_seed_are_the_same_on_all_ranks(export: Export) -> None:
    make = "def make():\n    torch.manual_seed(0)\n    return torch.randn(3)"
    assert "x = make()" in export("import torch", make, "x = make()\ndef f(rank): return x")


def _workers(notebook: Path) -> list[str]:
    """The functions of a lesson that a rank could run."""
    defined = (s.node for s in Notebook(notebook).statements)
    found = [node for node in defined if isinstance(node, ast.FunctionDef) and node.args.args]
    return list(dict.fromkeys(node.name for node in found if node.args.args[0].arg == "rank"))


@pytest.mark.system
@pytest.mark.parametrize("notebook", [pytest.param(path, id=path.stem) for path in LESSONS])
def test_each_function_of_the_lessons_is_exported_or_refused(notebook: Path, tidy: Tidy) -> None:
    exported: list[str] = []
    refused: list[str] = []
    for function in _workers(notebook):
        try:
            exported.append(script(notebook, function))
        except CannotExport as error:
            refused.append(str(error))
    for text in exported:
        compile(text, str(notebook), "exec")
    tidy(*exported)
    known = "--args", "works in a notebook only"
    assert exported or all(any(why in reason for why in known) for reason in refused)
    for reason in refused:
        assert re.search(r"--args|no body yet|generator|each rank would|in a notebook only", reason)


# Runs scripts one after the other, each in a new Python: in a fork of one that has torch, DDP's
# last reference to its group may be dropped while gloo's thread waits for the GIL, for good. None
# begins before all ranks have ended the one before, and with it the store at MASTER_PORT.
ONE_BY_ONE = """
import os, subprocess, sys, time

for script in sys.argv[1:]:
    subprocess.run([sys.executable, script], check=True)
    print("that was", os.path.basename(script))
    open(f"{script}.{os.environ['RANK']}", "x").close()
    while not all(os.path.exists(f"{script}.{n}") for n in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
"""


def _torchrun(folder: Path, scripts: Sequence[Path], nprocs: int) -> list[str]:
    """What each rank printed; into files, as lines of two ranks may run together."""
    (temporary := folder / "temporary").mkdir()  # torchrun leaves an empty folder
    (one_by_one := folder / "one_by_one.py").write_text(ONE_BY_ONE)
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    apart = ["--redirects=1", f"--log-dir={temporary}", "--nproc-per-node", str(nprocs)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *meet, *apart, one_by_one, *scripts],
        env={**os.environ, **QUIET, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [next(temporary.glob(f"*/*/{rank}/stdout.log")) for rank in range(nprocs)]
    return [file.read_text() for file in ranks]


@pytest.mark.slow
@pytest.mark.system
def test_scripts_do_under_torchrun_what_launch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    scripts: list[Path] = []
    expected: list[list[str]] = [[], []]
    lessons: list[tuple[str, str, tuple[int, ...]]] = [
        ("05_distributed_sampler", "compare", ()),
        ("07_ddp_timing", "train", (2,)),
        ("12_rank_zero", "log_step", ()),
    ]
    for lesson, function, args in lessons:
        scripts.append(path := tmp_path / f"{function}_of_{lesson}.py")
        path.write_text(script(ROOT / "notebooks" / f"{lesson}.ipynb", function))
        run = launch(getattr(importlib.import_module(path.stem), function), args, nprocs=2)
        for rank in run.ranks:
            returned = [f"rank {rank.rank} returned {rank.value}"] if rank.value else []
            expected[rank.rank] += [*rank.lines, *returned, f"that was {path.name}"]
    assert [printed.splitlines() for printed in _torchrun(tmp_path, scripts, 2)] == expected


@pytest.mark.system
def test_the_command_prints_the_script_or_says_why_not() -> None:
    lesson = str(ROOT / "notebooks" / "05_distributed_sampler.ipynb")
    done = _command("export", lesson, "see", "--args", "8, True")
    assert done.returncode == 0
    assert "value = see(rank, 8, True)" in done.stdout
    assert done.stderr == ""
    for arguments, said in (([lesson, "sea"], "'see'"), (["none.ipynb", "f"], "cannot be read")):
        done = _command("export", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("ddp-lessons export: ")
        assert said in done.stderr


def test_what_is_no_notebook_is_said(tmp_path: Path) -> None:
    (path := tmp_path / "nb.ipynb").write_text("def f(rank): pass")
    with pytest.raises(CannotExport, match="no notebook"):
        script(path, "f")
