"""Renew constraints.txt, the lock: the versions that pip takes today for all that we install.

`make lock` runs it; `make test` then says whether they serve. Nothing is installed. torch stays as
it is: its release decides much in the lessons, so whoever wants another one writes it there first.
Binder and `make lessons` install at these versions; `pip install ddp-lessons` does not.
"""

from __future__ import annotations

import json
import subprocess
import sys

import install


def main() -> None:
    """Ask pip what it would install, and write that down."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--ignore-installed", "--report", "-", *install.torch_options()]
    command += [install.pinned("torch"), *install.BUILD, *install.COURSE]
    command += install.in_groups(*install.GROUPS["bench"])
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    del found["ddp-lessons"]
    # A build of torch for CUDA brings packages that the one for CPUs does not have.
    lines = [
        f"{name}=={version.partition('+')[0]}\n"
        for name, version in sorted(found.items(), key=lambda item: item[0].lower())
        if not name.startswith(("nvidia-", "cuda-", "triton"))
    ]
    head, *_ = install.CONSTRAINTS.read_text().splitlines(keepends=True)
    install.CONSTRAINTS.write_text(head + "".join(lines))
    print(f"{install.CONSTRAINTS}: {len(lines)} packages. Now: make test")


if __name__ == "__main__":
    main()
