"""What a fresh rank is like: these features look, and change nothing that another could see."""

from __future__ import annotations

import faulthandler
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.parity.features import attempt, feature, joined


@feature()
def loggers_by_default(rank: int) -> Any:
    names = ("", "torch", "torch.distributed", "torch._dynamo")
    loggers = [logging.getLogger(name) for name in names]
    return [
        (one.name, one.level, one.propagate, len(one.handlers), one.disabled) for one in loggers
    ]


@feature()
def warnings_filters(rank: int) -> Any:
    return [(action, repr(kind)) for action, _, kind, _, _ in warnings.filters]


@feature()
def arguments(rank: int) -> Any:
    return sys.argv, sys.orig_argv[0], sys.executable, tuple(sys.flags), os.getcwd()


@feature()
def modules(rank: int) -> Any:
    """The path by which modules are found, and that of this one."""
    return sys.path, sys.dont_write_bytecode, __name__, sys.modules[__name__].__file__


@feature()
def variables(rank: int) -> Any:
    """The environment, but for the port, a folder of torch's and how plain ranks are started."""
    found = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "PYTHONUNBUFFERED", "PYTEST_CURRENT_TEST"):
        found.pop(name, None)
    return found


@feature()
def defaults_of_torch(rank: int) -> Any:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.is_autocast_enabled("cpu"),
        torch.cuda.is_available(),
        torch.cuda.is_initialized(),
        torch.get_rng_state().shape,
        torch.initial_seed() != torch.random.default_generator.seed(),
        attempt(torch.set_num_interop_threads, 3),
        torch.__config__.parallel_info().splitlines()[:3],
        torch._C._get_tracing_state(),
        torch.overrides.is_tensor_like(torch.ones(1)),
    )


@feature()
def faults(rank: int) -> Any:
    return faulthandler.is_enabled()


@feature()
def settings_of_the_interpreter(rank: int) -> Any:
    return (
        sys.getrecursionlimit(),
        sys.getswitchinterval(),
        gc.isenabled(),
        gc.get_threshold(),
        sys.gettrace(),
        sys.getprofile(),
        locale.getlocale(),
        sys.getfilesystemencoding(),
        sys.displayhook is sys.__displayhook__,
        os.umask(0o22),
        os.nice(0),
        os.sched_getaffinity(0) == os.sched_getaffinity(os.getppid()),
        hasattr(sys, "ps1"),
    )


@feature()
def descriptors(rank: int) -> Any:
    """The first that is free, and what the standard ones are."""
    with open(os.devnull) as file:
        first = file.fileno() > 2
    return first, [os.get_inheritable(n) for n in (0, 1, 2)], os.readlink("/proc/self/fd/0")


@feature()
def streams(rank: int) -> Any:
    facts: list[Any] = [(sys.stdin.isatty(), sys.stdin.mode, sys.stdin.read(), attempt(input))]
    for stream in (sys.stdout, sys.stderr):
        facts.append((stream.fileno(), stream.isatty(), stream.name, stream.mode))
        facts.append((stream.encoding, type(stream).__name__, stream.closed))
    return facts


@feature()
def streams_of_python(rank: int) -> Any:
    return sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__


@joined()
def random_states_are_fresh(rank: int) -> Any:
    """No two ranks draw alike, and a fresh generator has torch's constant seed."""
    drawn = [torch.randn(2).tolist(), random.random(), np.random.rand(2).tolist(), os.urandom(4)]
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, drawn)
    alike = [a == b for a, b in zip(*everybody, strict=True)]
    return alike, torch.Generator().initial_seed(), hash(1.5)


@feature()
def this_process(rank: int) -> Any:
    """What multiprocessing says of the process of a rank."""
    process = mp.current_process()
    parent = mp.parent_process()
    return (
        process.daemon,
        process.name == f"SpawnProcess-{rank + 1}",
        parent is not None and parent.is_alive(),
        mp.active_children(),
        mp.get_start_method(allow_none=True),
        mp.get_sharing_strategy(),
        threading.active_count(),
        threading.current_thread() is threading.main_thread(),
        threading.main_thread().name,
        os.getpid() == process.pid,
    )


@feature()
def signals_by_default(rank: int) -> Any:
    handlers = {
        n.name: signal.getsignal(n) for n in signal.valid_signals() if isinstance(n, signal.Signals)
    }
    handlers["SIGINT"] = handlers["SIGINT"] is signal.default_int_handler
    return (
        handlers,
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        signal.getitimer(signal.ITIMER_REAL),
    )


@feature()
def groups_of_processes(rank: int) -> Any:
    return os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid(), os.getppid() == os.getsid(0)


@feature()
def start_methods(rank: int) -> Any:
    return (
        mp.get_all_start_methods(),
        attempt(mp.set_start_method, "nonsense"),
        attempt(mp.get_context, "no"),
    )
