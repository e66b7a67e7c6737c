"""How long large values take to the ranks and back: `python -m benchmarks.values`.

Each of 2 ranks returns a value of 1.2 GB; then one is an argument, and one is used by the function.
Beside each: how long a rank takes to make such a value, in a `launch` that returns none. Seconds,
medians of 3 rounds, and the memory that the parent then has. Needs 8 GB of memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch

from ddp_lessons import launch

NUMBERS = 300_000_000  # of float32: 1.2 GB
KINDS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(NUMBERS),
    "array": lambda: np.ones(NUMBERS, np.float32),
    "state_dict": lambda: {str(n): torch.ones(NUMBERS // 100) for n in range(100)},
}


def give(rank: int, make: Callable[[], Any]) -> Any:
    return make()


def keep(rank: int, make: Callable[[], Any]) -> None:
    make()


def take(rank: int, value: Any) -> float:
    return float(value[-1])


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def round_of(make: Callable[[], Any]) -> list[float]:
    made, _ = seconds(lambda: launch(keep, (make,)))
    given, run = seconds(lambda: launch(give, (make,)))
    memory = psutil.Process().memory_full_info().uss / 1e9
    del run
    value = np.ones(NUMBERS, np.float32)
    passed, _ = seconds(lambda: launch(take, (value,)))
    used, _ = seconds(lambda: launch(lambda rank: float(value[rank])))
    return [made, given, memory, passed, used]


def main() -> None:
    launch(keep, (list,))  # warms the forkserver
    print("value       made  and given back  GB here  array as argument  used by the function")
    for name, make in KINDS.items():
        rounds = [round_of(make) for _ in range(3)]
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"{name:10}  {medians[0]:4.1f}  {medians[1]:14.1f}  {medians[2]:7.1f}", end="")
        print(f"  {medians[3]:17.1f}  {medians[4]:20.1f}")


if __name__ == "__main__":
    main()
