"""`plots.timeline`: what every rank did when, on one clock. Runs in the parent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.patches import Patch

from ddp_lessons.analysis.intervals import Intervals, union, without
from ddp_lessons.analysis.wait_states import ended
from ddp_lessons.plots import row_layout, style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.results import RankResult
from ddp_lessons.run import Run
from ddp_lessons.text import count
from ddp_lessons.wire.ops import GROUP_CALLS, RECVS, SENDS
from ddp_lessons.wire.records import IN_FLIGHT, PROFILED, Kind, Lane, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.7  # of a row
COLUMNS = 160  # short times, where means are drawn
OVERSTATED = 0.05  # of the picture: so much more of a kind may seem to be there
LABELLED = 400  # most bars that are drawn one by one, with names
MOST_SIDE_ROWS = 6  # for other threads and work in flight
STEPS_SHOWN = 60
FONT, SMALL = 8.5, 7.0
START_UP = "start-up"
UNMARKED = "in the function, unmarked"
DATA = "next batch"
CALL = "in a collective"
FLIGHT = "in flight"
GROUP = "joining or leaving the group"
OPEN = "never ended"

Look = dict[str, Any]

_START_UP_LOOK: Look = {"facecolor": style.PALE, "edgecolor": style.EDGE, "linewidth": 0.5}
_UNMARKED_LOOK: Look = {"facecolor": "white", "edgecolor": style.EDGE, "linewidth": 0.8}
_OTHER_LOOK: Look = {"facecolor": style.INK}
_DATA_LOOK: Look = {**_START_UP_LOOK, "hatch": "...."}
_GROUP_LOOK: Look = {"facecolor": "#FCE7B8", "edgecolor": style.ORANGE, "linewidth": 0.6}
_FLIGHT_LOOK: Look = {"facecolor": style.ORANGE, "edgecolor": "white", "linewidth": 0.5}
_HATCHES = (  # one a process group
    *("////", "\\\\\\\\", "xxxx", "++++"),
    *("oooo", "----", "||||", "****"),
)


@documented
def timeline(
    run: Run,
    *,
    steps: tuple[int, int] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one row for each rank: its start-up, spans and calls of torch.distributed over time.

    Work in flight and other threads lie under the bar of the rank's main thread. In a run with very
    many spans, those of one kind that are less than a pixel apart are drawn as one; where that
    would show much more of a kind than there is, each column is the mean over a short time.

    Parameters
    ----------
    {run}
    steps : (int, int), optional
        The first and the last training step to show, with their numbers; by default everything
        since the launch.
    {title}; by default the function's name and the number of ranks.
    {ax}
        The x axis counts milliseconds from the launch or from the first step, the same for all
        ranks.

    {raises}
        If no rank has such steps.
    """
    looks = Looks(run.spans())
    begin, end = (run.begin_ns, None) if steps is None else row_layout.of_steps(run, steps)
    bars = [bar for rank in run.ranks for bar in _bars(rank, looks, begin)]
    # A notebook's text has the figure's size: it must not depend on which spans overlap.
    ax = ax or style.new_axes(run.world_size, 1.5 if any(b.side_rows for b in bars) else 1.0)
    if end is None:
        last = max((bar.right for bar in bars), default=1.0)
        ax.set_xlim(0, max(last * 1.01, ax.get_xlim()[1]))  # axes that share x keep the longer one
    else:
        last = _ms(end, begin)
        bars = [bar for bar in bars if bar.left < last and bar.right > 0]
        ax.set_xlim(0, last)
    style.name_ranks(ax, run)
    pixel = style.POINTS / style.DPI / style.points_per_unit(ax)
    closest = pixel if len(bars) > LABELLED else 0.0
    crowded = bool(closest) and _is_crowded(bars, closest)
    if crowded:
        _draw_means(ax, bars)
    _draw(ax, [b for b in bars if not crowded or b.side_row is not None], closest, 2 * pixel)
    if not closest:
        _label(ax, bars)
    _mark_steps(ax, run, begin)
    if steps is not None:
        _number_steps(ax, run, begin)
    for rank in run.ranks:
        if _ms(rank.ended_ns, begin) <= ax.get_xlim()[1]:
            style.mark_failure(ax, rank, _ms(rank.ended_ns, begin))
    notes = [f"spans of a kind less than {closest:.2g} ms apart are one bar"] if closest else []
    if crowded:
        column = (ax.get_xlim()[1] - ax.get_xlim()[0]) / COLUMNS
        notes = [f"the height of a colour is its part of {column:.2g} ms"]
    since = "the launch" if steps is None else f"step {steps[0]} began"
    ax.set_xlabel("\n".join([f"ms since {since}", *notes, *style.losses(run)]))
    style.head(
        ax,
        title or f"{run.name} on {count(run.world_size, 'rank')}",
        looks.legend(bars),
    )
    return ax


