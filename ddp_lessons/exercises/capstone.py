"""The checks of lesson 20, each of one piece of a trainer, and a report of all.

A piece runs on 1, 2 and 3 ranks, and what is around it is right, so no mistake hides another. A
verdict says what was seen and which lesson that belongs to, not what to change; the hints do.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from ddp_lessons import Run
from ddp_lessons.data import SmallCNN, digits
from ddp_lessons.exercises.checkpoint_training import Disk, checkpoint_path, writers
from ddp_lessons.exercises.framework import Feedback, Wrong, exercise, in_group, run_ranks
from ddp_lessons.exercises.numeric_answers import is_number, near, number_or_text, plain
from ddp_lessons.exercises.small_training import SAMPLES, descend, flat, new_layer, samples
from ddp_lessons.text import as_html, count, listed, ranks_text

Piece = Callable[..., Any]
RANKS = (2, 3, 1)  # 2 and 3 first: on one rank most mistakes do nothing

# What a family is about, and where the course has it.
DATA = "Family: data, lesson 05. Who gets which samples, and in which order?"
STATISTICS = "Family: statistics, lesson 09. What do the ranks share of a batch norm?"
RATE = "Family: batch size and learning rate, lesson 08. What changes with the number of ranks?"
GRADIENTS = "Family: gradients, lessons 06 and 07. When does a gradient become that of all ranks?"
EVALUATION = "Family: uneven work, lessons 05 and 11. What if ranks have unequal parts?"
STOP = "Family: hangs, lesson 10. Do all ranks take the same way through the code?"
SAVE = "Family: rank 0, lesson 12. Who writes, and who waits for it?"
RESUME = "Family: resuming, lesson 12. Who remembers what?"


def _run(worker: Piece, piece: Piece, ranks: int, family: str, *more: Any) -> list[Any]:
    """What the ranks returned; `Wrong` with one line if they failed."""
    run = run_ranks(worker, (piece, *more), nprocs=ranks, check=False)
    if not run.ok:
        raise Wrong(f"{count(ranks, 'rank')}: {_failure(run)}", family)
    return run.values


def _failure(run: Run) -> str:
    """One line of the verdict, without its advice."""
    return run.verdict.title if run.verdict else str(run.error).splitlines()[0]


SHUFFLED, BATCH = 24, 6  # samples, and those of a step
EPOCHS = (0, 1, 2, 1)  # one of them twice, as after a restart


@in_group
def _shuffled(rank: int, batches: Piece) -> list[list[list[int]]]:
    torch.manual_seed(rank)  # dropout and augmentation have their own numbers on each rank
    dataset = TensorDataset(torch.arange(SHUFFLED))
    return [[plain(batch[0]) for batch in batches(dataset, epoch, BATCH)] for epoch in EPOCHS]


@exercise(
    "Count how often the ranks together see each sample of an epoch.",
    "Each rank shuffles all samples and then takes its part. When are the parts disjoint?",
    "All ranks must shuffle in the same way: one seed for all, and `set_epoch(epoch)`.",
)
def check_data(batches: Piece) -> str:
    """Check `batches(dataset, epoch, batch_size)`: each sample once an epoch, always reshuffled."""
    for ranks in RANKS:
        _judge_data(count(ranks, "rank"), _run(_shuffled, batches, ranks, DATA))
    return "each sample once an epoch, in an order of its own; on 1, 2 and 3 ranks."


def _judge_data(what: str, ranks: list[list[list[list[int]]]]) -> None:
    for number, epoch in enumerate(EPOCHS):
        of_ranks = [rank[number] for rank in ranks]
        times = Counter(chain(*chain(*of_ranks)))
        twice = sum(n > 1 for n in times.values())
        never = SHUFFLED - len(times)
        if twice or never:
            seen = f"of {SHUFFLED} samples, {twice} were seen more than once and {never} never"
            raise Wrong(f"{what}, epoch {epoch}: {seen}.", DATA)
        sizes = [[len(batch) for batch in batches] for batches in of_ranks]
        if sizes != [[BATCH // len(ranks)] * (SHUFFLED // BATCH)] * len(ranks):
            seen = (
                f"for a global batch of {BATCH} the ranks have batches of {listed(map(str, sizes))}"
            )
            raise Wrong(f"{what}, epoch {epoch}: {seen} samples.", DATA)
    orders = [[rank[number] for rank in ranks] for number in range(len(EPOCHS))]
    if orders[0] == orders[1] or orders[1] == orders[2]:
        raise Wrong(f"{what}: two epochs have the same batches in the same order.", DATA)
    if orders[1] != orders[3]:
        raise Wrong(
            f"{what}: epoch {EPOCHS[1]} has another order when it is asked for again, as after a "
            "restart.",
            DATA,
        )


@in_group
def _predicted(rank: int, wrap: Piece) -> tuple[Tensor, Tensor, Tensor, bool]:
    torch.manual_seed(3)
    model = wrap(SmallCNN())
    images, labels = digits()[64 * rank : 64 * (rank + 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for part in range(8):
        mine = slice(8 * part, 8 * (part + 1))
        optimizer.zero_grad()
        cross_entropy(model(images[mine] * (1 + rank)), labels[mine]).backward()
        optimizer.step()
    model.eval()
    test = digits(train=False)[:8][0]
    means = [b for name, b in model.module.named_buffers() if name.endswith("running_mean")]
    with torch.no_grad():
        model(test)  # DDP shares buffers when a forward begins
        together, single = model(test), torch.cat([model(image[None]) for image in test])
    return flat(model.parameters()), together, single, all(bool(mean.any()) for mean in means)


@exercise(
    "Train on two ranks, and let each evaluate all test images with its own model.",
    "A batch norm learns its running mean and variance from what it sees, and they are no "
    "parameters.",
    "DDP sends rank 0's buffers to all, unless it is told to ignore them. Or convert to a "
    "synchronised batch norm first.",
)
def check_statistics(wrap: Piece) -> str:
    """Check `wrap(model)`: after some steps, the ranks' models predict the same in eval mode."""
    for ranks in RANKS:
        _judge_statistics(count(ranks, "rank"), _run(_predicted, wrap, ranks, STATISTICS))
    return "after 8 steps all ranks predict the same in eval mode; on 1, 2 and 3 ranks."


