"""Compares what the ranks noted on request, and says where they differ, or should: `Run.notes`.

Runs in the parent, called by `Run`. What is noted here may be meant: different weights or learning
rates, the same samples or random numbers on all ranks, calls in the order of a set. So a note says
what is so, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ddp_lessons.diagnosis import source_code
from ddp_lessons.diagnosis.rank_state import frame_of, line_of
from ddp_lessons.diagnosis.verdict import Finding
from ddp_lessons.text import all_ranks, count, listed, ranks_text
from ddp_lessons.wire.records import Noted
from ddp_lessons.wire.stacks import line_name

if TYPE_CHECKING:
    from ddp_lessons.results import RunRecord


def notes(run: RunRecord) -> list[Finding]:
    """What differs between ranks that returned, or is the same; last, what was compared.

    Empty unless all ranks noted, which they do only on request.
    """
    noted = [rank.noted for rank in run.ranks if rank.noted is not None]
    if not run.ok or not noted or len(noted) < run.world_size:
        return []
    everyone = tuple(range(run.world_size))
    several = [*_weights(noted), *_rates(noted), *_batches(noted)] if len(noted) > 1 else []
    found = [*several, *_in_order_of_sets(run)]
    first = noted[0]
    seen = [
        f"the {what} of {count(len(noted_of), whose)}"
        for what, whose, noted_of in (
            ("weights", "DDP model", first.weights),
            ("learning rates", "optimizer", first.rates),
            ("batches", "DataLoader", first.batches),
        )
        if noted_of
    ]
    nothing = "no rank had a DDP model, an optimizer or a DataLoader to compare."
    text = f"compared between the ranks: {listed(seen)}." if seen else nothing
    compared = Finding("compared", everyone, text, is_note=True)
    return [*found, compared]


def _weights(noted: list[Noted]) -> Iterator[Finding]:
    for number, models in enumerate(zip(*(one.weights for one in noted), strict=False)):
        first = models[0]
        if any(model.keys() != first.keys() for model in models):
            continue  # models of several kinds
        differ = [name for name in first if len({model[name] for model in models}) > 1]
        if differ:
            sides = _sides([tuple(model.values()) for model in models])
            which = "" if len(noted[0].weights) == 1 else f" of DDP model {number + 1}"
            yield Finding(
                "weights differ",
                tuple(sides[-1]),
                f"the weights{which} are not the same on all ranks at the end: "
                f"{_apart(sides)}. {count(len(differ), 'parameter')} of {len(first)} "
                f"differ, first {differ[0]}.",
                is_note=True,
            )


def _rates(noted: list[Noted]) -> Iterator[Finding]:
    for number, rates in enumerate(zip(*(one.rates for one in noted), strict=False)):
        sides = _sides(list(rates))
        if len(sides) > 1:
            which = "" if len(noted[0].rates) == 1 else f" of optimizer {number + 1}"
            told = listed(f"{rates[side[0]]} on {ranks_text(side)}" for side in sides)
            yield Finding(
                "learning rates differ",
                tuple(sides[-1]),
                f"the learning rate{which} is not the same on all ranks at the last step: {told}.",
                is_note=True,
            )


def _batches(noted: list[Noted]) -> Iterator[Finding]:
    everyone = tuple(range(len(noted)))
    all_of_them = all_ranks(len(noted)).lower()
    by_line = [{batches.site: batches for batches in one.batches} for one in noted]
    for site in sorted(set.intersection(*map(set, by_line))):
        first, *_ = batches = [of_rank[site] for of_rank in by_line]
        line = line_of(site)
        if first.samples > 1 and len({(one.samples, one.digest) for one in batches}) == 1:
            yield Finding(
                "same samples",
                everyone,
                f"{all_of_them} got the same {first.samples:,} samples from the DataLoader at "
                f"{line}. To share them out, use a DistributedSampler; an IterableDataset must "
                "choose by rank itself.",
                frame_of(site),
                is_note=True,
            )
        if first.draws and len({(one.draws, one.drawn) for one in batches}) == 1:
            what = (
                f"the workers of the DataLoader at {line} began with the same seeds on "
                f"{all_of_them}, so what the dataset draws at random is the same"
                if first.workers
                else f"{all_of_them} drew the same random numbers in the DataLoader at {line}"
            )
            yield Finding(
                "same random numbers",
                everyone,
                f"{what}. For random augmentation of their own, seed each rank differently: "
                "torch.manual_seed(seed + rank).",
                frame_of(site),
                is_note=True,
            )


def _in_order_of_sets(run: RunRecord) -> Iterator[Finding]:
    """Loops over a set in which ranks call torch.distributed; its order may differ between them."""
    everyone = tuple(range(run.world_size))
    calls = {span.site: span.op for span in run.spans() if span.op and span.site}
    for site, op in calls.items():
        frame = frame_of(site)
        if frame is not None and source_code.is_in_loop_over_set(frame.filename, frame.lineno):
            yield Finding(
                "order of a set",
                everyone,
                f"{op} at {line_name(frame)} is called in a loop over a set. Forked ranks go "
                "through it in the same order; under torchrun each has its own order of strings. "
                "Loop over sorted(...).",
                frame,
                is_note=True,
            )


def _sides(values: list[object]) -> list[list[int]]:
    """The ranks in groups that agree, the largest first."""
    sides: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        sides.setdefault(value, []).append(rank)
    return sorted(sides.values(), key=lambda side: (-len(side), side))


def _apart(sides: list[list[int]]) -> str:
    """`rank 2 differs from ranks 0 and 1`."""
    if len(sides) == 2 and len(sides[0]) > len(sides[1]):
        rest, few = sides
        verb = "differs" if len(few) == 1 else "differ"
        return f"{ranks_text(few)} {verb} from {ranks_text(rest)}"
    return f"there are {len(sides)} versions"
