"""The checks of lesson 20, each of one piece of a trainer, and a report of all.

A piece runs on 1, 2 and 3 ranks, and what is around it is right, so no mistake hides another. A
verdict says what was seen and which lesson that belongs to, not what to change; the hints do. Where
a run fails and fails with the course's own piece, too, there is no verdict.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from ddp_lessons import Run
from ddp_lessons.data import SmallCNN, digits
from ddp_lessons.exercises import capstone_pieces
from ddp_lessons.exercises.capstone_disk import SlowDisk
from ddp_lessons.exercises.framework import (
    Feedback,
    Unjudged,
    Wrong,
    exercise,
    in_group,
    run_ranks,
)
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


REPAIRED: dict[str, Piece] = {
    DATA: capstone_pieces.batches,
    STATISTICS: capstone_pieces.wrap,
    RATE: capstone_pieces.make_optimizer,
    GRADIENTS: capstone_pieces.train_epoch,
    EVALUATION: capstone_pieces.evaluate,
    STOP: capstone_pieces.should_stop,
    SAVE: capstone_pieces.save,
    RESUME: capstone_pieces.resume,
}


def _run(worker: Piece, piece: Piece, ranks: int, family: str) -> list[Any]:
    """What `worker(rank, piece, folder)` returned on the ranks.

    Raises `Wrong` with one line if they failed, or `Unjudged` if they fail with a right piece, too.
    """
    run = _run_once(worker, piece, ranks)
    if run.ok:
        return run.values
    own = _run_once(worker, REPAIRED[family], ranks)
    if own.ok:
        raise Wrong(f"{count(ranks, 'rank')}: {_failure(run)}", family)
    raise Unjudged(
        f"On {count(ranks, 'rank')} the course's own piece fails, too, so the fault is not in "
        f"yours: {_failure(own)}"
    )


def _run_once(worker: Piece, piece: Piece, ranks: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(worker, (piece, folder), nprocs=ranks, check=False)


def _failure(run: Run) -> str:
    """One line of the verdict, without its advice."""
    verdict = run.verdict
    if verdict is None:
        return str(run.error).splitlines()[0]
    if verdict.kind == "computing" and verdict.frame is not None:  # its title names no line
        place = f"{verdict.frame.function}, line {verdict.frame.lineno}"
        return f"{verdict.title}: {ranks_text(verdict.ranks)} is in {place}"
    return verdict.title


SHUFFLED, BATCH = 24, 6  # samples, and those of a batch, of all ranks together
EPOCHS = (*range(8), 1)  # one of them twice, as after a restart
SEEDS = (0, 5, 3)  # of the ranks; on one rank a wrong seed makes no difference
Orders = list[list[list[int]]]  # by epoch and batch


@in_group
def _shuffled(rank: int, batches: Piece, _: str) -> tuple[Orders, list[int]]:
    torch.manual_seed(SEEDS[rank])  # dropout and augmentation have their own numbers on each rank
    dataset = TensorDataset(torch.arange(SHUFFLED))
    orders, drawn = [], []
    for epoch in EPOCHS:
        orders.append([plain(batch[0]) for batch in batches(dataset, epoch, BATCH)])
        drawn.append(int(torch.randint(2**62, ())))  # as dropout would draw
    return orders, drawn


@exercise(
    "Count how often the ranks together see each sample of an epoch.",
    "Each rank shuffles all samples and then takes its part. When are the parts disjoint?",
    "All ranks must shuffle in the same way: one seed for all, and `set_epoch(epoch)`. A rank's "
    "own seed is not one for all: what is `torch.initial_seed()` on rank 1? (The check seeds the "
    "ranks in its own way.)",
)
def check_data(batches: Piece) -> str:
    """Check `batches(dataset, epoch, batch_size)`: each sample once, in a new order each epoch."""
    together: dict[int, Orders] = {}
    for ranks in RANKS:
        found, drawn = zip(*_run(_shuffled, batches, ranks, DATA), strict=True)
        _judge_data(count(ranks, "rank"), found)
        _judge_drawn(count(ranks, "rank"), drawn)
        together[ranks] = _together(found)
    for ranks in RANKS:
        _judge_batches(count(ranks, "rank"), together[ranks], together[1])
    return (
        "each sample once an epoch, in an order of its own; the same batches on 1, 2 and 3 ranks."
    )


def _judge_data(what: str, ranks: Sequence[Orders]) -> None:
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
    orders = [str([rank[number] for rank in ranks]) for number in range(len(EPOCHS))]
    first = {order: epoch for epoch, order in reversed([*zip(EPOCHS, orders, strict=True)])}
    for epoch, order in zip(EPOCHS, orders, strict=True):
        if first[order] != epoch:
            seen = f"epochs {first[order]} and {epoch} have the same batches in the same order"
            raise Wrong(f"{what}: {seen}.", DATA)
    if orders[EPOCHS.index(EPOCHS[-1])] != orders[-1]:
        raise Wrong(
            f"{what}: epoch {EPOCHS[-1]} has a different order when it is asked for again, as "
            "after a restart.",
            DATA,
        )


def _judge_drawn(what: str, ranks: Sequence[list[int]]) -> None:
    """Judge the random numbers that each rank drew after each epoch's batches."""
    of_epochs = [*zip(*ranks, strict=True)]
    for epoch, of_ranks in zip(EPOCHS, of_epochs, strict=True):
        if len({*of_ranks}) < len(of_ranks):
            seen = f"after the batches of epoch {epoch}, ranks draw the same random numbers"
            raise Wrong(f"{what}: {seen}. Dropout would drop the same on them.", DATA)
    for rank, drawn in enumerate(ranks):
        if len({*drawn[:-1]}) < len(drawn) - 1:
            seen = f"rank {rank} draws the same random numbers after the batches of each epoch"
            raise Wrong(f"{what}: {seen}. Dropout would always drop the same.", DATA)


