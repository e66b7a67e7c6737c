"""The course as `pip install` gives it to a user today: `make newest`, `make newest-renew`.

An environment of its own is made from this repository without the versions of
binder/constraints.txt. There runs what a user would meet: `doctor`, the tests of failures and
hangs, five lessons. `make newest` takes the versions of ddp_lessons/cli/newest.txt, so that a
release upstream never breaks it; with `--renew` pip takes what it likes, and if all passes, that is
written to newest.txt and committed. With `--torch 2.6.0` it is that torch, and the rest as pip
likes. Runs in any Python, which makes the environment: `make pythons` takes several.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import STDOUT

from tests.support.checkout import ROOT

sys.path.insert(0, str(ROOT / "binder"))
import install

VENV = ROOT / ".newest"
PYTHON = VENV / "bin" / "python"
VERSIONS = ROOT / "ddp_lessons" / "cli" / "newest.txt"
COPY = ROOT / "build" / "newest"  # here, our own package is found only where pip put it
LIMIT = 20 * 60.0  # seconds for all of it
TOOLS = ("pytest", "pytest-timeout", "nbval")
SHOWN = ("torch", "cloudpickle", "ipython", "ipykernel", "jupyterlab", "matplotlib", "numpy")
SUITES = (
    *("diagnosis/test_failures", "diagnosis/test_hangs", "launcher/test_api", "worker/test_main"),
    *("wire/test_unfiled", "wire/test_pickling", "instrumentation/test_torch_api"),
)
LESSONS = (
    *("00_start_here", "04_barriers", "05_distributed_sampler"),
    *("09_sync_batchnorm", "10_hang_clinic"),
)
NOT_USERS = ("pip", "setuptools", "wheel", "ddp-lessons")

began = time.monotonic()


def main() -> int:
    """Make the environment, show its versions, run everything; the number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", help="resolve anew, commit what passes")
    parser.add_argument("--torch", metavar="VERSION", help="this torch, with anything that fits")
    given = parser.parse_args()
    make(given.renew, given.torch)
    found = versions()
    print(f"Python {platform.python_version()}", end=" · ")
    print(" · ".join(f"{name} {found[name]}" for name in SHOWN), flush=True)
    for name in ("tests", "notebooks", "benchmarks"):
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    with ThreadPoolExecutor() as pool:  # all at once, as each mostly waits
        failed = sum(not good for good in pool.map(run, parts(), parts().values()))
    if given.renew and not failed:
        write(found)
    return failed


def make(renew: bool, torch: str | None) -> None:
    """A new environment, with what pip takes for this repository."""
    for old in (VENV, COPY):
        shutil.rmtree(old, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    held = [f"torch=={torch}"] if torch else [] if renew else ["-c", str(VERSIONS)]
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install.say("Installing what pip takes for `pip install .`; this takes a minute or two ...")
    command += [*install.torch_options(), *held, str(ROOT), *TOOLS]
    subprocess.run(command, check=True, timeout=left())
    install.say(f"Installed after {time.monotonic() - began:.0f} s.")


def versions() -> dict[str, str]:
    """What is installed, by name."""
    command = [str(PYTHON), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def parts() -> dict[str, list[str]]:
    """What is run, by name."""
    pytest = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    nbval = ["-p", "nbval.plugin", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=120"]
    nbval += ["--nbval-sanitize-with=tests/support/nbval_sanitize.cfg"]
    return {
        "doctor": [str(VENV / "bin" / "ddp-lessons"), "doctor"],
        "tests": [*pytest, *(f"tests/{name}.py" for name in SUITES)],
        "lessons": [*pytest, *nbval, *(f"notebooks/{name}.ipynb" for name in LESSONS)],
    }


def run(name: str, command: list[str]) -> bool:
    """Run one part within what is left of the time, then print what it printed; if it went well."""
    env = {**os.environ, "DDP_LESSONS_LIVE": "0"}
    with tempfile.TemporaryFile("w+") as printed:
        done = subprocess.Popen(command, cwd=COPY, env=env, stdout=printed, stderr=STDOUT)
        try:
            code = done.wait(left())
        except subprocess.TimeoutExpired:
            done.kill()
            code = 124
        printed.seek(0)
        ended = f"exit code {code}, {time.monotonic() - began:.0f} s since the start"
        install.say(f"== {name}\n{printed.read()}== {name}: {ended}")
    return code == 0


def left() -> float:
    """Seconds that are left."""
    return max(1.0, began + LIMIT - time.monotonic())


def write(found: dict[str, str]) -> None:
    """Note what passed, and commit it."""
    today = datetime.date.today()
    head = (
        f"# The newest versions that the course was tested with: what pip took on {today}.\n"
        "# `make newest` tests with them; `make newest-renew` resolves anew.\n"
    )
    lines = [f"{name}=={found[name]}\n" for name in sorted(found) if name not in NOT_USERS]
    VERSIONS.write_text(head + "".join(lines), encoding="utf-8")
    if subprocess.run(["git", "diff", "--quiet", "--", VERSIONS], cwd=ROOT).returncode:
        message = f"Newest versions that pass: as of {today}"
        subprocess.run(["git", "commit", "-q", "-m", message, "--", VERSIONS], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
