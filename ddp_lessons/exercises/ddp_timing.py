"""The checks of lesson 07: name the straggler, accumulate with one sync, choose a bucket size."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import Run, Share, steps, watch_ddp
from ddp_lessons.exercises.framework import Wrong, call, exercise, in_group, judge, run_ranks
from ddp_lessons.exercises.numeric_answers import is_number, number
from ddp_lessons.exercises.small_training import flat, gradients, new_layer, samples
from ddp_lessons.simulated import SimulatedLink
from ddp_lessons.text import count, ranks_text

Delays = tuple[tuple[float, ...], ...]  # seconds of sleep before each step, `[step][rank]`
DELAYS: tuple[tuple[str, Delays], ...] = (
    ("rank 1 slept 15 ms before each of 6 steps", ((0, 0.015, 0, 0),) * 6),
    (
        "rank 3 slept 15 ms before each of 8 steps, and rank 0 once 60 ms",
        ((0, 0, 0, 0.015),) * 4 + ((0.06, 0, 0, 0.015),) + ((0, 0, 0, 0.015),) * 3,
    ),
    (
        "rank 0 slept 40 ms before each of 4 steps, rank 2 12 ms before each of 8, and rank 1 20 "
        "ms before the last",
        ((0.04, 0, 0, 0),) * 4 + ((0, 0, 0.012, 0),) * 8 + ((0, 0.02, 0, 0),),
    ),
    (
        "rank 0 slept 40 ms before each of 8 steps, rank 1 50 ms before 5 of them, and rank 2 50 "
        "ms before the other 3",
        ((0.04, 0.05, 0, 0),) * 5 + ((0.04, 0, 0.05, 0),) * 3,
    ),
)


@in_group
def _work(rank: int, delays: Delays) -> None:
    for step in steps(range(len(delays))):
        time.sleep(delays[step][rank])
        dist.all_reduce(torch.ones(1000))


@functools.cache
def _waits(delays: Delays) -> list[Share]:
    """The rows of a run with these delays, which is made once."""
    return run_ranks(_work, (delays,), nprocs=4).waits()


def _waited(rows: list[Share], field: str) -> list[int]:
    """The waiting in the rows of each rank, `field` being "rank", or for each, "last_rank"."""
    return [sum(row.wait_ns for row in rows if getattr(row, field) == rank) for rank in range(4)]


def _straggler(rows: list[Share]) -> int:
    caused = _waited(rows, "last_rank")
    return caused.index(max(caused))


Reading = Callable[[list[Share]], int | None]  # of a run's rows: the rank to blame
MISREADINGS: tuple[tuple[Reading, str], ...] = (
    (
        lambda rows: rows[-1].last_rank,
        "That rank was late in the last step. One step is chance: add up the waiting that each "
        "rank causes, over all steps.",
    ),
    (
        lambda rows: max(rows, key=lambda row: row.wait_ns).last_rank,
        "That rank caused the longest single wait. One hiccup costs less than a little every time: "
        "add up the waiting that each rank causes.",
    ),
    (
        lambda rows: Counter(row.last_rank for row in rows).most_common(1)[0][0],
        "That rank was late most often. A little many times may cost less than much a few times: "
        "add up the waiting that each rank causes.",
    ),
    (
        lambda rows: _waited(rows, "rank").index(min(_waited(rows, "rank"))),
        "That rank waited least, but that does not make it guilty: it is often nearly as late as "
        "another rank, and hardly anyone waits for it. `last_rank` says for whom they do.",
    ),
    (
        lambda rows: _waited(rows, "rank").index(max(_waited(rows, "rank"))),
        "That rank waited longest: it is the victim. The guilty rank comes last, so it finds all "
        "the others there and hardly waits at all.",
    ),
)


@exercise(
    "The rank that waits is not to blame. Which field of a row says for whom it waited?",
    "Add up `wait_ns` for each `last_rank`, over all rows, and take the largest sum.",
)
def check_name_straggler(name_straggler: Callable[[list[Share]], int]) -> str:
    """Check that `name_straggler(waits)` returns the rank that costs the others most time."""
    runs, answers = [_waits(delays) for _, delays in DELAYS], []
    for (what, _), rows in zip(DELAYS, runs, strict=True):
        named = number(call(name_straggler, rows, because="It takes the rows and returns a rank."))
        if not is_number(named):
            raise Wrong(
                f"{what}; you named {named!r}.",
                "Return the number of one rank. Is `return` missing?",
            )
        answers.append(named)
    # In one run a rank may be named for several reasons: what it was, the others tell.
    likely = sorted(MISREADINGS, key=lambda misreading: answers != list(map(misreading[0], runs)))
    for (what, _), rows, named in zip(DELAYS, runs, answers, strict=True):
        if named != _straggler(rows):
            mistakes = {
                "That is no rank: there are four, 0 to 3.": named not in range(4),
                **{text: named == reading(rows) for reading, text in likely},
                "Each row says who came last in it (`last_rank`) and what that cost.": True,
            }
            judge(f"{what}; you named {named!r}.", mistakes)
    return "right in all four runs: late always, late once, late often by a little, nearly late."


PARAMETERS = 2  # of the model: a weight and a bias
LossFunction = Callable[[Tensor, Tensor], Tensor]
MicroBatches = list[tuple[Tensor, Tensor]]
Accumulate = Callable[[DistributedDataParallel, LossFunction, MicroBatches], object]


@in_group
def _accumulated(rank: int, accumulate: Accumulate, pieces: int) -> tuple[Tensor, bool]:
    """The gradients, and whether the weights are as they were."""
    model = DistributedDataParallel(new_layer())
    inputs, labels = (part[rank :: dist.get_world_size()] for part in samples())
    micro_batches = list(zip(inputs.chunk(pieces), labels.chunk(pieces), strict=True))
    accumulate(model, nn.functional.cross_entropy, micro_batches)
    return gradients(model), torch.equal(flat(model.parameters()), flat(new_layer().parameters()))


@exercise(
    "`with model.no_sync():` leaves the gradients of a pass on their rank. Which pass must not be "
    "inside?",
    "All but the last micro-batch, forward and backward, inside `no_sync()`; and each loss divided "
    "by their number, because gradients add up.",
)
def check_accumulate(accumulate: Accumulate) -> str:
    """Check `accumulate(model, loss_fn, micro_batches)`: the right gradient, and one sync."""
    whole = new_layer()
    inputs, labels = samples()
    nn.functional.cross_entropy(whole(inputs), labels).backward()
    for ranks, pieces in ((2, 3), (3, 4), (2, 1)):
        run = run_ranks(_accumulated, (accumulate, pieces), nprocs=ranks)
        _judge_accumulated(run, pieces, gradients(whole))
    return "one sync for 1, 3 and 4 micro-batches, and the gradient of the whole batch."


def _judge_accumulated(run: Run, pieces: int, expected: Tensor) -> None:
    syncs = max(sum(span.lane == "buckets" for span in rank.spans) for rank in run.ranks)
    sent = max(sum(span.op == "all_reduce" for span in rank.spans) for rank in run.ranks)
    found, kept = zip(*run.values, strict=True)
    first, second, *_ = found
    wrong = [r for r, g in enumerate(found) if not torch.allclose(g, expected, atol=1e-9)]
    if not syncs and not wrong and sent <= PARAMETERS and all(kept):
        return  # added up by hand, once
    odd, where = found[wrong[0] if wrong else 0], ranks_text(wrong) if wrong else "no rank"
    ratio = float((odd @ expected) / (expected @ expected))
    is_multiple = torch.allclose(odd, ratio * expected, atol=1e-9)
    mistakes = {
        "there is no gradient, or only zeros.\n"
        "Each loss needs its `backward()`, and the gradients stay in `.grad`: whoever calls this "
        "takes the step.": not any(gradient.any() for gradient in found),
        "the weights have changed.\n"
        "Only the gradients are asked for. Whoever calls this takes the step.": not all(kept),
        f"all_reduce was called {sent} times.\n"
        "By hand, too, gradients travel once: when all "
        "have been added up.": not syncs and sent > PARAMETERS,
        "no gradient was ever sent; are those of rank 0 and 1 the same? "
        f"{torch.equal(first, second)}.\n"
        "The last micro-batch must run outside of `no_sync()`: its backward sends the sum of all. "
        "Else every rank steps with gradients of its own, and the models drift apart.": syncs == 0,
        f"the gradients were sent {syncs} times.\n"
        "Whether backward sends is decided in the forward pass. All micro-batches but the last "
        "belong in `with model.no_sync():`, with their forward pass.": syncs > 1,
        f"on {where} the gradient is not that of the whole batch, and elsewhere it is."
        "\nDDP makes the gradients equal. What is done to them after that, all ranks must "
        "do.": 0 < len(wrong) < run.world_size,
        "the gradients differ from rank to rank.\n"
        "Backward sends what is in `.grad` at that time. The pass outside of `no_sync()` must be "
        "the last one, when all have been added up.": not torch.equal(first, second),
        f"the gradient is {ratio:.2f} times that of the whole batch.\n"
        "`backward` adds to what is in `.grad`. For the mean over all samples, divide each "
        "micro-batch's loss by their number.": is_multiple and wrong,
        "the gradient is that of other samples than those of the whole batch.\n"
        "Every micro-batch must count, and all alike: pass each of them forward and backward once, "
        "and clear no gradient in between.": wrong,
    }
    judge(f"{pieces} micro-batches on {run.world_size} ranks: ", mistakes)


class _Link(NamedTuple):
    """A simulated task: equal layers, their backward time, and the link between the ranks."""

    layers: int
    layer_mb: float
    backward_ms: float  # of one layer
    latency_ms: float
    mb_per_s: float

    def finish_ms(self, per_bucket: int) -> float:
        """When the last bucket arrives, with `per_bucket` layers in each."""
        free = 0.0
        for first in range(0, self.layers, per_bucket):
            ready = min(first + per_bucket, self.layers)
            nbytes = (ready - first) * self.layer_mb
            free = max(free, ready * self.backward_ms) + self.latency_ms
            free += nbytes / self.mb_per_s * 1000
        return free

    def best(self) -> int:
        """The best number of layers in a bucket."""
        return min(range(1, self.layers + 1), key=self.finish_ms)

    def __str__(self) -> str:
        return f"a link with {self.latency_ms:g} ms a bucket and {self.mb_per_s:g} MB/s"


LINKS = (
    _Link(16, 0.3, 8.0, 8.0, 50.0),  # the best is in the middle, far from one layer and from all
    _Link(12, 0.2, 8.0, 0.0, 25.0),  # no latency: smallest buckets are best
    _Link(8, 0.2, 3.0, 60.0, 1000.0),  # high latency: one bucket is best
)
MUCH_LONGER = 1.1  # times the best


class _SlowBackward(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds, ctx.weights = seconds, weight.numel()
        return x + weight[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, grad.sum().expand(ctx.weights).contiguous(), None


class _Layers(nn.Module):  # type: ignore[misc]
    """Layers whose backward takes a simulated time."""

    def __init__(self, link: _Link) -> None:
        super().__init__()
        self.seconds = link.backward_ms / 1000
        size = int(link.layer_mb * 1e6 / 4)
        self.weights = nn.ParameterList([torch.zeros(size) for _ in range(link.layers)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = _SlowBackward.apply(x, weight, self.seconds)
        return x


@in_group
def _backward_ms(_: int, link: _Link, per_bucket: int) -> float:
    """The time of backward in ms, once DDP knows the order of the gradients."""
    mebibytes = per_bucket * link.layer_mb * 1e6 / 2**20  # DDP's unit
    model = DistributedDataParallel(_Layers(link), bucket_cap_mb=mebibytes)
    watch_ddp(model, SimulatedLink(link.mb_per_s, link.latency_ms))
    times = []
    for _ in range(3):
        loss = model(torch.ones(1)).sum()
        began = time.perf_counter()
        loss.backward()
        times.append((time.perf_counter() - began) * 1000)
    return min(times[1:])


@functools.cache
def _measured_ms(link: _Link, per_bucket: int) -> float:
    """The time of the slowest rank's backward in ms, which is measured once."""
    times: list[float] = run_ranks(_backward_ms, (link, per_bucket)).values
    return max(times)