class Bar(NamedTuple):
    """A drawn span: begin and end in ms, and its place in the rank's row."""

    span: Span
    left: float
    right: float
    look: Look
    depth: int = 0  # how many bars of its thread contain it
    side_row: int | None = None  # its row under the rank's bar, from the top
    side_rows: int = 0  # how many such rows the rank has


class Looks:
    """How spans look, and their legend: work by its name, collectives by their group."""

    def __init__(self, spans: Sequence[Span]) -> None:
        works = style.fills(span.name for span in spans if span.kind == Kind.COMPUTE)
        groups = dict.fromkeys(span.group for span in spans if span.group not in (None, "world"))
        self._works = {
            name: {"facecolor": fill} if fill else _OTHER_LOOK for name, fill in works.items()
        }
        self._calls, self._flights = {}, {}
        for number, group in enumerate(["world", *groups]):
            hatch = _HATCHES[min(number, len(_HATCHES) - 1)]
            self._calls[group] = {**_GROUP_LOOK, "hatch": hatch}
            self._flights[group] = {**_FLIGHT_LOOK, "hatch": hatch} if number else _FLIGHT_LOOK
        pairs = any(span.op in SENDS or span.op in RECVS for span in spans)
        self._call = f"{CALL}, send or recv" if pairs else CALL

    def of(self, span: Span) -> Look:
        if span.lane == Lane.PROCESS:
            return _START_UP_LOOK if span.name == START_UP else _UNMARKED_LOOK
        if span.kind == Kind.COMPUTE:
            return self._works[span.name]
        if span.kind == Kind.DATA:
            return _DATA_LOOK
        if span.name in GROUP_CALLS:
            return _GROUP_LOOK
        kinds = self._flights if _is_beside(span) else self._calls
        return kinds.get(span.group or "world", kinds["world"])

    def legend(self, bars: Sequence[Bar]) -> list[Patch]:
        """One entry for each look that is drawn."""
        drawn = {id(self.of(bar.span)) for bar in bars}
        entries = [(START_UP, _START_UP_LOOK), (UNMARKED, _UNMARKED_LOOK)]
        named = [(n, k) for n, k in self._works.items() if k is not _OTHER_LOOK]
        entries += [*named, ("other work", _OTHER_LOOK), (DATA, _DATA_LOOK), (GROUP, _GROUP_LOOK)]
        entries += [(self._call, self._calls["world"]), (FLIGHT, self._flights["world"])]
        for what, looks in (("collective", self._calls), ("in flight", self._flights)):
            named = [(f"{what} of {group}", look) for group, look in looks.items()]
            entries += named[1:]
        patches = [Patch(**look, label=name) for name, look in entries if id(look) in drawn]
        if any(bar.span.t1_ns is None for bar in bars):
            patches.append(Patch(facecolor="white", label=OPEN, **style.OPEN_EDGE))
        return patches


def _is_beside(span: Span) -> bool:
    """True for a span that is in flight and blocks no thread."""
    return span.lane in (*IN_FLIGHT, *PROFILED, Lane.CUDA)