def _together(ranks: Sequence[Orders]) -> Orders:
    """The samples of each batch, of all ranks together, sorted."""
    return [
        [sorted(chain(*parts)) for parts in zip(*of_ranks, strict=True)]
        for of_ranks in zip(*ranks, strict=True)
    ]


def _judge_batches(what: str, together: Orders, alone: Orders) -> None:
    for epoch, found, wanted in zip(EPOCHS, together, alone, strict=True):
        for number, (batch, other) in enumerate(zip(found, wanted, strict=True)):
            if batch != other:
                seen = f"batch {number} of epoch {epoch} has different samples than on one rank"
                raise Wrong(f"{what}: each sample once, but {seen}.", DATA)


GLOBAL, PARTS = 24, 8  # images of a batch, of all ranks together, and how many steps


Learned = tuple[Tensor, Tensor, Tensor]  # weights, scores of images together, and one by one


@in_group
def _learned(rank: int, wrap: Piece, _: str) -> Learned:
    torch.manual_seed(3 + rank)  # the weights of rank 0 are to be those of all
    model = wrap(SmallCNN())
    _learn(model, rank, dist.get_world_size())
    return _end(model, model.eval().module)  # which `train` evaluates


def _learn(model: nn.Module, rank: int, ranks: int) -> None:
    images, labels = digits()[: GLOBAL * PARTS]
    images = images * (1 + torch.arange(len(images)) % 6).view(-1, 1, 1, 1)  # ranks' shares differ
    for part in range(PARTS):
        mine = slice(GLOBAL * part + rank, GLOBAL * (part + 1), ranks)
        model.zero_grad()
        cross_entropy(model(images[mine]), labels[mine]).backward()
        descend(model, 0.05)


def _end(model: nn.Module, evaluated: nn.Module) -> Learned:
    test = digits(train=False)[:8][0]
    with torch.no_grad():
        single = torch.cat([evaluated(image[None]) for image in test])
        return flat(model.parameters()), evaluated(test), single


