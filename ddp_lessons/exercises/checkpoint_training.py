"""A small run for lesson 12's check: it saves, is killed and resumes with the learner's class.

Runs in workers, except `checkpoint_path`. It has all the state that a checkpoint must keep:
momentum, a scheduler, shuffled epochs and, on each rank, its own dropout.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from ddp_lessons.exercises.framework import in_group
from ddp_lessons.exercises.small_training import flat

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

SAMPLES, BATCHES, EPOCHS = 24, 4, 3  # BATCHES of an epoch
SAVED, CUT = (1, 2), (2, 1)  # all ranks save before this epoch and batch
SLOW = 0.2  # seconds that rank 0 takes to write

TORN = "overwritten"  # a file beside the record of writes: a checkpoint was not replaced
Facts = dict[str, Any]  # a rank's state when it saved or loaded, "later" at CUT, and at the end


class Disk:
    """Replaces `torch.save` on a rank: records its writes; can be slow, and kill."""

    def __init__(self, rank: int, folder: str) -> None:
        self.ended_ns = 0  # when the last write ended
        self._log = os.path.join(folder, f"written by {rank}")
        self._save = torch.save
        self._writes = self._kill_in = -1  # numbers of writes of this `save`, from 0
        self._slow = False

    def begin(self, slow: bool = False, kill: bool = False) -> None:
        """Begin a `save`, which may be slow, or kill its rank in the middle of the last write."""
        self._kill_in = self._writes if kill else -1
        self._writes, self._slow = -1, slow

    def __call__(self, state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if self._slow:
            time.sleep(SLOW)  # other ranks may finish first
            self._slow = False
        is_path = isinstance(file, str | os.PathLike)
        is_on_disk = is_path or hasattr(file, "name")  # not in memory, as pickle's parts
        self._writes += is_on_disk
        buffer = io.BytesIO()
        self._save(state, buffer, *args, **kwargs)
        data, killed = buffer.getvalue(), is_on_disk and self._writes == self._kill_in
        with open(file, "wb") if is_path else contextlib.nullcontext(file) as opened:
            if name := getattr(opened, "name", ""):
                with open(self._log, "a") as log:
                    log.write(f"{os.path.basename(name)}\n")
            opened.write(data[: len(data) // 2] if killed else data)
            opened.flush()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        self.ended_ns = time.perf_counter_ns()


@contextlib.contextmanager
def _unchanged(path: str, folder: str) -> Iterator[None]:
    """Notes in the folder if the file at `path` was written to: not replaced, but overwritten."""
    if not os.path.isfile(path):  # the checkpoint is somewhere beside it
        yield
        return
    with open(path, "rb") as file:
        before = file.read()
        yield
        file.seek(0)
        if file.read() != before:
            Path(folder, TORN).touch()


@in_group
def train(rank: int, checkpoint: Any, folder: str, killed: bool) -> Facts:
    """Train from beginning to end; return the rank's state when it saved, and at the end."""
    disk, path = Disk(rank, folder), checkpoint_path(folder)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files = checkpoint()
    parts = _set_up(seed=1, rank=rank)
    facts: Facts = {}
    with mock.patch.object(torch, "save", disk):
        for epoch, batch, *samples in _batches((0, 0)):
            if (epoch, batch) == SAVED:
                facts = _seen(*parts)
                disk.begin(slow=rank == 0 and not killed)
                files.save(path, *parts, epoch, batch)
                facts |= {"returned_ns": time.perf_counter_ns(), "written_ns": disk.ended_ns}
            if (epoch, batch) == CUT:
                facts["later"] = _seen(*parts)
            if killed and (epoch, batch) == CUT:
                disk.begin(slow=rank == 0, kill=rank == 0)
                with _unchanged(path, folder):
                    files.save(path, *parts, epoch, batch)
                os.kill(os.getpid(), signal.SIGKILL)  # if `save` did not use torch.save
            _step(*parts, *samples)
    return facts | {"end": flat(parts[0].parameters())}


@in_group
def resume(rank: int, checkpoint: Any, folder: str) -> Facts:
    """Load and train to the end; return the rank's state after loading, and at the end."""
    parts = _set_up(seed=7, rank=rank)
    place = _place(checkpoint().load(checkpoint_path(folder), *parts))
    torn = os.path.exists(os.path.join(folder, TORN))
    facts = {"place": place, "end": None, "torn": torn, **_seen(*parts)}
    places: list[tuple[int, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    if places == [SAVED] * len(places):  # otherwise training would fail anyway
        for _, _, *samples in _batches(SAVED):
            _step(*parts, *samples)
        facts["end"] = flat(parts[0].parameters())
    return facts


def checkpoint_path(folder: str) -> str:
    """The path for the learner's class: not beside the record of writes."""
    return os.path.join(folder, "checkpoints", "last.pt")


def writers(folder: str) -> dict[str, list[int]]:
    """The ranks that wrote to each file, by the files' names."""
    found: dict[str, list[int]] = {}
    for log in sorted(Path(folder).glob("written by *")):
        for name in dict.fromkeys(log.read_text().splitlines()):
            found.setdefault(name, []).append(int(log.name.split()[-1]))
    return found


def _set_up(
    seed: int, rank: int
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, LRScheduler]:
    torch.manual_seed(seed)
    layers = nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)
    model = DistributedDataParallel(nn.Sequential(*layers))
    # DDP orders its buckets now, not in the first step, so sums over three ranks keep their order.
    model(torch.zeros(1, 3)).sum().backward()
    torch.manual_seed(100 * seed + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    inputs: Tensor,
    labels: Tensor,
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    scheduler.step()


def _batches(place: tuple[int, int]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 3, generator=generator)
    labels = torch.randint(4, (SAMPLES,), generator=generator)
    sampler = DistributedSampler(range(SAMPLES))
    for epoch in range(place[0], EPOCHS):
        sampler.set_epoch(epoch)
        chunks = torch.tensor(list(sampler)).chunk(BATCHES)
        for batch in range(place[1] if epoch == place[0] else 0, BATCHES):
            yield epoch, batch, inputs[chunks[batch]], labels[chunks[batch]]


def _place(returned: Any) -> tuple[int, int] | None:
    try:
        epoch, batch = map(int, returned)
    except (TypeError, ValueError):
        return None
    return epoch, batch


def _seen(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> Facts:
    momentum = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    rate = float(optimizer.param_groups[0]["lr"])
    return {
        "model": flat(model.parameters()),
        "momentum": flat(momentum) if momentum else None,
        "scheduler": (scheduler.last_epoch, scheduler.get_last_lr(), rate),
        "random": torch.get_rng_state(),
    }