def _bars(rank: RankResult, looks: Looks, begin_ns: int) -> Iterator[Bar]:
    """The bars of one rank: main thread, then one row a thread, then packed work in flight."""
    sides: dict[str, list[Bar]] = {}
    main: list[Bar] = []
    for span, t1_ns in ended(rank.spans, rank.ended_ns):
        if span.lane == Lane.STEPS:
            continue
        look = looks.of(span)
        look = {**look, **style.OPEN_EDGE} if span.t1_ns is None else look
        bar = Bar(span, _ms(span.t0_ns, begin_ns), _ms(t1_ns, begin_ns), look)
        lane = "" if _is_beside(span) else span.lane
        (main if span.lane in (Lane.PROCESS, Lane.MAIN) else sides.setdefault(lane, [])).append(bar)
    placed = list(_placed({lane: _nested(bars) if lane else bars for lane, bars in sides.items()}))
    rows = min(max((row for row, _ in placed), default=-1) + 1, MOST_SIDE_ROWS)
    yield from (bar._replace(side_rows=rows) for bar in _nested(main))
    for row, bar in placed:
        yield bar._replace(side_row=min(row, rows - 1), side_rows=rows)


def _nested(bars: Sequence[Bar]) -> list[Bar]:
    """The bars of one thread with their depths: a call in marked work lies deeper than the work."""
    around: list[Bar] = []
    found = []
    for bar in sorted(bars, key=lambda bar: (bar.left, -bar.right)):
        while around and around[-1].right <= bar.left:
            around.pop()
        found.append(bar._replace(depth=len(around)))
        around.append(bar)
    return found


def _placed(sides: dict[str, list[Bar]]) -> Iterator[tuple[int, Bar]]:
    base = 0
    for lane in sorted(sides, reverse=True):  # the threads come first
        bars = sides[lane]
        rows = [0] * len(bars) if lane else row_layout.pack([(b.left, b.right) for b in bars])
        for row, bar in zip(rows, bars, strict=True):
            yield base + row, bar
        base += max(rows) + 1


def _ms(t_ns: int, begin_ns: int) -> float:
    return (t_ns - begin_ns) / 1e6


def _place(bar: Bar) -> tuple[float, float]:
    """Top and height of a bar in its rank's row."""
    top = bar.span.rank - HEIGHT / 2
    if not bar.side_rows:
        return top, HEIGHT
    main = HEIGHT * 0.6 if bar.side_rows < 3 else HEIGHT * 0.4
    if bar.side_row is None:
        return top, main
    height = (HEIGHT - main + 0.1) / bar.side_rows
    return top + main + 0.03 + bar.side_row * height, height * 0.9


def _draw(ax: Axes, bars: Sequence[Bar], closest: float, thin: float) -> None:
    """Draw the bars, all of one place and look at once: ten times as fast as one by one.

    What lies deeper is drawn on top. A bar thinner than `thin` has no white edge, which would
    cover it.
    """
    rows: dict[tuple[Any, ...], tuple[Look, list[row_layout.Interval]]] = {}
    for bar in bars:
        look = bar.look
        if bar.right - bar.left < thin and look.get("edgecolor") == "white":
            look = {**look, "edgecolor": look["facecolor"]}
        key = (*_place(bar), bar.depth, str(look))
        rows.setdefault(key, (look, []))[1].append((bar.left, bar.right))
    for (top, height, depth, _), (look, intervals) in rows.items():
        intervals = row_layout.merged(intervals, closest) if closest else intervals
        order = 1 + depth / (depth + 1)  # below the lines and texts
        ax.broken_barh([(a, b - a) for a, b in intervals], (top, height), zorder=order, **look)


def _rows(bars: Iterable[Bar]) -> dict[int, dict[int, dict[str, list[Bar]]]]:
    """The bars of main threads by rank, depth and look."""
    rows: dict[int, dict[int, dict[str, list[Bar]]]] = {}
    for bar in bars:
        if bar.side_row is None:
            by_look = rows.setdefault(bar.span.rank, {}).setdefault(bar.depth, {})
            by_look.setdefault(str(bar.look), []).append(bar)
    return rows


def _is_crowded(bars: Sequence[Bar], closest: float) -> bool:
    """Whether bars that are merged would show much more of a kind than there is."""
    width = max(bar.right for bar in bars) - min(bar.left for bar in bars)
    for by_depth in _rows(bars).values():
        for alike in (alike for by_look in by_depth.values() for alike in by_look.values()):
            intervals = [(bar.left, bar.right) for bar in alike]
            seen = sum(right - left for left, right in row_layout.merged(intervals, closest))
            if seen - sum(right - left for left, right in intervals) > OVERSTATED * width:
                return True
    return False