def _judge_statistics(what: str, ranks: list[tuple[Tensor, Tensor, Tensor, bool]]) -> None:
    weights, together, single, moved = zip(*ranks, strict=True)
    if off := _apart(weights):
        raise Wrong(f"{what}: after 8 steps their weights differ by up to {off:.2g}.", STATISTICS)
    if off := _apart(together):
        seen = "after 8 steps the weights are equal, but in eval mode the scores of the same images"
        raise Wrong(f"{what}: {seen} differ by up to {off:.2g}.", STATISTICS)
    if off := _apart((together[0], single[0])):
        seen = "in eval mode an image's scores depend on the other images of its batch"
        raise Wrong(f"{what}: {seen}, by up to {off:.2g}.", STATISTICS)
    if not all(moved):
        raise Wrong(f"{what}: after 8 steps a running mean is still zero.", STATISTICS)


def _apart(tensors: Sequence[Tensor], tolerance: float = 1e-4) -> float:
    """How far any is from the first one; 0 if only by rounding."""
    worst = max(float((tensor - tensors[0]).abs().max()) for tensor in tensors)
    return worst if not worst < tolerance else 0.0


STEPS, LR, MOMENTUM = 4, 0.1, 0.9


@in_group
def _descended(rank: int, make_optimizer: Piece) -> list[Tensor]:
    model = DistributedDataParallel(new_layer())
    optimizer = make_optimizer(model, LR)
    weights = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(model, slice(rank, None, dist.get_world_size())).backward()
        optimizer.step()
        weights.append(flat(model.parameters()))
    return weights


def _loss(model: nn.Module, part: slice) -> Tensor:
    inputs, labels = samples()
    return cross_entropy(model(inputs[part]), labels[part])


def _of_one_process() -> list[Tensor]:
    """The weights after each step; by hand, as torch's optimizers import its compiler."""
    model, weights = new_layer(), []
    for _ in range(STEPS):
        for parameter in model.parameters():  # what is left in `.grad` is the velocity
            parameter.grad = None if parameter.grad is None else MOMENTUM * parameter.grad
        _loss(model, slice(None)).backward()
        descend(model, LR)
        weights.append(flat(model.parameters()))
    return weights


