"""The checks of lesson 12: load any checkpoint into any model, and resume to the same bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, WorkersHung
from ddp_lessons.exercises.checkpoint_training import CUT, SAVED, Facts, resume, train, writers
from ddp_lessons.exercises.framework import Wrong, errors, exercise, in_group, judge, run_ranks
from ddp_lessons.text import count, listed, ranks_text

State = dict[str, Tensor]
LoadAnywhere = Callable[[nn.Module, State], object]

# A rank's state when it saves, and how a difference in it is described.
PARTS = {
    "model": "different weights",
    "momentum": "a different momentum",
    "scheduler": "a different learning rate, or a different count of the scheduler's steps,",
    "random": "a different random state",
}


ANOTHER = "`1.bias`, but `1.shift` in the state"

# The last two have layers named like DDP's attribute for its model.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "two layers": lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
    "a layer called `submodule`": lambda: nn.ModuleDict(
        {"encoder": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3), "submodule": nn.Linear(3, 2)}
    ),
    "a layer called `module`": lambda: nn.ModuleDict(
        {"module": nn.Linear(2, 3), "head": nn.Linear(3, 2)}
    ),
    "no other layer than `module`": lambda: nn.ModuleDict({"module": nn.Linear(2, 3)}),
}


def _load_each(_: int, load_anywhere: LoadAnywhere, wrapped: bool) -> tuple[str, ...]:
    """The first case in which loading failed: the model, the state's origin, what happened.

    All ranks go through all cases: each wraps a model in DDP, together.
    """
    problems: list[tuple[str, ...]] = []
    for name, make in MODELS.items():
        for origin, prefix in (("DDP", "module."), ("a plain model", "")):
            torch.manual_seed(1)
            wanted = _filled(make()).state_dict()
            state = {prefix + key: value.clone() for key, value in wanted.items()}
            model: nn.Module = DistributedDataParallel(make()) if wrapped else make()
            problem = _load(load_anywhere, model, state, wanted)
            if problem:
                problems.append((name, origin, problem))
    if _takes_another(load_anywhere, wrapped):
        problems.append((ANOTHER, "a plain model", "loaded, with no error"))
    return problems[0] if problems else ()


def _takes_another(load: LoadAnywhere, wrapped: bool) -> bool:
    """Whether the state of a model with a differently named layer is loaded without an error."""
    plain = MODELS["two layers"]()
    model = DistributedDataParallel(plain) if wrapped else plain
    *first, last = plain.state_dict().items()
    try:
        load(model, dict([*first, ("1.shift", last[1].clone())]))
    except Exception:
        return False
    return True


def _filled(model: nn.Module) -> nn.Module:
    """The model with values that no new model has, also in its buffers."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(3, 100, value.shape))
    return model


def _load(load: LoadAnywhere, model: nn.Module, state: State, wanted: State) -> str:
    """What went wrong; "" for nothing."""
    try:
        load(model, state)
    except Exception as error:
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = inner.state_dict()
    if found.keys() != wanted.keys():
        return "the model has different layers than before"
    lost = [key for key, value in found.items() if not torch.equal(value, wanted[key])]
    return f"not loaded, with no error: {listed(lost)}" if lost else ""


@exercise(
    "`inner = model.module if isinstance(model, DDP) else model` has keys without the prefix.",
    "If the state's keys are not those of `inner`, cut off the first seven letters of each: "
    '`key.removeprefix("module.")`.',
)
def check_load_anywhere(load_anywhere: LoadAnywhere) -> str:
    """Check `load_anywhere(model, state)` for plain and DDP models, with states of both."""
    plain = run_ranks(_load_each, (load_anywhere, False), nprocs=1)
    wrapped = run_ranks(in_group(_load_each), (load_anywhere, True))
    for is_wrapped, run in ((False, plain), (True, wrapped)):
        for problem in filter(None, run.values):
            _explain_loading(is_wrapped, *problem)
    return "plain into plain, DDP into plain, plain into DDP, DDP into DDP; whatever layers' names."