def _draw_means(ax: Axes, bars: Sequence[Bar]) -> None:
    """Draw each rank's main thread as stacked areas: what lies deeper covers what is around it."""
    edges = np.linspace(*ax.get_xlim(), COLUMNS + 1)
    for by_depth in _rows(bars).values():
        first = next(iter(next(iter(by_depth.values())).values()))[0]
        deeper: Intervals = []
        parts: list[tuple[np.ndarray, Look]] = []
        for _, by_look in sorted(by_depth.items(), reverse=True):
            times = {look: [_in_ns(bar) for bar in by_look[look]] for look in by_look}
            level = [
                (row_layout.fractions(without(those, deeper), edges * 1e6), by_look[look][0].look)
                for look, those in times.items()
            ]
            parts = level + parts
            deeper = union([*deeper, *itertools.chain.from_iterable(times.values())])
        row_layout.draw_fractions(ax, _place(first), edges, parts)


def _in_ns(bar: Bar) -> tuple[int, int]:
    return round(bar.left * 1e6), round(bar.right * 1e6)


def _label(ax: Axes, bars: Sequence[Bar]) -> None:
    """Write names and durations into the bars, where they fit beside bars on top of them."""
    for bar in bars:
        if bar.span.lane == Lane.PROCESS and bar.span.name != START_UP:
            continue
        left, right = ax.get_xlim()
        seen = max(bar.left, left), min(bar.right, right)
        _write(ax, bar, row_layout.widest_gap(seen, _on_top(bar, bars)))


def _on_top(bar: Bar, bars: Sequence[Bar]) -> list[row_layout.Interval]:
    return [
        (other.left, other.right)
        for other in bars
        if other.span.rank == bar.span.rank
        and other.span.lane == bar.span.lane
        and other is not bar
        and other.side_row == bar.side_row
        and bar.left <= other.left
        and other.right <= bar.right
    ]


def _write(ax: Axes, bar: Bar, where: row_layout.Interval) -> None:
    span = bar.span
    if bar.side_row is not None and bar.side_rows > 3:
        return
    end = OPEN if span.t1_ns is None else f"{bar.right - bar.left:.0f} ms"
    top, height = _place(bar)
    on_work = span.kind == Kind.COMPUTE
    plain = on_work or span.name == START_UP or _is_beside(span)
    style.write(
        ax,
        [f"{span.name} {end}", span.name],
        where,
        top + height / 2,
        FONT if bar.side_row is None else SMALL,
        color=style.ink_on(bar.look["facecolor"]) if on_work else style.INK,
        bbox=None if plain else {"facecolor": "#FCE7B8", "edgecolor": "none", "pad": 1},
    )


def _mark_steps(ax: Axes, run: Run, begin_ns: int) -> None:
    """Draw a short line over the bar where a step ends."""
    first, last = ax.get_xlim()
    all_ends = [
        (s.rank, _ms(s.t1_ns, begin_ns)) for s in run.spans() if s.lane == Lane.STEPS and s.t1_ns
    ]
    ends = [(rank, end) for rank, end in all_ends if first <= end <= last]
    if ends and len(ends) <= STEPS_SHOWN * run.world_size:
        ranks, at = zip(*ends, strict=True)
        top = [rank - HEIGHT / 2 for rank in ranks]
        ax.vlines(at, [t - 0.12 for t in top], top, color=style.INK, linewidth=0.8)


def _number_steps(ax: Axes, run: Run, begin_ns: int) -> None:
    """Write each step's number over the bar, where there is room between its borders."""
    first, last = ax.get_xlim()
    for span, t1_ns in (pair for rank in run.ranks for pair in ended(rank.spans, rank.ended_ns)):
        seen = max(_ms(span.t0_ns, begin_ns), first), min(_ms(t1_ns, begin_ns), last)
        if span.lane == Lane.STEPS and span.step is not None and seen[0] < seen[1]:
            texts = [f"step {span.step}", str(span.step)]
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
            style.write(ax, texts, seen, span.rank - HEIGHT / 2 - 0.1, SMALL, bbox=box)