@functools.cache
def _learned_without_ranks() -> Learned:
    """What the model learns in one process as it is: neither wrapped nor changed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = SmallCNN()
    _learn(model, 0, 1)
    return _end(model, model.eval())


@exercise(
    "Compare the ranks' buffers after an epoch, and the weights with those of a run on one rank.",
    "In training a batch norm takes mean and variance of what is in front of it: on two ranks, of "
    "half the batch. So its numbers are not those of one rank, and they differ from rank to rank.",
    "The batch norms must take them over all ranks' samples: `convert_sync_batchnorm` before DDP. "
    "Does your line with it run? `model.children()` are only the layers right below the model; "
    "`model.modules()` are all. Without an `if` it runs always. (torch's own layer needs a GPU.)",
)
def check_statistics(wrap: Piece) -> str:
    """Check `wrap(model)`: after some steps, weights and predictions are those of one rank."""
    ends = {}
    for ranks in RANKS:
        ends[ranks] = _run(_learned, wrap, ranks, STATISTICS)
        _judge_statistics(count(ranks, "rank"), ends[ranks])
    for ranks in sorted(RANKS):  # on one rank the change to a model shows alone
        _judge_learned(count(ranks, "rank"), ends[ranks][0], _learned_without_ranks())
    return f"after {PARTS} steps all ranks predict the same in eval mode, as one process does."


def _judge_statistics(what: str, ranks: list[Learned]) -> None:
    weights, together, single = zip(*ranks, strict=True)
    after = f"after {PARTS} steps"
    if off := _apart(weights):
        raise Wrong(f"{what}: {after} their weights differ by up to {off:.2g}.", STATISTICS)
    if off := _apart(together):
        seen = f"{after} the weights are equal, but in eval mode the scores of the same images"
        raise Wrong(f"{what}: {seen} differ by up to {off:.2g}.", STATISTICS)
    if off := _apart((together[0], single[0])):
        seen = "in eval mode an image's scores depend on the other images of its batch"
        raise Wrong(f"{what}: {seen}, by up to {off:.2g}.", STATISTICS)


def _judge_learned(what: str, end: Learned, alone: Learned) -> None:
    seen = f"{what}: after {PARTS} steps all ranks predict the same, but"
    unchanged = "the model as it was before `wrap`, in one process, with the same samples"
    if len(end[0]) != len(alone[0]):
        raise Wrong(f"{what}: {len(end[0])} weights, not {len(alone[0])} as before.", STATISTICS)
    if off := _apart((end[0], alone[0])):
        far = f"the weights are off by up to {off:.2g} from those of"
        raise Wrong(f"{seen} {far} {unchanged}.", STATISTICS)
    if off := _apart((end[1], alone[1])):
        far = f"the scores are off by up to {off:.2g} from those of"
        raise Wrong(f"{seen} {far} {unchanged}.", STATISTICS)


def _apart(tensors: Sequence[Tensor], tolerance: float = 1e-4) -> float:
    """How far any is from the first one; 0 if only by rounding."""
    worst = max(float((tensor - tensors[0]).abs().max()) for tensor in tensors)
    return worst if not worst < tolerance else 0.0


STEPS, LR, MOMENTUM = 4, 0.07, 0.9


@in_group
def _descended(rank: int, make_optimizer: Piece, _: str) -> list[Tensor]:
    model = DistributedDataParallel(new_layer())
    optimizer = make_optimizer(model, LR)
    weights = []
    for _step in range(STEPS):
        optimizer.zero_grad()
        _loss(model, slice(rank, None, dist.get_world_size())).backward()
        optimizer.step()
        weights.append(flat(model.parameters()))
    return weights


def _loss(model: nn.Module, part: slice) -> Tensor:
    inputs, labels = samples()
    return cross_entropy(model(inputs[part]), labels[part])


def _of_one_process() -> list[Tensor]:
    """The weights after each step."""
    model, weights = new_layer(), []
    for _ in range(STEPS):
        _step(model, _loss(model, slice(None)))
        weights.append(flat(model.parameters()))
    return weights


def _step(model: nn.Module, loss: Tensor) -> None:
    """A step with momentum; by hand, as torch's optimizers import its compiler."""
    for parameter in model.parameters():  # what is left in `.grad` is the velocity
        parameter.grad = None if parameter.grad is None else MOMENTUM * parameter.grad
    loss.backward()
    descend(model, LR)


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
        call = f"`make_optimizer(model, {LR})`"
        what = f"{call} on {count(ranks, 'rank')}, {SAMPLES} samples a step together"
        paths = _run(_descended, make_optimizer, ranks, RATE)
        for path in paths:
            far = f"{(path[0] - wanted[0] + first).norm() / first.norm():.3g}"
            if far != "1":
                seen = f"the first step is {far} times as long as that of one process"
                raise Wrong(f"{what}: {seen} with the same samples.", RATE)
            if off := _apart((wanted[0], path[0]), 1e-9):
                seen = "the first step is about as long as that of one process with the same"
                seen += f" samples, but the weights after it are off by up to {off:.2g}"
                raise Wrong(f"{what}: {seen}.", RATE)
        if off := _apart([wanted[-1], *(path[-1] for path in paths)], 1e-9):
            seen = f"after {STEPS} steps the weights are off by up to {off:.2g}"
            raise Wrong(f"{what}: the first step is right, but {seen}.", RATE)
    return "the steps of one process with the same samples; on 1, 2 and 3 ranks."


