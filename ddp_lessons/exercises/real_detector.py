"""The checks of real_3: a run folder of one job alone, a validation that all ranks share."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_lessons import Run, span
from ddp_lessons.exercises.framework import (
    Wrong,
    call,
    errors,
    exercise,
    in_group,
    judge,
    run_ranks,
    stuck,
)
from ddp_lessons.exercises.numeric_answers import is_number, near, number_or_text
from ddp_lessons.text import agree, count, listed

RunFolder = Callable[[int, str], Any]
OFF = "rank -1, without a group"
NO_GROUP = "-1 stands for a plain process: there is no group, so no call of `dist` that needs one."
APART = 0.05  # seconds from one rank's call to the next one's
LATE = 0.3  # seconds by which rank 0 comes after the others
OWNER = "of another job"


class Round(NamedTuple):
    """One call of the answer: what is there before, and what the new folder must be called."""

    title: str
    there: tuple[str, ...]
    right: str
    late: bool = False
    other_job: bool = False


ROUNDS = (
    Round("an empty project", (), "exp"),
    Round("exp to exp10 are there", ("exp", *(f"exp{n}" for n in range(2, 11))), "exp11"),
    Round("exp, exp3 and a file exp2 are there", ("exp", "exp2.file", "exp3"), "exp4"),
    Round("rank 0 comes last", ("exp",), "exp2", late=True),
    Round("another job makes folders at the same time", (), "exp2", other_job=True),
)


class _OtherJob:
    """A job that makes the folder which this one wants, just before it, and the next, just after.

    It stands in the place of `os.mkdir`, through which `os.makedirs` and `Path.mkdir` go, too.
    """

    def __init__(self, project: str) -> None:
        self.project, self.make = os.path.realpath(project), os.mkdir
        self.is_before = True

    def __call__(self, path: Any, *args: Any, **options: Any) -> None:
        wanted = Path(os.fsdecode(path))
        of_run = re.fullmatch(r"exp(\d*)", wanted.name)
        if of_run is None or os.path.realpath(wanted.parent) != self.project:
            self.make(path, *args, **options)
            return
        if self.is_before:
            self.is_before = False
            self._take(wanted)
        self.make(path, *args, **options)
        self._take(wanted.with_name(f"exp{int(of_run[1] or 1) + 1}"))

    def _take(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.make(path)
            (path / OWNER).touch()


@contextlib.contextmanager
def _beside(other_job: bool, project: str) -> Iterator[None]:
    make = os.mkdir
    if other_job:
        os.mkdir = _OtherJob(project)
    try:
        yield
    finally:
        os.mkdir = make


@in_group
def _make(rank: int, run_folder: RunFolder, top: str) -> list[str]:
    """What the answer returned in each round, as text."""
    returned = []
    for number, turn in enumerate(ROUNDS):
        project = f"{top}/{number}"
        dist.barrier()
        time.sleep(LATE if turn.late and rank == 0 else APART * rank)
        with span(f"round {number}"), _beside(turn.other_job, project):
            returned.append(_as_text(run_folder(rank, project)))
            dist.all_reduce(torch.ones(1))  # where ranks with too many calls do not meet
    return returned


def _as_text(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else repr(path)


def _prepare(project: Path, there: Sequence[str]) -> None:
    project.mkdir()
    for name in there:
        if name.endswith(".file"):
            (project / name.removesuffix(".file")).touch()
        else:
            (project / name).mkdir()


@exercise(
    "Who looks for a number, and how do the others learn which it was? And when two jobs want the "
    "same folder, what tells the second one that it came too late?",
    "`os.mkdir` makes a folder or raises FileExistsError, in one step that nobody can come "
    "between. So do not look first: try `exp`, then `exp2`, until one can be made. Rank 0 does "
    "that and broadcasts the path.",
    "`for n in itertools.count(1)`: path = f\"{project}/exp{n if n > 1 else ''}\"; `try: "
    "os.mkdir(path)`, then `break`; `except FileExistsError: pass`. Under `if rank in (-1, 0)`. "
    "Then `told = [path]` (on the others `[None]`), and `dist.broadcast_object_list(told, src=0)` "
    "if rank is not -1.",
)
def check_run_folder(run_folder: RunFolder) -> str:
    """Check `run_folder(rank, project)`: one new folder a job, and all ranks know it."""
    for nprocs in (3, 1):
        with tempfile.TemporaryDirectory() as top:
            for number, turn in enumerate(ROUNDS):
                _prepare(Path(top, str(number)), turn.there)
            run = run_ranks(_make, (run_folder, top), nprocs, check=False)
            where = count(nprocs, "rank")
            _judge_run(where, run)
            for number, turn in enumerate(ROUNDS):
                returned = [of_rank[number] for of_rank in run.values]
                _judge_round(f"{where}, {turn.title}", turn, Path(top, str(number)), returned)
    with tempfile.TemporaryDirectory() as top:
        for turn in (ROUNDS[0], ROUNDS[1]):
            _prepare(project := Path(top, turn.right), turn.there)
            path = call(functools.partial(run_folder, -1), str(project), because=NO_GROUP)
            _judge_round(f"{OFF}, {turn.title}", turn, project, [_as_text(path)])
    return "one new folder, known to all ranks, also beside another job; and it can be off."


def _judge_run(where: str, run: Run) -> None:
    if run.ok:
        return
    assert run.verdict is not None
    seen = f"{where}, {ROUNDS[_round_of(run)].title}: "
    if stuck(run):
        raise Wrong(
            f"{seen}they hang. {run.verdict.title}.",
            "Whatever the `if`s are, each rank must make the same collectives as the others, in "
            "the same order.",
        )
    error = next(iter(errors(run)), None)
    raised = error.summary if error else run.verdict.title
    beside = ROUNDS[_round_of(run)].other_job
    mistakes = {
        "The name was taken between your look and your `mkdir`, by another job. That is no "
        "failure: catch FileExistsError and try the next number.": "FileExists" in raised
        and (beside or run.world_size == 1),
        "Every rank makes a folder, and the second one finds it there. One rank of the job makes "
        "it and tells the others.": "FileExists" in raised and run.world_size > 1,
    }
    judge(f"{seen}rank {run.verdict.ranks[0]} raised {raised}", mistakes)
    run.raise_for_failure()


def _round_of(run: Run) -> int:
    """The round in which the rank stands that has come least far."""
    ended = [
        sum(s.name.startswith("round") and s.t1_ns is not None for s in rank.spans)
        for rank in run.ranks
    ]
    return min(min(ended), len(ROUNDS) - 1)


def _judge_round(where: str, turn: Round, project: Path, returned: Sequence[str]) -> None:
    found = {path.name for path in project.iterdir() if path.is_dir()}
    others = {path.parent.name for path in project.glob(f"*/{OWNER}")}
    made = sorted(found - set(turn.there) - others, key=lambda name: (len(name), name))
    names = [os.path.basename(path.rstrip("/")) for path in returned]
    said = _said(names)
    mistakes = {
        f"{said}.\nEvery rank needs the path. Is a `return` missing, or did only one rank learn "
        "it?": "None" in returned and len(set(returned)) > 1,
        f"{said}.\nReturn the path of the new folder.": not all(
            os.path.isdir(os.path.join(project, path)) for path in returned
        ),
        f"{said}.\nA rank that looks by itself sees what the disk has at that moment, which may "
        "be another one's folder. One rank of the job decides, and tells the others.": len(
            set(names)
        )
        > 1,
        f"{said}, and that folder belongs to the other job.\nIt was made between your look and "
        "your `mkdir`, and `exist_ok=True` says that this is fine. Two jobs now write over "
        "each other's checkpoints. Let `mkdir` fail, and try the next number.": names[0] in others,
        f"the job made {_list(made)}.\nOne folder a job: only one rank makes it.": len(made) > 1,
        f"{said}, which was there before.\nEach run needs a folder that nobody has used "
        "yet.": names[0] in turn.there,
        f"{said}, not the whole path.\nThe ranks do not stand in the project's folder: return "
        "project and name.": any(
            os.path.realpath(path) != os.path.realpath(project / name)
            for path, name in zip(returned, names, strict=True)
        ),
        f"{said}; {turn.right} was free.\nTake the first free one of exp, exp2, exp3 and so "
        "on, compared as numbers.": names[0] != turn.right,
    }
    judge(f"{where}: ", mistakes)


Find = Callable[[Tensor], Tensor]
Look = Callable[[int, Find, Tensor], Any]
SHAPE = (1, 2, 2)  # of an image
# Which images are found. The ranks' own shares, however they are cut, differ from that of all.
CASES = {
    "9 images": (1, 1, 1, 1, 0, 0, 0, 1, 0),
    "8 images": (1, 0, 0, 1, 1, 0, 0, 1),
    "4 images": (1, 0, 1, 1),
    "2 images": (1, 0),
}


class _Finder:
    """The `find` that an answer gets: it notes which images it has looked at."""

    def __init__(self, hits: Sequence[int]) -> None:
        self.hits = torch.tensor(hits, dtype=torch.bool)
        self.seen: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        if images.dim() != 1 + len(SHAPE):
            raise ValueError(f"find needs images of shape (n, 1, 2, 2), not {(*images.shape,)}")
        ids = images[:, 0, 0, 0].long()
        self.seen += ids.tolist()
        return self.hits[ids]


def _images(many: int) -> Tensor:
    """Images whose pixels are all their number."""
    return torch.arange(float(many)).view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()


@in_group
def _look_all(rank: int, look: Look) -> list[tuple[Any, list[int]]]:
    """For each case what the answer returned, and which images the rank looked at."""
    results = []
    for name, hits in CASES.items():
        with span(name):
            finder = _Finder(hits)
            value = number_or_text(look(rank, finder, _images(len(hits))))
            results.append((value, finder.seen))
            dist.all_reduce(torch.ones(1))
    return results


@exercise(
    "Which images are this rank's, so that each image is looked at once, however many ranks there "
    "are? And which two numbers of each rank must be added up?",
    "`images[rank::world_size]` gives each rank its share. `all_reduce` the number of images found "
    "and the number looked at, and divide afterwards. Think of a rank without an image, and of "
    "`images[-1::1]`.",
    "`mine = images[max(rank, 0)::world_size]` with world_size 1 where rank is -1; `found = "
    "find(mine)`; `sums = torch.tensor([found.sum(), len(mine)], dtype=torch.float64)`; "
    "`dist.all_reduce(sums)` if rank is not -1; return `(sums[0] / sums[1]).item()`.",
)
def check_look(look: Look) -> str:
    """Check `look(rank, find, images)`: every rank looks at its share, and knows the whole."""
    for nprocs in (3, 1):
        run = run_ranks(_look_all, (look,), nprocs, check=False)
        if stuck(run) and run.verdict is not None:
            raise Wrong(
                f"{count(nprocs, 'rank')}: they hang. {run.verdict.title}.",
                "Every rank must make the same collectives, also a rank without an image.",
            )
        run.raise_for_failure()
        for case, name in enumerate(CASES):
            results = [of_rank[case] for of_rank in run.values]
            _judge_seen(f"{name} on {count(nprocs, 'rank')}: ", CASES[name], results)
            _judge_values(f"{name} on {count(nprocs, 'rank')}: ", CASES[name], results)
    for name, hits in CASES.items():
        finder = _Finder(hits)
        value = call(functools.partial(look, -1, finder), _images(len(hits)), because=NO_GROUP)
        results = [(number_or_text(value), finder.seen)]
        _judge_seen(f"{OFF}, {name}: ", hits, results)
        _judge_values(f"{OFF}, {name}: ", hits, results)
    return (
        "each image looked at once, the ranks' shares as equal as can be, and all know the whole."
    )


Results = Sequence[tuple[Any, list[int]]]


def _judge_seen(where: str, hits: Sequence[int], results: Results) -> None:
    of_ranks = [seen for _, seen in results]
    seen = [image for own in of_ranks for image in own]
    twice = sorted({image for image in seen if seen.count(image) > 1})
    missed = [image for image in range(len(hits)) if image not in seen]
    busy = [rank for rank, own in enumerate(of_ranks) if own]
    counts = _list(map(len, of_ranks))
    mistakes = {
        "nobody called `find`.\n`find(images)` says for each image whether its object was "
        "found.": not seen,
        f"rank {busy[0] if busy else 0} looked at all of them, the others at none.\nThey wait "
        "until it is done, or until the group's timeout. Let each rank look at a "
        "share.": len(results) > 1 and len(busy) == 1 and not missed,
        "every rank looked at all of them.\nThat takes as long as on one rank. Let each look at a "
        "share.": len(results) > 1 and all(len(set(own)) == len(hits) for own in of_ranks),
        f"it looked at image {_list(seen)} only.\nWith rank -1 the slice "
        "`images[-1::1]` begins at the last image. Where is a plain process to "
        "begin?": len(results) == 1 and bool(missed) and seen == [len(hits) - 1],
        f"{_of_images(missed)} {agree(missed, 'was', 'were')} not looked at.\nThe shares must "
        "cover what is left over where the number does not divide.": bool(missed),
        f"{_of_images(twice)} {agree(twice, 'was', 'were')} looked at more than once.\nA sampler "
        "that repeats images makes the shares equal and the result wrong. Shares may differ by "
        "one.": bool(twice),
        f"the ranks looked at {counts} images.\nThe others wait for the rank with the most. "
        "Shares need not differ by more than one.": max(map(len, of_ranks))
        - min(map(len, of_ranks))
        > 1,
    }
    judge(where, mistakes)


def _list(items: Iterable[object]) -> str:
    texts = [*map(str, items)]
    return listed(texts) if texts else "none"


def _of_images(images: Sequence[int]) -> str:
    return f"{agree(images, 'image', 'images')} {_list(images)}"


def _judge_values(where: str, hits: Sequence[int], results: Results) -> None:
    right = sum(hits) / len(hits)
    own = [
        sum(hits[image] for image in seen) / len(seen) if seen else float("nan")
        for _, seen in results
    ]
    with_images = [value for value in own if value == value]
    mean, padded = sum(with_images) / len(with_images), sum(with_images) / len(own)
    values = [value for value, _ in results]
    said = _said(values)
    strange = [value for value in values if not is_number(value)]
    mistakes = {
        f"{said}.\nEvery rank returns the share, as a number. Is a `return` missing on some "
        "ranks?": "None" in strange,
        f"{said}.\nA rank may have no image at all: 0 divided by 0, or the mean of nothing, is not "
        "a number. Add up counts, and divide at the "
        "end.": any(str(value) == "nan" for value in strange),
        f"{said}.\nReturn one number, the share of all images that were found.": bool(strange),
        f"{said}; {right:.3f} of all images were found.\nThat is {'' if len(own) == 1 else 'each '}"
        "rank's own share. The others' counts must be added.": len(own) > 1
        and all(o == o and near(v, o) for v, o in zip(values, own, strict=True)),
        f"{said}; {right:.3f} of all images were found.\nSome ranks know the whole, some do not: "
        "`reduce` and `gather` give it to one rank only.": any(near(v, right) for v in values)
        and not all(near(v, right) for v in values),
        f"{said}; {right:.3f} of all images were found.\nThe mean of the ranks' shares is right "
        "only if all have equally many images. Add up what was found and what was looked at, and "
        "divide afterwards.": all(near(v, mean) or near(v, padded) for v in values),
        f"{said}; {right:.3f} of all images were found.\nThe number of images found must be "
        "divided by that of all images, not only by a rank's, and not left as it is.": True,
    }
    if not all(is_number(value) and near(value, right) for value in values):
        judge(where, mistakes)


def _said(values: Sequence[Any]) -> str:
    shown = [f"{value:.3f}" if is_number(value) else str(value) for value in values]
    if len(set(shown)) == 1:
        return f"{'it' if len(values) == 1 else 'every rank'} returned {shown[0]}"
    return listed(f"rank {rank} returned {value}" for rank, value in enumerate(shown))
