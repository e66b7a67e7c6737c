"""The checks of real_3: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddp_lessons.exercises.real_detector import check_look, check_run_folder
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Find = Callable[[Tensor], Tensor]


def name_of(number: int) -> str:
    return f"exp{number if number > 1 else ''}"


def claim(project: str) -> str:
    for number in itertools.count(1):
        try:
            os.mkdir(path := os.path.join(project, name_of(number)))
        except FileExistsError:
            continue
        return path
    raise AssertionError


def first_free(project: str) -> str:
    paths = (f"{project}/{name_of(number)}" for number in itertools.count(1))
    return next(path for path in paths if not os.path.exists(path))


def told(rank: int, path: str | None) -> Any:
    """What rank 0 has, on all ranks."""
    said = [path]
    if rank != -1:
        dist.broadcast_object_list(said, src=0)
    return said[0]


def by_broadcast(rank: int, project: str) -> Any:
    return told(rank, claim(project) if rank in (-1, 0) else None)


def by_number(rank: int, project: str) -> Path:
    """The number travels, as a tensor, and rank 0's may be 10."""
    number = torch.zeros(1, dtype=torch.int64)
    while rank <= 0 and number.item() == 0:
        for candidate in itertools.count(1):
            try:
                Path(project, name_of(candidate)).mkdir()
            except FileExistsError:
                continue
            number += candidate
            break
    if rank >= 0:
        dist.all_reduce(number)
    return Path(project) / name_of(int(number))


def by_last_rank(rank: int, project: str) -> Any:
    if not dist.is_initialized():
        return claim(project)
    last = dist.get_world_size() - 1
    every: list[Any] = [None] * (last + 1)
    dist.all_gather_object(every, claim(project) if rank == last else None)
    return every[last]


def by_messages(rank: int, project: str) -> str:
    """Looks first, and tries again when it came too late; as bytes from rank to rank."""
    if rank > 0:
        buffer = torch.zeros(500, dtype=torch.uint8)
        dist.recv(buffer, src=rank - 1)
    else:
        while True:
            try:
                os.makedirs(path := first_free(project))
                break
            except OSError:
                pass
        data = torch.tensor(list(path.encode()), dtype=torch.uint8)
        buffer = torch.cat([data, torch.zeros(500 - len(data), dtype=torch.uint8)])
    if rank != -1 and rank + 1 < dist.get_world_size():
        dist.send(buffer, dst=rank + 1)
    return bytes(buffer.tolist()).rstrip(b"\0").decode()


def by_scatter(rank: int, project: str) -> Any:
    if rank == -1:
        return claim(project)
    mine: list[Any] = [None]
    all_of_it = [claim(project)] * dist.get_world_size() if rank == 0 else None
    dist.scatter_object_list(mine, all_of_it, src=0)
    dist.barrier()
    return Path(mine[0])


def usual(rank: int, project: str) -> str:
    os.makedirs(path := first_free(project), exist_ok=True)
    return path


def told_usual(rank: int, project: str) -> Any:
    return told(rank, usual(rank, project) if rank in (-1, 0) else None)


def told_strict(rank: int, project: str) -> Any:
    if rank in (-1, 0):
        os.mkdir(path := first_free(project))
    return told(rank, path if rank in (-1, 0) else None)


def each_claims(rank: int, project: str) -> str:
    return claim(project)


def newest(rank: int, project: str) -> str:
    """The others wait at a barrier, and take the folder with the highest number."""
    if rank in (-1, 0):
        path = claim(project)
    if rank != -1:
        dist.barrier()
    if rank > 0:
        names = [n for n in os.listdir(project) if os.path.isdir(f"{project}/{n}")]
        path = f"{project}/{max(names, key=lambda name: int(name[3:] or 1))}"
    return path


def polls(rank: int, project: str) -> str:
    """The others wait for a folder to appear."""
    if rank in (-1, 0):
        return claim(project)
    while not (names := sorted(os.listdir(project))):
        time.sleep(0.01)
    return f"{project}/{names[-1]}"


def as_text(rank: int, project: str) -> Any:
    """The highest name there is as text, and one more."""
    if rank in (-1, 0):
        names = sorted(name for name in os.listdir(project) if os.path.isdir(f"{project}/{name}"))
        number = int(names[-1][3:] or 1) + 1 if names else 1
        os.makedirs(path := f"{project}/{name_of(number)}", exist_ok=True)
    return told(rank, path if rank in (-1, 0) else None)


def counted(rank: int, project: str) -> Any:
    """As many as there are, and one."""
    if rank in (-1, 0):
        path = f"{project}/{name_of(len(os.listdir(project)) + 1)}"
        os.makedirs(path, exist_ok=True)
    return told(rank, path if rank in (-1, 0) else None)


