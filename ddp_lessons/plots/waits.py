"""`plots.waits`: each rank's work, waiting for later ranks, and transfer. Runs in the parent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.patches import Patch

from ddp_lessons.analysis.metrics import Segment, segments
from ddp_lessons.analysis.wait_states import ALL_TO_ALL, Share
from ddp_lessons.plots import row_layout, style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.run import Run
from ddp_lessons.wire.ops import JOIN, LEAVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.72  # of a row
DRAWN_SINGLY = 1500  # segments; of more, means over short times are drawn
COLUMNS = 160  # number of such times
SEEN = 0.003  # least part of the picture of a kind in the legend
LONGEST = "rank 0 comes last"  # label of a line
MARKED = 0.02  # least part of the picture of a wait whose last arrival is marked
FONT = 8.5

Look = dict[str, Any]
Window = tuple[int, int]  # ns

OWN, WAIT, TRANSFER, GROUP, DATA = "own", "wait", "transfer", "group", "data"
LOOKS: dict[str, Look] = {
    OWN: {"facecolor": style.BLUE},
    DATA: {"facecolor": style.PALE, "edgecolor": style.EDGE, "linewidth": 0.5, "hatch": "...."},
    WAIT: style.WAIT_LOOK,
    TRANSFER: {"facecolor": style.ORANGE},
    GROUP: {"facecolor": "#FCE7B8", "edgecolor": style.ORANGE, "linewidth": 0.6},
}
NAMES = {
    OWN: "own work",
    DATA: "next batch",
    WAIT: "waits for a later rank",
    TRANSFER: "transfer, all have come",
    GROUP: "joining or leaving the group",
}


@documented
def waits(
    run: Run,
    *,
    steps: tuple[int, int] | None = None,
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one row for each rank: own work, waiting for a later rank, and transfer.

    A vertical line marks the last arrival at a collective and names that rank. Own work is all the
    time in which nothing held the rank up, marked or not.

    Parameters
    ----------
    {run}
    steps : (int, int), optional
        The first and the last training step to show; by default everything from when all had
        joined until the first leaves.
    {title}; by default which rank makes the others wait, and why.
    legend : bool
        Whether to draw the legend.
    {ax}
        The x axis counts milliseconds. Of a run with very many collectives, each column is the mean
        over a short time, and its parts are stacked.

    {raises}
        If no rank has such steps.
    """
    window = _window(run, steps)
    held = [s for s in segments(run) if s.t1_ns > window[0] and s.t0_ns < window[1]]
    ax = ax or style.new_axes(run.world_size)
    width = (window[1] - window[0]) / 1e6
    ax.set_xlim(0, max(width * 1.005, ax.get_xlim()[1]))  # axes that share x keep the longer scale
    style.name_ranks(ax, run)
    notes = []
    if len(held) <= DRAWN_SINGLY:
        _draw_singly(ax, run, held, window)
        _mark_last(ax, run, window)
    else:
        _draw_means(ax, run, held, window)
        notes.append(f"the height of a colour is its part of {width / COLUMNS:.2g} ms")
    for rank in run.ranks:
        if steps is None or rank.ended_ns <= window[1]:
            style.mark_failure(ax, rank, (min(rank.ended_ns, window[1]) - window[0]) / 1e6)
    since = "all had joined" if steps is None else f"step {steps[0]} began"
    ax.set_xlabel("\n".join([f"ms since {since}", *notes, *style.losses(run)]))
    seen = dict.fromkeys(LOOKS, 0.0)
    for segment in held:
        seen[segment.kind] += _clipped(segment.t0_ns, segment.t1_ns, window).width
    kinds = [OWN, *(k for k, ms in seen.items() if ms > SEEN * width * run.world_size)]
    handles = entries(kinds, any(map(_is_open, held))) if legend else []
    style.head(ax, title or finding(run), handles)
    return ax


def finding(run: Run) -> str:
    """The title: the verdict of `run.straggler()`, or else why the run failed."""
    found = run.straggler()
    if found.kind == "unknown" and run.verdict is not None:
        return f"{run.name}: {run.verdict.title}"
    return f"{run.name}: {found}" if found.kind in ("none", "unknown") else str(found)


def entries(kinds: Iterable[str], is_open: bool = False) -> list[Patch]:
    """The legend: one entry for each kind, always in the same order."""
    present = {*kinds}
    patches = [Patch(**LOOKS[kind], label=NAMES[kind]) for kind in LOOKS if kind in present]
    return (
        [*patches, Patch(facecolor="white", label="never ended", **style.OPEN_EDGE)]
        if is_open
        else patches
    )


def _window(run: Run, steps: tuple[int, int] | None) -> Window:
    if steps is not None:
        return row_layout.of_steps(run, steps)
    joins = [
        next((s.t1_ns for s in rank.spans if s.op == JOIN and s.t1_ns is not None), None)
        for rank in run.ranks
    ]
    starts = [rank.started_ns for rank in run.ranks if rank.started_ns is not None]
    begin = max([t for t in joins if t is not None] or starts or [run.begin_ns])
    leaves = [
        max((s.t0_ns for s in rank.spans if s.op == LEAVE and s.group is None), default=None)
        for rank in run.ranks
    ]
    ends = [t for t in leaves if t is not None and t > begin]
    end = min(ends, default=max(rank.ended_ns for rank in run.ranks))
    return begin, max(end, begin + 1)


