"""The checks of lesson 12: the solution passes; typical wrong answers are explained.

The training that the checks kill, `exercises/checkpoint_training.py`, is tested with them.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.exercises.rank_zero import check_load_anywhere, check_resume
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def inner(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def load_anywhere(model: Any, state: Any) -> None:
    model = inner(model)
    if state.keys() != model.state_dict().keys():
        state = {key.removeprefix("module."): value for key, value in state.items()}
    model.load_state_dict(state)


def by_the_other_way(model: Any, state: Any) -> None:
    """Gives the state DDP's keys, and loads it into DDP."""
    wanted = list(model.state_dict())
    if list(state) != wanted:
        longer = len(next(iter(state))) < len(wanted[0])
        change = "module.{}".format if longer else lambda key: key[len("module.") :]
        state = {change(key): value for key, value in state.items()}
    model.load_state_dict(state)


def as_it_is(model: Any, state: Any) -> None:
    model.load_state_dict(state)


def not_strict(model: Any, state: Any) -> None:
    model.load_state_dict(state, strict=False)


def replaced(model: Any, state: Any) -> None:
    inner(model).load_state_dict({k.replace("module.", ""): v for k, v in state.items()})


def stripped(model: Any, state: Any) -> None:
    inner(model).load_state_dict({k.lstrip("module."): v for k, v in state.items()})


def always_cut(model: Any, state: Any) -> None:
    inner(model).load_state_dict({k[7:]: v for k, v in state.items()})


def if_all_begin_with_it(model: Any, state: Any) -> None:
    if all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    inner(model).load_state_dict(state)


def whatever_has_a_module(model: Any, state: Any) -> None:
    load_anywhere(getattr(model, "module", model), state)


def into_outer(model: Any, state: Any) -> None:
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})


def consumed(model: Any, state: Any) -> None:
    consume_prefix_in_state_dict_if_present(state, "module.")
    inner(model).load_state_dict(state)


def by_hand(model: Any, state: Any) -> None:
    wanted = inner(model).state_dict()
    cut = 0 if state.keys() == wanted.keys() else len("module.")
    with torch.no_grad():
        for key, value in state.items():
            wanted[key[cut:]].copy_(value)


def assigned(model: Any, state: Any) -> Any:
    keys = list(inner(model).state_dict())
    return inner(model).load_state_dict(dict(zip(keys, state.values(), strict=True)), assign=True)


def copied_in_order(model: Any, state: Any) -> None:
    for value, loaded in zip(inner(model).state_dict().values(), state.values(), strict=False):
        value.copy_(loaded)


def fitted_but_not_strict(model: Any, state: Any) -> None:
    model = inner(model)
    if state.keys().isdisjoint(model.state_dict()):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    model.load_state_dict(state, strict=False)


def emptied(model: Any, state: Any) -> None:
    """Takes the state apart, piece by piece."""
    model = inner(model)
    if state.keys() ^ model.state_dict().keys():
        for key in list(state):
            state[key.partition(".")[2]] = state.pop(key)
    model.load_state_dict(state)


def only_parameters(model: Any, state: Any) -> None:
    load_anywhere(model, inner(model).state_dict() | dict(inner(model).named_buffers()))
    wanted = dict(inner(model).named_parameters())
    cut = 0 if state.keys() == inner(model).state_dict().keys() else len("module.")
    for key, value in state.items():
        if key[cut:] in wanted:
            wanted[key[cut:]].data.copy_(value)


def on_rank_0(model: Any, state: Any) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        load_anywhere(model, state)


class Checkpoint:
    """The solution with the errors named in `flaws`."""

    flaws: tuple[str, ...] = ()

    def save(
        self, path: str, model: Any, optimizer: Any, scheduler: Any, epoch: int, batch: int
    ) -> None:
        flaws = self.flaws
        rng = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        if "gather on rank 0" not in flaws or dist.get_rank() == 0:
            dist.gather_object(torch.get_rng_state(), rng)
        state = {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "place": (epoch, 0 if "epoch anew" in flaws else batch),
            "rng": rng,
        }
        if dist.get_rank() == 0 or "all write" in flaws:
            self.write(state, path)
        if "no barrier" not in flaws:
            dist.barrier()

    def write(self, state: Any, path: str) -> None:
        if "in place" in self.flaws:
            torch.save(state, path)
            return
        with open(f"{path}.new", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)

    def load(self, path: str, model: Any, optimizer: Any, scheduler: Any) -> Any:
        flaws = self.flaws
        state = torch.load(path)
        if "only rank 0 loads" not in flaws or dist.get_rank() == 0:
            model.module.load_state_dict(state["model"])
        if "optimizer" not in flaws:
            optimizer.load_state_dict(state["optimizer"])
        if "scheduler" not in flaws:
            scheduler.load_state_dict(state["scheduler"])
        if "rng" not in flaws:
            torch.set_rng_state(state["rng"][0 if "rng of 0" in flaws else dist.get_rank()])
        return None if "no place" in flaws else state["place"]


