"""The checks of lesson 12: any checkpoint into any model, and a resume to the same bits."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.errors import WorkersHung
from ddp_lessons.exercises.checking import Wrong, exercise, run_quietly
from ddp_lessons.exercises.killed import SAVED, Facts, checkpoint_path, resume, train
from ddp_lessons.results import Run

PARTS = ("model", "momentum", "scheduler", "random")


class _Named(nn.Module):  # type: ignore[misc]
    """A model with a layer whose name ends in `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
        self.submodule = nn.Sequential(nn.Linear(3, 2))


class _Own(nn.Module):  # type: ignore[misc]
    """A model with a layer that is called `module`, as DDP's own."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = nn.Linear(2, 3), nn.Linear(3, 2)


class _Only(nn.Module):  # type: ignore[misc]
    """A model all of whose keys begin with `module.`, though it is in no DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)


def _simple() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two layers": _simple,
    "a layer called `submodule`": _Named,
    "a layer called `module`": _Own,
    "no other layer than `module`": _Only,
}


def _load_each(_: int, load_anywhere: Callable[..., Any], wrapped: bool) -> list[list[str]]:
    """What went wrong, `[name, from, what]`, in the first case in which anything did."""
    if wrapped:
        dist.init_process_group("gloo")
    for name, make in MODELS.items():
        for prefixed in (True, False):
            torch.manual_seed(1)
            source = _filled(make())
            prefix = "module." if prefixed else ""
            state = {prefix + key: value.clone() for key, value in source.state_dict().items()}
            model: nn.Module = DistributedDataParallel(make()) if wrapped else make()
            problem = _load_one(load_anywhere, model, state, source.state_dict())
            if problem:
                return [[name, "DDP" if prefixed else "a plain model", problem]]
    if wrapped:
        dist.destroy_process_group()
    return []


def _filled(model: nn.Module) -> nn.Module:
    """The model with values that no new one has, in its buffers, too."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(3, 100, value.shape))
    return model


def _load_one(
    load_anywhere: Callable[..., Any], model: nn.Module, state: Facts, wanted: Facts
) -> str:
    try:
        load_anywhere(model, state)
    except Exception as error:
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = inner.state_dict()
    if found.keys() != wanted.keys():
        return "the model has other layers than before"
    lost = [key for key, value in found.items() if not torch.equal(value, wanted[key])]
    return f"not loaded: {len(lost)} of {len(wanted)} tensors, with no error" if lost else ""


@exercise(
    "`inner = model.module if isinstance(model, DDP) else model` has keys without the prefix.",
    "If the state's keys are not those of `inner`, cut off the first seven letters of each: "
    '`key.removeprefix("module.")`.',
)
def check_load_anywhere(load_anywhere: Callable[[nn.Module, dict[str, Tensor]], None]) -> str:
    """Check `load_anywhere(model, state)` for plain models and DDP's, and states of both."""
    for wrapped, ranks in ((False, 1), (True, 2)):
        run = run_quietly(_load_each, (load_anywhere, wrapped), nprocs=ranks)
        run.raise_for_failure()
        for problem in filter(None, run.values):
            _judge_loaded(wrapped, *problem[0])
    return "plain into plain, DDP into plain, plain into DDP, DDP into DDP; whatever layers' names."


def _judge_loaded(wrapped: bool, name: str, origin: str, problem: str) -> None:
    seen = f"a model with {name}, {'in DDP' if wrapped else 'plain'}; a state from {origin}: "
    raise Wrong(seen + problem, _why_not_loaded(wrapped, name, origin, problem))


def _why_not_loaded(wrapped: bool, name: str, origin: str, problem: str) -> str:
    if "no error" in problem:
        return (
            "`strict=False` skips every key that does not fit. Make the keys fit, and stay strict: "
            "then an error tells of what is missing."
        )
    if name == "two layers" and wrapped:
        return (
            "DDP's own keys begin with `module.`; those of `model.module` do not. Load into the "
            "inner model in any case."
        )
    if name == "two layers":
        return (
            "The keys of a DDP model begin with `module.`, those of the model in it do not. Cut "
            "the prefix off, but only where there is one."
        )
    if "submodule" in name:
        return (
            "Only the beginning of a key may be cut off. `replace` also finds `submodule.`, and "
            "`lstrip` takes away single letters, not a word."
        )
    if not wrapped and origin == "DDP":
        return (
            "That a model has a `module` does not make it DDP's: ask `isinstance(model, DDP)`. And "
            "cut `module.` off once: the second one in a key is the layer's."
        )
    return (
        "Here `module.` begins the key of the model's own layer. What tells a prefix from a layer "
        "is the model: do the state's keys equal its keys or not?"
    )


@exercise(
    "Six things: `model.module.state_dict()`, the state dicts of optimizer and scheduler, `epoch`, "
    "`batch`, and `torch.get_rng_state()` of every rank, which `dist.gather_object` brings to "
    "rank 0.",
    "Rank 0 alone writes, to another name in the same folder; then `os.replace`. After that a "
    "`dist.barrier()` of all ranks.",
)
def check_resume(checkpoint: Any) -> str:
    """Check a class with `save` and `load`: killed trainings must end in the same weights."""
    for ranks in (2, 1, 3):
        with _folder() as folder:
            run = _run(train, (checkpoint, folder, False), ranks)
            _judge_files(folder)
            _judge_failure(run)
            _judge_returned(run.values)
            resumed = _run(resume, (checkpoint, folder), ranks)
            _judge_failure(resumed)
            _judge_load(run.values, resumed.values)
        if ranks == 2:
            with _folder() as folder:
                _run(train, (checkpoint, folder, True), ranks)
                _judge_left(run.values, _run(resume, (checkpoint, folder), ranks))
    return (
        "the same weights, bit for bit, on 2 ranks, 1 and 3; also after rank 0 was killed in the "
        "middle of a write."
    )


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(os.path.dirname(checkpoint_path(folder)))
        yield folder


def _run(worker: Callable[..., Facts], args: tuple[Any, ...], ranks: int) -> Run:
    run = run_quietly(worker, args, nprocs=ranks)
    if isinstance(run.error, WorkersHung):
        raise Wrong(
            run.explain(),
            "Every rank calls `save` and `load`. A collective in them must be called by every "
            "rank, too: not under `if rank == 0`, nor after a `return` for the others.",
        )
    return run


def _judge_failure(run: Run) -> None:
    """Raise if a rank failed; two common errors have an explanation."""
    errors = [rank.error.summary for rank in run.ranks if rank.error]
    if any(error.startswith("FileNotFoundError") for error in errors):
        raise Wrong(
            run.explain(),
            "Only the rank that has written a file may rename it, once; and nobody may read it "
            "before.",
        )
    if any("Weights only load failed" in error for error in errors):
        raise Wrong(
            "`torch.load` raised UnpicklingError: Weights only load failed.",
            "The file holds whole objects, which `torch.load` does not trust. Save the "
            "`state_dict()` of model, optimizer and scheduler, and numbers and tensors.",
        )
    run.raise_for_failure()


def _judge_files(folder: str) -> None:
    """Raise if several ranks have written to one file."""
    writers: dict[str, str] = {}
    for log in sorted(Path(folder).glob("written by *")):
        for name in set(log.read_text().splitlines()):
            rank = log.name.split()[-1]
            if name in writers:
                raise Wrong(
                    f"ranks {writers[name]} and {rank} wrote to the same file, {name}.",
                    "Whoever writes last wins, or the file is a mixture of both. Let rank 0 write "
                    "alone.",
                )
            writers[name] = rank


def _judge_returned(ranks: list[Facts]) -> None:
    """Raise if `save` returned on a rank before all was written."""
    written = max(facts["written_ns"] for facts in ranks)
    early = [rank for rank, facts in enumerate(ranks) if facts["returned_ns"] < written]
    if early:
        raise Wrong(
            f"`save` returned on rank {early[0]} while another rank was still writing.",
            "What it goes on with may read the file, or end the job. Let all ranks meet in a "
            "`dist.barrier()` when the file is there.",
        )


def _judge_load(saved: list[Facts], loaded: list[Facts]) -> None:
    several = "" if len(saved) > 1 else ", alone,"
    for rank, facts in enumerate(loaded):
        if facts["place"] != SAVED:
            raise Wrong(
                f"saved before epoch {SAVED[0]}, batch {SAVED[1]}; on rank {rank}{several} `load` "
                f"returned {_told(facts['place'])}.",
                _why_not_place(facts["place"]),
            )
    for part in PARTS:
        wrong = [r for r, facts in enumerate(loaded) if not _same(facts[part], saved[r][part])]
        if wrong:
            raise Wrong(
                f"{len(saved)} rank{'s' * (len(saved) > 1)}: after `load`, rank {wrong[0]} has "
                f"{_what(part)} than it had when it saved.",
                _why_not(part, wrong, saved, loaded),
            )
    if not all(torch.equal(a["end"], b["end"]) for a, b in zip(saved, loaded, strict=True)):
        raise Wrong(
            f"{len(saved)} ranks: after `load` all was there, but the weights in the end differ.",
            "`save` and `load` must change nothing but what they load: no seeds, no new objects.",
        )


def _told(place: Any) -> str:
    return "no two numbers" if place is None else f"epoch {place[0]}, batch {place[1]}"


def _why_not_place(place: Any) -> str:
    if place is None:
        return "Save `epoch` and `batch`, and return both from `load`: `return epoch, batch`."
    if place == (SAVED[0], 0):
        return (
            f"The epoch would begin anew: its first {SAVED[1]} batches would be trained on twice. "
            "The place in the epoch belongs in the checkpoint."
        )
    return "The training goes on where `save` was called: with that epoch's order and that batch."


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _what(part: str) -> str:
    return {
        "model": "other weights",
        "momentum": "another momentum",
        "scheduler": "another learning rate, or another count of the scheduler's steps,",
        "random": "another random state",
    }[part]


def _why_not(part: str, wrong: list[int], saved: list[Facts], loaded: list[Facts]) -> str:
    if part == "random":
        first = saved[0]["random"]
        if len(saved) > 1 and all(torch.equal(loaded[rank]["random"], first) for rank in wrong):
            return (
                "It got that of rank 0. Then all ranks draw the same dropout from now on. Each "
                "rank has a random state of its own: gather all, and give each its own back."
            )
        return (
            "Dropout would draw other numbers than the undisturbed training. Save "
            "`torch.get_rng_state()` of every rank, and set it last."
        )
    if 0 not in wrong:
        return (
            "Only rank 0 loaded it. DDP makes the weights equal when it wraps the model, and "
            "never again; of the optimizer it knows nothing. Every rank must load."
        )
    return {
        "model": "The weights belong in the checkpoint: `model.module.state_dict()`.",
        "momentum": (
            "SGD with momentum remembers a mean of past gradients; without it the first steps are "
            "too short. Save and load `optimizer.state_dict()`."
        ),
        "scheduler": (
            "It counts steps, and halves the rate after every fourth. Save and load "
            "`scheduler.state_dict()`, and the optimizer's, where the rate is."
        ),
    }[part]


def _judge_left(saved: list[Facts], run: Run) -> None:
    """Raise if a second save that was cut off has spoilt the first one."""
    killed = "rank 0 was killed in the middle of its second `save`. "
    atomic = (
        "Write to another name in the same folder, and `os.replace` it when it is complete: then "
        "the old checkpoint is there until the new one is."
    )
    if not run.ok:
        raise Wrong(f"{killed}After that `load` failed.\n{run.explain()}", atomic)
    places = {facts["place"] for facts in run.values}
    if len(places) > 1 or not all(map(_as_saved, saved, run.values)):
        found = [
            *map(_told, sorted(places, key=str)),
            *(_what(part).rstrip(",") for part in PARTS if not _all_same(part, saved, run.values)),
        ]
        raise Wrong(
            f"{killed}What `load` found then was not what the first one saved: {', '.join(found)}.",
            "Some files were of the first save and some of the second. One file that is replaced "
            "at once cannot be torn apart.",
        )


def _as_saved(saved: Facts, loaded: Facts) -> bool:
    return loaded["place"] == SAVED and all(_same(saved[part], loaded[part]) for part in PARTS)


def _all_same(part: str, saved: list[Facts], loaded: list[Facts]) -> bool:
    return all(_same(a[part], b[part]) for a, b in zip(saved, loaded, strict=True))