MICRO = 6  # samples of a batch, of all ranks together
ACCUMULATED = ((2, 4), (3, 7), (1, 2))  # k, and how many batches


class _Layer(nn.Module):  # type: ignore[misc]
    """The small layer; it counts the batches that it gets in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = new_layer()
        self.in_eval = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.in_eval += not self.training
        scores: Tensor = self.layer(inputs)
        return scores


@in_group
def _accumulated(rank: int, train_epoch: Piece, _: str) -> list[tuple[Tensor, object, int]]:
    ranks = dist.get_world_size()
    ends: list[tuple[Tensor, object, int]] = []
    for k, number in ACCUMULATED:
        model = DistributedDataParallel(_Layer())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        mine = [(inputs[rank::ranks], labels[rank::ranks]) for inputs, labels in _micro(number)]
        for _epoch in range(2):  # in the second one, momenta that differ show
            loss = train_epoch(model, optimizer, mine, k)
            model.eval()  # as an evaluation leaves it
        ends.append((flat(model.parameters()), number_or_text(loss), model.module.in_eval))
    return ends


def _micro(number: int) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = samples()
    return list(zip(inputs.split(MICRO), labels.split(MICRO), strict=True))[:number]


def _one_process(k: int, number: int, ranks: int) -> tuple[Tensor, list[float]]:
    """One process's weights, and of each rank the mean loss of its part of the second epoch."""
    model, batches = new_layer(), _micro(number)
    for _ in range(2):
        losses = torch.zeros(ranks, dtype=torch.double)
        for first in range(0, number, k):
            group = batches[first : first + k]
            with torch.no_grad():
                for inputs, labels in group:
                    for rank in range(ranks):
                        mine = slice(rank, None, ranks)
                        losses[rank] += cross_entropy(model(inputs[mine]), labels[mine])
            inputs, labels = map(torch.cat, zip(*group, strict=True))
            _step(model, cross_entropy(model(inputs), labels))
    return flat(model.parameters()), (losses / number).tolist()