def always_exp(rank: int, project: str) -> str:
    os.makedirs(f"{project}/exp", exist_ok=True)
    return f"{project}/exp"


def name_only(rank: int, project: str) -> Any:
    return os.path.basename(by_broadcast(rank, project))


def only_zero_knows(rank: int, project: str) -> Any:
    path = by_broadcast(rank, project)
    return path if rank <= 0 else None


def nothing(rank: int, project: str) -> None:
    by_broadcast(rank, project)


def zero_in_branch(rank: int, project: str) -> Any:
    if rank == 0:
        said = [claim(project)]
        dist.broadcast_object_list(said, src=0)
        return said[0]
    return None if rank > 0 else claim(project)


def group_needed(rank: int, project: str) -> Any:
    said = [claim(project) if rank <= 0 else None]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def off_forgotten(rank: int, project: str) -> Any:
    return told(rank, claim(project) if rank == 0 else None)


def all_then_zero(rank: int, project: str) -> Any:
    return told(rank, claim(project))


def counts(found: Tensor, rank: int) -> Any:
    sums = torch.tensor([found.sum(), len(found)], dtype=torch.float64)
    if rank != -1:
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def strided(rank: int, find: Find, images: Tensor) -> Any:
    return counts(find(images[max(rank, 0) :: world()]), rank)


def contiguous(rank: int, find: Find, images: Tensor) -> Any:
    """`tensor_split` makes parts that differ by one; it gives a tensor back."""
    hits = find(images.tensor_split(world())[max(rank, 0)]).sum()
    if rank >= 0:
        dist.all_reduce(hits)
    return hits / len(images)


def gathered(rank: int, find: Find, images: Tensor) -> Any:
    """The results themselves travel, as an array."""
    every: list[Any] = [find(images[max(rank, 0) :: world()]).numpy()]
    if dist.is_initialized():
        mine, every = every[0], [None] * world()
        dist.all_gather_object(every, mine)
    return np.concatenate(every).mean()


def one_by_one(rank: int, find: Find, images: Tensor) -> Any:
    hits = [bool(find(image[None])) for image in list(images)[max(rank, 0) :: world()]]
    return counts(torch.tensor(hits), rank)


def weighted(rank: int, find: Find, images: Tensor) -> Any:
    """The mean of the shares' means, weighted by how many images each has."""
    mine = images[rank % world() :: world()]
    value = torch.zeros(1).double()
    if len(mine):
        value += find(mine).double().mean() * len(mine) / len(images)
    if rank >= 0:
        dist.all_reduce(value)
    return float(value)


def from_the_end(rank: int, find: Find, images: Tensor) -> Any:
    """Rank 0 gathers, computes and tells."""
    if rank < 0:
        return find(images).double().mean()
    order = torch.arange(len(images)).flip(0)[rank :: world()]
    parts: list[Any] = [None] * world()
    dist.gather_object(find(images[order]).tolist(), parts if rank == 0 else None, dst=0)
    value = torch.zeros(())
    if rank == 0:
        value += sum(map(sum, parts)) / len(images)
    dist.broadcast(value, src=0)
    return value


def alone(rank: int, find: Find, images: Tensor) -> Any:
    value = torch.zeros(1)
    if rank in (-1, 0):
        value += find(images).float().mean()
    if rank != -1:
        dist.broadcast(value, src=0)
    return value.item()


def all_of_it(rank: int, find: Find, images: Tensor) -> Any:
    return find(images).float().mean().item()


def mean_of_means(rank: int, find: Find, images: Tensor) -> Any:
    mine = images[max(rank, 0) :: world()]
    value = find(mine).float().mean().reshape(1) if len(mine) else torch.zeros(1)
    if rank != -1:
        dist.all_reduce(value)
    return value.item() / world()


def nan_mean(rank: int, find: Find, images: Tensor) -> Any:
    value = find(images[max(rank, 0) :: world()]).float().mean()
    if rank != -1:
        dist.all_reduce(value)
    return value.item() / world()


def own_share(rank: int, find: Find, images: Tensor) -> Any:
    found = find(images[max(rank, 0) :: world()])
    return found.sum().item() / max(len(found), 1)


def sampled(rank: int, find: Find, images: Tensor) -> Any:
    sampler = DistributedSampler(range(len(images)), world(), max(rank, 0), shuffle=False)
    return counts(find(images[list(sampler)]), rank)


def dropped(rank: int, find: Find, images: Tensor) -> Any:
    each = len(images) // world()
    return counts(find(images[max(rank, 0) * each :][:each]), rank)


