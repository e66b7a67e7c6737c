"""Print this machine's GPUs and torch: `python -m benchmarks.gpu_machine`."""

from __future__ import annotations

import platform

import torch


def main() -> None:
    """Print a line for the software, and one for each GPU."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.device_count():
        print("no GPU: what needs one will be skipped")


if __name__ == "__main__":
    main()
