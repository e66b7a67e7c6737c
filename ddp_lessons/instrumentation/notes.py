"""Notes what ranks often have wrong, but may mean: ``launch(..., notes=True)``.

Runs in workers, only on request: worker/main.py and worker/torchrun.py call `start`. When the rank
ends it sends a `Noted`, which diagnosis/notes.py compares with those of the other ranks: checksums
of the weights of each DDP model, the learning rates of each optimizer, and of each line that takes
batches from a DataLoader which samples came, and which random numbers were drawn meanwhile.
"""

from __future__ import annotations

import functools
import random
import sys
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ddp_lessons.instrumentation.recording import Recorder
from ddp_lessons.wire.records import Batches, Noted

MOST = 20  # models, optimizers and lines that are noted
MOST_WEIGHTS = 1000  # parameters of a model
MOST_SAMPLES = 10_000  # of a line


def start(recorder: Recorder) -> None:
    """Note from now on, and send the notes when the rank ends."""
    notes = _Notes(recorder)
    help_init = DistributedDataParallel._ddp_init_helper

    @functools.wraps(help_init)
    def help_init_and_note(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        help_init(self, *args, **kwargs)
        notes.follow(self)

    DistributedDataParallel._ddp_init_helper = help_init_and_note
    register_optimizer_step_post_hook(lambda optimizer, *_: notes.stepped(optimizer))
    take = _BaseDataLoaderIter.__next__

    @functools.wraps(take)
    def take_and_note(self: Any) -> Any:
        site = recorder.sites.of(sys._getframe().f_back)
        before = _random_states() if self._num_workers == 0 else {}
        batch = take(self)
        notes.took(self, site, batch, before)
        return batch

    _BaseDataLoaderIter.__next__ = take_and_note
    recorder.at_end.append(notes.send)


@dataclass
class _Line:
    """What one line took from its DataLoader."""

    workers: int
    batches: int = 0
    samples: set[int] = field(default_factory=set)
    draws: int = 0
    drawn: int = 0  # checksum of the generators' states when random numbers were drawn
    iterators: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


class _Notes:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._models: list[weakref.finalize[..., Any]] = []
        self._weights: dict[int, dict[str, int]] = {}
        self._rates: dict[int, str] = {}
        self._optimizers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._lines: dict[str, _Line] = {}

    def follow(self, model: DistributedDataParallel) -> None:
        """Note a model's weights when it is freed, or at the end."""
        if len(self._models) < MOST:
            parameters = dict(model.module.named_parameters())
            weigh = weakref.finalize(model, self._weigh, len(self._models), parameters)
            weigh.atexit = False
            self._models.append(weigh)

    def _weigh(self, model: int, parameters: Mapping[str, torch.Tensor]) -> None:
        names = list(parameters)[:MOST_WEIGHTS]
        try:
            self._weights[model] = {name: _checksum(parameters[name]) for name in names}
        except (RuntimeError, TypeError):  # the device has failed, or they have no bytes of theirs
            self._weights[model] = {}

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        number = self._optimizers.setdefault(optimizer, len(self._rates))
        if number < MOST:
            rates = [
                f"{float(group['lr']):.6g}" for group in optimizer.param_groups if "lr" in group
            ]
            self._rates[number] = ", ".join(rates)

    def took(self, iterator: Any, site: str | None, batch: Any, before: Mapping[str, int]) -> None:
        if site is None or (site not in self._lines and len(self._lines) == MOST):
            return
        line = self._lines.setdefault(site, _Line(iterator._num_workers))
        line.batches += 1
        if len(line.samples) < MOST_SAMPLES:
            line.samples.update(_samples(batch, is_one=not iterator._auto_collation))
        is_first = iterator not in line.iterators
        line.iterators.add(iterator)
        if line.workers and is_first:
            line.draws, line.drawn = line.draws + 1, _mixed(line.drawn, iterator._base_seed)
        if line.workers or is_first:  # with the first batch a sampler draws its own seed
            return
        for name, after in _random_states().items():
            if before.get(name, after) != after:
                line.draws, line.drawn = line.draws + 1, _mixed(line.drawn, before[name])

    def send(self) -> None:
        for weigh in self._models:
            weigh()
        lines = [
            Batches(
                site, line.batches, len(line.samples), _mixed(0, *sorted(line.samples)),
                line.draws, line.drawn, line.workers,
            )
            for site, line in list(self._lines.items())
        ]  # fmt: skip
        weights = [weights for _, weights in sorted(self._weights.items())]
        rates = [rates for _, rates in sorted(self._rates.items())]
        self._recorder.send(Noted(tuple(weights), tuple(rates), tuple(lines)))


def _mixed(checksum: int, *numbers: object) -> int:
    return zlib.crc32(repr(numbers).encode(), checksum)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_rows(tensor.detach().reshape(1, -1)))


def _rows(tensor: torch.Tensor) -> Any:
    """A tensor's bytes as an array, a row for each place of its first dimension."""
    flat = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
    return flat.view(torch.uint8).numpy()


def _samples(batch: Any, *, is_one: bool) -> list[int]:
    """A checksum of each sample in a batch, over all tensors that have a row for each.

    Without such tensors, of each entry of a list; or of all of it, `is_one` sample that the
    DataLoader passed on as it came.
    """
    tensors = [t for t in _tensors(batch) if t.dim() and t.numel()]
    if not tensors:
        entries = batch if isinstance(batch, list | tuple) and not is_one else [batch]
        texts = [list(_plain(entry)) for entry in entries]
        return [_mixed(0, *text) for text in texts if text]
    try:
        rows = [_rows(tensor) for tensor in tensors if len(tensor) == len(tensors[0])]
    except (RuntimeError, TypeError):  # such as a sparse tensor
        return []
    checksums = [0] * len(tensors[0])
    for array in rows:
        checksums = [zlib.crc32(row, sum_) for row, sum_ in zip(array, checksums, strict=True)]
    return checksums


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    return (value for value in _values(batch) if isinstance(value, torch.Tensor))


def _plain(sample: Any) -> Iterator[object]:
    """The numbers and texts in a sample."""
    for value in _values(sample):
        if isinstance(value, torch.Tensor) and not value.dim():
            yield value.item()
        elif isinstance(value, bool | int | float | complex | str | bytes):
            yield value


def _values(nested: Any) -> Iterator[Any]:
    """What is in dicts, lists and tuples, in order."""
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        for value in nested:
            yield from _values(value)
    else:
        yield nested


def _random_states() -> dict[str, int]:
    """Checksums of the states of Python's, torch's and NumPy's global generators."""
    states = {
        "random": hash(random.getstate()[1]),
        "torch": zlib.crc32(torch.default_generator.get_state().numpy()),
    }
    if (numpy := sys.modules.get("numpy.random")) is not None:
        _, key, place, *_ = numpy.get_state()
        states["numpy"] = _mixed(zlib.crc32(key), place)
    return states
