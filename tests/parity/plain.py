"""Runs features by plain torch: ranks that torch's spawn starts, without this package."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.parity.features import Feature, text_of
from tests.parity.outcomes import Outcome

# As torchrun sets it; line by line; and without looking up names, which takes long here and there.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "RES_OPTIONS": "timeout:1 attempts:1",
}
PATIENCE = 240.0  # seconds that plain ranks may take for one feature


class PlainRanks:
    """Ranks of plain torch, each a process that runs one feature after the other."""

    def __init__(
        self, ranks: int, env: Mapping[str, str] | None = None, args: tuple[Any, ...] = ()
    ) -> None:
        pipes = [torch.multiprocessing.get_context("spawn").Pipe() for _ in range(ranks)]
        self._args = args  # what is shared lives until the ranks have it
        self._pipes = [ours for ours, _ in pipes]
        self._folder = tempfile.TemporaryDirectory()
        with _variables({**VARIABLES, **(env or {})}):
            self._context = torch.multiprocessing.start_processes(
                _serve,
                ([theirs for _, theirs in pipes], self._folder.name, args),
                ranks,
                join=False,
                start_method="spawn",
            )
        for _, theirs in pipes:
            theirs.close()

    def __enter__(self) -> PlainRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._context.processes:
            process.join(PATIENCE / 24)
            process.kill()
            process.join()
            process.close()
        self._folder.cleanup()

    def run(self, feature: Feature, port: int) -> list[Outcome]:
        """Run a feature. If it is one that runs alone, its processes end with it."""
        for pipe in self._pipes:
            pipe.send((feature.run, feature.alone, port))
        return [self._outcome(rank, feature.alone) for rank in range(feature.ranks)]

    def _outcome(self, rank: int, alone: bool) -> Outcome:
        pipe = self._pipes[rank]
        value, raised, ended = None, None, False
        if not pipe.poll(PATIENCE):
            for process in self._context.processes:
                process.kill()  # no other feature can use them
            raise TimeoutError(f"plain rank {rank} has not answered for {PATIENCE:g} s")
        try:
            value, raised = pickle.loads(pipe.recv_bytes())
        except EOFError:
            ended = True
        if not alone:
            assert not ended, f"plain rank {rank} ended: such a feature runs alone"
            return Outcome(value, raised, self._output(rank))
        process = self._context.processes[rank]
        process.join(PATIENCE)
        return Outcome(value, raised, self._output(rank), process.exitcode)

    def _output(self, rank: int) -> str:
        written = Path(self._folder.name, str(rank)).read_bytes()
        return written.decode(errors="backslashreplace")


@contextlib.contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Have these variables for a moment, for processes to inherit."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(rank: int, pipes: list[Connection], folder: str, args: tuple[Any, ...]) -> None:
    """Be a plain rank: run what comes, until the parent closes its end or a feature is alone."""
    for other in [pipe for place, pipe in enumerate(pipes) if place != rank]:
        other.close()
    pipe = pipes[rank]
    output = os.open(os.path.join(folder, str(rank)), os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # as on a terminal
    gc.freeze()  # what lives now need not be looked through after each feature
    while True:
        try:
            function, alone, port = pipe.recv()
        except EOFError:
            return
        os.ftruncate(1, 0)
        with warnings.catch_warnings():
            pass  # Python forgets which it has shown
        report = _report(function, rank, port, len(pipes), args)
        if alone:
            pipe.send_bytes(report)
            if pickle.loads(report)[1] is not None:
                sys.exit(1)
            return
        _clean_up()
        pipe.send_bytes(report)


def _report(
    function: Callable[..., Any], rank: int, port: int, world_size: int, args: tuple[Any, ...]
) -> bytes:
    """Run a feature as torchrun would have a rank run it. Returns the pickle of what came of it."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
    )
    try:
        return pickle.dumps((function(rank, *args), None))
    except Exception as error:
        return pickle.dumps((None, text_of(error)))


def _clean_up() -> None:
    """Leave what a feature that raised has joined, and write what C has kept to write."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
