"""Set up `.venv` for `make lessons` and `make test`: one command, safe to repeat.

Uses only Python's standard library. When nothing has changed since the last time it does nothing.
On Linux without an NVIDIA GPU, torch comes from PyTorch's index of CPU builds if that answers:
the ordinary build brings gigabytes of CUDA. `TORCH_INDEX=URL` names another index, `TORCH_INDEX=`
(empty) uses none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
CONSTRAINTS = ROOT / "binder" / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE = 4.0  # seconds that the CPU index has to answer
NEWS = "@jupyterlab/apputils-extension:announcements"  # a pop-up on the first start


def main() -> None:
    """Install what pyproject.toml asks for, at the versions of constraints.txt."""
    if sys.version_info < (3, 11):
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed. "
            "If you have one, say which: make lessons PYTHON=python3.12"
        )
    wanted = state()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    say("Setting up .venv: PyTorch, JupyterLab and the course. This takes a minute or two.")
    STAMP.unlink(missing_ok=True)
    if not python().exists():
        make_venv()
    pip("PyTorch, about 200 MB", pinned("torch"), *torch_options())
    pip("JupyterLab, the course and its tests", "-e", f"{ROOT}[test,docs]")
    subprocess.run(
        [python().with_name("jupyter"), "labextension", "disable", NEWS],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    STAMP.write_text(wanted)
    say("Done.")


def state() -> str:
    """What the installation depends on, as a hash."""
    parts = [(ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes()]
    parts += [sys.version.encode(), os.environ.get("TORCH_INDEX", "default").encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def make_venv() -> None:
    """Create `.venv`, and say what is missing if that fails."""
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
    """`torch==...`, the version that constraints.txt names."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def torch_options() -> list[str]:
    """Options by which pip finds the right build of torch."""
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
    """True if the index answers within a few seconds; one try."""
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


def pip(what: str, *arguments: str) -> None:
    """Install something at the tested versions, saying what."""
    say(f"Installing {what} ...")
    command = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-c", str(CONSTRAINTS), *arguments], check=False)
    if done.returncode:
        sys.exit(f"pip could not install {what}: see above. Then repeat the command.")


def say(text: str) -> None:
    """Tell the user, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
