"""The checks of lesson 07: name the straggler, accumulate with one sync, pick the bucket size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons.buckets import watch_ddp
from ddp_lessons.exercises.checking import Wrong, call, exercise, run_quietly
from ddp_lessons.meetings import Share
from ddp_lessons.recording import steps
from ddp_lessons.results import Run
from ddp_lessons.simulated import SimulatedLink

# Seconds of sleep before each step, `[step][rank]`, and the rank that costs the others most.
DELAYS: tuple[tuple[str, tuple[tuple[float, ...], ...], int], ...] = (
    ("rank 1 slept 15 ms before each of 6 steps", ((0, 0.015, 0, 0),) * 6, 1),
    (
        "rank 3 slept 15 ms before each of 8 steps, and rank 0 once 60 ms",
        ((0, 0, 0, 0.015),) * 4 + ((0.06, 0, 0, 0.015),) + ((0, 0, 0, 0.015),) * 3,
        3,
    ),
    (
        "rank 0 slept 20 ms before each of 5 steps, and rank 2 before a last, short one 10 ms",
        ((0.02, 0, 0, 0),) * 5 + ((0, 0, 0.01, 0),),
        0,
    ),
)


def _work(rank: int, delays: tuple[tuple[float, ...], ...]) -> None:
    dist.init_process_group("gloo")
    for step in steps(range(len(delays))):
        time.sleep(delays[step][rank])
        dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()


@exercise(
    "Who waits is not to blame. Which field of a row says for whom it waited?",
    "Add up `wait_ns` for each `last_rank`, over all rows, and take the largest sum.",
)
def check_name_straggler(name_straggler: Callable[[list[Share]], int]) -> str:
    """Check that `name_straggler(waits)` names the rank that costs the others most time."""
    for what, delays, culprit in DELAYS:
        run = run_quietly(_work, (delays,), nprocs=4)
        run.raise_for_failure()
        named = call(name_straggler, run.waits(), because="It takes the rows and returns a rank.")
        _judge_straggler(what, run, culprit, named)
    return "right in all three runs: late always, late once, late in the last step only."


def _judge_straggler(what: str, run: Run, culprit: int, named: Any) -> None:
    if named == culprit:
        return
    seen = f"{what}; you named {named!r}."
    rows = run.waits()
    waited = [sum(row.wait_ns for row in rows if row.rank == rank) for rank in range(4)]
    if not isinstance(named, int):
        raise Wrong(seen, "Return the number of one rank. Is `return` missing?")
    if named == waited.index(max(waited)):
        raise Wrong(
            seen,
            f"Rank {named} waited longest: it is the victim. The guilty rank comes last, so it "
            "finds all the others there and hardly waits at all.",
        )
    if named == rows[-1].last_rank:
        raise Wrong(
            seen,
            "That rank was late in the last step. One step is chance: add up the waiting that each "
            "rank causes, over all steps.",
        )
    if named == max(rows, key=lambda row: row.wait_ns).last_rank:
        raise Wrong(
            seen,
            "That rank caused the longest single wait. One hiccup costs less than a little every "
            "time: add up the waiting that each rank causes.",
        )
    raise Wrong(seen, "Each row says who came last in it (`last_rank`) and what that cost.")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def _data(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 16), torch.arange(size) % 4


def _gradient(model: nn.Module) -> torch.Tensor:
    parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts]).clone()


def _accumulated(rank: int, accumulate: Callable[..., Any], pieces: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    model = watch_ddp(DistributedDataParallel(_network()))
    inputs, labels = (part[rank :: dist.get_world_size()] for part in _data(24))
    micro_batches = list(zip(inputs.chunk(pieces), labels.chunk(pieces), strict=True))
    accumulate(model, nn.functional.cross_entropy, micro_batches)
    dist.destroy_process_group()
    return _gradient(model)


@exercise(
    "`with model.no_sync():` leaves the gradients of a pass on their rank. Which pass must not be "
    "inside?",
    "All but the last micro-batch, forward and backward, inside `no_sync()`; and each loss divided "
    "by their number, because gradients add up.",
)
def check_accumulate(accumulate: Callable[..., Any]) -> str:
    """Check `accumulate(model, loss_fn, micro_batches)`: the right gradient, and one sync."""
    whole = _network()
    inputs, labels = _data(24)
    nn.functional.cross_entropy(whole(inputs), labels).backward()
    for ranks, pieces in ((2, 3), (3, 4), (2, 1)):
        run = run_quietly(_accumulated, (accumulate, pieces), nprocs=ranks)
        run.raise_for_failure()
        _judge_accumulated(run, pieces, _gradient(whole))
    return "one sync for 1, 3 and 4 micro-batches, and the gradient of the whole batch."


def _judge_accumulated(run: Run, pieces: int, expected: torch.Tensor) -> None:
    syncs = sum(span.lane == "buckets" for span in run.ranks[0].spans)
    seen = f"{pieces} micro-batches on {run.world_size} ranks"
    gradients: list[torch.Tensor] = run.values
    if syncs == 0:
        raise Wrong(
            f"{seen}: no gradient was ever sent; are those of rank 0 and 1 the same? "
            f"{torch.equal(gradients[0], gradients[1])}.",
            "The last micro-batch must run outside of `no_sync()`: its backward sends the sum of "
            "all. Else every rank steps with gradients of its own, and the models drift apart.",
        )
    if syncs > 1:
        raise Wrong(
            f"{seen}: the gradients were sent {syncs} times.",
            "Whether backward sends is decided in the forward pass. All micro-batches but the last "
            "belong in `with model.no_sync():`, with their forward pass.",
        )
    ratio = float((gradients[0] @ expected) / (expected @ expected))
    if not torch.allclose(gradients[0], expected, rtol=1e-4, atol=1e-6):
        raise Wrong(
            f"{seen}: the gradient is {ratio:.2f} times that of the whole batch.",
            "`backward` adds to what is in `.grad`. For the mean over all samples, divide each "
            "micro-batch's loss by their number, and use every one of them.",
        )


class _Link(NamedTuple):
    """A simulated task: layers of equal size, their backward and the link between the ranks."""

    layers: int
    layer_mb: float
    backward_ms: float  # of one layer
    latency_ms: float
    mb_per_s: float

    def finish_ms(self, per_bucket: int) -> float:
        """When the last bucket is there, with so many layers in each."""
        free = 0.0
        for first in range(0, self.layers, per_bucket):
            ready = min(first + per_bucket, self.layers)
            nbytes = (ready - first) * self.layer_mb
            free = max(free, ready * self.backward_ms) + self.latency_ms
            free += nbytes / self.mb_per_s * 1000
        return free

    def best(self) -> int:
        """How many layers a bucket should have."""
        return min(range(1, self.layers + 1), key=self.finish_ms)

    def __str__(self) -> str:
        return f"a link with {self.latency_ms:g} ms a bucket and {self.mb_per_s:g} MB/s"


LINKS = (
    _Link(12, 0.2, 8.0, 25.0, 25.0),  # in the middle
    _Link(12, 0.2, 8.0, 0.0, 25.0),  # nothing to save: as small as can be
    _Link(8, 0.2, 3.0, 60.0, 1000.0),  # every bucket is one too many
)
MUCH_LONGER = 1.2  # times the best: not chance


class _SlowBackward(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds, ctx.weights = seconds, weight.numel()
        return x + weight[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, grad.sum().expand(ctx.weights).contiguous(), None


class _Layers(nn.Module):  # type: ignore[misc]
    """Layers whose backward takes a simulated time."""

    def __init__(self, link: _Link) -> None:
        super().__init__()
        self.seconds = link.backward_ms / 1000
        size = int(link.layer_mb * 1e6 / 4)
        self.weights = nn.ParameterList([torch.zeros(size) for _ in range(link.layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = _SlowBackward.apply(x, weight, self.seconds)
        return x


def _backward_ms(_: int, link: _Link, bucket_mb: float) -> float:
    """How long backward takes, once DDP knows the order of the gradients."""
    dist.init_process_group("gloo")
    mebibytes = bucket_mb * 1e6 / 2**20  # what DDP counts in
    model = DistributedDataParallel(_Layers(link), bucket_cap_mb=mebibytes)
    watch_ddp(model, SimulatedLink(link.mb_per_s, link.latency_ms))
    times = []
    for _ in range(3):
        loss = model(torch.ones(1)).sum()
        began = time.perf_counter()
        loss.backward()
        times.append((time.perf_counter() - began) * 1000)
    dist.destroy_process_group()
    return min(times[1:])


@exercise(
    "Small buckets leave early, but each pays the latency. Large ones pay once, but leave late.",
    "Work out for 1, 2, 3 ... layers in a bucket when the last one arrives: a bucket begins to "
    "travel when its layers are ready and the link is free. Return the best one's size in MB.",
)
def check_choose_bucket(choose_bucket: Callable[..., float]) -> str:
    """Check `choose_bucket(layers, layer_mb, backward_ms, latency_ms, mb_per_s)` on such links."""
    for link in LINKS:
        bucket_mb = call(choose_bucket, *link, because="It takes five numbers and returns one.")
        if not isinstance(bucket_mb, int | float) or not 0 < bucket_mb < math.inf:
            raise Wrong(
                f"for {link} you chose {bucket_mb!r}.",
                "Return the largest size of a bucket in MB, a number above 0.",
            )
        chosen, best = (_measured(link, mb) for mb in (bucket_mb, link.best() * link.layer_mb))
        if chosen > MUCH_LONGER * best:
            _explain_bucket(link, bucket_mb, chosen / best)
    return "backward was as short as it can be on all three simulated links."


def _measured(link: _Link, bucket_mb: float) -> float:
    run = run_quietly(_backward_ms, (link, bucket_mb))
    run.raise_for_failure()
    times: Sequence[float] = run.values
    return max(times)


def _explain_bucket(link: _Link, bucket_mb: float, ratio: float) -> None:
    # DDP closes a bucket with the layer that fills it.
    per_bucket = min(link.layers, max(1, math.ceil(bucket_mb / link.layer_mb - 1e-6)))
    buckets = math.ceil(link.layers / per_bucket)
    what = "1 bucket" if buckets == 1 else f"{buckets} buckets"
    seen = f"on {link}, {bucket_mb:g} MB make {what}, and backward takes {ratio:.1f} times the best"
    if per_bucket < link.best():
        raise Wrong(
            f"{seen}.",
            "Every bucket pays the latency again. Where that is long, fewer and larger buckets are "
            "better.",
        )
    raise Wrong(
        f"{seen}.",
        "A bucket travels when its last gradient is ready. One that is large leaves late, and "
        "backward has nothing left to hide it behind.",
    )