@exercise(
    "Compare the first step on one rank with that on two.",
    "The global batch is the same on any number of ranks, and DDP takes the mean gradient.",
    "A larger rate goes with a larger global batch. Here `rate` is right as it is.",
)
def check_rate(make_optimizer: Piece) -> str:
    """Check `make_optimizer(model, rate)`: the same steps on any number of ranks."""
    wanted = _of_one_process()
    first = wanted[0] - flat(new_layer().parameters())
    for ranks in RANKS:
        what = f"{count(ranks, 'rank')}, {SAMPLES} samples a step together"
        paths = _run(_descended, make_optimizer, ranks, RATE)
        for path in paths:
            far = (path[0] - wanted[0] + first).norm() / first.norm()
            if abs(far - 1) > 1e-6:
                seen = f"the first step is {far:.3g} times as long as that of one process"
                raise Wrong(f"{what}: {seen} with the same samples.", RATE)
        if off := _apart([wanted[-1], *(path[-1] for path in paths)], 1e-9):
            seen = f"after {STEPS} steps the weights are off by up to {off:.2g}"
            raise Wrong(f"{what}: the first step is right, but {seen}.", RATE)
    return "the steps of one process with the same samples; on 1, 2 and 3 ranks."


MICRO = 6  # samples of a batch, of all ranks together
ACCUMULATED = ((2, 4), (3, 7), (1, 2))  # k, and how many batches


@in_group
def _accumulated(rank: int, train_epoch: Piece) -> list[tuple[Tensor, object]]:
    ranks = dist.get_world_size()
    ends: list[tuple[Tensor, object]] = []
    for k, number in ACCUMULATED:
        model = DistributedDataParallel(new_layer())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        mine = [(inputs[rank::ranks], labels[rank::ranks]) for inputs, labels in _micro(number)]
        loss = train_epoch(model, optimizer, mine, k)
        ends.append((flat(model.parameters()), number_or_text(loss)))
    return ends


def _micro(number: int) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = samples()
    return list(zip(inputs.split(MICRO), labels.split(MICRO), strict=True))[:number]


def _one_process(k: int, number: int) -> Tensor:
    model, batches = new_layer(), _micro(number)
    for first in range(0, number, k):
        inputs, labels = map(torch.cat, zip(*batches[first : first + k], strict=True))
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        descend(model, LR)
    return flat(model.parameters())


@exercise(
    "Compare the ranks' weights after an epoch.",
    "Under `no_sync()` a gradient stays on its rank. The next backward outside of it averages all "
    "that has been added up.",
    "So the last batch of each group must be outside of `no_sync()`, and only the last one has to "
    "be.",
)
def check_gradients(train_epoch: Piece) -> str:
    """Check `train_epoch(model, optimizer, batches, k)`: the weights of one process."""
    for ranks in RANKS:
        ends = _run(_accumulated, train_epoch, ranks, GRADIENTS)
        for (k, number), of_ranks in zip(ACCUMULATED, zip(*ends, strict=True), strict=True):
            what = f"{count(ranks, 'rank')}, {number} batches, a step for every {k}"
            _judge_gradients(what, of_ranks, _one_process(k, number))
    return "the weights of one process; for 4, 7 and 2 batches, on 1, 2 and 3 ranks."


def _judge_gradients(what: str, of_ranks: Sequence[tuple[Tensor, object]], wanted: Tensor) -> None:
    weights, losses = zip(*of_ranks, strict=True)
    if off := _apart(weights, 1e-9):
        raise Wrong(f"{what}: the ranks' weights differ by up to {off:.2g}.", GRADIENTS)
    if off := _apart((wanted, weights[0]), 1e-9):
        seen = f"the ranks have equal weights, off by up to {off:.2g} from those of one process"
        raise Wrong(f"{what}: {seen} with the same samples.", GRADIENTS)
    if not all(map(is_number, losses)):
        raise Wrong(f"{what}: returned {losses[0]}, not a loss.", GRADIENTS)


# Numbers of samples; of 65 and 97, rank 0 has two batches of at most 32, and the others one.
EVALUATED = {2: (70, 65), 3: (97, 2), 1: (40,)}


@in_group
def _evaluated(_: int, evaluate: Piece) -> list[object]:
    sizes = EVALUATED[dist.get_world_size()]
    return [number_or_text(evaluate(nn.Identity(), _scored(size))) for size in sizes]