@exercise(
    "Small buckets leave early, but each pays the latency. Large ones pay once, but leave late.",
    "Work out for 1, 2, 3 ... layers in a bucket when the last one arrives: a bucket begins to "
    "travel when its layers are ready and the link is free. Return the best one's size in MB.",
)
def check_choose_bucket(choose_bucket: Callable[..., float]) -> str:
    """Check `choose_bucket(layers, layer_mb, backward_ms, latency_ms, mb_per_s)` on such links."""
    for link in LINKS:
        bucket_mb = call(choose_bucket, *link, because="It takes five numbers and returns one.")
        bucket_mb = number(bucket_mb)
        if not is_number(bucket_mb) or bucket_mb <= 0:
            raise Wrong(
                f"for {link} you chose {bucket_mb!r}.",
                "Return the largest size of a bucket in MB, a number above 0.",
            )
        # DDP closes a bucket with the layer that fills it.
        per_bucket = min(link.layers, max(1, math.ceil(bucket_mb / link.layer_mb - 1e-6)))
        took, least = _measured_ms(link, per_bucket), _measured_ms(link, link.best())
        # A busy machine must not decide: the link's own arithmetic does.
        if link.finish_ms(per_bucket) > MUCH_LONGER * link.finish_ms(link.best()):
            _explain_bucket(link, float(bucket_mb), per_bucket, took, least)
    return "backward was as short as it can be on all three simulated links."


def _explain_bucket(
    link: _Link, bucket_mb: float, per_bucket: int, took_ms: float, least_ms: float
) -> None:
    buckets = count(math.ceil(link.layers / per_bucket), "bucket")
    mistakes = {
        "Every bucket pays the latency again. Where that is long, fewer and larger buckets are "
        "better.": per_bucket < link.best(),
        "A bucket travels when its last gradient is ready. One that is large leaves late, and "
        "backward has nothing left to hide it behind.": True,
    }
    judge(
        f"on {link}, {bucket_mb:g} MB make {buckets}: backward took {took_ms:.0f} ms, and "
        f"{least_ms:.0f} ms with the best size.",
        mistakes,
    )