@exercise(
    "Compare the ranks' weights after a step, and after an epoch. When do they part?",
    "Under `no_sync()` a gradient stays on its rank. The next backward outside of it averages all "
    "that has been added up.",
    "So the last batch before each step must be outside of `no_sync()`, and only that has to be. "
    "Which one is it where fewer than `k` batches are left?",
)
def check_gradients(train_epoch: Piece) -> str:
    """Check `train_epoch(model, optimizer, batches, k)`: the weights of one process."""
    for ranks in RANKS:
        ends = _run(_accumulated, train_epoch, ranks, GRADIENTS)
        for (k, number), of_ranks in zip(ACCUMULATED, zip(*ends, strict=True), strict=True):
            what = f"{count(ranks, 'rank')}, {number} batches, a step for every {k}"
            _judge_gradients(what, of_ranks, *_one_process(k, number, ranks))
    return "weights of one process, mean loss of all batches; 4, 7 and 2 of them, 1 to 3 ranks."


def _judge_gradients(
    what: str, of_ranks: Sequence[tuple[Tensor, object, int]], wanted: Tensor, means: list[float]
) -> None:
    weights, losses, in_eval = zip(*of_ranks, strict=True)
    if off := _apart(weights, 1e-9):
        raise Wrong(f"{what}: the ranks' weights differ by up to {off:.2g}.", GRADIENTS)
    if off := _apart((wanted, weights[0]), 1e-9):
        seen = f"the ranks have equal weights, off by up to {off:.2g} from those of one process"
        raise Wrong(f"{what}: {seen} with the same samples.", GRADIENTS)
    if not all(map(is_number, losses)):
        raise Wrong(f"{what}: returned {losses[0]}, not a loss.", GRADIENTS)
    if any(in_eval):
        seen = f"in the second epoch, after an evaluation, {max(in_eval)} of a rank's batches"
        raise Wrong(f"{what}: {seen} went through the model in eval mode.", GRADIENTS)
    of_all = sum(means) / len(means)  # may be returned, too
    for rank, (loss, mean) in enumerate(zip(losses, means, strict=True)):
        if not (near(loss, mean, 1e-5) or near(loss, of_all, 1e-5)):
            seen = f"the weights are right, but rank {rank} returned {loss:.4g}"
            raise Wrong(f"{what}: {seen}; the mean of its losses is {mean:.4g}.", GRADIENTS)


# Numbers of samples; of 65 and 97, rank 0 has two batches of at most 32, and the others one.
EVALUATED = {2: (70, 65), 3: (97, 2), 1: (40,)}