def but(*flaws: str) -> Any:
    return type("Checkpoint", (Checkpoint,), {"flaws": flaws})


class PerRank:
    """One file for each rank: right, except for a kill between two writes."""

    def save(self, path: str, *parts: Any) -> None:
        *modules, epoch, batch = parts
        state = [m.state_dict() for m in modules]
        target = f"{path}.{dist.get_rank()}"
        torch.save([state, epoch, batch, torch.get_rng_state()], f"{target}.new")
        os.replace(f"{target}.new", target)
        dist.barrier()

    def load(self, path: str, *modules: Any) -> Any:
        state, epoch, batch, rng = torch.load(f"{path}.{dist.get_rank()}")
        for module, loaded in zip(modules, state, strict=True):
            module.load_state_dict(loaded)
        torch.set_rng_state(rng)
        return epoch, batch


class RandomApart(Checkpoint):
    """Keeps each rank's random state in a file of its own, which is not replaced atomically."""

    def save(self, path: str, *parts: Any) -> None:
        torch.save(torch.get_rng_state(), f"{path}.random.{dist.get_rank()}")
        super().save(path, *parts)

    def load(self, path: str, *modules: Any) -> Any:
        place = super().load(path, *modules)
        torch.set_rng_state(torch.load(f"{path}.random.{dist.get_rank()}"))
        return place


class Whole(Checkpoint):
    def write(self, state: Any, path: str) -> None:
        super().write({**state, "optimizer": nn.ReLU()}, path)


class AllRename(Checkpoint):
    def save(self, path: str, *parts: Any) -> None:
        super().save(path, *parts)
        os.replace(f"{path}.new", path)


class Pickled(Checkpoint):
    """Writes with pickle; `load` returns a list."""

    def write(self, state: Any, path: str) -> None:
        with open(f"{path}.new", "wb") as file:
            pickle.dump(state, file)
        os.replace(f"{path}.new", path)

    def load(self, path: str, model: Any, optimizer: Any, scheduler: Any) -> Any:
        with open(path, "rb") as file:
            state = pickle.load(file)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"][dist.get_rank()])
        return list(state["place"])


class InPlace(Pickled):
    """Writes over the old file, and not by `torch.save`."""

    def write(self, state: Any, path: str) -> None:
        with open(path, "wb") as file:
            pickle.dump(state, file)