def _explain_loading(wrapped: bool, name: str, origin: str, problem: str) -> None:
    is_simple = name == "two layers"
    mistakes = {
        "This is another model's state: it must raise an error. Values belong to names, not to "
        "places: a `zip` gives every name the next value, whatever its name was, and "
        "`strict=False` leaves out what does not fit. `load_state_dict` compares the names.": (
            name == ANOTHER
        ),
        "A state holds buffers, too, such as running means. `load_state_dict` loads all that is in "
        "it.": "no error" in problem and "running_mean" in problem and "weight" not in problem,
        "Nothing may be left out in silence. Give it all to `load_state_dict`, and stay strict: "
        "`strict=False` skips every key that does not fit, where an error would tell of "
        "it.": "no error" in problem,
        "DDP's own keys begin with `module.`; those of `model.module` do not. Load into the inner "
        "model in any case.": is_simple and wrapped,
        "The keys of a DDP model begin with `module.`, those of the model in it do not. Cut the "
        "prefix off, but only where there is one.": is_simple,
        "Only the beginning of a key may be cut off. `replace` also finds `submodule.`, and "
        "`lstrip` takes away single letters, not a word.": "submodule" in name,
        "That a model has a `module` does not make it DDP's: ask `isinstance(model, DDP)`. And cut "
        "`module.` off once: the "
        "second one in a key is the layer's.": not wrapped and origin == "DDP",
        "Here `module.` begins the key of the model's own layer. What tells a prefix from a layer "
        "is the model: do the state's keys equal its keys or not?": True,
    }
    kind = "in DDP" if wrapped else "plain"
    judge(f"a model with {name}, {kind}; a state from {origin}: {problem}", mistakes)


@exercise(
    "Six things: `model.module.state_dict()`, the state dicts of optimizer and scheduler, `epoch`, "
    "`batch`, and `torch.get_rng_state()` of every rank, which `dist.gather_object` brings to "
    "rank 0.",
    "Rank 0 alone writes, to another name in the same folder; then `os.replace`. After that a "
    "`dist.barrier()` of all ranks.",
    "`load`, on every rank: `torch.load(path)`, the three `load_state_dict`, at last "
    "`torch.set_rng_state` with this rank's own, and `return epoch, batch`.",
)
def check_resume(checkpoint: Any) -> str:
    """Check a class with `save` and `load`: killed runs must end with the same weights."""
    for ranks in (2, 1, 3):
        with tempfile.TemporaryDirectory() as folder:
            run = _run(train, (checkpoint, folder, False), ranks)
            _judge_files(folder)
            _judge_failure(run)
            _judge_returned(run.values)
            resumed = _run(resume, (checkpoint, folder), ranks)
            _judge_failure(resumed)
            _judge_loaded(run.values, resumed.values)
        if ranks == 2:
            with tempfile.TemporaryDirectory() as folder:
                _run(train, (checkpoint, folder, True), ranks)
                _judge_killed(run.values, _run(resume, (checkpoint, folder), ranks))
    return (
        "the same weights, bit for bit, on 2 ranks, 1 and 3; also after rank 0 was killed in the "
        "middle of a write."
    )


def _run(worker: Callable[..., Facts], args: tuple[Any, ...], ranks: int) -> Run:
    run = run_ranks(worker, args, nprocs=ranks, check=False)
    if isinstance(run.error, WorkersHung):
        raise Wrong(
            run.explain(),
            "Every rank calls `save` and `load`. A collective in them must be called by every "
            "rank, too: not under `if rank == 0`, nor after a `return` for the others.",
        )
    return run


def _judge_failure(run: Run) -> None:
    """Raise `Wrong` if a rank failed; two common errors are explained."""
    raised = [error.summary for error in errors(run)]
    mistakes = {
        f"{run.explain()}\n"
        "Only the rank that has written a file may rename it, once; and nobody may read it "
        "before.": any(error.startswith("FileNotFoundError") for error in raised),
        "`torch.load` raised UnpicklingError: Weights only load failed.\n"
        "The file holds whole objects, which `torch.load` does not trust. Save the `state_dict()` "
        "of model, optimizer and scheduler, and numbers and "
        "tensors.": any("Weights only load failed" in error for error in raised),
    }
    judge("", mistakes)
    run.raise_for_failure()