class _Scores(nn.Module):  # type: ignore[misc]
    """A model whose samples are their own scores; it counts them, and errs in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.in_training = 0

    def forward(self, samples: Tensor) -> Tensor:
        number = samples.numel() // CLASSES
        self.seen += number
        self.in_training += number * self.training
        return samples.roll(1, dims=-1) if self.training else samples


CLASSES = 10


@in_group
def _evaluated(_: int, evaluate: Piece, __: str) -> list[tuple[object, int, int]]:
    found: list[tuple[object, int, int]] = []
    for size in EVALUATED[dist.get_world_size()]:
        model = _Scores()
        value = number_or_text(evaluate(model, _scored(size)))
        found.append((value, model.seen, model.in_training))
    return found


def _scored(size: int) -> TensorDataset:
    """Samples that are their own scores; a third of them, in the middle, has the next label.

    So whoever leaves out the first or the last ones leaves out hits.
    """
    scores = torch.arange(size) % CLASSES
    labels = scores.clone()
    first = (size - size // 3) // 2
    labels[first : first + size // 3] += 1
    return TensorDataset(torch.eye(CLASSES)[scores], labels % CLASSES)


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
            _judge_evaluation(size, *zip(*of_ranks, strict=True))
    return "exact on every rank; for 70 and 65 samples on 2, 97 and 2 on 3, 40 on 1."


def _judge_evaluation(
    size: int, values: Sequence[object], shares: Sequence[int], in_training: Sequence[int]
) -> None:
    ranks = len(values)
    what = f"{size} samples on {count(ranks, 'rank')}"
    wrong = size // 3
    exact = 1 - wrong / size
    if not all(near(value, exact, 1e-5) for value in values):
        told = listed([f"{v:.4g}" if is_number(v) else str(v)[:40] for v in values])
        seen = f"the accuracy is {exact:.4g}, and the ranks returned {told}"
        if any(in_training) and all(near(value, wrong / size, 1e-5) for value in values):
            seen += ", which is that of the model in training mode"
        elif 0 < sum(shares) < size:
            seen += f"; together they gave {sum(shares)} of the samples to the model"
        raise Wrong(f"{what}: {seen}.", EVALUATION)
    for rank, share in enumerate(shares):
        if share > size // ranks + ranks:
            seen = f"the accuracy is right, but rank {rank} gave {share} of them to the model"
            raise Wrong(f"{what}: {seen}; its part is some {size // ranks}.", EVALUATION)


TARGET = 0.5
LOSSES = (
    *((0.1, 0.2, 0.4), (0.9, 0.6, 0.8), (0.3, 0.6, 0.7), (0.9, 0.4, 0.4), (0.49, 0.52, 0.1)),
    (0.5, 0.5, 0.5),  # not below the target
)


@in_group
def _decided(rank: int, should_stop: Piece, _: str) -> list[bool]:
    return [bool(should_stop(losses[rank], TARGET)) for losses in LOSSES]


@exercise(
    "After which call does each rank decide, and by which number?",
    "The ranks' mean loss is the same for all. Which ranks have it when they compare?",
    "`all_reduce` puts the sum into the tensor that it gets. If that is a copy, as `mean.double()` "
    "makes one, `mean` stays the rank's own loss. Make the tensor a double first, hand over that "
    "tensor, and compare it. (`reduce` would give the sum to one rank only.)",
)
def check_stop(should_stop: Piece) -> str:
    """Check `should_stop(loss, target)`: all ranks decide by the mean of their losses."""
    for ranks in RANKS:
        decided = zip(*_run(_decided, should_stop, ranks, STOP), strict=True)
        for losses, stops in zip(LOSSES, decided, strict=True):
            mean = sum(losses[:ranks]) / ranks
            if {*stops} == {mean < TARGET}:
                continue
            ways = listed(["stop" if stop else "go on" for stop in stops])
            told = f"losses {listed(map(str, losses[:ranks]))}, target {TARGET}"
            agreed = f" Their mean loss is {mean:.3g}." if len({*stops}) == 1 else ""
            raise Wrong(f"{count(ranks, 'rank')}, {told}: they decide: {ways}.{agreed}", STOP)
    return "all ranks decide the same, by the mean of their losses; on 1, 2 and 3 ranks."


@in_group
def _saved(rank: int, save: Piece, folder: str) -> list[tuple[list[str], str, str]]:
    disk, found = SlowDisk(rank, folder), []
    with disk.in_place():
        dist.barrier()
        for epoch in range(2):  # the second one finds the first one's file
            state = {"model": new_layer().state_dict(), "optimizer": {}, "epoch": epoch}
            with disk.watched():
                save(disk.path, state)
                content = _content(disk.path, state)  # before another rank knows of the return
            found.append((sorted(disk.names), disk.in_danger, content))
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
    "What does a rank find in the file as soon as its own `save` returns? Which ranks write?",
    "One rank is enough. The others must know when it is done.",
    "Rank 0 writes a new file and puts it in the old one's place, then all ranks meet in a "
    "`dist.barrier()`, which stands outside of the `if`.",
)
def check_save(save: Piece) -> str:
    """Check `save(path, state)`: one rank writes; complete as soon as it returns anywhere."""
    for ranks in RANKS:
        found = _run(_saved, save, ranks, SAVE)
        for epoch, of_ranks in enumerate(zip(*found, strict=True)):
            _judge_saved(f"{count(ranks, 'rank')}, on a slow disk, epoch {epoch}", of_ranks)
    return "one rank writes, and all find the file complete; on 1, 2 and 3 ranks."


def _judge_saved(what: str, of_ranks: Sequence[tuple[list[str], str, str]]) -> None:
    wrote = {rank: names for rank, (names, *_) in enumerate(of_ranks) if names}
    if len(wrote) > 1:
        names = sorted({*chain(*wrote.values())})
        raise Wrong(f"{what}: {ranks_text(wrote)} wrote to {listed(names)}.", SAVE)
    for rank, (*_, wrong) in enumerate(of_ranks):
        if wrong:
            seen = f"when `save` returned on rank {rank}, the file was {wrong}"
            raise Wrong(f"{what}: {seen}.", SAVE)
    for rank, (_, in_danger, _) in enumerate(of_ranks):
        if in_danger:
            seen = f"while rank {rank} wrote, {in_danger}"
            raise Wrong(f"{what}: {seen}. A rank that is stopped there leaves no checkpoint.", SAVE)


SAVED, LAST = 1, 4  # the epoch of the first checkpoint; the training has 4


@dataclass(frozen=True)
class _Resumed:
    """What a rank saw: what `resume` returned, what it did to the file, how far off all is."""

    at_first: object  # without a file
    place: object
    file: str
    weights: Tensor  # right after loading, less those that were saved
    buffers: Tensor
    end: Tensor  # weights some epochs later, less those of a run that was never stopped
    again: Tensor  # the same, for one that was stopped and resumed twice


@in_group
def _resumed(_: int, resume: Piece, folder: str) -> _Resumed:
    path = os.path.join(folder, "last.pt")
    model, optimizer = _fresh(1)
    before = flat(model.parameters())
    at_first = number_or_text(resume(path, model, optimizer))
    untouched = torch.equal(before, flat(model.parameters()))
    _epochs(model, optimizer, 0, SAVED + 1)
    for group in optimizer.param_groups:
        group["lr"] /= 2  # as a schedule does
    _checkpoint(path, model, optimizer, SAVED)
    file = _bytes(path)
    saved = torch.load(path)["model"]
    _epochs(model, optimizer, SAVED + 1, LAST)
    wanted = flat(model.parameters())
    model, optimizer = _fresh(7)
    place = number_or_text(resume(path, model, optimizer))
    weights = flat(p - saved[name] for name, p in model.module.named_parameters())
    buffers = flat((b - saved[name]).double() for name, b in model.module.named_buffers())
    dist.barrier()  # all have loaded it
    left = "the same" if _bytes(path) == file else "changed" if os.path.exists(path) else "gone"
    dist.barrier()
    _epochs(model, optimizer, SAVED + 1, LAST - 1)
    _checkpoint(path, model, optimizer, LAST - 2)
    again = _resumed_and_trained(resume, path) - wanted
    _epochs(model, optimizer, LAST - 1, LAST)
    at_first = at_first if untouched else "something after changing the weights"
    end = flat(model.parameters()) - wanted
    return _Resumed(at_first, place, left, weights, buffers, end, again)


def _resumed_and_trained(resume: Piece, path: str) -> Tensor:
    """The weights at the end of a run that is resumed before its last epoch."""
    model, optimizer = _fresh(8)
    resume(path, model, optimizer)
    _epochs(model, optimizer, LAST - 1, LAST)
    return flat(model.parameters())


def _checkpoint(path: str, model: Any, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch}, path)
    dist.barrier()


def _fresh(seed: int) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    layers = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)
    model = DistributedDataParallel(nn.Sequential(*layers).double())
    return model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _epochs(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for epoch in range(first, last):
        inputs, labels = (part[12 * epoch + rank : 12 * (epoch + 1) : ranks] for part in samples())
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@exercise(
    "Compare a resumed run with one that was never stopped: right after loading, and some "
    "steps later.",
    "Neither the weights nor the rate are all that a step depends on. What does SGD remember with "
    "momentum?",
    '`optimizer.load_state_dict(state["optimizer"])`, on every rank.',
)
def check_resume(resume: Piece) -> str:
    """Check `resume(path, model, optimizer)`: goes on as if never stopped; 0 without a file."""
    for ranks in RANKS:
        _judge_resumed(ranks, _run(_resumed, resume, ranks, RESUME))
    return "it goes on as if it had never been stopped; on 1, 2 and 3 ranks."


def _judge_resumed(ranks: int, values: Sequence[_Resumed]) -> None:
    what = [f"{count(ranks, 'rank')}, rank {rank}: " for rank in range(ranks)]
    for rank, seen_by in enumerate(values):
        if not near(seen_by.at_first, 0):
            seen = f"without a file, `resume` returned {seen_by.at_first}"
            raise Wrong(f"{what[rank]}{seen}.", RESUME)
        if not near(seen_by.place, SAVED + 1):
            seen = f"after epoch {SAVED} was saved, `resume` returned {seen_by.place}"
            raise Wrong(f"{what[rank]}{seen}.", RESUME)
    for name in ("weights", "buffers"):
        rank, off = _worst([getattr(seen_by, name) for seen_by in values])
        if off:
            seen = f"right after `resume`, its {name} are off by up to {off:.2g}"
            raise Wrong(f"{what[rank]}{seen} from those that were saved.", RESUME)
    if (left := values[0].file) != "the same":
        raise Wrong(f"{count(ranks, 'rank')}: after `resume`, the checkpoint was {left}.", RESUME)
    ends = [seen_by.end for seen_by in values]
    later = f"the weights are right after loading, but {LAST - SAVED - 1} epochs later"
    if apart := _apart(ends, 1e-9):
        seen = f"{later} the ranks' weights differ by up to {apart:.2g}"
        raise Wrong(f"{count(ranks, 'rank')}: {seen}.", RESUME)
    again = "resumed once, it goes on rightly; stopped and resumed a second time,"
    for when, offs in ((later, ends), (again, [seen_by.again for seen_by in values])):
        rank, off = _worst(offs)
        if off:
            undisturbed = "those of a run that was never stopped"
            seen = f"the weights are off by up to {off:.2g} from {undisturbed}"
            raise Wrong(f"{what[rank]}{when} {seen}.", RESUME)


def _worst(ranks: Sequence[Tensor]) -> tuple[int, float]:
    """The rank whose values are farthest from 0, and how far; 0 if only by rounding."""
    far = [_apart((torch.zeros(()), values), 1e-9) for values in ranks]
    return far.index(max(far)), max(far)


@dataclass(frozen=True)
class Report:
    """What several checks found, as a table: the family, whether it is repaired, what was seen."""

    found: tuple[Feedback, ...]

    def __repr__(self) -> str:
        rows = [f"{family:<12}{mark:<14}{seen}".rstrip() for family, mark, seen in self._rows()]
        return "\n".join([self._title(), *rows])

    def _repr_html_(self) -> str:
        cells = ["".join(f"<td>{as_html(text)}</td>" for text in row) for row in self._rows()]
        return f"<b>{self._title()}</b><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def _title(self) -> str:
        repaired = sum(one.passed is True for one in self.found)
        done = repaired == len(self.found)
        return f"{'✓' if done else '○'} {repaired} of {len(self.found)} repaired"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(one.exercise.removeprefix("check_"), *_told(one)) for one in self.found]


def _told(one: Feedback) -> tuple[str, str]:
    if one.passed is None:
        return ("○ not tried", "") if "not attempted" in one.seen else ("○ not judged", one.seen)
    return "✓ repaired" if one.passed else "✗ broken", one.seen


def report(*found: Feedback) -> Report:
    """Put what checks found into one table, which the cell shows."""
    return Report(found)