class OneOfAll(Checkpoint):
    """Every rank sends all its parts; `load` reads on rank 0, and sends the rest theirs."""

    def save(self, path: str, *parts: Any) -> None:
        *modules, epoch, batch = parts
        mine = [*(m.state_dict() for m in modules), torch.get_rng_state()]
        each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(each, mine)
        if dist.get_rank() == 0:
            self.write({"each": each, "place": torch.tensor([epoch, batch])}, path)
        dist.all_reduce(torch.zeros(1))

    def load(self, path: str, *modules: Any) -> Any:
        loaded: list[Any] = [torch.load(path) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(loaded)
        *states, random = loaded[0]["each"][dist.get_rank()]
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        torch.set_rng_state(random)
        return loaded[0]["place"]


class Folders(Checkpoint):
    """Writes each checkpoint to a new folder; a link, replaced at once, names the last one."""

    def write(self, state: Any, path: str) -> None:
        folder = tempfile.mkdtemp(dir=os.path.dirname(path))
        torch.save(state, os.path.join(folder, "all.pt"))
        os.symlink(os.path.join(folder, "all.pt"), os.path.join(folder, "link"))
        os.replace(os.path.join(folder, "link"), path)


class Swapped(Checkpoint):
    def load(self, *args: Any) -> Any:
        return super().load(*args)[::-1]


class OnlyRank0Saves(Checkpoint):
    def save(self, *args: Any) -> None:
        if dist.get_rank() == 0:
            super().save(*args)


class ForTwo(Checkpoint):
    """Right on two ranks only."""

    def load(self, *args: Any) -> Any:
        place = super().load(*args)
        return place if dist.get_world_size() == 2 else (place[0], 0)


def on_each_number(*kinds: Any) -> Any:
    """Another class on each number of ranks: they share the check's runs."""
    return lambda: kinds[dist.get_world_size() % len(kinds)]()


class Seeds(Checkpoint):
    def load(self, *args: Any) -> Any:
        place = super().load(*args)
        args[1].register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
        return place


class Nothing:
    def save(self, *args: Any) -> None:
        print("saved")

    def load(self, *args: Any) -> Any:
        return 1, 2


class Raises(Checkpoint):
    def save(self, *args: Any) -> None:
        raise OSError("disk full")


RIGHT: list[tuple[Any, Any]] = [
    (check_load_anywhere, load_anywhere),
    (check_load_anywhere, by_the_other_way),
    (check_load_anywhere, by_hand),
    (check_load_anywhere, emptied),
    (check_load_anywhere, partial(answers.decorated(load_anywhere))),
    (check_resume, Checkpoint),
    (check_resume, on_each_number(Pickled, OneOfAll, Folders)),
    (check_resume, on_each_number(OneOfAll, partial(Checkpoint), Pickled)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_load_anywhere, as_it_is, "plain; a state from DDP: raised RuntimeError.*begin with `mo"),
    (
        check_load_anywhere,
        not_strict,
        "from DDP: not loaded, with no error: 0.weight.*`strict=False` skips",
    ),
    (check_load_anywhere, assigned, "plain model: loaded, with no error.*names, not to places"),
    (check_load_anywhere, copied_in_order, "`1.shift` in the state.*names, not to places"),
    (check_load_anywhere, fitted_but_not_strict, "`1.shift` in the state.*`strict=False` leaves"),
    (check_load_anywhere, replaced, "layer called `submodule`.*`replace` also finds"),
    (check_load_anywhere, stripped, "layer called `submodule`.*single letters"),
    (check_load_anywhere, always_cut, "two layers, plain; a state from a plain.*only where there"),
    (check_load_anywhere, consumed, "layer called `module`.*own layer"),
    (check_load_anywhere, into_outer, "layer called `module`.*own layer"),
    (check_load_anywhere, if_all_begin_with_it, "no other layer than `module`, plain.*own layer"),
    (check_load_anywhere, whatever_has_a_module, "layer called `module`, plain; a st.*isinstance"),
    (check_load_anywhere, lambda model, state: model.eval(), "not loaded, with no error.*left out"),
    (check_load_anywhere, only_parameters, "not loaded, with no error: norm.running_mean.*buffers"),
    (check_load_anywhere, on_rank_0, "two layers, in DDP; .*not loaded, with no error"),
    (check_load_anywhere, answers.recurses, "raised RecursionError"),
    (check_load_anywhere, lambda model: model.eval(), "raised TypeError"),
    (
        check_resume,
        but("optimizer"),
        "2 ranks: .*rank 0 has a different momentum.*optimizer.state_d",
    ),
    (
        check_resume,
        but("scheduler"),
        "2 ranks: .*rank 0 has a different learning rate.*scheduler.sta",
    ),
    (check_resume, but("rng"), "rank 0 has a different random state.*set it last"),
    (check_resume, but("rng of 0"), "rank 1 has a different random state.*that of rank 0"),
    (check_resume, but("only rank 0 loads"), "rank 1 has different weights.*Every rank must load"),
    (check_resume, but("epoch anew"), "`load` returned epoch 1, batch 0.*begin anew"),
    (check_resume, but("no place"), "on rank 0 `load` returned no two numbers.*return both"),
    (check_resume, but("all write"), "ranks 0 and 1 wrote to the same file, last.pt.new"),
    (check_resume, but("no barrier"), "returned on rank 1 while another rank was still.*barrier"),
    (check_resume, but("in place"), "killed in the middle.*`load` failed.*os.replace"),
    (check_resume, but("gather on rank 0"), "gather_object.*Every rank calls `save`"),
    (check_resume, PerRank, "killed in the middle.*epoch 1, batch 2, epoch 2, batch 1.*torn apart"),
    (check_resume, RandomApart, "killed.*epoch 1, batch 2, a different random state.*torn apart"),
    (check_resume, Whole, "Weights only load failed.*whole objects"),
    (check_resume, AllRename, "FileNotFoundError.*Only the rank that has written"),
    (check_resume, InPlace, "second `save` wrote into the file of the first.*os.replace"),
    (check_resume, Swapped, "returned epoch 2, batch 1.*goes on where `save` was called"),
    (check_resume, OnlyRank0Saves, "gather_object|barrier.*Every rank calls `save`"),
    (check_resume, ForTwo, "rank 0, alone, `load` returned epoch 1, batch 0"),
    (check_resume, Seeds, "all was there, but the weights in the end differ"),
    (check_resume, Nothing, "rank 0 has different weights.*belong in the checkpoint"),
    (check_resume, Raises, "failed on real ranks.*disk full"),
    (check_resume, dict, "failed on real ranks.*AttributeError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
