"""What a script's top level or a notebook sets reaches ranks, as it does under mp.spawn."""

from __future__ import annotations

import ast
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from ddp_lessons import launch
from ddp_lessons.instrumentation import torch_api
from tests.support.kernels import Kernel

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOP_LEVEL = """
import logging
import logging.handlers
import os
import queue
import resource
import sys
import warnings

import numpy as np
import torch
import torch.multiprocessing as mp

class Own(UserWarning):
    pass

class Net(torch.nn.Linear):
    pass

class Shout(logging.Handler):
    def __init__(self, mark):
        super().__init__()
        self.mark = mark
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage().upper() + self.mark)

def refuse(kind, flag):
    raise OverflowError(kind)

torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.benchmark = True
torch.set_num_threads(5)
torch.set_printoptions(precision=2)
torch.set_grad_enabled(False)
torch.autograd.set_detect_anomaly(True)
torch.serialization.add_safe_globals([Net])
torch.multiprocessing.set_sharing_strategy("file_system")
np.set_printoptions(precision=3)
np.seterr(divide="raise", over="call")
np.seterrcall(refuse)
os.environ["MY_SETTING"] = "yes"
os.umask(0o27)
os.setpriority(os.PRIO_PROCESS, 0, 7)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
resource.setrlimit(resource.RLIMIT_NOFILE, (777, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.setrecursionlimit(2345)
sys.setswitchinterval(0.25)
sys.set_int_max_str_digits(6000)
warnings.filterwarnings("error", category=Own)
warnings.filterwarnings("ignore", message="a nuisance")
warnings.simplefilter("error", (ImportWarning, BytesWarning))
logging.basicConfig(level=logging.INFO, filename="all.log", filemode="w", format="%(message)s")
logging.getLogger("quiet").setLevel(logging.ERROR)
logging.getLogger("loud").addHandler(Shout("!"))
logging.getLogger("loud").propagate = False
logging.getLogger("torch").setLevel(logging.CRITICAL)
logging.captureWarnings(True)

@torch.compile(backend="eager", fullgraph=True)
def compiled(x):
    return x * 2

def raises(kind, text):
    try:
        warnings.warn(text, kind)
    except Warning:
        return True
    return False

def overflow():
    try:
        return str(np.float64(1e308) * 10)
    except OverflowError as error:
        return str(error)

def seen():
    loud = logging.getLogger("loud")
    loud.info("hear this")
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.empty(1).device),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "printed": repr(torch.tensor([1.23456], device="cpu")),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "safe": Net in torch.serialization.get_safe_globals(),
        "sharing": mp.get_sharing_strategy(),
        "numpy": repr(np.array([1.23456])),
        "divide": np.geterr()["divide"],
        "overflow": overflow(),
        "variable": os.environ.get("MY_SETTING"),
        "umask": os.umask(0o27),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": os.sched_getaffinity(0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "python": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits()],
        "own warning": raises(Own, "stop"),
        "nuisance": raises(UserWarning, "a nuisance"),
        "two warnings": [raises(ImportWarning, "one"), raises(BytesWarning, "two")],
        "levels": [logging.getLogger(name).getEffectiveLevel() for name in ("", "quiet", "torch")],
        "handlers": [type(one).__name__ for one in logging.root.handlers],
        "loud": [one.said for one in loud.handlers],
        "propagate": loud.propagate,
        "captures": logging._warnings_showwarning is not None,
        "compiled": compiled(torch.ones(1, device="cpu")).item(),
    }
"""
MAIN = """
def work(rank, *queue):
    found = seen()
    logging.info("hello from %d", rank)
    if queue:
        queue[0].put((rank, found))
    return found

def plain():
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (queue,), nprocs=2)
    return [found for _, found in sorted((queue.get() for _ in "ab"), key=lambda both: both[0])]

if __name__ == "__main__":
    from ddp_lessons import launch

    methods = ("forkserver", "spawn")
    print(plain() + [found for one in methods for found in launch(work, start_method=one).values])
"""