def _scored(size: int) -> TensorDataset:
    """Samples that are their own scores; the last third of them has another label."""
    labels = torch.arange(size) % 10
    return TensorDataset(
        torch.eye(10)[labels], (labels + (torch.arange(size) >= size - size // 3)) % 10
    )


@exercise(
    "How many batches has each rank on three ranks? And how large is the last one?",
    "A mean of means counts small batches as much as large ones.",
    "Count hits on each rank, add them up by one `all_reduce` after the loop, and divide by the "
    "number of all samples.",
)
def check_evaluation(evaluate: Piece) -> str:
    """Check `evaluate(model, dataset)`: the exact accuracy, on every rank, for uneven parts."""
    for ranks in RANKS:
        found = _run(_evaluated, evaluate, ranks, EVALUATION)
        for size, of_ranks in zip(EVALUATED[ranks], zip(*found, strict=True), strict=True):
            exact = 1 - (size // 3) / size
            if not all(near(value, exact, 1e-5) for value in of_ranks):
                values = listed([f"{v:.4g}" if is_number(v) else str(v)[:40] for v in of_ranks])
                raise Wrong(
                    f"{size} samples on {count(ranks, 'rank')}: the accuracy is {exact:.4g}, and "
                    f"the ranks returned {values}.",
                    EVALUATION,
                )
    return "exact on every rank; for 70 and 65 samples on 2, 97 and 2 on 3, 40 on 1."


TARGET = 0.5
LOSSES = ((0.1, 0.2, 0.4), (0.9, 0.6, 0.8), (0.3, 0.6, 0.7), (0.9, 0.4, 0.4), (0.49, 0.52, 0.1))


@in_group
def _decided(rank: int, should_stop: Piece) -> list[bool]:
    return [bool(should_stop(losses[rank], TARGET)) for losses in LOSSES]


@exercise(
    "On which rank was the loss below the target, and what did the other one do then?",
    "Each rank sees its own loss, but all must decide the same.",
    "Make one number of the losses that all ranks know (their mean, by `all_reduce`) and compare "
    "that. Or rank 0 decides, and broadcasts.",
)
def check_stop(should_stop: Piece) -> str:
    """Check `should_stop(loss, target)`: all ranks decide the same."""
    for ranks in RANKS:
        decided = zip(*_run(_decided, should_stop, ranks, STOP), strict=True)
        for losses, stops in zip(LOSSES, decided, strict=True):
            below = {loss < TARGET for loss in losses[:ranks]}
            if len({*stops}) == 1 and (len(below) == 2 or {*stops} == below):
                continue
            ways = listed(["stop" if stop else "go on" for stop in stops])
            told = f"losses {listed(map(str, losses[:ranks]))}, target {TARGET}"
            raise Wrong(f"{count(ranks, 'rank')}, {told}: they decide: {ways}.", STOP)
    return "all ranks decide the same, whoever is below the target; on 1, 2 and 3 ranks."


@in_group
def _saved(rank: int, save: Piece, folder: str) -> list[str]:
    path, disk, found = checkpoint_path(folder), Disk(rank, folder), []
    os.makedirs(os.path.dirname(path), exist_ok=True)
    dist.barrier()
    with mock.patch.object(torch, "save", disk):
        for epoch in range(2):  # the second one finds the first one's file
            state = {"model": new_layer().state_dict(), "optimizer": {}, "epoch": epoch}
            disk.begin(slow=True)
            save(path, state)
            found.append(_content(path, state))
            dist.barrier()
    return found


def _content(path: str, state: dict[str, Any]) -> str:
    """What is wrong with a checkpoint; "" for nothing."""
    try:
        found = torch.load(path)
        if found["epoch"] != state["epoch"]:
            return f"that of epoch {found['epoch']}"
        same = found.keys() == state.keys() and all(
            torch.equal(found["model"][key], value) for key, value in state["model"].items()
        )
        return "" if same else "not what was saved"
    except FileNotFoundError:
        return "not there"
    except Exception as error:
        return f"unreadable ({type(error).__name__})"


@exercise(
    "How many ranks write to `last.pt`? What does a rank find there that returns from `save` "
    "first?",
    "One rank is enough. The others must know when it is done.",
    "Rank 0 writes, then all ranks meet in a `dist.barrier()`, which stands outside of the `if`.",
)
def check_save(save: Piece) -> str:
    """Check `save(path, state)`: one writer a file; complete as soon as it returns anywhere."""
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            found = _run(_saved, save, ranks, SAVE, folder)
            written = writers(folder)
        what = f"{count(ranks, 'rank')}, on a slow disk"
        for name, those in written.items():
            if len(those) > 1:
                raise Wrong(f"{what}: {ranks_text(those)} wrote to the same file, {name}.", SAVE)
        for rank, of_rank in enumerate(found):
            for epoch, wrong in enumerate(of_rank):
                if wrong:
                    seen = f"when `save` returned on rank {rank}, the file was {wrong}"
                    raise Wrong(f"{what}, epoch {epoch}: {seen}.", SAVE)
    return "one rank writes a file, and all find it complete; on 1, 2 and 3 ranks."


SAVED, LAST = 1, 4  # the epoch of the checkpoint; the training has 4


@in_group
def _resumed(rank: int, resume: Piece, folder: str) -> tuple[object, object, Tensor, Tensor | None]:
    path = os.path.join(folder, "last.pt")
    model, optimizer = _fresh(1)
    before = flat(model.parameters())
    at_first = number_or_text(resume(path, model, optimizer))
    untouched = torch.equal(before, flat(model.parameters()))
    _epochs(model, optimizer, 0, SAVED + 1)
    if rank == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": SAVED}, path)
    dist.barrier()
    saved = flat(model.parameters())
    _epochs(model, optimizer, SAVED + 1, LAST)
    wanted = flat(model.parameters())
    model, optimizer = _fresh(7)
    place = number_or_text(resume(path, model, optimizer))
    loaded = flat(model.parameters()) - saved
    _epochs(model, optimizer, SAVED + 1, LAST)
    at_first = at_first if untouched else "something after changing the weights"
    return at_first, place, loaded, flat(model.parameters()) - wanted


def _fresh(seed: int) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = DistributedDataParallel(nn.Linear(4, 3).double())
    return model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def _epochs(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for epoch in range(first, last):
        inputs, labels = (part[12 * epoch + rank : 12 * (epoch + 1) : ranks] for part in samples())
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@exercise(
    "Compare a resumed training with one that was never stopped: right after loading, and some "
    "steps later.",
    "The weights are not all that a step depends on. What does SGD remember with momentum?",
    '`optimizer.load_state_dict(state["optimizer"])`, on every rank.',
)
def check_resume(resume: Piece) -> str:
    """Check `resume(path, model, optimizer)`: goes on as if never stopped; 0 without a file."""
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            _judge_resumed(ranks, _run(_resumed, resume, ranks, RESUME, folder))
    return "it goes on as if it had never been stopped; on 1, 2 and 3 ranks."


def _judge_resumed(ranks: int, values: list[Any]) -> None:
    what = [f"{count(ranks, 'rank')}, rank {rank}: " for rank in range(ranks)]
    for rank, (at_first, place, loaded, _) in enumerate(values):
        if not near(at_first, 0):
            raise Wrong(f"{what[rank]}without a file, `resume` returned {at_first}.", RESUME)
        if not near(place, SAVED + 1):
            seen = f"after epoch {SAVED} was saved, `resume` returned {place}"
            raise Wrong(f"{what[rank]}{seen}.", RESUME)
        if off := _apart((torch.zeros(()), loaded), 1e-9):
            seen = f"right after `resume`, its weights are off by up to {off:.2g}"
            raise Wrong(f"{what[rank]}{seen} from those that were saved.", RESUME)
    for rank, (*_, end) in enumerate(values):
        if off := _apart((torch.zeros(()), end), 1e-9):
            seen = f"the weights were loaded, but {LAST - SAVED - 1} epochs later they are off by"
            undisturbed = "those of a training that was never stopped"
            raise Wrong(f"{what[rank]}{seen} up to {off:.2g} from {undisturbed}.", RESUME)


@dataclass(frozen=True)
class Report:
    """What several checks found, as a table: the family, whether it is repaired, what was seen."""

    found: tuple[Feedback, ...]

    def __repr__(self) -> str:
        rows = [f"{family:<12}{mark:<13}{seen}".rstrip() for family, mark, seen in self._rows()]
        return "\n".join([self._title(), *rows])

    def _repr_html_(self) -> str:
        cells = ["".join(f"<td>{as_html(text)}</td>" for text in row) for row in self._rows()]
        return f"<b>{self._title()}</b><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def _title(self) -> str:
        repaired = sum(one.passed is True for one in self.found)
        done = repaired == len(self.found)
        return f"{'✓' if done else '○'} {repaired} of {len(self.found)} repaired"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (one.exercise.removeprefix("check_"), _MARKS[one.passed], one.seen if tried else "")
            for one in self.found
            for tried in [one.passed is not None]
        ]


_MARKS = {True: "✓ repaired", False: "✗ broken", None: "○ not tried"}


def report(*found: Feedback) -> Report:
    """Put what checks found into one table, which the cell shows."""
    return Report(found)