def rounded_up(rank: int, find: Find, images: Tensor) -> Any:
    each = -(-len(images) // world())
    return counts(find(images[max(rank, 0) * each :][:each]), rank)


def reduced(rank: int, find: Find, images: Tensor) -> Any:
    hits = find(images[max(rank, 0) :: world()]).sum().double()
    if rank != -1:
        dist.reduce(hits, dst=0)
    return hits.item() / len(images)


def on_zero_only(rank: int, find: Find, images: Tensor) -> float | None:
    value = strided(rank, find, images)
    return value if rank <= 0 else None


def of_minus_one(rank: int, find: Find, images: Tensor) -> Any:
    return counts(find(images[rank :: world()]), rank)


def not_divided(rank: int, find: Find, images: Tensor) -> Any:
    return strided(rank, find, images) * len(images)


def if_images(rank: int, find: Find, images: Tensor) -> Any:
    mine = images[max(rank, 0) :: world()]
    return counts(find(mine), rank) if len(mine) else 0.0


def needs_group(rank: int, find: Find, images: Tensor) -> Any:
    return counts(find(images[max(rank, 0) :: dist.get_world_size()]), rank)


def never_finds(rank: int, find: Find, images: Tensor) -> Any:
    return 0.5


def as_list(rank: int, find: Find, images: Tensor) -> Any:
    return [strided(rank, find, images)] * 2


RIGHT: list[tuple[Any, Any]] = [
    *((check_run_folder, a) for a in (by_broadcast, by_number, by_last_rank, by_messages)),
    (check_run_folder, answers.Called(by_scatter)),
    (check_run_folder, answers.decorated(by_broadcast)),
    *((check_look, a) for a in (strided, contiguous, gathered, one_by_one, weighted)),
    (check_look, functools.partial(from_the_end)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (
        check_run_folder,
        usual,
        "an empty project: rank 0 returned exp, rank 1 returned exp2.*itself",
    ),
    (check_run_folder, told_usual, "another job .*exp.* belongs to the other job.*`exist_ok=True`"),
    (check_run_folder, told_strict, "another job.*FileExistsError.*is no failure"),
    (
        check_run_folder,
        each_claims,
        "an empty project: rank 0 returned exp, rank 1.*looks by itself",
    ),
    (check_run_folder, newest, "another job.*rank 1 returned exp3.*another one's folder"),
    (check_run_folder, polls, "exp10 are there: .*rank 1 returned exp9.*looks by itself"),
    (check_run_folder, as_text, "exp10 are there: every rank returned exp10, which was there"),
    (check_run_folder, counted, "another job.*returned exp, and that folder belongs to the oth"),
    (
        check_run_folder,
        always_exp,
        "exp10 are there: every rank returned exp, which was there before",
    ),
    (check_run_folder, name_only, "returned exp, not the whole path"),
    (check_run_folder, only_zero_knows, "rank 1 returned None.*Every rank needs the path"),
    (check_run_folder, nothing, "Return the path of the new folder"),
    (check_run_folder, zero_in_branch, "they hang.*same collectives|returned None"),
    (check_run_folder, group_needed, "-1, without a group|raised ValueError.*-1 stands"),
    (check_run_folder, off_forgotten, "-1, without a group, an empty project.*returned None"),
    (check_run_folder, all_then_zero, "the job made exp, exp2 and exp3.*One folder a job"),
    (check_run_folder, lambda: 1, "TypeError"),
    (check_look, alone, "rank 0 looked at all of them, the others at none.*They wait"),
    (check_look, all_of_it, "every rank looked at all"),
    (check_look, mean_of_means, "8 images on 3.*mean of the ranks' shares is right only"),
    (check_look, nan_mean, "8 images.*mean of the ranks'|not a number"),
    (check_look, own_share, "9 images on 3.*rank's own share"),
    (check_look, sampled, "8 images on 3 ranks: image 0 was looked at more than once.*sampler"),
    (check_look, dropped, "8 images on 3 ranks: images 6 and 7 were not looked at.*left over"),
    (check_look, rounded_up, "4 images on 3 ranks: the ranks looked at 2, 2 and 0 images"),
    (check_look, reduced, "9 images.*`reduce` and `gather` give it to one rank"),
    (check_look, on_zero_only, "rank 1 returned None.*`return` missing"),
    (check_look, of_minus_one, "without a group, 9 images: it looked at image 8 only.*last image"),
    (check_look, not_divided, "must be divided by that of all"),
    (check_look, if_images, "they hang.*also a rank without an image"),
    (check_look, needs_group, "raised ValueError.*-1 stands for a plain process"),
    (check_look, never_finds, "nobody called `find`"),
    (check_look, as_list, "Return one number"),
    (check_look, lambda rank, find, images: find(images[0]), "find needs images of shape"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
