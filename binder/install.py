"""Set up `.venv`: `install.py lessons` for learners, `test` or `bench` for contributors.

The Makefile calls it. It uses only Python's standard library, is safe to repeat, and does nothing
if nothing has changed since the last time. Each purpose includes the ones before it. On Linux
without an NVIDIA GPU, torch comes from PyTorch's index of CPU builds if that answers: the ordinary
build brings gigabytes of CUDA. `TORCH_INDEX=URL` names another index, `TORCH_INDEX=` (empty) uses
none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
CONSTRAINTS = ROOT / "binder" / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE = 4.0  # seconds for the CPU index to answer
TELL = 5.0  # seconds between progress messages
BUILD = ("hatchling", "editables")  # pyproject.toml's build system, and its requirement for -e
OF_TORCH = "torch, torch._dynamo, torch.nn.parallel, torch.profiler"
OF_COURSE = (
    "ddp_lessons.worker.main, ddp_lessons.data, ddp_lessons.plots, ipykernel.kernelapp, "
    "ipywidgets, jupyterlab.labapp, sklearn.datasets"
)
# The dependency groups of pyproject.toml that each purpose needs.
GROUPS = {"lessons": (), "test": ("test", "docs"), "bench": ("test", "docs", "bench")}
COURSE = ("-e", f"{ROOT}[cluster]")
NEWS = "@jupyterlab/apputils-extension:announcements"  # a pop-up on the first start


def main() -> None:
    """Install pyproject.toml's requirements, at the versions of constraints.txt."""
    if sys.version_info < (3, 11):
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed. "
            "If you have one, say which: make lessons PYTHON=python3.12"
        )
    purpose = sys.argv[1] if len(sys.argv) > 1 else "lessons"
    purposes = list(GROUPS)
    if purpose not in purposes:
        sys.exit(f"{purpose!r} is not one of: {', '.join(purposes)}")
    found = STAMP.read_text().split() if STAMP.exists() else []
    if found in ([more, state()] for more in purposes[purposes.index(purpose) :]):
        return
    if found in ([less, state()] for less in purposes):
        say(f"Adding to .venv what {purpose} needs.")
    else:
        say("Setting up .venv for the lessons: PyTorch, JupyterLab and the course.")
    STAMP.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:
        options = pool.submit(torch_options)  # may wait for an index that does not answer
        if not python().exists():
            make_venv()
    # With our package's build system: otherwise pip would fetch it again for an isolated build.
    pip("PyTorch, about 200 MB", pinned("torch"), *options.result(), *BUILD)
    with import_once(OF_TORCH):
        what = "JupyterLab and the course" if purpose == "lessons" else "the course and its tests"
        pip(what, "--no-build-isolation", *COURSE, *in_groups(*GROUPS[purpose]))
    say("Making the first start quick ...")
    if import_once(OF_COURSE).wait():
        sys.exit(f"What was installed cannot be imported. See {python()} -c 'import {OF_COURSE}'")
    subprocess.run(
        [python().with_name("jupyter"), "labextension", "disable", NEWS],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    STAMP.write_text(f"{purpose} {state()}")
    say("Done.")


def state() -> str:
    """A hash of everything that the installation depends on."""
    parts = [(ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes()]
    parts += [sys.version.encode(), os.environ.get("TORCH_INDEX", "default").encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def make_venv() -> None:
    """Create `.venv`; if that fails, say what is missing."""
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            "Python's venv module does not work here. On Debian or Ubuntu: apt install python3-venv"
        )


def python() -> Path:
    """The interpreter of `.venv`."""
    return VENV / "bin" / "python"


def pinned(package: str) -> str:
    """`torch==...`, with the version of constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def in_groups(*names: str) -> list[str]:
    """What dependency groups of pyproject.toml ask for; pip reads them itself from 25.1 on."""
    import tomllib  # Python 3.10 must get as far as the message that it is too old

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return [requirement for name in names for requirement in groups[name]]


def torch_options() -> list[str]:
    """pip's options for the right build of torch."""
    if "TORCH_INDEX" in os.environ:
        index = os.environ["TORCH_INDEX"]
        return ["--extra-index-url", index] if index else []
    if sys.platform != "linux" or has_nvidia_gpu():
        return []
    if answers(CPU_INDEX):
        return ["--extra-index-url", CPU_INDEX]
    say("PyTorch's index of CPU builds does not answer: taking torch from pip's usual place.")
    return []


def has_nvidia_gpu() -> bool:
    """True if NVIDIA's driver is loaded."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def answers(url: str) -> bool:
    """True if the index answers within a few seconds, at the first try."""
    reached: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=PATIENCE) as answer:
                reached.append(answer.status == 200)
        except OSError:
            pass

    # In a thread, because looking up a host name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reached == [True]


def import_once(modules: str) -> subprocess.Popen[bytes]:
    """Import modules in a new process, so that their bytecode is written.

    pip would compile all modules, most of them never imported: that takes 20 s and 250 MB.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(
        [python(), "-c", f"import {modules}"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def pip(what: str, *arguments: str) -> None:
    """Install packages at the tested versions, printing their names and the progress."""
    say(f"Installing {what} ...")
    command = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-compile", "-c", str(CONSTRAINTS), *arguments]
    began = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                process.wait(TELL)
            except subprocess.TimeoutExpired:
                say(f"  {time.monotonic() - began:3.0f} s, .venv has {size() >> 20:,} MB")
    if process.returncode:
        sys.exit(f"pip could not install {what}: see above. Then repeat the command.")


def size() -> int:
    """The size of `.venv` in bytes; files that disappear meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(VENV):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def say(text: str) -> None:
    """Print a message at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