def _judge_loaded(saved: list[Facts], loaded: list[Facts]) -> None:
    ranks, several = count(len(saved), "rank"), "" if len(saved) > 1 else ", alone,"
    for rank, facts in enumerate(loaded):
        place = facts["place"]
        if place == SAVED:
            continue
        mistakes = {
            "Save `epoch` and `batch`, and return both from `load`: `return epoch, batch`.": (
                place is None
            ),
            f"The epoch would begin anew: its first {SAVED[1]} batches would be trained on twice. "
            "The place in the epoch belongs in the checkpoint.": place == (SAVED[0], 0),
            "The training goes on where `save` was called: with that epoch's order and that "
            "batch.": True,
        }
        where = f"saved before {_told(SAVED)}; on rank {rank}{several} `load` returned "
        judge(f"{where}{_told(place)}.", mistakes)
    for part, what in PARTS.items():
        wrong = [r for r, facts in enumerate(loaded) if not _same(facts[part], saved[r][part])]
        if wrong:
            seen = f"{ranks}: after `load`, rank {wrong[0]} has {what} than it had when it saved."
            _explain_part(seen, part, wrong, saved, loaded)
    if not all(torch.equal(a["end"], b["end"]) for a, b in zip(saved, loaded, strict=True)):
        raise Wrong(
            f"{ranks}: after `load` all was there, but the weights in the end differ.",
            "`save` and `load` must change nothing but what they load: no seeds, no new objects.",
        )


def _explain_part(
    seen: str, part: str, wrong: list[int], saved: list[Facts], loaded: list[Facts]
) -> None:
    first, is_random = saved[0]["random"], part == "random"
    all_first = all(torch.equal(loaded[rank]["random"], first) for rank in wrong)
    mistakes = {
        "It got that of rank 0. Then all ranks draw the same dropout from now on. Each rank has a "
        "random state of its own: gather all, and give "
        "each its own back.": is_random and len(saved) > 1 and all_first,
        "Dropout would draw different numbers than in the undisturbed run. Save "
        "`torch.get_rng_state()` of every rank, and set it last.": is_random,
        "Only rank 0 loaded it. DDP makes the weights equal when it wraps the model, and never "
        "again; of the optimizer it knows nothing. Every rank must load.": 0 not in wrong,
        "The weights belong in the checkpoint: `model.module.state_dict()`.": part == "model",
        "SGD with momentum remembers a mean of past gradients; without it the first steps are too "
        "short. Save and load `optimizer.state_dict()`.": part == "momentum",
        "It counts steps, and halves the rate after every fourth. Save and load "
        "`scheduler.state_dict()`, and the optimizer's, where the rate is.": part == "scheduler",
    }
    judge(seen, mistakes)


def _judge_files(folder: str) -> None:
    """Raise `Wrong` if several ranks wrote to one file."""
    for name, ranks in writers(folder).items():
        if len(ranks) > 1:
            raise Wrong(
                f"{ranks_text(ranks)} wrote to the same file, {name}.",
                "The last one overwrites the others, or the file is a mixture of both. Let "
                "rank 0 write alone.",
            )


def _judge_returned(ranks: list[Facts]) -> None:
    """Raise `Wrong` if `save` returned on a rank before everything was written."""
    written = max(facts["written_ns"] for facts in ranks)
    early = [rank for rank, facts in enumerate(ranks) if facts["returned_ns"] < written]
    if early:
        raise Wrong(
            f"`save` returned on rank {early[0]} while another rank was still writing.",
            "What it goes on with may read the file, or end the job. Let all ranks meet in a "
            "`dist.barrier()` when the file is there.",
        )


def _told(place: tuple[int, int] | None) -> str:
    return "no two numbers" if place is None else f"epoch {place[0]}, batch {place[1]}"


def _judge_killed(saved: list[Facts], run: Run) -> None:
    """Raise `Wrong` if a second, interrupted save destroyed the first one."""
    killed = "rank 0 was killed in the middle of its second `save`. "
    if not run.ok:
        raise Wrong(
            f"{killed}After that `load` failed.\n{run.explain()}",
            "Write to another name in the same folder, and `os.replace` it when it is complete: "
            "then the old checkpoint is there until the new one is.",
        )
    if any(facts["torn"] for facts in run.values):
        raise Wrong(
            "the second `save` wrote into the file of the first one.",
            "Killed in the middle of that, a rank leaves half a checkpoint and no older one. Write "
            "to another name in the same folder, and `os.replace` it when it is complete.",
        )
    places = {loaded["place"] for loaded in run.values}
    is_second = places == {CUT}  # it was whole: the kill came after it
    whole = [facts["later"] for facts in saved] if is_second else saved
    pairs = list(zip(whole, run.values, strict=True))
    other = [
        what.rstrip(",")
        for part, what in PARTS.items()
        if not all(_same(a[part], b[part]) for a, b in pairs)
    ]
    if other or places not in ({SAVED}, {CUT}):
        found = ", ".join([*map(_told, sorted(places, key=str)), *other])
        raise Wrong(
            f"{killed}What `load` found then was not what the first one saved: {found}.",
            "Some files were of the first save and some of the second. One file that is replaced "
            "at once cannot be torn apart.",
        )


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