def run_script(script: Path) -> Any:
    """What a script prints last, as a value."""
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=script.parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(script.parent)},  # else it leaves one
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_ranks_have_what_a_scripts_top_level_sets_as_under_mp_spawn(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOP_LEVEL + MAIN)
    plain, *others = run_script(script)
    assert others == [plain] * 5
    lines = (tmp_path / "all.log").read_text().splitlines()
    assert sorted(line for line in lines if "hello" in line)[-2:] == ["hello from 1"] * 2


@pytest.mark.slow
def test_ranks_have_what_a_notebook_sets(
    kernels: Callable[[], Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The kernel imports torch's compiler, which makes this folder.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    kernel = kernels()
    for code in (
        TOP_LEVEL,
        "values = launch(lambda rank: seen(), nprocs=1).values",
        "print([values[0], seen()])",
    ):
        cell = kernel.run(code)
        assert not cell.error, cell.error
    in_rank, in_kernel = ast.literal_eval(cell.stdout)
    in_kernel["loud"] = in_rank["loud"]
    assert in_rank == in_kernel
    assert in_rank["loud"] == [["HEAR THIS!"]]


@pytest.mark.slow
def test_log_lines_of_a_notebook_are_in_its_format(kernels: Callable[[], Kernel]) -> None:
    kernel = kernels()
    cell = kernel.run(
        """
        import logging
        logging.basicConfig(level=logging.INFO, format="%(levelname)s here: %(message)s")
        launch(lambda rank: logging.info("step %d", rank))
        """
    )
    assert cell.stdout == "[rank 0] INFO here: step 0\n[rank 1] INFO here: step 1\n"


PRECISIONS = """
import torch
from ddp_lessons import launch
from ddp_lessons.instrumentation import torch_api

def seen(rank):
    return {name: read() for name, (read, _) in torch_api.settings().items() if "fp32" in name}

agree = []
for change in (
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
):
    change()
    agree.append(launch(seen, nprocs=1).values == [seen(0)])
print(agree)
"""


@pytest.mark.slow
def test_precisions_of_the_older_and_the_newer_interface(tmp_path: Path) -> None:
    """torch refuses to read the older settings once one of the newer is set."""
    script = tmp_path / "script.py"
    script.write_text(PRECISIONS)
    assert run_script(script) == [True] * 6


SEEDS = """
import functools
import imported
import numpy as np
import torch
import torch.multiprocessing as mp
from ddp_lessons import launch

SEED = 123
torch.manual_seed(SEED)
np.random.seed(7)

def draw_with(nothing, rank, *queue):
    numbers = torch.rand(()).item(), np.random.rand()
    if queue:
        queue[0].put(numbers)
    return numbers

def draw(rank, *queue):
    return draw_with(None, rank, *queue)

def plain(draw):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(draw, (queue,), nprocs=2)
    return [queue.get(), queue.get()]

if __name__ == "__main__":
    draws = [draw, functools.partial(draw_with, None), imported.draw]
    print([[plain(draw), launch(draw).values] for draw in draws])
"""
IMPORTED = """
import torch

def draw(rank, *queue):
    number = torch.rand(()).item()
    if queue:
        queue[0].put(number)
    return number
"""


@pytest.mark.slow
def test_seeds_of_a_script_are_those_of_its_ranks_as_under_mp_spawn(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SEEDS)
    (tmp_path / "imported.py").write_text(IMPORTED)
    for plain, ours in run_script(script):
        assert ours == plain


@pytest.mark.slow
def test_seeds_of_a_notebook_are_its_own(kernels: Callable[[], Kernel]) -> None:
    kernel = kernels()
    cell = kernel.run(
        """
        import torch
        torch.manual_seed(123)
        print(len({*launch(lambda rank: torch.rand(()).item()).values, torch.rand(()).item()}))
        """
    )
    assert cell.stdout == "3\n"


@pytest.fixture
def untouched() -> Iterator[None]:
    """Give back what a test sets in this process."""
    level, handlers, filters = logging.root.level, logging.root.handlers[:], warnings.filters[:]
    yield
    logging.root.setLevel(level)
    logging.root.handlers[:], warnings.filters[:] = handlers, filters  # type: ignore[index]
    logging.captureWarnings(False)


def rank_logs(logger: str) -> list[str]:
    """The lines of a rank that logs three messages."""

    def work(rank: int) -> None:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(logger).log(level, "it went well")

    return launch(work, nprocs=1).ranks[0].lines


def test_a_handler_that_cannot_travel_writes_to_the_ranks_output(untouched: None) -> None:
    class Odd(logging.Handler):
        def __init__(self) -> None:
            super().__init__(logging.INFO)
            self.unsendable = (i for i in "x")

    for i, handler in enumerate((Odd(), logging.handlers.QueueHandler(queue.Queue()))):
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("odd: %(message)s"))
        logger = logging.getLogger(f"apart {i}")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        assert rank_logs(logger.name) == ["odd: it went well"] * 2
        handler.close()


def test_where_what_numpy_calls_cannot_travel_it_warns() -> None:
    unsendable = (i for i in "x")
    with np.errstate(divide="call", over="raise", call=lambda *_: next(unsendable)):
        (errors,) = launch(lambda rank: np.geterr(), nprocs=1).values
    assert (errors["divide"], errors["over"]) == ("warn", "raise")


def test_a_file_that_cannot_be_opened_gives_way_to_the_ranks_output(
    untouched: None, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    handler = logging.FileHandler(tmp_path / "logs" / "all.log")
    logging.getLogger("filed").addHandler(handler)
    handler.close()
    (tmp_path / "logs" / "all.log").unlink(missing_ok=True)
    (tmp_path / "logs").rmdir()
    assert rank_logs("filed") == ["it went well"]


@pytest.mark.slow
def test_what_is_not_set_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys, warnings, torch\n"
        "from ddp_lessons import launch\n"
        "def seen(rank):\n"
        "    return [\n"
        "        logging.root.level, logging.root.handlers, torch.get_num_threads(),\n"
        "        str(torch.get_default_dtype()), torch.initial_seed() > 1 << 32,\n"
        "        'sklearn.exceptions' in sys.modules, 'psutil' in sys.modules]\n"
        "if __name__ == '__main__':\n"
        "    print(launch(seen, nprocs=1, env={'OMP_NUM_THREADS': '1'}).values[0])\n"
    )
    assert run_script(script)[:5] == [logging.WARNING, [], 1, "torch.float32", True]


def test_variables_of_the_ranks_decide_over_torchs_own_logging() -> None:
    def level(rank: int) -> int:
        return logging.getLogger("torch._dynamo").getEffectiveLevel()

    assert launch(level, nprocs=1).values != [logging.DEBUG]
    assert launch(level, nprocs=1, env={"TORCH_LOGS": "+dynamo"}).values == [logging.DEBUG]


@pytest.mark.slow
def test_threads_that_torch_chose_are_not_taken_for_the_learners() -> None:
    program = "from ddp_lessons.instrumentation.torch_api import settings as all\n"
    program += "read, _ = all()['threads']\nprint(read())"
    for variables in ({}, {"OMP_NUM_THREADS": "3"}, {"MKL_NUM_THREADS": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
        )
        assert done.stdout == "None\n", done.stderr


def test_every_setting_of_torch_can_be_read_and_set() -> None:
    for name, (read, write) in torch_api.settings().items():
        if (value := read()) is not None:
            write(value)
            assert repr(read()) == repr(value), name
    assert isinstance(torch.get_default_dtype(), torch.dtype)
    assert np.geterr()