def _is_open(segment: Segment) -> bool:
    return segment.share is not None and segment.share.open


class _Bar(NamedTuple):
    left: float
    width: float


def _clipped(t0_ns: int, t1_ns: int, window: Window) -> _Bar:
    begin, end = window
    left, right = (min(max(t, begin), end) - begin for t in (t0_ns, t1_ns))
    return _Bar(left / 1e6, (right - left) / 1e6)


def _draw_singly(ax: Axes, run: Run, held: Sequence[Segment], window: Window) -> None:
    bars: dict[tuple[int, str, bool], list[_Bar]] = {}
    for rank in run.ranks:
        whole = _clipped(rank.started_ns or rank.ended_ns, rank.ended_ns, window)
        bars[rank.rank, OWN, False] = [whole]
    for segment in held:
        key = (segment.rank, segment.kind, _is_open(segment))
        bar = _clipped(segment.t0_ns, segment.t1_ns, window)
        bars.setdefault(key, []).append(bar)
    for (row, kind, is_open), found in bars.items():
        look = {**LOOKS[kind], **style.OPEN_EDGE} if is_open else LOOKS[kind]
        ax.broken_barh(found, (row - HEIGHT / 2, HEIGHT), **look)
    for (row, kind, is_open), found in bars.items():
        for bar in found if kind == WAIT else ():
            _write_length(ax, row, bar, is_open)


def _write_length(ax: Axes, row: int, bar: _Bar, is_open: bool) -> None:
    left, width = bar
    texts = [f"{width:.0f} ms, never ended", "never ended"] if is_open else []
    texts += [f"{width:.0f} ms", f"{width:.0f}"] if width >= 1 else []
    style.write(ax, texts, (left, left + width), row, FONT, bbox=style.WAIT_LABEL)


def _draw_means(ax: Axes, run: Run, held: Sequence[Segment], window: Window) -> None:
    """Draw each rank's row as stacked areas: the share of each kind in each short time."""
    edges = np.linspace(window[0], window[1], COLUMNS + 1)
    times: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for segment in held:
        key = segment.rank, segment.kind
        times.setdefault(key, []).append((segment.t0_ns, segment.t1_ns))
    for rank in run.ranks:
        alive = [(rank.started_ns or rank.ended_ns, rank.ended_ns)]
        parts = {
            kind: row_layout.fractions(times.get((rank.rank, kind), []), edges)
            for kind in LOOKS
            if kind != OWN
        }
        own = np.clip(row_layout.fractions(alive, edges) - sum(parts.values()), 0, None)
        stacked = [(own, LOOKS[OWN]), *((part, LOOKS[kind]) for kind, part in parts.items())]
        row = rank.rank - HEIGHT / 2, HEIGHT
        row_layout.draw_fractions(ax, row, (edges - window[0]) / 1e6, stacked)


def _mark_last(ax: Axes, run: Run, window: Window) -> None:
    """Draw a line at each last arrival, with the rank's number where it fits.

    All labels have the same wording if there is room for it.
    """
    subgroups = any(share.group != "world" for share in run.waits())
    top = -0.5 - 0.035 * run.world_size
    marks = sorted((at, last, shares) for at, last, shares in _last(run, window))
    rooms = _room([at for at, *_ in marks])
    narrowest = min(rooms, default=0.0) * style.points_per_unit(ax)
    short = not subgroups and not style.fitting([LONGEST], narrowest, FONT)
    for (at, last, shares), room in zip(marks, rooms, strict=True):
        rows = [share.rank for share in shares]
        edges = [row - 0.5 for row in rows], [row + 0.5 for row in rows]
        ax.vlines([at] * len(rows), *edges, color=style.INK, linewidth=1.2)
        group = f" of {shares[0].group}" if subgroups else ""
        texts = [f"rank {last} comes last{group}", f"rank {last} last", f"rank {last}", f"{last}"]
        where = (at - room / 2, at + room / 2)
        style.write(ax, texts[short:], where, top, FONT, va="bottom", clip_on=False)
    ax.set_ylim(top=top - 0.35 - 0.02 * run.world_size)


def _room(times: Sequence[float]) -> list[float]:
    """The room for the label at each time: the distance to the nearest other one."""
    edges = [-math.inf, *times, math.inf]
    around = zip(edges, edges[1:], edges[2:], strict=False)
    return [min(at - before, after - at, 1e9) for before, at, after in around]


def _last(run: Run, window: Window) -> Iterator[tuple[float, int, list[Share]]]:
    """For each collective with a wait: the last arrival in ms, its rank, and the shares."""
    meetings: dict[tuple[str, str, int], list[Share]] = {}
    for share in run.waits():
        if share.pattern == ALL_TO_ALL and share.last_rank is not None:
            meetings.setdefault((share.op, share.group, share.seq), []).append(share)
    least = MARKED * (window[1] - window[0])
    for shares in meetings.values():
        at = max(share.t0_ns for share in shares)
        last = shares[0].last_rank
        worst = max(share.wait_ns for share in shares)
        if last is not None and window[0] <= at <= window[1] and worst >= least:
            yield (at - window[0]) / 1e6, last, shares
